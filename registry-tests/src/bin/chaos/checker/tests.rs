//! Made-up histories: a good one passes, and each way to break a promise is found.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

const START: Millis = 1_000_000;
const BOUNDS: Bounds = Bounds {
    shown: 1_000,
    restored: 2_000,
    repaired: 3_000,
    resumed: 2_500,
    gone: 4_000,
    gone_after_outage: 6_000,
    protection: 5_000,
    answered: 5_000,
    calm: 20_000,
};

/// Two instances of one provider, of one service each.
const ONE: Name = Name { provider: 0, number: 0 };
const TWO: Name = Name { provider: 0, number: 1 };

/// A history that is told second by second.
struct History {
    checker: Checker,
    now: Millis,
    provider: Process,
    reader: Process,
    revisions: u64,
}

impl History {
    /// A provider and a reader, and nothing registered.
    fn new() -> Self {
        let mut checker = Checker::new(BOUNDS, START);
        let provider = checker.started("p0.1".to_owned(), false, START);
        let reader = checker.started("r0".to_owned(), true, START);
        Self { checker, now: START, provider, reader, revisions: 0 }
    }

    /// The same, after both were registered and seen by the reader and in the store, long ago.
    fn settled() -> Self {
        let mut history = Self::new();
        history.register(&[(ONE, 1), (TWO, 2)]);
        history.shows(&[(ONE, 1), (TWO, 2)], "live");
        history.passes(20_000);
        history
    }

    fn order(&mut self, all: &[(Name, Option<Generation>)]) -> u64 {
        self.checker.ledger.ordered(self.provider, all, self.now)
    }

    fn answer(&mut self, order: u64, outcomes: Vec<Outcome>) {
        self.checker.said(self.provider, Report::Answer { order, outcomes }, self.now);
    }

    fn register(&mut self, all: &[(Name, Generation)]) {
        let wanted: Vec<_> = all.iter().map(|(name, generation)| (*name, Some(*generation))).collect();
        let order = self.order(&wanted);
        self.answer(order, vec![Outcome::Done; all.len()]);
    }

    fn unregister(&mut self, name: Name) {
        let order = self.order(&[(name, None)]);
        self.answer(order, vec![Outcome::Done]);
    }

    /// The reader is given this, and so is who looks into the store.
    fn shows(&mut self, all: &[(Name, Generation)], freshness: &str) {
        self.reader_shows(all, freshness);
        self.store_holds(all);
    }

    fn reader_shows(&mut self, all: &[(Name, Generation)], freshness: &str) {
        self.revisions += 1;
        for service in crate::names::SERVICES {
            let instances = all.iter().filter(|(name, _)| name.service() == service);
            let report = Report::Saw {
                at: self.now,
                service: service.to_owned(),
                revision: self.revisions,
                freshness: freshness.to_owned(),
                instances: instances.map(|(name, generation)| (name.id(), *generation)).collect(),
            };
            self.checker.said(self.reader, report, self.now);
        }
    }

    fn store_holds(&mut self, all: &[(Name, Generation)]) {
        let held = all.iter().map(|(name, generation)| (name.service().to_owned(), name.id(), *generation));
        self.checker.observed(self.now, held.collect());
    }

    /// Time passes, in which nothing changes.
    fn passes(&mut self, time: Millis) {
        let end = self.now + time;
        while self.now < end {
            self.now += 100;
            self.checker.said(self.reader, Report::Tick { at: self.now, late: 0 }, self.now);
            self.look_at_the_store();
            self.checker.review(0, self.now);
        }
    }

    fn look_at_the_store(&mut self) {
        let held: Vec<_> = self.checker.store.shown.clone().into_iter().collect();
        self.store_holds(&held);
    }

    fn is_fine(&mut self) {
        self.passes(20_000);
        assert_eq!(self.checker.violation(), None);
    }

    /// Something is wrong, and it is said to be this.
    #[track_caller]
    fn is_broken(&mut self, by: &str) {
        self.passes(20_000);
        let violation = self.checker.violation().unwrap_or_else(|| panic!("not found: {by}"));
        assert!(violation.contains(by), "{violation}");
    }
}

