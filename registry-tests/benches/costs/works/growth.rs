//! How costs grow with the number of instances, drawn.

use std::path::Path;

use plotters::prelude::*;

use crate::{
    Result,
    bare::Bare,
    measured::Loaded,
    samples::Samples,
    works::{Effort, destroy_all, fill, follow::converged, large::load, register::at_once},
};

const COUNTS: [usize; 5] = [100, 300, 1_000, 3_000, 10_000];

/// What is drawn together: a line for each store, and one for its floor.
#[derive(Default)]
pub(crate) struct Growth {
    register: Vec<Line>,
    converge: Vec<Line>,
    memory: Vec<Line>,
}

struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

impl Growth {
    /// Measures one store.
    pub(crate) async fn measure<B: Bare>(&mut self, store: &B, effort: Effort) -> Result<()> {
        let [mut register, mut converge] = [const { [Vec::new(), Vec::new()] }; 2];
        let mut memory = Vec::new();
        for count in COUNTS {
            let of = |figure: f64| (count as f64, figure);
            let mut samples: [Samples; 4] = Default::default();
            // At other places than the works of a fixed size.
            for round in 1000..1000 + effort.rounds.min(3) {
                let (registered, converged) =
                    (at_once(store, round, count).await?, converged(store, round, count).await?);
                for (samples, took) in samples.iter_mut().zip([registered.0, registered.1, converged.0, converged.1]) {
                    samples.time(took);
                }
            }
            let [ours, floor, ours_converge, floor_converge] = samples.map(|samples| of(samples.median() * 1e3));
            register[0].push(ours);
            register[1].push(floor);
            converge[0].push(ours_converge);
            converge[1].push(floor_converge);
            let writers = fill(store, &format!("growth-{count}"), 1, count).await?;
            let (Loaded { allocated, .. }, measured) = load(store, &format!("growth-{count}"), 1, count).await?;
            measured.end().await?;
            destroy_all(writers).await?;
            memory.push(of(allocated / 1e6));
        }
        for (lines, both) in [(&mut self.register, register), (&mut self.converge, converge)] {
            for (points, name) in both.into_iter().zip([B::NAME.to_owned(), format!("{}, floor", B::NAME)]) {
                lines.push(Line { name, points });
            }
        }
        self.memory.push(Line { name: B::NAME.to_owned(), points: memory });
        Ok(())
    }

    /// Draws what was measured, if anything was, as SVG.
    pub(crate) fn draw(&self, folder: &Path) -> Result<()> {
        draw(&folder.join("register.svg"), "registering n instances at once, in ms", &self.register)?;
        draw(&folder.join("converge.svg"), "until a reader has n new instances, in ms", &self.converge)?;
        draw(&folder.join("memory.svg"), "memory of n cached instances, in MB", &self.memory)
    }
}

fn draw(file: &Path, title: &str, lines: &[Line]) -> Result<()> {
    let values = || lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value);
    let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max));
    if lines.is_empty() {
        return Ok(());
    }
    let area = SVGBackend::new(file, (720, 440)).into_drawing_area();
    area.fill(&WHITE)?;
    let (from, to) = (COUNTS[0] as f64, COUNTS[COUNTS.len() - 1] as f64);
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d((from..to).log_scale(), (least / 1.5..most * 1.5).log_scale())?;
    chart.configure_mesh().light_line_style(WHITE).x_desc("n").draw()?;
    for (index, line) in lines.iter().enumerate() {
        // Those of one store have one colour.
        let floor = line.name.ends_with("floor");
        let store = lines[..index].iter().filter(|line| !line.name.ends_with("floor")).count() - usize::from(floor);
        let style = Palette99::pick(store).stroke_width(if floor { 1 } else { 3 });
        let drawn = chart.draw_series(LineSeries::new(line.points.iter().copied(), style).point_size(3))?;
        drawn.label(&line.name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(area.present()?)
}
