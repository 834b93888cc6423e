//! Subscriptions: each reads the store's log by revision at its own pace, so a slow one holds nothing and nobody up.

use std::{collections::BTreeSet, sync::Arc};

use async_stream::try_stream;
use futures::Stream;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    MemoryBackend, MemoryStore, entries, is_mark, key_of,
    link::Call,
    store::{Bytes, Commit, Event, Position, State},
    unavailable,
};
use crate::{
    Departure, Directory, InstanceId, Key, Layout, Malformed, NativeLayout, Record, Result, ServiceName, Update,
    Updates,
};

/// After how many revisions of other services a reader's cursor is moved, so that it stays in the log.
const QUIET_REVISIONS: u64 = 1000;

/// One subscription.
pub(super) struct Feed {
    store: MemoryStore,
    call: Call,
    reader: Arc<Reader>,
    news: watch::Receiver<()>,
    service: ServiceName,
    /// The paths that are followed, from inclusive to exclusive.
    range: (String, String),
    at: Position,
    /// The revision of the cursor that was given out last.
    told: u64,
}

/// What was taken from the store while it was locked, to be decoded when it is not any more.
pub(super) enum Taken {
    Commits(Vec<Arc<Commit>>),
    Everything { entries: Vec<(String, Bytes)>, at: Position, rewound: bool },
}

impl Feed {
    /// A subscription and what its first item tells.
    pub(super) fn open(
        state: &State,
        backend: &MemoryBackend,
        service: &ServiceName,
        since: Option<Position>,
    ) -> (Self, Taken) {
        let range = NativeLayout.followed(service);
        let here = since.filter(|since| is_past(state, *since));
        let resumed = here.filter(|here| state.after(here.revision).is_some());
        let first = match resumed {
            Some(_) => Taken::Commits(Vec::new()),
            None => everything(state, &range, since.is_some() && here.is_none()),
        };
        let at = resumed.unwrap_or(state.at);
        let feed = Self {
            store: backend.store.clone(),
            call: backend.link.call(),
            reader: Arc::clone(&backend.reader),
            news: backend.store.news(),
            service: service.clone(),
            range,
            at,
            told: at.revision,
        };
        (feed, first)
    }

    pub(super) fn stream(mut self, first: Taken) -> impl Stream<Item = Result<Updates>> {
        try_stream! {
            let mut first = self.read(first);
            yield first.pop().unwrap_or_else(|| self.tell(self.at, Vec::new()));
            loop {
                for updates in self.next().await? {
                    yield updates;
                }
            }
        }
    }

    /// Waits for changes.
    async fn next(&mut self) -> Result<Vec<Updates>> {
        loop {
            self.call.item().await?;
            let (taken, deadline) = self.store.with(|state| Ok((self.take(state)?, state.next_deadline())))?;
            let updates = self.read(taken);
            if !updates.is_empty() {
                return Ok(updates);
            }
            tokio::select! {
                _ = self.news.changed() => {}
                () = self.call.down() => {}
                () = until(deadline) => {}
            }
        }
    }

    fn take(&self, state: &State) -> Result<Taken> {
        if !is_past(state, self.at) {
            return Err(unavailable("the store was wiped"));
        }
        Ok(match state.after(self.at.revision) {
            Some(commits) => Taken::Commits(commits.cloned().collect()),
            None => everything(state, &self.range, false),
        })
    }

    fn read(&mut self, taken: Taken) -> Vec<Updates> {
        match taken {
            Taken::Everything { entries, at, rewound } => vec![self.tell(at, vec![self.reset(&entries, rewound)])],
            Taken::Commits(commits) => {
                let mut updates = Vec::new();
                for commit in commits {
                    self.at = commit.at;
                    if let Some(changes) = self.reader.changes(&commit, &self.range) {
                        updates.push(self.tell(commit.at, changes));
                    }
                }
                if self.at.revision - self.told >= QUIET_REVISIONS {
                    updates.push(self.tell(self.at, Vec::new()));
                }
                updates
            }
        }
    }

    fn tell(&mut self, at: Position, updates: Vec<Update>) -> Updates {
        (self.at, self.told) = (at, at.revision);
        Updates { cursor: Some(at.cursor()), updates }
    }

    fn reset(&self, entries: &[(String, Bytes)], rewound: bool) -> Update {
        let marks = entries.iter().filter(|(path, _)| is_mark(path));
        let left = marks.flat_map(|(_, bytes)| NativeLayout.decode_mark(bytes));
        let left = left.map(|id| Key::provider(self.service.clone(), id)).collect();
        Update::Reset { records: self.reader.records(entries), left, rewound }
    }
}

/// Whether anything that is followed may have changed after `at`.
pub(super) fn has_news(state: &State, service: &ServiceName, at: Position) -> bool {
    let range = NativeLayout.followed(service);
    match state.after(at.revision).filter(|_| is_past(state, at)) {
        Some(mut commits) => commits.any(|commit| commit.events.iter().any(|event| is_in(&range, &event.path))),
        // Nobody remembers.
        None => true,
    }
}

/// Whether the store has been at this point.
fn is_past(state: &State, at: Position) -> bool {
    at.history == state.at.history && at.revision <= state.at.revision
}

fn everything(state: &State, range: &(String, String), rewound: bool) -> Taken {
    let (from, to) = range;
    Taken::Everything { entries: entries(state, from, |path| path < to.as_str()), at: state.at, rewound }
}

fn is_in((from, to): &(String, String), path: &str) -> bool {
    from.as_str() <= path && path < to.as_str()
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Decodes records; malformed ones are skipped, counted, and logged once each.
pub(super) struct Reader(Malformed);

impl Default for Reader {
    fn default() -> Self {
        Self(Malformed::new(super::NAME))
    }
}

impl Reader {
    pub(super) fn malformed(&self) -> u64 {
        self.0.count()
    }

    pub(super) fn records(&self, entries: &[(String, Bytes)]) -> Vec<Record> {
        entries.iter().filter_map(|(path, bytes)| self.record(&key_of(path)?, path, bytes)).collect()
    }

    /// The changes of one revision within the range; `None` if nothing there changed.
    fn changes(&self, commit: &Commit, range: &(String, String)) -> Option<Vec<Update>> {
        let events: Vec<&Event> = commit.events.iter().filter(|event| is_in(range, &event.path)).collect();
        let marks = events.iter().filter(|event| is_mark(&event.path)).filter_map(|event| event.bytes.as_ref());
        let left: BTreeSet<InstanceId> = marks.flat_map(|bytes| NativeLayout.decode_mark(bytes)).collect();
        let changes = events.iter().filter_map(|event| {
            let key = key_of(&event.path)?;
            match &event.bytes {
                Some(bytes) => Some(match self.record(&key, &event.path, bytes) {
                    Some(record) => Update::Upsert(record),
                    // New readers would not see it: the others must not go on with what it was.
                    None => Update::Remove { key, cause: Departure::Unknown },
                }),
                None => {
                    let marked = key.directory == Directory::Providers && left.contains(&key.id);
                    let cause = if marked { Departure::Left } else { Departure::Unknown };
                    Some(Update::Remove { key, cause })
                }
            }
        });
        (!events.is_empty()).then(|| changes.collect())
    }

    fn record(&self, key: &Key, path: &str, bytes: &[u8]) -> Option<Record> {
        self.0.read(&NativeLayout, key, &[(path, bytes)])
    }
}