#[test]
fn a_good_history_passes() {
    let mut history = History::settled();
    assert!(history.checker.unsettled().is_empty(), "{:?}", history.checker.unsettled());
    assert!(history.checker.counts.held > 1_000, "not for want of looking");
    history.register(&[(ONE, 3)]);
    history.store_holds(&[(ONE, 3), (TWO, 2)]);
    history.passes(500);
    history.shows(&[(ONE, 3), (TWO, 2)], "live");
    history.unregister(TWO);
    history.store_holds(&[(ONE, 3)]);
    history.passes(500);
    history.shows(&[(ONE, 3)], "live");
    history.passes(10_000);
    // A crash, and a successor.
    history.checker.ending(history.provider);
    history.checker.killed(history.provider, history.now);
    history.checker.fell_silent(history.provider, history.now);
    history.passes(3_000);
    history.shows(&[], "live");
    history.passes(10_000);
    history.provider = history.checker.started("p0.2".to_owned(), false, history.now);
    history.register(&[(ONE, 4)]);
    history.store_holds(&[(ONE, 4)]);
    history.passes(500);
    history.shows(&[(ONE, 4)], "live");
    // The store is wiped, the reader protects, and the provider restores.
    history.checker.ledger.store_away();
    history.passes(1_000);
    history.checker.ledger.store_back(history.now);
    history.reader_shows(&[(ONE, 4)], "protected");
    history.store_holds(&[]);
    history.passes(1_000);
    history.shows(&[(ONE, 4)], "live");
    history.is_fine();
    assert!(history.checker.unsettled().is_empty(), "{:?}", history.checker.unsettled());
}

#[test]
fn a_living_instance_that_is_not_shown_is_found() {
    let mut history = History::settled();
    history.reader_shows(&[(TWO, 2)], "live");
    history.is_broken("r0 does not show p0-0@1");
}

#[test]
fn a_living_instance_that_is_missing_for_a_moment_is_found() {
    let mut history = History::settled();
    history.reader_shows(&[(TWO, 2)], "live");
    history.reader_shows(&[(ONE, 1), (TWO, 2)], "live");
    history.is_broken("r0 does not show p0-0@1");
}

#[test]
fn a_living_instance_that_the_store_lost_is_found() {
    let mut history = History::settled();
    history.store_holds(&[(ONE, 1)]);
    history.is_broken("the store does not show p0-1@2");
}

#[test]
fn a_new_instance_that_is_shown_too_late_is_found() {
    let mut history = History::new();
    history.register(&[(ONE, 1)]);
    history.store_holds(&[(ONE, 1)]);
    history.passes(BOUNDS.resumed + 100);
    history.shows(&[(ONE, 1)], "live");
    history.is_broken("r0 does not show p0-0@1");
}

#[test]
fn old_content_that_is_shown_for_too_long_is_found() {
    let mut history = History::settled();
    history.register(&[(ONE, 3)]);
    history.store_holds(&[(ONE, 3), (TWO, 2)]);
    history.is_broken("r0 shows p0-0@1, and not @3");
    let mut history = History::settled();
    history.register(&[(ONE, 3)]);
    history.look_at_the_store();
    history.shows(&[(ONE, 3), (TWO, 2)], "live");
    history.is_broken("the store shows p0-0@1, and not @3");
}

#[test]
fn a_provider_that_is_back_and_restores_nothing_is_found() {
    let mut history = History::settled();
    history.checker.ledger.harmed(history.provider, Trouble::Cut, history.now);
    history.passes(3_000);
    history.shows(&[], "live");
    history.passes(10_000);
    assert_eq!(history.checker.violation(), None, "nobody can tell until it is back");
    history.checker.ledger.mended(history.provider, Trouble::Cut, history.now);
    history.is_broken("does not show p0-0@1");
}

#[test]
fn an_instance_that_was_taken_out_and_is_still_shown_is_found() {
    let mut history = History::settled();
    history.unregister(ONE);
    history.store_holds(&[(TWO, 2)]);
    history.is_broken("r0 still shows p0-0@1");
}

#[test]
fn an_instance_that_comes_back_after_it_was_taken_out_is_found() {
    let mut history = History::settled();
    history.unregister(ONE);
    history.shows(&[(TWO, 2)], "live");
    history.passes(10_000);
    history.store_holds(&[(ONE, 1), (TWO, 2)]);
    history.is_broken("the store still shows p0-0@1");
}

