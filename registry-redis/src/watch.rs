//! Following services: messages are fast and may be lost, the log and a bounded poll are the truth.
//!
//! ```text
//! subscribe ─confirmed─▶ read: resume from `since`, or everything ─▶ wait ─┐
//!                                  ▲                                       │
//!                                  └── a hint, or the poll: look, read on ─┤
//!                                      a message that continues the chain: apply it
//! ```
//!
//! The subtle point is the order: a channel is confirmed before the first read, so that no change falls in between;
//! whatever a message tells is applied only if it continues the chain at our position. Messages wait in an inbox of
//! bounded size; what does not fit becomes a hint.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use async_stream::try_stream;
use futures::{Stream, future::join_all};
use redis::{PushInfo, PushKind, Value};
use registry_core::{Departure, Result, ServiceName, Update, Updates};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};
use tracing::debug;

use crate::{
    error::{Class, Failure, NAME},
    link::{Line, Push},
    read::{Look, News, Reader},
    scripts::CHANGED,
    space::{Entry, Half, Keys, Message, Position, id_of},
    store::{Request, Store, in_ms},
};

/// How many bytes of changes wait in an inbox.
const WAITING: usize = 4 << 20;
/// How many services are compared in one script.
const COMPARED: usize = 250;
/// No two polls are closer than this.
const CLOSEST: Duration = Duration::from_millis(50);
/// Those who notice an end at the same time look within this.
const SPREAD: Duration = Duration::from_millis(150);

/// Whoever follows something, by channel.
#[derive(Default)]
pub(crate) struct Hub {
    /// Short, never held across an `.await`.
    channels: Mutex<BTreeMap<Vec<u8>, Vec<Weak<Inbox>>>>,
    /// One change of the subscriptions at a time: an end must not overtake a new beginning.
    subscribing: tokio::sync::Mutex<()>,
    /// The time of the next poll may have changed.
    replan: Notify,
}

/// What waits for one subscription.
pub(crate) struct Inbox {
    keys: Keys,
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Default)]
struct Waiting {
    /// The head that `entries` lead to; `None` before the first read.
    tail: Option<String>,
    entries: Vec<Entry>,
    /// The size of those.
    size: usize,
    /// There is more than that.
    more: bool,
    /// Somebody has to look who is alive.
    look: bool,
    /// Somebody is taken for dead and still there: it may come back without a word.
    judged: bool,
    /// Somebody has to look then.
    due: Option<Instant>,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_in(&self, message: Message) {
        let mut waiting = self.lock();
        if waiting.tail.as_ref() == Some(&message.head) {
            return;
        }
        match message.entry {
            Some(entry) if Some(&entry.previous) == waiting.tail.as_ref() && waiting.size < WAITING => {
                waiting.tail = Some(message.head);
                waiting.size += entry.size();
                waiting.entries.push(entry);
            }
            _ => waiting.more = true,
        }
        drop(waiting);
        self.wake.notify_one();
    }

    /// There may be something, or somebody has to look.
    fn hint(&self) {
        let mut waiting = self.lock();
        (waiting.more, waiting.look) = (true, true);
        drop(waiting);
        self.wake.notify_one();
    }
}

