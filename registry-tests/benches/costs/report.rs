//! The table that figures are printed in as they come, and the file that holds them all at the end.

use std::path::Path;

use serde::Serialize;

use crate::{
    Result,
    samples::{Samples, Unit},
};

/// All rows so far.
#[derive(Default)]
pub(crate) struct Report {
    part: &'static str,
    rows: Vec<Row>,
}

/// One work, on one store or in the process.
#[derive(Serialize)]
struct Row {
    part: &'static str,
    id: &'static str,
    work: String,
    unit: Unit,
    ours: Figure,
    floor: Option<Figure>,
    ratio: Option<f64>,
    target: Option<String>,
    met: Option<bool>,
}

#[derive(Serialize)]
struct Figure {
    median: f64,
    least: f64,
    most: f64,
}

/// What a row must come to.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// So many times the floor at most.
    Ratio(f64),
    /// That, or not more above it than this: where both take microseconds, a ratio says little about what a user waits for.
    RatioOr(f64, f64),
    Most(f64),
    /// That, or so many times the floor, where the machine is slow at what both do.
    MostOr(f64, f64),
    None,
}

impl Target {
    /// Whether it is met; `None` if there is nothing to be met.
    fn is_met(self, ours: f64, floor: Option<f64>) -> Option<bool> {
        let ratio = |most: f64| floor.filter(|floor| *floor > 0.0).map(|floor| ours <= most * floor);
        match self {
            Self::Ratio(most) => ratio(most),
            Self::RatioOr(most, spare) => Some(ratio(most)? || ours - floor? <= spare),
            Self::Most(most) => Some(ours <= most),
            Self::MostOr(most, times) => Some(ours <= most || ratio(times) == Some(true)),
            Self::None => None,
        }
    }

    fn show(self, unit: Unit) -> Option<String> {
        match self {
            Self::Ratio(most) => Some(format!("≤ {most}×")),
            Self::RatioOr(most, spare) => Some(format!("≤ {most}× or {} more", unit.show(spare))),
            Self::Most(most) => Some(format!("≤ {}", unit.show(most))),
            Self::MostOr(most, times) => Some(format!("≤ {} or {times}×", unit.show(most))),
            Self::None => None,
        }
    }
}

impl Report {
    pub(crate) fn part(&mut self, part: &'static str) {
        self.part = part;
        println!(
            "\n{part}\n\n| | work | ours | floor | ratio | target | |\n| --- | --- | --- | --- | --- | --- | --- |"
        );
    }

    /// A row whose target is a ratio to the floor.
    pub(crate) fn ratio(
        &mut self,
        id: &'static str,
        work: &str,
        unit: Unit,
        ours: &Samples,
        floor: &Samples,
        most: f64,
    ) {
        self.row(id, work, unit, ours, Some(floor), Target::Ratio(most));
    }

    /// A row whose target is a figure.
    pub(crate) fn bound(
        &mut self,
        id: &'static str,
        work: &str,
        unit: Unit,
        ours: &Samples,
        floor: Option<&Samples>,
        most: f64,
    ) {
        self.row(id, work, unit, ours, floor, Target::Most(most));
    }

    /// A row without a target.
    pub(crate) fn figure(&mut self, id: &'static str, work: &str, unit: Unit, ours: &Samples, floor: Option<&Samples>) {
        self.row(id, work, unit, ours, floor, Target::None);
    }

    pub(crate) fn row(
        &mut self,
        id: &'static str,
        work: &str,
        unit: Unit,
        ours: &Samples,
        floor: Option<&Samples>,
        target: Target,
    ) {
        let ratio = floor.map(|floor| ours.median() / floor.median()).filter(|ratio| ratio.is_finite());
        let (met, target) = (target.is_met(ours.median(), floor.map(Samples::median)), target.show(unit));
        let verdict = met.map_or("", |met| if met { "ok" } else { "missed" });
        let dash = || "–".to_owned();
        println!(
            "| {id} | {work} | {} | {} | {} | {} | {verdict} |",
            ours.show(unit),
            floor.map_or_else(dash, |floor| floor.show(unit)),
            ratio.map_or_else(dash, |ratio| format!("{ratio:.2}")),
            target.clone().unwrap_or_else(dash),
        );
        let figure =
            |samples: &Samples| Figure { median: samples.median(), least: samples.least(), most: samples.most() };
        self.rows.push(Row {
            part: self.part,
            id,
            work: work.to_owned(),
            unit,
            ours: figure(ours),
            floor: floor.map(figure),
            ratio,
            target,
            met,
        });
    }

    /// How many targets were missed.
    pub(crate) fn missed(&self) -> usize {
        self.rows.iter().filter(|row| row.met == Some(false)).count()
    }

    /// Writes all of it, and on which machine, as JSON.
    pub(crate) fn write(&self, file: &Path, rounds: usize) -> Result<()> {
        let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
        let report = serde_json::json!({
            "machine": {
                "processors": std::thread::available_parallelism()?.get(),
                "model": model.unwrap_or_default(),
                "kernel": read("/proc/sys/kernel/osrelease").trim(),
            },
            "version": env!("CARGO_PKG_VERSION"),
            "rounds": rounds,
            "rows": self.rows,
        });
        std::fs::create_dir_all(file.parent().ok_or("a file has a folder")?)?;
        Ok(std::fs::write(file, serde_json::to_string_pretty(&report)?)?)
    }
}
