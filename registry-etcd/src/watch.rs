//! Following a service: list, then watch from the next revision on, and never lose a change in between.
//!
//! ```text
//!            ┌─ same history ──▶ resume ─┐
//! since? ────┤                           ├──▶ watch from revision + 1 ──ended──▶ since?
//!            └─ else ──▶ list, Reset ────┘
//! ```
//!
//! The subtle point is *same history*. A store that was wiped comes back with the same cluster and member ids, and
//! after a while its revision has grown past ours: a watch would then go on as if nothing had happened. So a position
//! carries a *witness*: the record that was last written in the range, with its `mod_revision` and its lease, which no
//! other history has at that revision; and the number of keys in the range. Both are asked for *at the revision of the
//! position*, where in the same history the answer is always the same.

use std::{collections::HashSet, fmt, str::FromStr, sync::Arc, time::Duration};

use async_stream::try_stream;
use etcd_client::{
    Event, EventType, GetOptions, KeyValue, SortOrder, SortTarget, Txn, TxnOp, TxnOpResponse, WatchResponse,
};
use futures::Stream;
use registry_core::{Cursor, Departure, Key, Place, Record, Result, ServiceName, Update, Updates};
use tokio::time::Instant;
use tracing::debug;

use crate::{
    endpoints::{Moves, Pool},
    error::{Class, Failure, NAME},
    space::{Range, Space},
    store::{Listed, headless},
    streams::Watch,
};

/// A watch that told nothing and ends sooner than this is no reason to open another one at once.
const SETTLED: Duration = Duration::from_secs(1);

/// A service's departure marks, overrides and providers: one range of keys.
#[derive(Clone, Debug)]
pub(crate) struct Followed {
    pool: Arc<Pool>,
    space: Space,
    service: ServiceName,
    range: Range,
}

/// A point in the history of a range, and what tells this history from others. Its text is the [`Cursor`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    revision: i64,
    cluster: u64,
    /// How many keys the range has.
    count: i64,
    /// `None` only where nothing was ever seen in the range.
    witness: Option<Witness>,
}

/// What was last written in the range.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Witness {
    key: Vec<u8>,
    mod_revision: i64,
    lease: i64,
    /// The last revision at which it was there, if it has gone since.
    until: Option<i64>,
}

/// What lies in the range, by its kind.
#[derive(Default)]
pub(crate) struct Sorted {
    count: i64,
    newest: Option<Witness>,
    records: Vec<Record>,
    /// Records that are malformed, which are there all the same.
    unreadable: Vec<Key>,
    /// Who is named by a departure mark.
    left: HashSet<Key>,
}

/// A watch that has just begun, and what is to be told first.
pub(crate) struct Following {
    position: Position,
    first: Updates,
    watch: Watch,
    moves: Moves,
}

/// How the store's history compares with a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum History {
    Same,
    Other,
    /// Too old to tell.
    Compacted,
}

impl Followed {
    pub(crate) fn new(pool: Arc<Pool>, space: Space, service: ServiceName) -> Self {
        let range = space.followed(&service);
        Self { pool, space, service, range }
    }

    /// Starts from `since` where that is possible, else with the complete set.
    pub(crate) async fn start(&self, since: Option<Position>) -> Result<Following, Failure> {
        let (position, first) = match &since {
            None => self.reset(false).await?,
            Some(since) => match self.compare(since).await? {
                History::Same => resumed(since.clone()),
                History::Other => self.reset(true).await?,
                History::Compacted => match self.unchanged(since).await? {
                    Some(revision) if since.stands() => resumed(Position { revision, ..since.clone() }),
                    _ => self.reset_after(since).await?,
                },
            },
        };
        let (watch, moves) = self.open(&position).await?;
        Ok(Following { position, first, watch, moves })
    }

    /// Gives the first item, and then what happens after it.
    pub(crate) fn follow(self, mut following: Following) -> impl Stream<Item = Result<Updates>> + Send {
        try_stream! {
            loop {
                let Following { mut position, first, mut watch, mut moves } = following;
                let (opened, mut useful) = (Instant::now(), false);
                yield first;
                let failure = loop {
                    match self.next(&position, &mut watch, &mut moves).await {
                        Ok(response) => if let Some(updates) = self.updates(&mut position, &response) {
                            useful = true;
                            yield updates;
                        },
                        Err(failure) => break failure,
                    }
                };
                debug!(backend = NAME, service = %self.service, why = %failure, "a watch ended");
                let class = failure.class();
                let again = matches!(failure, Failure::Moved)
                    || matches!(class, Class::Compacted | Class::Future | Class::AnswerTooLarge)
                    || useful
                    || opened.elapsed() >= SETTLED;
                if !again {
                    Err(self.cannot_follow(&failure))?;
                }
                // Once more at once, from where we are: readers need not know. What is too large to be told change by
                // change is read anew.
                let since = (class != Class::AnswerTooLarge).then_some(position);
                // Boxed, for it is large, and rare: else every watch would have room for it.
                following = Box::pin(self.start(since)).await.map_err(|failure| self.cannot_follow(&failure))?;
            }
        }
    }

