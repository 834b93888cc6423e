//! Figures, and the table that they are printed in.

use std::time::Duration;

/// Figures of one kind, one a round, in order.
#[derive(Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

/// What the figures count.
#[derive(Clone, Copy)]
pub(crate) enum Unit {
    Seconds,
    Bytes,
}

impl Samples {
    pub(crate) fn add(&mut self, sample: f64) {
        let at = self.0.partition_point(|other| *other <= sample);
        self.0.insert(at, sample);
    }

    pub(crate) fn time(&mut self, took: Duration) {
        self.add(took.as_secs_f64());
    }

    pub(crate) fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    /// The figure that 99 of 100 do not exceed, alone.
    pub(crate) fn p99(&self) -> Self {
        Self(vec![self.0[self.0.len() * 99 / 100]])
    }

    fn show(&self, unit: Unit) -> String {
        let of = |sample: f64| match unit {
            Unit::Bytes => format!("{sample:.0} B"),
            Unit::Seconds if sample < 1e-5 => format!("{:.0} ns", sample * 1e9),
            Unit::Seconds if sample < 1e-2 => format!("{:.0} µs", sample * 1e6),
            Unit::Seconds => format!("{:.0} ms", sample * 1e3),
        };
        match self.0.as_slice() {
            [only] => of(*only),
            all => format!("{} ({}–{})", of(self.median()), of(all[0]), of(all[all.len() - 1])),
        }
    }
}

/// The table, row by row, and how many targets were missed.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) missed: usize,
}

impl Report {
    pub(crate) fn title(&mut self, title: &str) {
        println!("\n{title}\n\n| work | ours | floor | ratio | target | |\n| --- | --- | --- | --- | --- | --- |");
    }

    /// A row whose target is a ratio to the floor.
    pub(crate) fn ratio(&mut self, work: &str, unit: Unit, ours: &Samples, floor: &Samples, most: f64) {
        let ratio = ours.median() / floor.median();
        let verdict = self.verdict(ratio > most);
        println!("| {work} | {} | {} | {ratio:.2} | ≤ {most}× | {verdict} |", ours.show(unit), floor.show(unit));
    }

    /// A row whose target is a figure.
    pub(crate) fn bound(&mut self, work: &str, unit: Unit, ours: &Samples, floor: Option<&Samples>, most: f64) {
        let verdict = self.verdict(ours.median() > most);
        let (beside, ratio) = match floor {
            Some(floor) => (floor.show(unit), format!("{:.2}", ours.median() / floor.median())),
            None => ("–".into(), "–".into()),
        };
        let mut target = Samples::default();
        target.add(most);
        println!("| {work} | {} | {beside} | {ratio} | ≤ {} | {verdict} |", ours.show(unit), target.show(unit));
    }

    fn verdict(&mut self, missed: bool) -> &'static str {
        self.missed += usize::from(missed);
        if missed { "missed" } else { "ok" }
    }
}
