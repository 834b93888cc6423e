//! Reading a service: everything, or what came after a position.
//!
//! Everything is read a page at a time, so that no answer is too large; what changes meanwhile is in the log, and is
//! applied on top. What came after a position is a chain: each entry names the head before it. Where the chain breaks,
//! somebody trimmed the log, wrote by hand, or it is another history.
//!
//! The log does not repeat what was put together with others, so that it stays small. It is asked for, together with the
//! head: if that has moved on meanwhile, so may have the records, and what moved them is read, too.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use redis::Value;
use registry_core::{Departure, Directory, Key, Record, ServiceName, Update, encode_segment};

use tokio::time::sleep;

use crate::{
    error::{Class, Failure},
    scripts::{LOOK, Script},
    space::{Change, Entry, HEAD, Half, Keys, META, NONE, Position, Space, What, id_of},
    store::{Request, Store, command},
};

/// How many records a page has, about; a small hash comes in one anyway.
const PAGE: &[u8] = b"1000";
/// How many entries of the log are read at once.
const ENTRIES: usize = 500;
/// More than a log has.
const WHOLE_LOG: usize = 10_000;
/// How many records are asked for at once.
const VALUES: usize = 500;
/// How often everything is read anew because it changed past the log meanwhile.
const ROUNDS: usize = 5;
/// How often the log is read on because it went on while it was read.
const MOST_ROUNDS: u64 = 100;

/// Reads services.
#[derive(Clone, Debug)]
pub(crate) struct Reader {
    pub(crate) store: Arc<Store>,
    pub(crate) space: Space,
}

/// What a look at who is alive told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    /// The server's clock, and before when nobody is judged.
    pub(crate) now: u64,
    pub(crate) safe: u64,
    /// When somebody has to look again, by the server's clock.
    pub(crate) due: Option<u64>,
    /// Those that are dead and that we could not take out.
    pub(crate) dead: Vec<Vec<u8>>,
}

/// What came after a position.
#[derive(Debug)]
pub(crate) enum News {
    /// These, and it leads to that position.
    Entries(Vec<Entry>, Position),
    /// The chain breaks.
    Broken {
        /// It is not the history that the position is from.
        rewound: bool,
    },
}

/// Everything of one half of a service.
#[derive(Debug, Default)]
pub(crate) struct Everything {
    /// By its field; `None` for what is malformed or lies elsewhere.
    pub(crate) records: BTreeMap<Vec<u8>, Option<Record>>,
    pub(crate) position: Option<Position>,
}