    /// Whether anything in the range has changed after `since`.
    pub(crate) async fn changed(&self, since: &Position) -> Result<bool, Failure> {
        Ok(self.unchanged(since).await?.is_none())
    }

    pub(crate) fn cannot_follow(&self, failure: &Failure) -> registry_core::Error {
        failure.during(format!("cannot follow {}", self.service))
    }

    async fn reset(&self, rewound: bool) -> Result<(Position, Updates), Failure> {
        let listed = self.list().await?;
        Ok(self.complete(listed, rewound))
    }

    /// After a compaction only the store's revision and name can still tell that its history is another one.
    async fn reset_after(&self, since: &Position) -> Result<(Position, Updates), Failure> {
        let listed = self.list().await?;
        let rewound = listed.revision < since.revision || listed.cluster != since.cluster;
        Ok(self.complete(listed, rewound))
    }

    async fn list(&self) -> Result<Listed<Sorted>, Failure> {
        self.pool.list(&self.range, |sorted: &mut Sorted, kv| sorted.take(&self.space, &kv)).await
    }

    fn complete(&self, listed: Listed<Sorted>, rewound: bool) -> (Position, Updates) {
        let position = Position::of(&listed);
        let (records, left) = listed.made.finish();
        let cursor = Some(position.cursor());
        (position, Updates { cursor, updates: vec![Update::Reset { records, left, rewound }] })
    }

    /// Asks for the witness and the number of keys as they were at the position.
    async fn compare(&self, since: &Position) -> Result<History, Failure> {
        let (from, to) = self.range.clone();
        let count = GetOptions::new().with_range(to).with_count_only().with_revision(since.revision);
        let mut looks = vec![TxnOp::get(from, Some(count))];
        if let Some(witness) = &since.witness {
            let at = witness.until.unwrap_or(since.revision);
            let options = GetOptions::new().with_keys_only().with_revision(at);
            looks.push(TxnOp::get(witness.key.clone(), Some(options)));
        }
        let answer = match self.pool.txn(|| Txn::new().and_then(looks.clone())).await {
            Ok(answer) => answer,
            Err(failure) => match failure.class() {
                Class::Compacted => return Ok(History::Compacted),
                Class::Future => return Ok(History::Other),
                _ => return Err(failure),
            },
        };
        let cluster = answer.header().ok_or_else(headless)?.cluster_id();
        let mut gets = gets(answer.op_responses());
        let count = gets.next().map_or(0, |(count, _)| count);
        let seen = gets.next().and_then(|(_, kv)| kv);
        let same = cluster == since.cluster && count == since.count && since.is_witnessed_by(seen.as_ref());
        Ok(if same { History::Same } else { History::Other })
    }

    /// The store's revision, if the range is there what it was at `since`.
    async fn unchanged(&self, since: &Position) -> Result<Option<i64>, Failure> {
        let (from, to) = self.range.clone();
        let newest = GetOptions::new()
            .with_range(to)
            .with_sort(SortTarget::Mod, SortOrder::Descend)
            .with_limit(1)
            .with_keys_only();
        let mut looks = vec![TxnOp::get(from, Some(newest))];
        let standing = since.witness.as_ref().filter(|witness| witness.until.is_none());
        if let Some(witness) = standing {
            looks.push(TxnOp::get(witness.key.clone(), Some(GetOptions::new().with_keys_only())));
        }
        let answer = self.pool.txn(|| Txn::new().and_then(looks.clone())).await?;
        let (revision, cluster) =
            answer.header().map(|header| (header.revision(), header.cluster_id())).ok_or_else(headless)?;
        let mut gets = gets(answer.op_responses());
        let (count, newest) = gets.next().unwrap_or_default();
        let newest = newest.map_or(0, |kv| kv.mod_revision());
        let same = match standing {
            // Nothing is newer than the last that we saw, and that one is as we saw it.
            Some(witness) => {
                newest == witness.mod_revision && since.is_witnessed_by(gets.next().and_then(|(_, kv)| kv).as_ref())
            }
            None => newest <= since.revision,
        };
        let same = same && revision >= since.revision && cluster == since.cluster && count == since.count;
        Ok(same.then_some(revision))
    }

    /// A watch from the next revision on, and the news that its endpoint is left.
    async fn open(&self, position: &Position) -> Result<(Watch, Moves), Failure> {
        let start = position.next_revision();
        let ((watch, created), moves) = self.pool.watch(&self.range, start).await?;
        self.check(position, &created).await?;
        Ok((watch, moves))
    }

