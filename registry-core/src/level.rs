//! Gauges that several holders in one process share.

use std::{
    collections::HashMap,
    fmt, mem,
    sync::{LazyLock, Mutex, PoisonError},
};

use metrics::{Key, Label, Metadata};

/// What all holders of a gauge say, added up. Told as a whole each time: a recorder that is installed late, or forgets
/// what is idle, is right again at the next report.
static SUMS: LazyLock<Mutex<HashMap<Key, f64>>> = LazyLock::new(Mutex::default);

static METADATA: Metadata<'static> = Metadata::new("service_registry", metrics::Level::INFO, Some(module_path!()));

/// One holder's part of a gauge, 0 once it is dropped. Whole numbers add up exactly.
pub struct Level {
    key: Key,
    part: f64,
}

impl Level {
    /// A part of 0, which is not told before [`set`](Self::set).
    #[must_use]
    pub fn new<const N: usize>(name: &'static str, labels: [(&'static str, &str); N]) -> Self {
        let labels: Vec<_> = labels.into_iter().map(|(label, value)| Label::new(label, value.to_owned())).collect();
        Self { key: Key::from_parts(name, labels), part: 0.0 }
    }

    /// Makes it so much, and tells the recorder the sum.
    pub fn set(&mut self, part: u32) {
        let part = f64::from(part);
        let mut sums = SUMS.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = sums.entry(self.key.clone()).or_default();
        *sum += part - mem::replace(&mut self.part, part);
        // Under the lock, so that the last one told is the last one counted.
        metrics::with_recorder(|recorder| recorder.register_gauge(&self.key, &METADATA)).set(*sum);
        if *sum == 0.0 {
            sums.remove(&self.key);
        }
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        if self.part != 0.0 {
            self.set(0);
        }
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Level").field("name", &self.key.name()).field("part", &self.part).finish()
    }
}
