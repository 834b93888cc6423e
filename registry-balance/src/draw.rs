//! Picks by weight whose cost does not grow with the number of instances: in turn, and at random.

use std::hint::select_unpredictable;

use crate::counter::Counter;

/// In turn, each as often as its weight says: the static stride scheduler of gRPC's weighted round robin.
///
/// A round looks at everybody once. Whoever has the largest weight is taken in each, others in those rounds in which
/// their weights have added up to another whole. A pick takes largest / mean weight looks.
#[derive(Debug)]
pub(crate) struct Turns {
    len: u32,
    /// As parts of `WHOLE`, which is the largest; `None` if all are equal.
    parts: Option<Box<[u16]>>,
}

const WHOLE: u32 = u16::MAX as u32;

impl Turns {
    pub(crate) fn even(len: usize) -> Self {
        Self { len: as_u32(len), parts: None }
    }

    pub(crate) fn by(weights: &[u64]) -> Self {
        let largest = u128::from(weights.iter().copied().max().unwrap_or(1).max(1));
        let part = |weight: &u64| {
            let part = (u128::from(*weight) * u128::from(WHOLE) + largest / 2) / largest;
            u16::try_from(part).unwrap_or(u16::MAX).max(1)
        };
        Self { len: as_u32(weights.len()), parts: (!are_equal(weights)).then(|| weights.iter().map(part).collect()) }
    }

    /// There must be somebody.
    pub(crate) fn next(&self, counter: &Counter) -> usize {
        let Some(parts) = &self.parts else { return (counter.next() % self.len) as usize };
        loop {
            let look = counter.next();
            let (round, at) = (look / self.len, look % self.len);
            let part = u32::from(parts[at as usize]);
            // Shifted by half for every other one, so that equals do not all have their turns in the same rounds.
            let sum = u64::from(part) * u64::from(round) + u64::from(at) * u64::from(WHOLE / 2);
            if sum % u64::from(WHOLE) >= u64::from(WHOLE - part) {
                return at as usize;
            }
        }
    }
}

/// At random, each as often as its weight says: Vose's alias method.
#[derive(Debug)]
pub(crate) struct Dice {
    len: u32,
    /// The odds, of `u32::MAX`, that a place keeps the throw, and who else has it; `None` if all are equal.
    places: Option<Box<[(u32, u32)]>>,
}

impl Dice {
    pub(crate) fn by(weights: &[u64]) -> Self {
        Self { len: as_u32(weights.len()), places: (!are_equal(weights)).then(|| places(weights)) }
    }

    /// There must be somebody. One random number says the place, and how far into it.
    pub(crate) fn throw(&self, random: u32) -> usize {
        let scaled = u64::from(random) * u64::from(self.len);
        let at = (scaled >> 32) as usize;
        let Some(places) = &self.places else { return at };
        let (odds, other) = places[at];
        #[allow(clippy::cast_possible_truncation, reason = "the lower half")]
        let keeps = scaled as u32 <= odds;
        // A branch would be predicted wrongly half the time.
        select_unpredictable(keeps, at, other as usize)
    }
}

/// Every place holds an equal share: some of its own, and, where that is too little, the rest of one who has too much.
fn places(weights: &[u64]) -> Box<[(u32, u32)]> {
    let total: u128 = weights.iter().copied().map(u128::from).sum();
    let len = weights.len() as u128;
    // In parts of `total`, of which a place holds one whole.
    let mut shares: Vec<u128> = weights.iter().map(|weight| u128::from(*weight) * len).collect();
    let mut places: Vec<(u32, u32)> = (0..as_u32(weights.len())).map(|at| (u32::MAX, at)).collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..shares.len()).partition(|at| shares[*at] < total);
    while let (Some(poor), Some(rich)) = (small.pop(), large.last().copied()) {
        let odds = u32::try_from(shares[poor] * u128::from(u32::MAX) / total.max(1)).unwrap_or(u32::MAX);
        places[poor] = (odds, as_u32(rich));
        shares[rich] -= total - shares[poor];
        if shares[rich] < total {
            large.pop();
            small.push(rich);
        }
    }
    places.into()
}

fn are_equal(weights: &[u64]) -> bool {
    weights.windows(2).all(|pair| pair[0] == pair[1])
}

/// Nobody follows four thousand million instances.
fn as_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PICKS: u32 = 100_000;

    fn counted(len: usize, mut pick: impl FnMut() -> usize) -> Vec<u32> {
        let mut counts = vec![0; len];
        (0..PICKS).for_each(|_| counts[pick()] += 1);
        counts
    }

    fn assert_shares(weights: &[u64], counts: &[u32], off: f64) {
        let total: u64 = weights.iter().sum();
        for (weight, count) in weights.iter().zip(counts) {
            let (due, got) = (*weight as f64 / total as f64, f64::from(*count) / f64::from(PICKS));
            assert!((due - got).abs() <= off, "{weight} of {total}: {got}, not {due}; {counts:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]

        #[test]
        fn turns_and_dice_give_everybody_the_share_of_its_weight(weights in prop::collection::vec(1_u64..2000, 1..40)) {
            let (turns, counter) = (Turns::by(&weights), Counter::new());
            assert_shares(&weights, &counted(weights.len(), || turns.next(&counter)), 0.002);
            let dice = Dice::by(&weights);
            assert_shares(&weights, &counted(weights.len(), || dice.throw(fastrand::u32(..))), 0.01);
        }
    }

    #[test]
    fn turns_do_not_come_in_bursts() {
        let (turns, counter) = (Turns::by(&[50, 100, 50]), Counter::new());
        let picks: Vec<_> = (0..400).map(|_| turns.next(&counter)).collect();
        for window in picks.windows(4) {
            let heavy = window.iter().filter(|pick| **pick == 1).count();
            assert!((1..=3).contains(&heavy), "{picks:?}");
        }
    }

    #[test]
    fn the_largest_and_the_smallest_weights_are_kept_apart() {
        let weights = [u64::from(u32::MAX) * 1000, 1];
        let (turns, counter) = (Turns::by(&weights), Counter::new());
        assert!(counted(2, || turns.next(&counter))[1] <= 2);
        let dice = Dice::by(&weights);
        assert!(counted(2, || dice.throw(fastrand::u32(..)))[1] <= 1);
    }
}