    /// The next message.
    async fn next(&self, position: &Position, watch: &mut Watch, moves: &mut Moves) -> Result<WatchResponse, Failure> {
        let message = tokio::select! {
            biased;
            message = watch.message() => message?,
            () = moves.moved() => return Err(Failure::Moved),
        };
        if message.events().is_empty() {
            Box::pin(self.check(position, &message)).await?;
        }
        Ok(message)
    }

    /// A watch that waits for a revision far ahead of the store is silent, and lives. So where a message comes from a
    /// store that is behind us, either that member lags, or the store was wiped since we read it.
    async fn check(&self, position: &Position, message: &WatchResponse) -> Result<(), Failure> {
        let behind = message.header().is_none_or(|header| header.revision() < position.revision);
        if behind && self.compare(position).await? != History::Same {
            return Err(Failure::Rewound);
        }
        Ok(())
    }

    /// What a message says, and the position after it; `None` if it says nothing.
    pub(crate) fn updates(&self, position: &mut Position, response: &WatchResponse) -> Option<Updates> {
        if response.events().is_empty() {
            // An answer to our own question may be ahead of events that are on their way; only what the server tells
            // by itself is in order.
            let told = response.watch_id() >= 0 && !response.created();
            let revision = response.header().map_or(0, |header| header.revision());
            if !told || revision <= position.revision {
                return None;
            }
            position.revision = revision;
        }
        let mut updates = Vec::new();
        let mut left = (0, HashSet::new());
        for event in response.events() {
            let (Some(kv), Some(kind)) = (event.kv(), kind(event)) else { continue };
            let put = kind == EventType::Put;
            position.advance(kv, put);
            match self.space.place(kv.key()) {
                // A mark comes before the removals of its revision.
                Some(Place::Mark(service, _)) if put => {
                    left = (kv.mod_revision(), self.space.left(&service, kv.value()).collect());
                }
                // One that cannot be read is no longer there, as it is for who lists.
                Some(Place::Record(key)) if put => updates.push(match self.space.read(&key, kv) {
                    Some(record) => Update::Upsert(record),
                    None => Update::Remove { key, cause: Departure::Unknown },
                }),
                Some(Place::Record(key)) => {
                    let said = left.0 == kv.mod_revision() && left.1.contains(&key);
                    updates
                        .push(Update::Remove { key, cause: if said { Departure::Left } else { Departure::Unknown } });
                }
                _ => {}
            }
        }
        Some(Updates { cursor: Some(position.cursor()), updates })
    }
}

impl Sorted {
    pub(crate) fn take(&mut self, space: &Space, kv: &KeyValue) {
        self.count += 1;
        if self.newest.as_ref().is_none_or(|newest| newest.mod_revision <= kv.mod_revision()) {
            self.newest = Some(Witness::of(kv));
        }
        match space.place(kv.key()) {
            Some(Place::Mark(service, _)) => self.left.extend(space.left(&service, kv.value())),
            Some(Place::Record(key)) => match space.read(&key, kv) {
                Some(record) => self.records.push(record),
                None => self.unreadable.push(key),
            },
            _ => {}
        }
    }

    /// The records, and who is named by the departure marks and is not there.
    pub(crate) fn finish(mut self) -> (Vec<Record>, Vec<Key>) {
        if !self.left.is_empty() {
            for key in self.records.iter().map(|record| &record.key).chain(&self.unreadable) {
                self.left.remove(key);
            }
        }
        (self.records, self.left.into_iter().collect())
    }
}

impl Position {
    fn of(listed: &Listed<Sorted>) -> Self {
        let Sorted { count, newest, .. } = &listed.made;
        Self { revision: listed.revision, cluster: listed.cluster, count: *count, witness: newest.clone() }
    }

    pub(crate) fn cursor(&self) -> Cursor {
        Cursor::new(self.to_string())
    }

    /// The first revision after it.
    pub(crate) fn next_revision(&self) -> i64 {
        self.revision.saturating_add(1)
    }

    /// Takes an event into account.
    fn advance(&mut self, kv: &KeyValue, put: bool) {
        self.revision = self.revision.max(kv.mod_revision());
        if put {
            self.count = self.count.saturating_add(i64::from(kv.version() == 1));
            self.witness = Some(Witness::of(kv));
            return;
        }
        self.count = self.count.saturating_sub(1);
        if let Some(witness) = self.witness.as_mut().filter(|witness| witness.key == kv.key()) {
            witness.until = Some(kv.mod_revision().saturating_sub(1));
        }
    }

    fn is_witnessed_by(&self, seen: Option<&KeyValue>) -> bool {
        match (&self.witness, seen) {
            (None, _) => true,
            (Some(witness), Some(kv)) => witness.mod_revision == kv.mod_revision() && witness.lease == kv.lease(),
            (Some(_), None) => false,
        }
    }

