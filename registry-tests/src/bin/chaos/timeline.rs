//! What happened, for people: the last lines only, however long the run.

use std::{collections::VecDeque, fmt::Display};

use crate::protocol::Millis;

/// The schedule, as somebody who does something.
pub(crate) const PLAN: &str = "plan";
/// How many lines are kept.
const LINES: usize = 220;

#[derive(Debug)]
pub(crate) struct Timeline {
    start: Millis,
    lines: VecDeque<String>,
    forgotten: u64,
}

impl Timeline {
    pub(crate) fn new(start: Millis) -> Self {
        Self { start, lines: VecDeque::with_capacity(LINES), forgotten: 0 }
    }

    /// Lines are in the order in which the orchestrator heard of it; the time is when it was.
    pub(crate) fn note(&mut self, at: Millis, who: impl Display, what: impl Display) {
        if self.lines.len() == LINES {
            self.lines.pop_front();
            self.forgotten += 1;
        }
        self.lines.push_back(format!("{:>9} {:<6} {what}", self.time(at), who.to_string()));
    }

    /// The time since the start, in seconds.
    pub(crate) fn time(&self, at: Millis) -> String {
        let since = at.saturating_sub(self.start);
        format!("{}.{:03}", since / 1000, since % 1000)
    }

    pub(crate) fn print(&self) {
        println!("{:>9} {:<6} what ({} earlier lines are forgotten)", "seconds", "who", self.forgotten);
        for line in &self.lines {
            println!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_is_bounded_and_keeps_the_latest() {
        let mut timeline = Timeline::new(1000);
        for at in 1..=1000 {
            timeline.note(1000 + at, "r0", format!("line {at}"));
        }
        assert_eq!(timeline.lines.len(), LINES);
        assert_eq!(timeline.lines.back().unwrap(), "    1.000 r0     line 1000");
    }
}
