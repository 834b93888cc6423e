//! Figures of one kind, of several rounds.

use std::time::Duration;

use serde::Serialize;

/// Figures of one kind, one a round, in order.
#[derive(Clone, Default)]
pub(crate) struct Samples(Vec<f64>);

/// What the figures count.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Unit {
    Seconds,
    Bytes,
    /// A plain number.
    Count,
    /// A share of one processor.
    Share,
}

impl Samples {
    pub(crate) fn of(sample: f64) -> Self {
        Self(vec![sample])
    }

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

    pub(crate) fn least(&self) -> f64 {
        self.0[0]
    }

    pub(crate) fn most(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    /// The figure that 99 of 100 do not exceed, alone.
    pub(crate) fn p99(&self) -> Self {
        Self::of(self.0[self.0.len() * 99 / 100])
    }

    pub(crate) fn show(&self, unit: Unit) -> String {
        match self.0.as_slice() {
            [only] => unit.show(*only),
            _ => format!("{} ({}–{})", unit.show(self.median()), unit.show(self.least()), unit.show(self.most())),
        }
    }
}

impl Unit {
    pub(crate) fn show(self, sample: f64) -> String {
        match self {
            Self::Bytes if sample < 1e5 => format!("{sample:.0} B"),
            Self::Bytes if sample < 1e8 => format!("{:.0} kB", sample / 1e3),
            Self::Bytes => format!("{:.0} MB", sample / 1e6),
            Self::Count if sample < 10.0 && sample.fract() > 0.0 => format!("{sample:.2}"),
            Self::Count => format!("{sample:.0}"),
            Self::Share => format!("{:.2} %", sample * 100.0),
            Self::Seconds if sample < 1e-5 => format!("{:.0} ns", sample * 1e9),
            Self::Seconds if sample < 1e-2 => format!("{:.0} µs", sample * 1e6),
            Self::Seconds if sample < 1e1 => format!("{:.0} ms", sample * 1e3),
            Self::Seconds => format!("{sample:.1} s"),
        }
    }
}