#[test]
fn the_dead_who_are_still_shown_are_found() {
    let mut history = History::settled();
    history.checker.ending(history.provider);
    history.checker.killed(history.provider, history.now);
    history.store_holds(&[]);
    history.passes(BOUNDS.gone - 100);
    assert_eq!(history.checker.violation(), None, "it has its time");
    history.is_broken("r0 still shows p0-0@1");
}

#[test]
fn those_out_of_reach_who_are_still_shown_are_found() {
    let mut history = History::settled();
    history.checker.ledger.harmed(history.provider, Trouble::Stopped, history.now);
    history.is_broken("still shows p0-0@1");
}

#[test]
fn protection_is_bounded() {
    let die = || {
        let mut history = History::settled();
        history.checker.ending(history.provider);
        history.checker.killed(history.provider, history.now);
        history.passes(BOUNDS.gone - 500);
        history.reader_shows(&[(ONE, 1), (TWO, 2)], "protected");
        history.store_holds(&[]);
        history.passes(BOUNDS.protection);
        history
    };
    let mut history = die();
    history.shows(&[], "live");
    history.is_fine();
    die().is_broken("r0 still protects p0-0@1");
}

#[test]
fn what_nobody_registered_is_found() {
    let mut history = History::settled();
    history.reader_shows(&[(ONE, 1), (TWO, 7)], "live");
    history.is_broken("r0 shows payments/p0-1@7, which nobody registered");
}

#[test]
fn content_that_goes_backwards_is_found_even_in_an_outage() {
    let mut history = History::settled();
    history.register(&[(ONE, 3)]);
    history.shows(&[(ONE, 3), (TWO, 2)], "live");
    history.checker.ledger.store_away();
    history.passes(1_000);
    history.checker.ledger.store_back(history.now);
    history.reader_shows(&[(ONE, 1), (TWO, 2)], "live");
    history.is_broken("r0 shows p0-0@1 after p0-0@3");
}

#[test]
fn content_that_goes_backwards_is_found_across_an_absence() {
    let mut history = History::settled();
    history.register(&[(ONE, 3)]);
    history.shows(&[(ONE, 3), (TWO, 2)], "live");
    history.unregister(ONE);
    history.shows(&[(TWO, 2)], "live");
    history.store_holds(&[(ONE, 1), (TWO, 2)]);
    history.is_broken("the store shows p0-0@1 after p0-0@3");
}

#[test]
fn revisions_that_go_backwards_or_stay_are_found() {
    for back in [0, 1] {
        let mut history = History::settled();
        history.reader_shows(&[(ONE, 1), (TWO, 2)], "live");
        history.revisions -= 1 + back;
        history.reader_shows(&[(ONE, 1), (TWO, 2)], "live");
        history.is_broken("r0 gave revision");
    }
}

#[test]
fn an_instance_that_is_there_twice_is_found() {
    let mut history = History::settled();
    history.reader_shows(&[(ONE, 1), (ONE, 1), (TWO, 2)], "live");
    history.is_broken("r0 shows p0-0 twice");
    let mut history = History::settled();
    history.store_holds(&[(ONE, 1), (ONE, 1), (TWO, 2)]);
    history.is_broken("the store shows p0-0 twice");
}

#[test]
fn a_call_without_an_answer_is_found() {
    let mut history = History::settled();
    history.order(&[(ONE, Some(3))]);
    history.is_broken("p0.1 has not answered order 2 in time");
}

#[test]
fn a_call_that_is_refused_is_found_unless_it_was_overtaken() {
    let mut history = History::settled();
    let register = history.order(&[(ONE, Some(3))]);
    let unregister = history.order(&[(ONE, None)]);
    history.answer(register, vec![Outcome::Refused("unregistered meanwhile".to_owned())]);
    history.answer(unregister, vec![Outcome::Done]);
    history.shows(&[(TWO, 2)], "live");
    assert_eq!(history.checker.violation(), None);
    // Of two in one order, one.
    let register = history.order(&[(ONE, Some(5)), (TWO, Some(6))]);
    let unregister = history.order(&[(ONE, None)]);
    history.answer(register, vec![Outcome::Refused("unregistered meanwhile".to_owned()), Outcome::Done]);
    history.answer(unregister, vec![Outcome::Done]);
    history.shows(&[(TWO, 6)], "live");
    assert_eq!(history.checker.violation(), None);
    let register = history.order(&[(TWO, Some(7))]);
    history.answer(register, vec![Outcome::Refused("held by another owner".to_owned())]);
    history.is_broken("p0.1 was refused order 6");
}

