//! Puts and removals: as few requests as possible, each with a condition for each of its nodes.
//!
//! A node is made where there is none, or changed or deleted at the version that was seen. So a request that was given
//! up and is applied late changes nothing that is newer, and repeating one is safe.
//!
//! The subtle point is the version: it begins at 0 with every node, so the node of another owner could have the version
//! that we saw on ours. Therefore who replaces a node gives the new one the next version instead.

use std::collections::BTreeMap;

use registry_core::{Directory, Epoch, Error, ErrorKind, Few, Intent, Key, Lifetime, Record, Result};
use zookeeper_client::{CreateMode, Error as ClientError, MultiWriter};

use crate::{
    backend::ZooKeeperBackend,
    error::{Class, Failure, NAME},
    held::Expect,
    session::Link,
    store::Found,
};

/// How many operations go into one request.
const OPERATIONS: usize = 500;
/// How many keys are removed by one request.
const REMOVALS: usize = 100;
/// How many requests of one call are in flight.
const AT_ONCE: usize = 4;
/// How often a write that others overtook is tried.
const ROUNDS: usize = 8;
/// The largest record: with what a request has around it, it must stay below `jute.maxbuffer`.
const LARGEST: usize = 1_000_000;
/// Above this version a new node begins at 0 again, which is another version, too.
const LAST_VERSION: i32 = 32;
/// What an operation has beyond its path, its bytes and its access control list.
const OVERHEAD: usize = 64;

/// A record on its way into the store.
struct Write<'a> {
    /// Which of the caller's records it is.
    index: usize,
    record: &'a Record,
    path: String,
    bytes: Vec<u8>,
    epoch: Epoch,
    on: On,
    /// This call has sent it before; it may be what is there.
    sent: bool,
}

/// What a record is written on top of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    Nothing,
    /// A node of this version that hangs where the record shall.
    Node(i32),
    /// A node of this version that hangs elsewhere, such as on the session of another owner.
    Other(i32),
    /// Look first.
    Unknown,
}

/// What is about to be removed, as it was last seen.
struct Removal<'a> {
    index: usize,
    key: &'a Key,
    path: String,
    /// Its version, if it is there and ours.
    seen: Option<i32>,
    /// It was ours once; if it is absent then, it is us who removed it, or our session.
    was_ours: bool,
}

impl ZooKeeperBackend {
    pub(crate) async fn write_all(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        let link = match self.store.session.link().await {
            Ok(link) => link,
            Err(failure) => return records.iter().map(|record| Err(cannot_put(record, &failure))).collect(),
        };
        let mut outcomes: BTreeMap<usize, Result<Epoch>> = BTreeMap::new();
        let mut writes = Vec::with_capacity(records.len());
        for (index, record) in records.iter().enumerate() {
            match self.begin(index, record, why, link.session()) {
                Ok(write) => writes.push(write),
                Err(error) => drop(outcomes.insert(index, Err(error))),
            }
        }
        let (acl, budget) = (self.store.acl.bytes(), self.store.budget.get());
        // What may be too large for the server ends the connection: last, and by itself.
        let (suspects, writes) = writes.into_iter().partition(|write| self.store.budget.suspects(write.bytes(acl)));
        let chunks = chunks(writes, acl, budget).into_iter().map(|chunk| self.write(&link, chunk, why));
        let done = Few::at_most(AT_ONCE, chunks.collect()).await;
        outcomes.extend(done.into_iter().flatten());
        let suspects = suspects.into_iter().map(|suspect| self.write(&link, vec![suspect], why));
        let done = Few::at_most(AT_ONCE, suspects.collect()).await;
        outcomes.extend(done.into_iter().flatten());
        outcomes.into_values().collect()
    }

