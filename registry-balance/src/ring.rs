//! Consistent hashing: each instance has points on a ring, and a key goes to whose point comes next.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// How many points an instance of the default weight has. The share of one then varies by some 9 %.
const POINTS: u64 = 128;
const MOST_POINTS: u64 = 16 * POINTS;

/// Where a key lies on the ring; the same in every process, version and architecture.
pub(crate) fn position(key: &[u8]) -> u64 {
    xxh3_64(key)
}

/// The points of an instance depend on its own id and weight alone: no other instance moves them.
#[derive(Debug)]
pub(crate) struct Ring {
    /// Sorted: where, and whose.
    points: Box<[(u64, u32)]>,
    /// The ring in equal arcs, about one for each point: the first point that lies in one or after it.
    arcs: Box<[u32]>,
    shift: u32,
}

impl Ring {
    /// From ids and weights; `usual` is the weight that has `POINTS`. There must be somebody.
    pub(crate) fn new<'a>(members: impl Iterator<Item = (&'a str, u64)>, usual: u64) -> Self {
        let mut points = Vec::new();
        for (owner, (id, weight)) in (0..).zip(members) {
            let count = (weight * POINTS / usual.max(1)).clamp(1, MOST_POINTS);
            points.extend((0..count).map(|nth| (xxh3_64_with_seed(id.as_bytes(), nth), owner)));
        }
        points.sort_unstable();
        let bits = points.len().next_power_of_two().ilog2().max(1);
        let shift = u64::BITS - bits;
        let mut first = 0;
        let arcs = (0..1_u64 << bits)
            .map(|arc| {
                while points.get(first).is_some_and(|(at, _)| *at >> shift < arc) {
                    first += 1;
                }
                u32::try_from(first).unwrap_or(u32::MAX)
            })
            .collect();
        Self { points: points.into(), arcs, shift }
    }

    /// The owners of the points from this position on, once around. Owners come as often as they have points.
    pub(crate) fn from(&self, position: u64) -> impl Iterator<Item = usize> {
        #[allow(clippy::cast_possible_truncation, reason = "there are fewer arcs than fit a usize")]
        let mut first = self.arcs[(position >> self.shift) as usize] as usize;
        while self.points.get(first).is_some_and(|(at, _)| *at < position) {
            first += 1;
        }
        let (before, after) = self.points.split_at(first);
        after.iter().chain(before).map(|(_, owner)| *owner as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: u32 = 100_000;

    fn ring(ids: &[String]) -> Ring {
        Ring::new(ids.iter().map(|id| (id.as_str(), 100)), 100)
    }

    fn owner<'a>(ring: &Ring, ids: &'a [String], key: u32) -> &'a str {
        &ids[ring.from(position(&key.to_le_bytes())).next().unwrap()]
    }

    #[test]
    fn one_more_or_less_of_n_moves_no_more_than_its_share_and_a_half() {
        for n in [2, 3, 10, 100] {
            let all: Vec<_> = (0..n).map(|id| format!("instance-{id}")).collect();
            let whole = ring(&all);
            for gone in 0..n.min(10) {
                let mut fewer = all.clone();
                let id = fewer.remove(gone);
                let without = ring(&fewer);
                let mut moved = 0;
                for key in 0..KEYS {
                    let (before, after) = (owner(&whole, &all, key), owner(&without, &fewer, key));
                    if before != after {
                        assert_eq!(before, id, "only what was its own moves");
                        moved += 1;
                    }
                }
                let share = f64::from(moved) * n as f64 / f64::from(KEYS);
                assert!(share <= 1.5, "{share:.2} of 1/{n} moved");
            }
        }
    }

    #[test]
    fn a_position_never_changes_between_versions() {
        assert_eq!(position(b"orders"), 0xa88c_cdc9_fa49_74fb);
    }

    #[test]
    fn around_the_ring_everybody_is_met_from_every_position() {
        let ids: Vec<_> = (0..5).map(|id| format!("i-{id}")).collect();
        let ring = ring(&ids);
        let ends = [0, 1, u64::MAX / 3, u64::MAX - 1, u64::MAX];
        for position in ends.into_iter().chain(ring.points.iter().map(|(at, _)| *at)) {
            let met: std::collections::BTreeSet<_> = ring.from(position).collect();
            assert_eq!(met.len(), 5);
            let next = ring.points.iter().find(|(at, _)| *at >= position).unwrap_or(&ring.points[0]);
            assert_eq!(ring.from(position).next(), Some(next.1 as usize));
        }
    }

    #[test]
    fn twice_the_weight_is_twice_the_keys() {
        let ring = Ring::new([("a", 100), ("b", 200), ("c", 1)].into_iter(), 100);
        let mut counts = [0; 3];
        for key in 0..KEYS {
            counts[ring.from(position(&key.to_le_bytes())).next().unwrap()] += 1;
        }
        let ratio = f64::from(counts[1]) / f64::from(counts[0]);
        assert!((1.5..2.6).contains(&ratio), "{counts:?}");
        assert!(counts[2] < counts[0] / 20 && counts[2] > 0, "{counts:?}");
    }
}
