//! Following a service: watch, then read, then read again what the watch says has changed.
//!
//! ```text
//! watch providers and overrides ──▶ sync ──▶ read all, Reset ──▶ wait for events ──▶ read those nodes, Upsert or Remove
//!                                                                    ▲                      │
//!                                                                    └──────────────────────┘
//! ```
//!
//! The subtle points:
//!
//! * An event says which node, not what is there now. Events of a burst are collected and their nodes read together. A
//!   node that was deleted and made again, as in a take-over, is there when it is read: nobody sees it go.
//! * The server sends the event of a change before any answer that shows the change. So who finds a node gone has met
//!   the mark of its departure, if there was one.
//! * A watch ends with its connection, whatever the client says: it does not renew persistent watches, as its
//!   `session/watch.rs` (0.11.2) asks for them by `index = index.max(index)`; and a server would not tell what happened
//!   meanwhile ([ZOOKEEPER-4698]). So the subscription ends with it, too.
//!
//! [ZOOKEEPER-4698]: https://issues.apache.org/jira/browse/ZOOKEEPER-4698

use std::{
    collections::{BTreeMap, HashSet},
    mem,
    panic::AssertUnwindSafe,
    sync::Arc,
};

use async_stream::try_stream;
use futures::{FutureExt, Stream, future::BoxFuture};
use registry_core::{Departure, Directory, Key, Record, Result, ServiceName, Update, Updates};
use zookeeper_client::{AddWatchMode, EventType, PersistentWatcher, WatchedEvent};

use crate::{
    cursor::Position,
    error::Failure,
    session::Link,
    space::{Node, Space},
    store::Store,
};

/// How often a burst is read before readers get to see it.
const ROUNDS: usize = 4;
/// How many departures are remembered that no deletion has followed: none, unless somebody else makes such nodes.
pub(crate) const MOST_LEFT: usize = 4096;

/// A service's providers and overrides.
#[derive(Clone, Debug)]
pub(crate) struct Followed {
    store: Store,
    service: ServiceName,
    providers: String,
    overrides: String,
}

/// A subscription that has begun, and what is to be told first.
pub(crate) struct Following {
    followed: Followed,
    link: Arc<Link>,
    tap: Tap,
    position: Position,
    first: Updates,
    /// What is still to be read.
    dirty: Dirty,
    /// The paths whose departure marks were seen, and whose deletion was not yet.
    left: HashSet<String>,
}

/// Where events come from, and the news that no more will come.
struct Tap {
    providers: PersistentWatcher,
    overrides: PersistentWatcher,
    lost: BoxFuture<'static, ()>,
}

/// What events say has changed.
#[derive(Default)]
pub(crate) struct Dirty {
    records: BTreeMap<Key, Touched>,
    /// Nodes came or went: the position is another.
    members: bool,
}

struct Touched {
    path: String,
    /// It was deleted last, and had a departure mark.
    left: bool,
}

/// What changed, as it was read.
type Changes = BTreeMap<Key, (Option<Record>, bool)>;

impl Followed {
    pub(crate) fn new(store: Store, service: ServiceName) -> Self {
        let providers = store.space.directory(&service, Directory::Providers);
        let overrides = store.space.directory(&service, Directory::Overrides);
        Self { store, service, providers, overrides }
    }

