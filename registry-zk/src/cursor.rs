//! Where in the store's history a reader is, and whether that history is still the same.
//!
//! ZooKeeper cannot be asked what has happened since, and a store that was wiped counts its transactions from the
//! beginning again. What tells one history from another are nodes: the transaction and the time by which one was made
//! never change, and its count of children only ever moves forward. The root stays as long as its history does. The
//! directories of a service go when they are empty, and come back with a later transaction than any before.

use std::{fmt, str::FromStr};

use registry_core::Cursor;
use zookeeper_client::Stat;

/// What a reader last saw. Its text is the [`Cursor`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) root: Option<Witness>,
    pub(crate) providers: Option<Witness>,
    pub(crate) overrides: Option<Witness>,
    /// The latest transaction that was seen.
    seen: i64,
}

/// A node that tells its history from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Witness {
    /// The transaction that made it.
    made: i64,
    /// When that was, in milliseconds by the server's clock.
    time: i64,
    /// The last transaction that made or deleted a child of it.
    children: i64,
}

impl Position {
    pub(crate) fn new(root: Option<Stat>, providers: Option<Stat>, overrides: Option<Stat>) -> Self {
        let [root, providers, overrides] = [root, providers, overrides].map(|stat| stat.as_ref().map(Witness::of));
        let seen = [root, providers, overrides].into_iter().flatten().map(|witness| witness.made.max(witness.children));
        Self { root, providers, overrides, seen: seen.max().unwrap_or(0) }
    }

    /// The position after this one, when these are the nodes that are seen.
    pub(crate) fn after(self, before: &Self) -> Self {
        Self { seen: self.seen.max(before.seen), ..self }
    }

    pub(crate) fn cursor(&self) -> Cursor {
        Cursor::new(self.to_string())
    }

    /// Whether what is seen `now` cannot have come after this.
    pub(crate) fn is_rewound(&self, now: &Self) -> bool {
        let root = self.root.is_some_and(|before| !now.root.is_some_and(|now| now.is_later(&before)));
        let directory = |before: Option<Witness>, now: Option<Witness>| match (before, now) {
            // A directory that went and came back was made after everything that was seen.
            (Some(before), Some(now)) if now.is_other(&before) => now.made <= self.seen,
            (Some(before), Some(now)) => !now.is_later(&before),
            (None, Some(_)) | (_, None) => false,
        };
        root || directory(self.providers, now.providers) || directory(self.overrides, now.overrides)
    }

    /// Whether what is seen `now` shows a change in who is there.
    pub(crate) fn is_changed(&self, now: &Self) -> bool {
        // A root that was made since has nothing to say of this service.
        let root = self.root.is_some_and(|before| now.root.is_none_or(|now| now.is_other(&before)));
        root || self.providers != now.providers || self.overrides != now.overrides
    }
}

impl Witness {
    fn of(stat: &Stat) -> Self {
        Self { made: stat.czxid, time: stat.ctime, children: stat.pzxid }
    }

    fn is_other(&self, before: &Self) -> bool {
        (self.made, self.time) != (before.made, before.time)
    }

    /// The same node, not earlier.
    fn is_later(&self, before: &Self) -> bool {
        !self.is_other(before) && self.children >= before.children
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.seen)?;
        for witness in [&self.root, &self.providers, &self.overrides] {
            match witness {
                None => f.write_str(";")?,
                Some(Witness { made, time, children }) => write!(f, ";{made}:{time}:{children}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Position {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split(';');
        let mut next = || parts.next().ok_or(());
        let seen = next()?.parse().map_err(drop)?;
        let (root, providers, overrides) = (witness(next()?)?, witness(next()?)?, witness(next()?)?);
        if parts.next().is_some() {
            return Err(());
        }
        Ok(Self { root, providers, overrides, seen })
    }
}

fn witness(text: &str) -> Result<Option<Witness>, ()> {
    if text.is_empty() {
        return Ok(None);
    }
    let numbers = text.split(':').map(str::parse).collect::<Result<Vec<i64>, _>>().map_err(drop)?;
    let &[made, time, children] = &*numbers else { return Err(()) };
    Ok(Some(Witness { made, time, children }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(root: (i64, i64, i64), providers: Option<(i64, i64, i64)>) -> Position {
        let witness = |(made, time, children)| Witness { made, time, children };
        let seen = root.2.max(providers.map_or(0, |providers| providers.2.max(providers.0)));
        Position { root: Some(witness(root)), providers: providers.map(witness), overrides: None, seen }
    }

    #[test]
    fn a_position_survives_as_text() {
        for position in [Position::default(), at((3, 1700, 9), None), at((3, 1700, 9), Some((-5, 1701, 12)))] {
            assert_eq!(position.cursor().as_str().parse(), Ok(position));
        }
        for text in ["", "1", "1;;", "1;;;;", "x;;;", "1;1:2;;", "1;1:2:3:4;;", "1;a:b:c;;", "99999999999999999999;;;"]
        {
            assert_eq!(text.parse::<Position>(), Err(()), "{text:?}");
        }
    }

    #[test]
    fn a_history_that_goes_on_is_not_rewound() {
        let before = at((3, 1700, 9), Some((4, 1700, 12)));
        for now in [
            before.clone(),
            at((3, 1700, 20), Some((4, 1700, 30))),
            at((3, 1700, 20), None),                 // the empty directory was taken away
            at((3, 1700, 20), Some((13, 1900, 13))), // and made again
        ] {
            assert!(!before.is_rewound(&now), "{now:?}");
        }
        assert!(!Position::default().is_rewound(&before));
    }

    #[test]
    fn a_history_that_is_another_or_went_back_is_rewound() {
        let before = at((3, 1700, 9), Some((4, 1700, 12)));
        for now in [
            Position::default(),                       // wiped
            at((3, 1800, 9), Some((4, 1800, 12))),     // wiped, and grown to the same numbers
            at((30, 1800, 90), Some((40, 1800, 120))), // or past them
            at((3, 1700, 5), None),                    // restored from before the service was
            at((3, 1700, 9), Some((4, 1700, 7))),      // or from before the last change
            at((3, 1700, 9), Some((6, 1705, 6))),      // a directory that was made before what we saw, and was not seen
        ] {
            assert!(before.is_rewound(&now), "{now:?}");
        }
        // Without a prefix the root is as old as the server.
        assert!(at((0, 0, 9), Some((4, 1700, 12))).is_rewound(&at((0, 0, 4), None)));
        assert!(at((0, 0, 9), Some((4, 1700, 12))).is_rewound(&at((0, 0, 9), Some((4, 1800, 12)))));
    }

    #[test]
    fn a_probe_sees_who_came_and_went_and_nothing_else() {
        let before = at((3, 1700, 9), Some((4, 1700, 12)));
        assert!(!before.is_changed(&at((3, 1700, 99), Some((4, 1700, 12)))), "another service");
        assert!(before.is_changed(&at((3, 1700, 9), Some((4, 1700, 13)))));
        assert!(before.is_changed(&at((3, 1700, 9), None)));
        assert!(before.is_changed(&at((3, 1800, 9), Some((4, 1700, 12)))));
        assert!(before.is_changed(&Position::default()));
        assert!(!Position::default().is_changed(&at((3, 1700, 9), None)), "the first of another service");
    }
}