    fn begin<'a>(&self, index: usize, record: &'a Record, why: Intent, session: i64) -> Result<Write<'a>> {
        let path = self.store.space.key(&record.key);
        let mut write = Write { index, record, path, bytes: Vec::new(), epoch: 0, on: On::Nothing, sent: false };
        self.encode(&mut write, first_epoch(record, why))?;
        write.on = match (self.held.expect(&record.key, session), why) {
            (Expect::Absent, _) => On::Nothing,
            // As we left it, if nobody else changed or deleted it: then one request is enough.
            (Expect::Ours(version), Intent::Restore) => On::Node(version),
            _ => On::Unknown,
        };
        Ok(write)
    }

    fn encode(&self, write: &mut Write<'_>, epoch: Epoch) -> Result<()> {
        let record = Record { owner: self.owner.clone(), epoch, ..write.record.clone() };
        write.bytes = self.store.space.encode(&record).map_err(|error| error.with_backend(NAME))?;
        let size = write.path.len() + write.bytes.len() + self.store.acl.bytes();
        if size > LARGEST {
            let message = format!(
                "the record of {} takes {size} bytes, ZooKeeper takes {LARGEST} (jute.maxbuffer at its default)",
                record.key
            );
            return Err(Error::invalid(message).with_backend(NAME));
        }
        write.epoch = epoch;
        Ok(())
    }

    /// Writes one chunk: on top of what was last seen, until nothing is left to write.
    async fn write(&self, link: &Link, mut chunk: Vec<Write<'_>>, why: Intent) -> Vec<(usize, Result<Epoch>)> {
        let mut done = Vec::with_capacity(chunk.len());
        let mut failure = Failure::Contended;
        let mut in_vain = 0;
        while in_vain < ROUNDS {
            let left = chunk.len();
            match self.round(link, &mut chunk, &mut done, why).await {
                Ok(()) => {}
                // There is room for some of them.
                Err(Failure::Client(ClientError::QuotaExceeded)) if chunk.len() > 1 => {
                    let rest = chunk.split_off(chunk.len() / 2);
                    done.extend(Box::pin(self.write(link, chunk, why)).await);
                    if done.iter().all(|(_, outcome)| outcome.is_ok()) {
                        done.extend(Box::pin(self.write(link, rest, why)).await);
                        return done;
                    }
                    (chunk, failure) = (rest, Failure::Client(ClientError::QuotaExceeded));
                    break;
                }
                Err(other) => {
                    failure = other;
                    break;
                }
            }
            if chunk.is_empty() {
                return done;
            }
            in_vain = if chunk.len() < left { 0 } else { in_vain + 1 };
        }
        for write in &chunk {
            self.held.doubt(&write.record.key);
        }
        done.extend(chunk.iter().map(|write| (write.index, Err(cannot_put(write.record, &failure)))));
        done
    }

    /// Looks what is there, where that is not known, and writes the rest of the chunk.
    async fn round(
        &self,
        link: &Link,
        chunk: &mut Vec<Write<'_>>,
        done: &mut Vec<(usize, Result<Epoch>)>,
        why: Intent,
    ) -> Result<(), Failure> {
        if chunk.iter().any(|write| write.on == On::Unknown) {
            let paths: Vec<_> = chunk.iter().map(|write| write.path.as_str()).collect();
            let found = self.store.read(link, &paths).await?;
            for (mut write, found) in std::mem::take(chunk).into_iter().zip(found) {
                match self.weigh(&mut write, found.as_ref(), why, link.session()) {
                    None => chunk.push(write),
                    Some(outcome) => done.push((write.index, outcome)),
                }
            }
        }
        // What has to be looked at may take more operations than what has not.
        let (now, later) = fitting(std::mem::take(chunk), self.store.acl.bytes(), self.store.budget.get());
        *chunk = later;
        let refused = self.commit(link, now, chunk, done).await?;
        match refused {
            Some(Class::Absent) => self.make_room(link, chunk).await,
            _ => Ok(()),
        }
    }

    /// Writes what is to be written; what was overtaken goes back to the chunk, with the reason.
    async fn commit<'a>(
        &self,
        link: &Link,
        mut writes: Vec<Write<'a>>,
        chunk: &mut Vec<Write<'a>>,
        done: &mut Vec<(usize, Result<Epoch>)>,
    ) -> Result<Option<Class>, Failure> {
        if writes.is_empty() {
            return Ok(None);
        }
        writes.iter_mut().for_each(|write| write.sent = true);
        let Err(failure) = self.send(link, &writes).await else {
            for write in writes {
                let Record { key, lifetime, .. } = write.record;
                self.held.wrote(key, *lifetime, link.session(), write.on.next());
                done.push((write.index, Ok(write.epoch)));
            }
            return Ok(None);
        };
        let class = failure.class();
        let overtaken = matches!(class, Class::Overtaken | Class::Absent);
        // What is made where nothing was is not overtaken by a directory that is missing.
        let only_new = class == Class::Absent && writes.iter().all(|write| write.on == On::Nothing);
        if overtaken && !only_new {
            writes.iter_mut().for_each(|write| write.on = On::Unknown);
        }
        chunk.append(&mut writes);
        if overtaken { Ok(Some(class)) } else { Err(failure) }
    }

    /// All of the writes, or none.
    async fn send(&self, link: &Link, writes: &[Write<'_>]) -> Result<(), Failure> {
        let answer = {
            let mut writer = link.client().new_multi_writer();
            writes.iter().try_for_each(|write| self.add(&mut writer, write))?;
            writer.commit()
        };
        let bytes = writes.iter().map(|write| write.bytes(self.store.acl.bytes())).sum();
        let sent = self.store.session.call(link, answer).await;
        self.store.budget.learn(bytes, sent.map(drop))
    }

    async fn make_room(&self, link: &Link, chunk: &[Write<'_>]) -> Result<(), Failure> {
        let paths: Vec<_> = chunk.iter().map(|write| write.path.as_str()).collect();
        self.store.make_parents(link, &paths).await
    }

    fn add(&self, writer: &mut MultiWriter<'_>, write: &Write<'_>) -> Result<(), ClientError> {
        let Write { path, bytes, .. } = write;
        let mode = if write.is_bound() { CreateMode::Ephemeral } else { CreateMode::Persistent };
        let options = mode.with_acls(self.store.acl.acls());
        match write.on {
            On::Node(version) => writer.add_set_data(path, bytes, Some(version)),
            On::Nothing | On::Unknown => writer.add_create(path, bytes, &options),
            On::Other(version) => {
                writer.add_delete(path, Some(version))?;
                let last = write.on.next();
                writer.add_create(path, if last == 0 { bytes } else { b"" }, &options)?;
                for version in 0..last {
                    writer.add_set_data(path, if version + 1 == last { bytes } else { b"" }, Some(version))?;
                }
                Ok(())
            }
        }
    }

    /// Takes note of what is there: the outcome, or `None` if the record is to be written on top of it.
    fn weigh(&self, write: &mut Write<'_>, found: Option<&Found>, why: Intent, session: i64) -> Option<Result<Epoch>> {
        let Record { key, lifetime, .. } = write.record;
        let home = if write.is_bound() { session } else { 0 };
        let at_home = found.is_some_and(|found| found.stat.ephemeral_owner == home);
        // The store has it already: readers need not hear of it again.
        let same = |write: &Write<'_>| {
            let found = found.filter(|found| at_home && found.bytes == write.bytes)?;
            self.held.wrote(key, *lifetime, session, found.stat.version);
            Some(Ok(write.epoch))
        };
        if write.sent
            && let Some(outcome) = same(write)
        {
            return Some(outcome);
        }
        let current = found.and_then(|found| self.store.space.decode(key, &found.bytes).ok());
        let epoch = match (current, why) {
            (Some(current), Intent::Claim) => current.epoch.saturating_add(1),
            (Some(current), Intent::Restore) if current.owner != self.owner || current.epoch > write.record.epoch => {
                self.held.release(key);
                let ours = current.owner == self.owner;
                let holder = if ours { "is newer in the store" } else { "is held by another owner" };
                let message = format!("cannot restore {key}: it {holder}");
                return Some(Err(Error::new(ErrorKind::Conflict, message).with_backend(NAME)));
            }
            _ => first_epoch(write.record, why),
        };
        write.on = match found {
            None => On::Nothing,
            Some(found) if at_home => On::Node(found.stat.version),
            Some(found) => On::Other(found.stat.version),
        };
        if epoch != write.epoch
            && let Err(error) = self.encode(write, epoch)
        {
            return Some(Err(error));
        }
        same(write)
    }

    pub(crate) async fn remove_all(&self, keys: &[Key]) -> Vec<Result<bool>> {
        let link = match self.store.session.link().await {
            Ok(link) => link,
            Err(failure) => return keys.iter().map(|key| Err(cannot_remove(key, &failure))).collect(),
        };
        self.remove_on(&link, keys).await
    }

    pub(crate) async fn remove_on(&self, link: &Link, keys: &[Key]) -> Vec<Result<bool>> {
        let removal = |(index, key)| {
            let path = self.store.space.key(key);
            Removal { index, key, path, seen: None, was_ours: false }
        };
        let removals: Vec<_> = keys.iter().enumerate().map(removal).collect();
        let mut chunks = Vec::new();
        let mut rest = removals.into_iter().peekable();
        while rest.peek().is_some() {
            chunks.push(self.remove_chunk(link, rest.by_ref().take(REMOVALS).collect()));
        }
        let done = Few::at_most(AT_ONCE, chunks).await;
        let outcomes: BTreeMap<usize, Result<bool>> = done.into_iter().flatten().collect();
        outcomes.into_values().collect()
    }

    async fn remove_chunk(&self, link: &Link, mut removals: Vec<Removal<'_>>) -> Vec<(usize, Result<bool>)> {
        let outcome = self.take_away(link, &mut removals).await;
        // One that cannot be removed must not keep the others.
        if outcome.as_ref().is_err_and(|failure| matches!(failure.class(), Class::Denied | Class::Invalid))
            && removals.len() > 1
        {
            let rest = removals.split_off(removals.len() / 2);
            let mut done = Box::pin(self.remove_chunk(link, removals)).await;
            done.extend(Box::pin(self.remove_chunk(link, rest)).await);
            return done;
        }
        let outcome_of = |removal: Removal<'_>| match &outcome {
            Ok(()) => {
                self.held.release(removal.key);
                (removal.index, Ok(removal.was_ours))
            }
            Err(failure) => {
                self.held.doubt(removal.key);
                (removal.index, Err(cannot_remove(removal.key, failure)))
            }
        };
        removals.into_iter().map(outcome_of).collect()
    }

    /// Looks whose they are, then removes ours together with their marks: all of them, or none if one of them changed.
    async fn take_away(&self, link: &Link, removals: &mut [Removal<'_>]) -> Result<(), Failure> {
        let mut marking = true;
        for _ in 0..ROUNDS {
            self.see(link, removals).await?;
            if removals.iter().all(|removal| removal.seen.is_none()) {
                return Ok(());
            }
            let answer = {
                let mut writer = link.client().new_multi_writer();
                removals.iter().try_for_each(|removal| self.take(&mut writer, removal, marking))?;
                writer.commit()
            };
            match self.store.session.call(link, answer).await {
                Ok(_) => return Ok(()),
                // Somebody else made a node of a mark's name, or there is no room for one: late is better than never.
                Err(Failure::Client(ClientError::NodeExists | ClientError::QuotaExceeded)) if marking => {
                    marking = false
                }
                Err(failure) if matches!(failure.class(), Class::Overtaken | Class::Absent) => {}
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::Contended)
    }

    /// Takes note of what is there now.
    async fn see(&self, link: &Link, removals: &mut [Removal<'_>]) -> Result<(), Failure> {
        let paths: Vec<_> = removals.iter().map(|removal| removal.path.as_str()).collect();
        let found = self.store.look(link, &paths).await?;
        for (removal, found) in removals.iter_mut().zip(found) {
            let found = match found {
                // Closed to us: somebody else's, which an override is not.
                Err(ClientError::NoAuth) if removal.key.directory != Directory::Overrides => None,
                other => other?,
            };
            // Operators come back as another owner, so an override is anybody's. What nobody can read is ours if it hangs
            // on our session.
            let is_ours = |found: &Found| {
                removal.key.directory == Directory::Overrides
                    || match self.store.space.decode(removal.key, &found.bytes) {
                        Ok(record) => record.owner == self.owner,
                        Err(_) => found.stat.ephemeral_owner == link.session(),
                    }
            };
            removal.seen = found.as_ref().filter(|found| is_ours(found)).map(|found| found.stat.version);
            if found.is_some() {
                removal.was_ours = removal.seen.is_some();
            }
        }
        Ok(())
    }

    /// The mark, so that readers meet its event before that of the removal; then the removal.
    fn take(&self, writer: &mut MultiWriter<'_>, removal: &Removal<'_>, marking: bool) -> Result<(), ClientError> {
        let Some(version) = removal.seen else { return Ok(()) };
        // Only the instances of a service are missed by readers.
        if marking && removal.key.directory == Directory::Providers {
            let mark = self.store.space.mark(&removal.path);
            writer.add_create(&mark, b"", &CreateMode::Persistent.with_acls(self.store.acl.acls()))?;
            writer.add_delete(&mark, None)?;
        }
        writer.add_delete(&removal.path, Some(version))
    }

    pub(crate) fn is_ours(&self, key: &Key, bytes: &[u8]) -> bool {
        self.store.space.decode(key, bytes).is_ok_and(|record| record.owner == self.owner)
    }
}

impl Write<'_> {
    fn is_bound(&self) -> bool {
        self.record.lifetime == Lifetime::Session
    }

    fn bytes(&self, acl: usize) -> usize {
        self.bytes.len() + self.operations() * (self.path.len() + acl + OVERHEAD)
    }

    fn operations(&self) -> usize {
        match self.on {
            On::Other(_) => 2 + usize::try_from(self.on.next()).unwrap_or(0),
            _ => 1,
        }
    }
}

impl On {
    /// The version of the node once it is written.
    fn next(self) -> i32 {
        match self {
            Self::Nothing | Self::Unknown => 0,
            Self::Node(version) => version.wrapping_add(1),
            Self::Other(version) if (0..LAST_VERSION).contains(&version) => version + 1,
            Self::Other(_) => 0,
        }
    }
}

/// The epoch of a key that nobody holds.
fn first_epoch(record: &Record, why: Intent) -> Epoch {
    match why {
        Intent::Claim => 1,
        Intent::Restore => record.epoch,
    }
}

/// Writes that go together: not too many or too large for one request.
fn chunks(mut writes: Vec<Write<'_>>, acl: usize, budget: usize) -> Vec<Vec<Write<'_>>> {
    let mut chunks = Vec::new();
    while !writes.is_empty() {
        let (chunk, rest) = fitting(writes, acl, budget);
        chunks.push(chunk);
        writes = rest;
    }
    chunks
}

/// As many of the writes as fit into one request, one at least, and the others.
fn fitting(mut writes: Vec<Write<'_>>, acl: usize, budget: usize) -> (Vec<Write<'_>>, Vec<Write<'_>>) {
    let (mut operations, mut bytes) = (0, 0);
    let fits = |write: &Write<'_>| {
        operations += write.operations();
        bytes += write.bytes(acl);
        operations <= OPERATIONS && bytes <= budget
    };
    let count = writes.iter().take_while({
        let mut fits = fits;
        move |write| fits(write)
    });
    let count = count.count().max(1).min(writes.len());
    let rest = writes.split_off(count);
    (writes, rest)
}

fn cannot_put(record: &Record, failure: &Failure) -> Error {
    failure.during(format!("cannot put {}", record.key))
}

fn cannot_remove(key: &Key, failure: &Failure) -> Error {
    failure.during(format!("cannot remove {key}"))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use registry_core::{Content, Entry, Instance, InstanceId, Layout, NativeLayout, Owner, Place, ServiceName};

    use super::*;
    use crate::{config::ZooKeeperConfig, store::BYTES};

    /// Spells records as so many entries of so many bytes.
    #[derive(Debug)]
    struct Bloated(usize, usize);

    impl Layout for Bloated {
        fn path(&self, key: &Key) -> String {
            NativeLayout.path(key)
        }
        fn directory(&self, service: &ServiceName, directory: Directory) -> String {
            NativeLayout.directory(service, directory)
        }
        fn followed(&self, service: &ServiceName) -> (String, String) {
            NativeLayout.followed(service)
        }
        fn mark(&self, service: &ServiceName, owner: &Owner) -> String {
            NativeLayout.mark(service, owner)
        }
        fn encode_mark(&self, ids: &[InstanceId]) -> Vec<u8> {
            NativeLayout.encode_mark(ids)
        }
        fn decode_mark(&self, bytes: &[u8]) -> Vec<InstanceId> {
            NativeLayout.decode_mark(bytes)
        }
        fn place(&self, path: &str) -> Option<Place> {
            NativeLayout.place(path)
        }
        fn encode(&self, record: &Record) -> Result<Vec<Entry>> {
            let entry = Entry { path: self.path(&record.key), bytes: vec![b'x'; self.1] };
            Ok(vec![entry; self.0])
        }
        fn decode(&self, key: &Key, entries: &[(&str, &[u8])]) -> Result<Record> {
            NativeLayout.decode(key, entries)
        }
    }

    #[tokio::test]
    async fn a_record_that_zookeeper_does_not_take_is_refused_before_it_is_sent() {
        let (record, config) = (record(), ZooKeeperConfig::new(["127.0.0.1:1"]));
        for (layout, expected) in [
            (Bloated(1, LARGEST - 200), None),
            (Bloated(1, LARGEST), Some((ErrorKind::InvalidInput, "jute.maxbuffer"))),
            (Bloated(2, 10), Some((ErrorKind::Unsupported, "one node"))),
            (Bloated(0, 10), Some((ErrorKind::Unsupported, "one node"))),
        ] {
            let backend = ZooKeeperBackend::new(config.clone()).unwrap().with_layout(Arc::new(layout));
            let refused = backend.begin(0, &record, Intent::Claim, 1).map(drop).err();
            assert_eq!(refused.as_ref().map(Error::kind), expected.map(|(kind, _)| kind));
            let said = refused.map(|error| error.to_string()).unwrap_or_default();
            assert!(said.contains(expected.map_or("", |(_, text)| text)), "{said}");
        }
    }

    fn record() -> Record {
        let key = Key::provider("orders".parse().unwrap(), "1".parse().unwrap());
        let content = Content::Instance(Instance::builder("orders", "1").build().unwrap().into());
        Record { key, owner: Owner::random(), epoch: 1, lifetime: Lifetime::Session, content }
    }

    fn write(record: &Record, bytes: usize, on: On) -> Write<'_> {
        Write { index: 0, record, path: "/orders/providers/1".into(), bytes: vec![0; bytes], epoch: 1, on, sent: false }
    }

    fn sizes(writes: Vec<Write<'_>>) -> Vec<usize> {
        chunks(writes, 30, BYTES).iter().map(Vec::len).collect()
    }

    #[test]
    fn requests_are_bounded_by_operations_and_bytes() {
        let record = record();
        let many = |count, bytes, on| (0..count).map(|_| write(&record, bytes, on)).collect::<Vec<_>>();
        assert_eq!(sizes(Vec::new()), [0; 0]);
        assert_eq!(sizes(many(1200, 200, On::Nothing)), [500, 500, 200]);
        assert_eq!(sizes(many(20, 60_000, On::Node(3))), [8, 8, 4]);
        assert_eq!(sizes(many(200, 200, On::Other(2))), [100, 100]);
        assert_eq!(sizes(many(2, 2 * BYTES, On::Nothing)), [1, 1]);
    }

    #[test]
    fn a_node_that_replaces_another_never_has_its_version() {
        for version in [0, 1, 7, LAST_VERSION - 1, LAST_VERSION, i32::MAX, -1] {
            let next = On::Other(version).next();
            assert!(next != version && (0..=LAST_VERSION).contains(&next), "{version} {next}");
        }
    }
}