    /// Watches, then reads everything.
    pub(crate) async fn start(self, since: Option<&Position>) -> Result<Following, Failure> {
        let session = &self.store.session;
        let link = session.link().await?;
        let client = link.client();
        let (lost, root) = (session.lost(&link).boxed(), [self.store.space.root()]);
        // Requests leave when they are made, and are answered in that order: all in one round trip. A follower of the
        // leader that we saw before may be behind it, so it is asked to catch up first.
        let (providers, overrides, synced, root, listed, set) = tokio::join!(
            biased;
            session.call(&link, client.watch(&self.providers, AddWatchMode::PersistentRecursive)),
            session.call(&link, client.watch(&self.overrides, AddWatchMode::PersistentRecursive)),
            session.call(&link, client.sync("/")),
            self.store.stats(&link, &root),
            self.store.list(&link, &self.service, Directory::Providers),
            self.store.list(&link, &self.service, Directory::Overrides),
        );
        let tap = Tap { providers: providers?, overrides: overrides?, lost };
        synced?;
        let (root, listed, set) = (root?.pop().flatten(), listed?, set?);
        let now = Position::new(root, listed.stat, set.stat);
        let rewound = since.is_some_and(|since| since.is_rewound(&now));
        let position = match since {
            Some(since) if !rewound => now.after(since),
            _ => now,
        };
        let records = listed.records.into_iter().chain(set.records).collect();
        let reset = Update::Reset { records, left: Vec::new(), rewound };
        let first = Updates { cursor: Some(position.cursor()), updates: vec![reset] };
        Ok(Following { followed: self, link, tap, position, first, dirty: Dirty::default(), left: HashSet::new() })
    }

    /// What can be seen now of who is there.
    pub(crate) async fn position(&self, link: &Link) -> Result<Position, Failure> {
        let paths = [self.store.space.root(), &self.providers, &self.overrides];
        let mut stats = self.store.stats(link, &paths).await?.into_iter();
        let mut next = || stats.next().flatten();
        Ok(Position::new(next(), next(), next()))
    }

    /// Reads the nodes that changed, and where that leaves us.
    async fn read(&self, link: &Link, dirty: &Dirty) -> Result<(Option<Position>, Changes), Failure> {
        let paths: Vec<_> = dirty.records.values().map(|touched| touched.path.as_str()).collect();
        let position = async {
            // Before the nodes: what is read of them is not older.
            if dirty.members { self.position(link).await.map(Some) } else { Ok(None) }
        };
        let (position, found) = tokio::join!(biased; position, self.store.look(link, &paths));
        let read = dirty.records.iter().zip(found?).map(|((key, touched), found)| {
            let record = match found {
                Ok(found) => found.and_then(|found| self.store.space.read(key, &found.bytes)),
                // Closed to us: as it is for who lists.
                Err(_) => None,
            };
            (key.clone(), (record, touched.left))
        });
        Ok((position?, read.collect()))
    }

    pub(crate) fn cannot_follow(&self, failure: &Failure) -> registry_core::Error {
        failure.during(format!("cannot follow {}", self.service))
    }
}

impl Following {
    /// What was read, then every change.
    pub(crate) fn follow(mut self) -> impl Stream<Item = Result<Updates>> + Send {
        try_stream! {
            yield mem::replace(&mut self.first, Updates { cursor: None, updates: Vec::new() });
            loop {
                let next = self.next().await;
                yield next.map_err(|failure| self.followed.cannot_follow(&failure))?;
            }
        }
    }

    /// The next burst of changes.
    async fn next(&mut self) -> Result<Updates, Failure> {
        let Self { followed, link, tap, position, dirty, left, .. } = self;
        let space = &followed.store.space;
        while dirty.is_clean() {
            dirty.note(tap.event().await?, space, left);
        }
        let mut changes = Changes::new();
        for _ in 0..ROUNDS {
            tap.drain(dirty, space, left)?;
            if dirty.is_clean() {
                break;
            }
            let batch = mem::take(dirty);
            let (now, read) = tap.during(followed.read(link, &batch), dirty, space, left).await?;
            changes.extend(read);
            if let Some(now) = now {
                *position = now.after(position);
            }
        }
        let updates = changes.into_iter().map(|(key, (record, left))| match record {
            Some(record) => Update::Upsert(record),
            None => {
                let left = left || dirty.has_left(&key);
                Update::Remove { key, cause: if left { Departure::Left } else { Departure::Unknown } }
            }
        });
        Ok(Updates { updates: updates.collect(), cursor: Some(position.cursor()) })
    }
}