/// Some of the records of a service.
struct Page {
    /// The connection that it came on.
    line: u64,
    next: Vec<u8>,
    values: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Reader {
    /// Runs a script of one half of a service; `gone` says whether it has to do with the mark that the owner is gone.
    pub(crate) async fn run(
        &self,
        script: &'static Script,
        keys: &Keys,
        half: Half,
        (owner, gone): (&str, bool),
        rest: Vec<Cow<'_, [u8]>>,
    ) -> Result<Value, Failure> {
        let say = match half {
            Half::Consumers => "",
            Half::Followed if self.store.has_sharded_channels(keys.slot).await? => "SPUBLISH",
            Half::Followed => "PUBLISH",
        };
        let mut args: Vec<Cow<'_, [u8]>> = Vec::with_capacity(4 + rest.len());
        args.extend([nonce().into(), say.as_bytes().into(), keys.channel.as_bytes().into()]);
        args.push(bytes(encode_segment(owner)));
        args.extend(rest);
        let request = Request::Script { script, keys: keys.of(half, gone.then_some(owner)), args };
        self.store.ask(keys.slot, &request).await
    }

    /// Judges who is alive, and takes out who is not.
    pub(crate) async fn look(&self, keys: &Keys, half: Half, since: &Look) -> Result<Look, Failure> {
        // A copy that is cut off from its primary must not take everybody for dead: there, others have to have looked.
        let known = if self.store.is_primary(keys.slot).await? { since } else { &Look::default() };
        loop {
            let rest = vec![number(known.now), number(known.safe)];
            let answer = self.run(&LOOK, keys, half, (NONE, false), rest).await?;
            let (now, safe, due, more, dead): (u64, u64, Option<u64>, u8, Vec<Vec<u8>>) =
                redis::from_redis_value(answer).map_err(|_| Failure::odd("a look"))?;
            if more == 0 {
                return Ok(Look { now, safe, due, dead });
            }
        }
    }

    /// Whether it is judged who is alive.
    pub(crate) async fn is_judged(&self, keys: &Keys, now: u64) -> Result<bool, Failure> {
        let meta = command(&["HMGET", &keys.records, "~seen", "~safe", "~ttl"], []);
        let (seen, safe, ttl): (Option<u64>, Option<u64>, Option<u64>) =
            redis::from_redis_value(self.store.ask(keys.slot, &meta).await?)
                .map_err(|_| Failure::odd("when somebody looked"))?;
        let [seen, safe, ttl] = [seen, safe, ttl].map(Option::unwrap_or_default);
        Ok(is_judged(now, seen, safe, ttl))
    }

    pub(crate) async fn position(&self, keys: &Keys) -> Result<Position, Failure> {
        let meta = command(&["HMGET", &keys.records, "~epoch", "~head"], []);
        let (epoch, head): (Option<String>, Option<String>) =
            redis::from_redis_value(self.store.ask(keys.slot, &meta).await?)
                .map_err(|_| Failure::odd("the head of a log"))?;
        Ok(Position::new(epoch, head))
    }

    async fn range(&self, keys: &Keys, from: &str, to: &str, count: usize) -> Result<Vec<Entry>, Failure> {
        let count = count.to_string();
        let range = command(&["XRANGE", &keys.log, from, to, "COUNT", &count], []);
        Entry::parse_all(self.store.ask(keys.slot, &range).await?)
    }

    /// What came after a position, with all that was put.
    pub(crate) async fn news(&self, keys: &Keys, since: &Position) -> Result<News, Failure> {
        let (mut news, mut at, mut filled) = (Vec::new(), since.clone(), 0);
        for round in 0..MOST_ROUNDS {
            // Under a storm of changes, so that each round gathers more of them.
            if round > 3 {
                sleep(Duration::from_millis(round)).await;
            }
            match self.chain(keys, &at).await? {
                News::Entries(more, position) => {
                    news.extend(more);
                    at = position;
                }
                broken => return Ok(broken),
            }
            let head = self.fill(keys, &mut news[filled..]).await?;
            filled = news.len();
            if head.is_none_or(|head| head == at.head.as_bytes()) {
                return Ok(News::Entries(news, at));
            }
            // What was put may be newer than where the entries lead: those in between belong to it.
        }
        Err(too_fast())
    }

    /// The entries after a position.
    async fn chain(&self, keys: &Keys, since: &Position) -> Result<News, Failure> {
        let mut at = since.clone();
        let mut news = Vec::new();
        loop {
            // In this order: the entries lead at least to the head that is read before them.
            let from = format!("({}", at.id().unwrap_or("0-0"));
            let count = if at.id().is_some() { ENTRIES } else { WHOLE_LOG };
            let (now, entries) = tokio::join!(biased; self.position(keys), self.range(keys, &from, "+", count));
            let (now, mut entries) = (now?, entries?);
            if at.id().is_none() {
                // A head that was written by hand does not say where in the log it is.
                entries.drain(..entries.iter().position(|entry| entry.previous == at.head).unwrap_or(entries.len()));
            }
            if now.epoch != at.epoch {
                return Ok(News::Broken { rewound: since.epoch != NONE });
            }
            if since.anew {
                return self.broken(keys, &at, &now).await;
            }
            let full = entries.len() == ENTRIES;
            let moved = !entries.is_empty();
            for entry in entries {
                if entry.previous != at.head {
                    return self.broken(keys, &at, &now).await;
                }
                at.head.clone_from(&entry.head);
                news.push(entry);
            }
            if !moved && now.head != at.head {
                return self.broken(keys, &at, &now).await;
            }
            if !full {
                return Ok(News::Entries(news, at));
            }
        }
    }

    /// Gets what the log leaves out, and gives the head at that time; `None` if nothing is left out. What is not there any
    /// more is dropped: a later entry says what became of it.
    async fn fill(&self, keys: &Keys, news: &mut [Entry]) -> Result<Option<Vec<u8>>, Failure> {
        let is_left_out = |change: &Change| change.what == What::Put && change.value.is_none();
        let changes = news.iter().flat_map(|entry| &entry.changes);
        let fields: BTreeSet<_> = changes.filter(|change| is_left_out(change)).map(|change| &change.field).collect();
        let fields: Vec<_> = fields.into_iter().cloned().collect();
        let (mut head, mut values) = (None, BTreeMap::new());
        for chunk in fields.chunks(VALUES) {
            let mut there = self.values(keys, [&[HEAD.to_vec()], chunk].concat()).await?.into_iter();
            head = there.next().map(|(_, head)| head.unwrap_or_default());
            values.extend(there);
        }
        for change in news.iter_mut().flat_map(|entry| &mut entry.changes).filter(|change| is_left_out(change)) {
            change.value = values.get(&change.field).cloned().flatten();
        }
        news.iter_mut().for_each(|entry| entry.changes.retain(|change| !is_left_out(change)));
        Ok(head)
    }

    /// Whether the store has been at this position.
    async fn broken(&self, keys: &Keys, at: &Position, now: &Position) -> Result<News, Failure> {
        let Some(id) = at.id() else { return Ok(News::Broken { rewound: false }) };
        let (ours, first) = tokio::join!(self.range(keys, id, id, 1), self.range(keys, "-", "+", 1));
        let (ours, first) = (ours?, first?);
        let rewound = match (ours.first(), first.first()) {
            (Some(entry), _) => entry.head != at.head,
            // Ours was trimmed, unless there are older ones.
            (None, Some(first)) => id_of(&first.head) <= id_of(&at.head),
            (None, None) => id_of(&now.head).is_some_and(|now| Some(now) < id_of(&at.head)),
        };
        Ok(News::Broken { rewound })
    }

    /// Everything, as it was at one position. Each page becomes records before the next one is asked for: of ten thousand
    /// there need not be what was read, too.
    pub(crate) async fn everything(&self, service: &ServiceName, keys: &Keys) -> Result<Everything, Failure> {
        let read = |(field, value): (Vec<u8>, Vec<u8>)| {
            let record = self.record(service, &field, &value);
            (field, record)
        };
        for _ in 0..ROUNDS {
            // In this order: what changes after the position is in the log.
            let (before, first) = tokio::join!(biased; self.position(keys), self.page(keys, b"0"));
            let (before, Page { line, mut next, values }) = (before?, first?);
            let mut records: BTreeMap<_, _> = values.into_iter().map(read).collect();
            let mut same = true;
            while same && next != b"0" {
                let page = self.page(keys, &next).await?;
                // What one server calls the next page is none to another, or to the same after a restart.
                same = page.line == line;
                next = page.next;
                records.extend(page.values.into_iter().map(read));
            }
            if !same {
                continue;
            }
            if let News::Entries(entries, position) = self.news(keys, &before).await? {
                for change in entries.into_iter().flat_map(|entry| entry.changes) {
                    match change.value {
                        Some(value) => records.extend([read((change.field, value))]),
                        None => drop(records.remove(&change.field)),
                    }
                }
                return Ok(Everything { records, position: Some(position) });
            }
        }
        Err(too_fast())
    }

    async fn page(&self, keys: &Keys, from: &[u8]) -> Result<Page, Failure> {
        let scan = command(&["HSCAN", &keys.records], [from, b"COUNT", PAGE]);
        let (line, answer) = self.store.ask_on(keys.slot, &scan).await?;
        let (next, mut values): (Vec<u8>, BTreeMap<Vec<u8>, Vec<u8>>) =
            redis::from_redis_value(answer).map_err(|_| Failure::odd("a page of records"))?;
        values.retain(|field, _| field.first() != Some(&META));
        Ok(Page { line, next, values })
    }

    /// The values at fields, where there are any.
    pub(crate) async fn values(
        &self,
        keys: &Keys,
        fields: Vec<Vec<u8>>,
    ) -> Result<Vec<(Vec<u8>, Option<Vec<u8>>)>, Failure> {
        if fields.is_empty() {
            return Ok(Vec::new());
        }
        let get = command(&["HMGET", &keys.records], fields.iter().map(Vec::as_slice));
        let values: Vec<Option<Vec<u8>>> = redis::from_redis_value(self.store.ask(keys.slot, &get).await?)
            .map_err(|_| Failure::odd("the values of records"))?;
        Ok(fields.into_iter().zip(values).collect())
    }

    /// Who left last and is not back, as far as the log tells.
    pub(crate) async fn left<T>(
        &self,
        service: &ServiceName,
        keys: &Keys,
        present: &BTreeMap<Vec<u8>, T>,
    ) -> Result<Vec<Key>, Failure> {
        let count = ENTRIES.to_string();
        let range = command(&["XREVRANGE", &keys.log, "+", "-", "COUNT", &count], []);
        let entries = Entry::parse_all(self.store.ask(keys.slot, &range).await?)?;
        let mut last = BTreeMap::new();
        for change in entries.into_iter().flat_map(|entry| entry.changes.into_iter().rev()) {
            last.entry(change.field).or_insert(change.what);
        }
        let left = last.into_iter().filter(|(field, what)| *what == What::Left && !present.contains_key(field));
        Ok(left.filter_map(|(field, _)| self.space.place(service, &field)).collect())
    }

    pub(crate) fn record(&self, service: &ServiceName, field: &[u8], value: &[u8]) -> Option<Record> {
        let key = self.space.place(service, field)?;
        self.space.read(&key, field, value)
    }

    /// What a change says to readers.
    pub(crate) fn update(&self, service: &ServiceName, change: &Change) -> Option<Update> {
        let key = self.space.place(service, &change.field)?;
        let marked = change.what == What::Left && key.directory == Directory::Providers;
        Some(match &change.value {
            Some(value) => self.upsert(key, &change.field, value),
            None => Update::Remove { key, cause: if marked { Departure::Left } else { Departure::Unknown } },
        })
    }

    /// New readers would not see a malformed record: the others must not go on with what it was.
    fn upsert(&self, key: Key, field: &[u8], value: &[u8]) -> Update {
        match self.space.read(&key, field, value) {
            Some(record) => Update::Upsert(record),
            None => Update::Remove { key, cause: Departure::Unknown },
        }
    }
}

/// Not if nobody looked for a while. As in `look` of the scripts.
fn is_judged(now: u64, seen: u64, safe: u64, ttl: u64) -> bool {
    let gap = (ttl.saturating_mul(2) / 3).max(500);
    now >= safe && now.abs_diff(seen) <= gap
}

fn too_fast() -> Failure {
    Failure::new(Class::NotNow, "it is changed past the log faster than it can be read")
}

/// A text as an argument of a script.
pub(crate) fn bytes(text: Cow<'_, str>) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => text.as_bytes().into(),
        Cow::Owned(text) => text.into_bytes().into(),
    }
}

/// A number as an argument of a script.
pub(crate) fn number(number: u64) -> Cow<'static, [u8]> {
    itoa::Buffer::new().format(number).as_bytes().to_vec().into()
}

/// Names one call among all: servers of 6.2 would give everybody the same random numbers.
fn nonce() -> Vec<u8> {
    format!("{:016x}", rand::random::<u64>()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_judged_who_is_alive_where_somebody_looked_lately() {
        assert!(is_judged(1000, 500, 1000, 0) && !is_judged(1000, 499, 0, 0) && !is_judged(1000, 1000, 1001, 0));
        assert!(is_judged(20_000, 10_000, 0, 15_000) && !is_judged(20_001, 10_000, 0, 15_000));
        assert!(is_judged(u64::MAX, u64::MAX, 0, u64::MAX), "a ttl that somebody wrote by hand");
    }
}