    /// Whether what tells its history from others is still there to be looked at.
    fn stands(&self) -> bool {
        self.witness.as_ref().is_none_or(|witness| witness.until.is_none())
    }
}

impl Witness {
    fn of(kv: &KeyValue) -> Self {
        Self { key: kv.key().to_vec(), mod_revision: kv.mod_revision(), lease: kv.lease(), until: None }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.revision, self.cluster, self.count)?;
        let Some(Witness { key, mod_revision, lease, until }) = &self.witness else { return Ok(()) };
        write!(f, ":{mod_revision}:{lease}:{}:", until.unwrap_or(0))?;
        key.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Position {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        fn next<T: FromStr>(parts: &mut std::str::SplitN<'_, char>) -> Result<T, ()> {
            parts.next().and_then(|part| part.parse().ok()).ok_or(())
        }
        let parts = &mut text.splitn(7, ':');
        let (revision, cluster, count): (i64, _, _) = (next(parts)?, next(parts)?, next(parts)?);
        let witness = match parts.next() {
            None => None,
            Some(mod_revision) => Some(Witness {
                mod_revision: mod_revision.parse().map_err(drop)?,
                lease: next(parts)?,
                until: Some(next(parts)?).filter(|until| *until != 0),
                key: parts.next().and_then(unhex).filter(|key| !key.is_empty()).ok_or(())?,
            }),
        };
        let until = witness.as_ref().and_then(|witness| witness.until);
        // Asked for what was there then, the store would tell what is there now.
        if revision < 1 || until.is_some_and(|until| until < 1) {
            return Err(());
        }
        Ok(Self { revision, cluster, count, witness })
    }
}

/// What happened, if we know it. The client panics if it does not (0.21.1, `Event::event_type`).
fn kind(event: &Event) -> Option<EventType> {
    EventType::try_from(event.0.r#type).ok()
}

/// Keys are bytes, and not all in our range need be ours.
fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.bytes().map(|c| char::from(c).to_digit(16)).collect::<Option<Vec<_>>>()?;
    digits.chunks(2).map(|pair| u8::try_from(pair.first()? * 16 + pair.get(1)?).ok()).collect()
}

fn resumed(position: Position) -> (Position, Updates) {
    let cursor = Some(position.cursor());
    (position, Updates { cursor, updates: Vec::new() })
}

/// The count and the first key of each get in a transaction.
pub(crate) fn gets(answers: Vec<TxnOpResponse>) -> impl Iterator<Item = (i64, Option<KeyValue>)> {
    answers.into_iter().filter_map(|answer| match answer {
        TxnOpResponse::Get(mut get) => Some((get.count(), get.take_kvs().into_iter().next())),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::{PbEvent, PbKeyValue};

    use super::*;

    fn position(witness: Option<Witness>) -> Position {
        Position { revision: 42, cluster: u64::MAX, count: 3, witness }
    }

    #[test]
    fn a_position_survives_as_text() {
        let witness = Witness { key: b"/a:b/left/\xff".to_vec(), mod_revision: 7, lease: -9, until: None };
        let gone = Witness { until: Some(40), ..witness.clone() };
        for position in [position(None), position(Some(witness)), position(Some(gone))] {
            assert_eq!(position.to_string().parse(), Ok(position.clone()));
            assert_eq!(position.cursor().as_str(), position.to_string());
        }
    }

    #[test]
    fn an_event_of_a_kind_to_come_is_none_that_we_know() {
        let of = |kind| super::kind(&Event(PbEvent { r#type: kind, ..Default::default() }));
        assert_eq!([of(0), of(1), of(2), of(-1)], [Some(EventType::Put), Some(EventType::Delete), None, None]);
    }

    #[test]
    fn a_position_takes_any_numbers() {
        for number in [i64::MIN, i64::MAX] {
            let mut position: Position = format!("42:7:{number}:41:0:0:2f").parse().unwrap();
            let kv =
                KeyValue(PbKeyValue { key: b"/".to_vec(), mod_revision: number, version: 1, ..Default::default() });
            position.advance(&kv, false);
            position.advance(&kv, true);
            assert!(position.next_revision() >= 43);
        }
    }

    #[test]
    fn a_cursor_that_is_none_of_ours_is_no_position() {
        for text in [
            "",
            ":",
            "1:2",
            "1:2:x",
            "1:2:3:",
            "1:2:3:4",
            "1:2:3:4:5",
            "1:2:3:4:5:6",
            "1:2:3:4:5:6:abc",
            "1:2:3:4:5:-6:ab",
            "0:2:3",
            "-1:2:3",
            "1:2:3:4:5:6:é",
            "99999999999999999999:1:1",
        ] {
            assert_eq!(text.parse::<Position>(), Err(()), "{text:?}");
        }
    }
}