impl Tap {
    /// The next event. An error means that there are no more.
    async fn event(&mut self) -> Result<WatchedEvent, Failure> {
        // The client panics where its task is ended under a watch (0.11.2, `session/watch.rs`, `recv`: it unwraps).
        let event = tokio::select! {
            biased;
            () = &mut self.lost => return Err(Failure::Interrupted),
            event = AssertUnwindSafe(self.overrides.changed()).catch_unwind() => event,
            event = AssertUnwindSafe(self.providers.changed()).catch_unwind() => event,
        };
        match event {
            Ok(event) if event.event_type != EventType::Session => Ok(event),
            _ => Err(Failure::Interrupted),
        }
    }

    /// What a request answers. Takes note of all events that came before the answer.
    async fn during<T>(
        &mut self,
        request: impl Future<Output = Result<T, Failure>>,
        dirty: &mut Dirty,
        space: &Space,
        left: &mut HashSet<String>,
    ) -> Result<T, Failure> {
        tokio::pin!(request);
        let answer = loop {
            tokio::select! {
                biased;
                event = self.event() => dirty.note(event?, space, left),
                answer = &mut request => break answer?,
            }
        };
        // One may have come between the last look at the events and the one at the answer.
        self.drain(dirty, space, left)?;
        Ok(answer)
    }

    /// Takes note of all events that are there.
    fn drain(&mut self, dirty: &mut Dirty, space: &Space, left: &mut HashSet<String>) -> Result<(), Failure> {
        while let Some(event) = self.event().now_or_never() {
            dirty.note(event?, space, left);
        }
        Ok(())
    }
}

impl Dirty {
    fn is_clean(&self) -> bool {
        self.records.is_empty() && !self.members
    }

    pub(crate) fn has_left(&self, key: &Key) -> bool {
        self.records.get(key).is_some_and(|touched| touched.left)
    }

    pub(crate) fn note(&mut self, event: WatchedEvent, space: &Space, left: &mut HashSet<String>) {
        let WatchedEvent { event_type, path, .. } = event;
        self.members |= event_type != EventType::NodeDataChanged;
        match space.node(&path) {
            Node::Mark(record) if event_type == EventType::NodeCreated => {
                if left.len() >= MOST_LEFT {
                    left.clear();
                }
                left.insert(record);
            }
            Node::Record(key) => {
                let marked = event_type != EventType::NodeDataChanged && left.remove(&path);
                let left = marked && event_type == EventType::NodeDeleted;
                self.records.insert(key, Touched { path, left });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use registry_core::NativeLayout;

    use super::*;

    const ONE: &str = "/orders/providers/1";

    fn noted(events: &[(EventType, &str)]) -> Dirty {
        let space = Space::new("", Arc::new(NativeLayout));
        let (mut dirty, mut left) = (Dirty::default(), HashSet::new());
        for (event_type, path) in events {
            dirty.note(WatchedEvent::new(*event_type, *path), &space, &mut left);
        }
        dirty
    }

    #[test]
    fn a_deletion_that_follows_its_mark_is_a_departure() {
        use EventType::{NodeCreated, NodeDataChanged, NodeDeleted};
        let key = Key::provider("orders".parse().unwrap(), "1".parse().unwrap());
        let mark = "/orders/providers/~left~1";
        let gone = [(NodeCreated, mark), (NodeDeleted, mark), (NodeDeleted, ONE)];
        assert!(noted(&gone).has_left(&key) && noted(&gone).members);
        assert!(!noted(&gone[2..]).has_left(&key));
        let back = [&gone[..], &[(NodeCreated, ONE)]].concat();
        assert!(!noted(&back).has_left(&key), "it is there again");
        let crashed = [&back[..], &[(NodeDeleted, ONE)]].concat();
        assert!(!noted(&crashed).has_left(&key), "and gone again, without a word");
        assert!(!noted(&[(NodeDataChanged, ONE)]).members);
        assert!(noted(&[(NodeDataChanged, "/orders/providers")]).is_clean());
        assert!(noted(&[(NodeDeleted, "/orders/providers")]).records.is_empty());
    }
}