impl Hub {
    /// What happens with what servers push.
    pub(crate) fn push(self: &Arc<Self>) -> Push {
        let hub = Arc::downgrade(self);
        Arc::new(move |push: PushInfo| {
            let (Some(hub), Some(Value::BulkString(channel))) = (hub.upgrade(), push.data.first()) else { return true };
            match (push.kind, push.data.get(1)) {
                (PushKind::Message | PushKind::SMessage, Some(Value::BulkString(payload))) => {
                    hub.deliver(channel, payload);
                    true
                }
                // Not asked for: the slot has moved. The client takes the word for the answer to whatever it asked last
                // (`send_result` of redis 1.8.1, src/aio/multiplexed_connection.rs), so the connection is of no use.
                (PushKind::Unsubscribe | PushKind::SUnsubscribe, _) => hub.inboxes(channel).is_empty(),
                _ => true,
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, Vec<Weak<Inbox>>>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inboxes(&self, channel: &[u8]) -> Vec<Arc<Inbox>> {
        self.lock().get(channel).into_iter().flatten().filter_map(Weak::upgrade).collect()
    }

    fn deliver(&self, channel: &[u8], payload: &[u8]) {
        for inbox in self.inboxes(channel) {
            match Message::parse(payload) {
                Some(message) => inbox.take_in(message),
                // Written by hand: a wake-up all the same.
                None => inbox.hint(),
            }
        }
    }

    /// Takes an inbox out; `true` if it was the last one of its channel.
    fn forget(&self, channel: &[u8], inbox: &Arc<Inbox>) -> bool {
        let mut channels = self.lock();
        let Some(inboxes) = channels.get_mut(channel) else { return false };
        inboxes.retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(inbox)));
        let last = inboxes.is_empty();
        if last {
            channels.remove(channel);
        }
        last
    }

    fn followed(&self) -> Vec<Arc<Inbox>> {
        self.lock().values().flatten().filter_map(Weak::upgrade).collect()
    }

    /// Compares what is followed with the store, for ever: at every poll, and when the nearest ttl ends.
    pub(crate) async fn poll(self: Arc<Self>, reader: Reader, period: Duration) {
        let mut next = Instant::now() + period.mul_f64(rand::random());
        let mut closest = Instant::now();
        loop {
            let due = self.followed().iter().filter_map(|inbox| inbox.lock().due).min();
            let at = due.map_or(next, |due| next.min(due + SPREAD.mul_f64(rand::random()))).max(closest);
            tokio::select! {
                () = sleep_until(at) => {}
                () = self.replan.notified() => continue,
            }
            let due = compare(&reader, &self.followed()).await;
            let now = Instant::now();
            let soon = due.map_or(now + period, |due| due + SPREAD.mul_f64(rand::random()));
            next = soon.min(now + period);
            closest = now + CLOSEST;
        }
    }
}

/// Wakes those whose service has changed or has to be looked at; gives when the next of the others has to be.
async fn compare(reader: &Reader, followed: &[Arc<Inbox>]) -> Option<Instant> {
    let mut groups: BTreeMap<u16, Vec<(&Arc<Inbox>, String)>> = BTreeMap::new();
    for inbox in followed {
        let mut waiting = inbox.lock();
        waiting.due = None;
        let Some(tail) = waiting.tail.clone() else { continue };
        if waiting.judged {
            drop(waiting);
            inbox.hint();
            continue;
        }
        let slot = if reader.store.is_cluster() { inbox.keys.slot } else { 0 };
        groups.entry(slot).or_default().push((inbox, tail));
    }
    let chunks = groups.values().flat_map(|group| group.chunks(COMPARED));
    let rounds = chunks.map(|chunk| async move {
        compare_chunk(reader, chunk).await.unwrap_or_else(|failure| {
            debug!(backend = NAME, error = %failure, "not polled");
            // They try to read, and if that fails too, their readers know.
            chunk.iter().for_each(|(inbox, _)| inbox.hint());
            None
        })
    });
    join_all(rounds.collect::<Vec<_>>()).await.into_iter().flatten().min()
}

/// The same for some that are on one server.
async fn compare_chunk(reader: &Reader, chunk: &[(&Arc<Inbox>, String)]) -> Result<Option<Instant>, Failure> {
    let keys = chunk.iter().flat_map(|(inbox, _)| [&inbox.keys.records, &inbox.keys.expiry]);
    let args = chunk.iter().map(|(_, tail)| tail.as_bytes().into());
    let request =
        Request::Script { script: &CHANGED, keys: keys.map(|key| key.into()).collect(), args: args.collect() };
    let slot = chunk.first().map_or(0, |(inbox, _)| inbox.keys.slot);
    let answer = reader.store.ask(slot, &request).await?;
    let answer: Vec<Option<u64>> = redis::from_redis_value(answer).map_err(|_| Failure::odd("a comparison"))?;
    let mut answer = answer.into_iter();
    let (now, due) = (answer.next().flatten(), answer.next().flatten());
    for position in answer.flatten() {
        if let Some((inbox, _)) = usize::try_from(position).ok().and_then(|position| chunk.get(position)) {
            inbox.hint();
        }
    }
    Ok(now.zip(due).map(|(now, due)| in_ms(due, now)))
}

/// A subscription of one service.
pub(crate) struct Followed {
    reader: Reader,
    service: ServiceName,
    position: Position,
    /// What the last look told.
    look: Look,
    subscription: Subscription,
}

/// A confirmed channel; dropped, it ends.
struct Subscription {
    hub: Arc<Hub>,
    store: Arc<Store>,
    inbox: Arc<Inbox>,
    line: Line,
    sharded: bool,
}

impl Subscription {
    async fn open(hub: &Arc<Hub>, reader: &Reader, keys: Keys) -> Result<Self, Failure> {
        let sharded = reader.store.has_sharded_channels(keys.slot).await?;
        let line = reader.store.messages(keys.slot).await?;
        let _one_at_a_time = hub.subscribing.lock().await;
        let channel = keys.channel.clone();
        let inbox = Arc::new(Inbox { keys, waiting: Mutex::default(), wake: Notify::new() });
        hub.lock().entry(channel.clone().into_bytes()).or_default().push(Arc::downgrade(&inbox));
        let subscription = Self { hub: hub.clone(), store: reader.store.clone(), inbox, line, sharded };
        let word = if sharded { "SSUBSCRIBE" } else { "SUBSCRIBE" };
        reader.store.turn(&subscription.line, word, &channel).await?;
        Ok(subscription)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let channel = self.inbox.keys.channel.clone();
        if !self.hub.forget(channel.as_bytes(), &self.inbox) || self.line.closed.is_cancelled() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (hub, store, line) = (self.hub.clone(), self.store.clone(), self.line.clone());
        let word = if self.sharded { "SUNSUBSCRIBE" } else { "UNSUBSCRIBE" };
        runtime.spawn(async move {
            let _one_at_a_time = hub.subscribing.lock().await;
            if hub.inboxes(channel.as_bytes()).is_empty() {
                let ended = store.turn(&line, word, &channel);
                // Whether it is confirmed or the connection ends: nothing comes any more.
                let _ = line.closed.run_until_cancelled(ended).await;
            }
        });
    }
}

impl Followed {
    /// Starts from `since` where that is possible, else with everything; gives the first item too.
    pub(crate) async fn start(
        hub: &Arc<Hub>,
        reader: &Reader,
        service: &ServiceName,
        since: Option<Position>,
    ) -> Result<(Self, Updates), Failure> {
        let keys = reader.space.keys(service, Half::Followed);
        let subscription = Subscription::open(hub, reader, keys).await?;
        let (reader, service) = (reader.clone(), service.clone());
        let known = since.is_some();
        let position = since.unwrap_or_else(|| Position::new(None, None));
        let mut followed = Self { reader, service, position, look: Look::default(), subscription };
        let before = followed.look_around().await?;
        let first = if known { followed.read_on(Some(before)).await? } else { followed.read_everything(false).await? };
        Ok((followed, first))
    }

    /// Gives the first item, and then what happens after it.
    pub(crate) fn follow(mut self, first: Updates) -> impl Stream<Item = Result<Updates>> + Send {
        try_stream! {
            yield first;
            loop {
                let news = self.next().await;
                let updates = news.map_err(|failure| cannot_follow(&self.service, &failure))?;
                if let Some(updates) = updates {
                    yield updates;
                }
            }
        }
    }

    fn keys(&self) -> &Keys {
        &self.subscription.inbox.keys
    }

    async fn next(&mut self) -> Result<Option<Updates>, Failure> {
        let closed = &self.subscription.line.closed;
        tokio::select! {
            () = self.subscription.inbox.wake.notified() => {}
            () = closed.cancelled() => {
                return Err(Failure::new(Class::Dropped, "the connection for messages ended"));
            }
        }
        let (entries, mut more, look) = {
            let mut waiting = self.subscription.inbox.lock();
            waiting.size = 0;
            let Waiting { entries, more, look, .. } = &mut *waiting;
            (std::mem::take(entries), std::mem::take(more), std::mem::take(look))
        };
        let mut fresh = Vec::new();
        for entry in entries {
            if entry.previous == self.position.head {
                self.position.head.clone_from(&entry.head);
                fresh.push(entry);
            } else if !self.is_past(&entry) {
                more = true;
            }
        }
        let mut updates = self.tell(&fresh);
        if more {
            let before = if look { Some(self.look_around().await?) } else { None };
            updates.extend(self.read_on(before).await?.updates);
        }
        self.settle();
        Ok((!updates.is_empty()).then(|| self.at(updates)))
    }

    /// Whether we have read past an entry.
    fn is_past(&self, entry: &Entry) -> bool {
        id_of(&entry.head).zip(id_of(&self.position.head)).is_some_and(|(entry, ours)| entry <= ours)
    }

    /// What comes from now on continues here.
    fn settle(&self) {
        let mut waiting = self.subscription.inbox.lock();
        if waiting.entries.is_empty() {
            waiting.tail = Some(self.position.head.clone());
        }
    }

    fn at(&self, updates: Vec<Update>) -> Updates {
        // Who is dead and still there comes back without an entry: nobody can resume from here by the log alone.
        let position = Position { anew: !self.look.dead.is_empty(), ..self.position.clone() };
        Updates { cursor: Some(position.cursor()), updates }
    }

    fn tell(&mut self, entries: &[Entry]) -> Vec<Update> {
        let changes = || entries.iter().flat_map(|entry| &entry.changes);
        if !self.look.dead.is_empty() {
            let changed: BTreeSet<_> = changes().map(|change| &change.field).collect();
            self.look.dead.retain(|dead| !changed.contains(dead));
        }
        changes().filter_map(|change| self.reader.update(&self.service, change)).collect()
    }

    /// Reads on from where we are: everything, if that is not possible. After a look, that is, so that what it takes out
    /// is read at once, who was taken for dead before it.
    async fn read_on(&mut self, before: Option<Vec<Vec<u8>>>) -> Result<Updates, Failure> {
        match self.reader.news(self.keys(), &self.position).await? {
            News::Entries(entries, position) => {
                let mut updates = self.tell(&entries);
                self.position = position;
                if let Some(before) = &before {
                    updates.extend(self.judge(before).await?);
                }
                self.settle();
                Ok(self.at(updates))
            }
            News::Broken { rewound } => {
                if before.is_none() {
                    self.look_around().await?;
                }
                self.read_everything(rewound).await
            }
        }
    }

    /// Looks who is alive; gives who was taken for dead before.
    async fn look_around(&mut self) -> Result<Vec<Vec<u8>>, Failure> {
        let look = self.reader.look(self.keys(), Half::Followed, &self.look).await?;
        let before = std::mem::replace(&mut self.look, look).dead;
        let mut waiting = self.subscription.inbox.lock();
        waiting.due = self.look.due.map(|due| in_ms(due, self.look.now));
        waiting.judged = !self.look.dead.is_empty();
        drop(waiting);
        self.subscription.hub.replan.notify_one();
        Ok(before)
    }

    /// The dead that nobody took out are gone for us, and back if their owner renewed them after all.
    async fn judge(&mut self, before: &[Vec<u8>]) -> Result<Vec<Update>, Failure> {
        if before.is_empty() && self.look.dead.is_empty() {
            return Ok(Vec::new());
        }
        let (before, now): (BTreeSet<_>, BTreeSet<_>) = (before.iter().collect(), self.look.dead.iter().collect());
        let died = now.difference(&before).filter_map(|field| self.reader.space.place(&self.service, field));
        let mut updates: Vec<_> = died.map(|key| Update::Remove { key, cause: Departure::Unknown }).collect();
        let revived = before.difference(&now).copied().cloned().collect();
        for (field, value) in self.reader.values(self.keys(), revived).await? {
            let record = value.and_then(|value| self.reader.record(&self.service, &field, &value));
            updates.extend(record.map(Update::Upsert));
        }
        Ok(updates)
    }

    async fn read_everything(&mut self, rewound: bool) -> Result<Updates, Failure> {
        let everything = self.reader.everything(&self.service, self.keys()).await?;
        let left = self.reader.left(&self.service, self.keys(), &everything.records).await?;
        let alive = everything.records.into_iter().filter(|(field, _)| !self.look.dead.contains(field));
        let records = alive.filter_map(|(_, record)| record).collect();
        self.position = everything.position.unwrap_or_else(|| Position::new(None, None));
        debug!(backend = NAME, service = %self.service, rewound, position = ?self.position, "read everything");
        self.settle();
        Ok(self.at(vec![Update::Reset { records, left, rewound }]))
    }
}

pub(crate) fn cannot_follow(service: &ServiceName, failure: &Failure) -> registry_core::Error {
    failure.during(format!("cannot follow {service}"))
}

/// Whether anything changed after a position.
pub(crate) async fn has_news(reader: &Reader, service: &ServiceName, at: &Position) -> Result<bool, Failure> {
    let now = reader.position(&reader.space.keys(service, Half::Followed)).await?;
    Ok((now.epoch, now.head) != (at.epoch.clone(), at.head.clone()))
}