#[test]
fn an_answer_belongs_to_its_instance_also_when_others_were_overtaken() {
    let mut history = History::new();
    history.passes(10_000);
    let both = history.order(&[(ONE, Some(1)), (TWO, Some(2))]);
    history.register(&[(ONE, 3)]);
    history.answer(both, vec![Outcome::GoesOn("no answer in time".to_owned()), Outcome::Done]);
    history.shows(&[(ONE, 3)], "live");
    // Who was told that it is done has it in the store at once; who was not, a while later.
    history.is_broken("the store does not show p0-1@2; due at 10.000 since its provider was answered");
}

#[test]
fn a_process_that_ends_by_itself_is_found() {
    let mut history = History::settled();
    history.checker.fell_silent(history.reader, history.now);
    history.is_broken("r0 ended by itself");
}

#[test]
fn what_is_not_settled_is_named() {
    let mut history = History::settled();
    history.reader_shows(&[(ONE, 1), (TWO, 2)], "stale");
    assert_eq!(history.checker.unsettled(), ["r0 orders is stale", "r0 payments is stale"]);
    history.shows(&[(ONE, 1)], "live");
    let missing = ["the store differs from what is desired: -p0-1", "r0 payments differs from what is desired: -p0-1"];
    assert_eq!(history.checker.unsettled(), missing);
    history.order(&[(ONE, Some(3))]);
    assert!(history.checker.unsettled().iter().any(|open| open.contains("not answered")));
    history.checker.started("r1.1".to_owned(), true, history.now);
    assert!(history.checker.unsettled().contains(&"r1.1 orders has not been read".to_owned()));
}

#[test]
fn a_new_reader_that_is_given_nothing_is_found() {
    let mut history = History::settled();
    history.checker.ending(history.reader);
    history.checker.killed(history.reader, history.now);
    history.reader = history.checker.started("r0.2".to_owned(), true, history.now);
    history.is_broken("r0.2 does not show p0-0@1");
}

fn leaving(outcome: Outcome) -> History {
    let mut history = History::settled();
    history.checker.ending(history.provider);
    let order = history.checker.ledger.leaving(history.provider, history.now);
    history.passes(500);
    history.answer(order, vec![outcome]);
    history.checker.left(history.provider, history.now);
    history
}

#[test]
fn who_leaves_in_good_order_is_gone_at_once() {
    let mut history = leaving(Outcome::Done);
    history.shows(&[], "live");
    history.is_fine();
    // From the store.
    let mut history = leaving(Outcome::Done);
    history.look_at_the_store();
    history.shows(&[], "live");
    history.is_broken("the store still shows p0-0@1");
    // From the readers, who were there all the time.
    let mut history = leaving(Outcome::Done);
    history.store_holds(&[]);
    history.passes(BOUNDS.shown + 100);
    history.shows(&[], "live");
    history.is_broken("r0 still shows p0-0@1");
    // Who could not say so is gone like who crashed.
    let mut history = leaving(Outcome::GoesOn("no answer in time".to_owned()));
    history.passes(BOUNDS.gone - 100);
    history.shows(&[], "live");
    history.is_fine();
}

#[test]
fn what_delayed_somebody_excuses_it_also_when_it_is_heard_of_later() {
    // The provider was held up and lost its session; that this is why comes after what it caused.
    let mut history = History::settled();
    history.shows(&[], "live");
    history.passes(1_000);
    history.checker.said(history.provider, Report::Tick { at: history.now, late: 3_000 }, history.now);
    history.shows(&[(ONE, 1), (TWO, 2)], "live");
    history.is_fine();
    // All were.
    let mut history = History::settled();
    history.shows(&[], "live");
    history.checker.review(3_000, history.now);
    history.shows(&[(ONE, 1), (TWO, 2)], "live");
    history.is_fine();
}

#[test]
fn a_reader_is_not_judged_by_what_it_cannot_know() {
    let mut history = History::settled();
    history.checker.ledger.harmed(history.reader, Trouble::Cut, history.now);
    history.unregister(ONE);
    history.store_holds(&[(TWO, 2)]);
    history.passes(20_000);
    assert_eq!(history.checker.violation(), None);
    history.checker.ledger.mended(history.reader, Trouble::Cut, history.now);
    history.is_broken("r0 still shows p0-0@1");
}
