//! Puts, renewals and removals: one script for each service and batch, all of them in the same round trip.
//!
//! A script replaces a record only if it may: an absent or dead one, or the very one that we put last or that was seen, by
//! its digest. So a request that was given up and is applied late changes nothing that is newer.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use redis::Value;
use registry_core::{
    Directory, Epoch, Error, ErrorKind, Few, Intent, Key, Lifetime, Record, Result, ServiceName, encode_segment,
};

use tokio::time::{Instant, timeout};

use crate::{
    backend::{Held, Place, RedisBackend, Used},
    error::{Class, Failure, NAME},
    scripts::{INDEX, PUT, REMOVE, RENEW, Script},
    space::{Half, Keys, Message, id_of},
    store::Request,
};

/// How many records a script writes or removes, and how many it renews: what takes less than 5 ms at the server.
const WRITES: usize = 200;
const RENEWALS: usize = 500;
/// How many bytes a script carries.
const BYTES: usize = 1 << 20;
/// How many scripts of one put are in flight.
const AT_ONCE: usize = 4;
/// How long the index of services is waited for.
const SPARE: Duration = Duration::from_millis(250);
/// How often a claim that others overtook is tried.
const ROUNDS: usize = 5;

/// A record on its way into the store.
struct Write<'a> {
    /// Which of the caller's records it is.
    index: usize,
    record: &'a Record,
    epoch: Epoch,
    /// The digest of what it may replace, if that was seen.
    expected: Vec<u8>,
    field: String,
    value: Vec<u8>,
}

/// What one script removes.
struct Removal<'a> {
    service: &'a ServiceName,
    half: Half,
    /// Whoever wrote it: operators come back as another owner, so an override is anybody's.
    force: bool,
    /// Each with its place among the caller's.
    keys: Vec<(usize, &'a Key)>,
}

impl Write<'_> {
    fn is_bound(&self) -> bool {
        self.record.lifetime == Lifetime::Session
    }
}

/// What belongs into the same script: the half of a service.
type Group<'a, T> = BTreeMap<(&'a ServiceName, Half), Vec<T>>;

impl RedisBackend {
    pub(crate) async fn write_all(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        let mut groups: Group<'_, (usize, &Record)> = BTreeMap::new();
        for (index, record) in records.iter().enumerate() {
            groups.entry(group_of(&record.key)).or_default().push((index, record));
        }
        self.note_used(groups.keys().copied());
        let services = services_of(&groups);
        let batches = groups.into_iter().flat_map(|((service, half), records)| {
            // Those of one script live equally long.
            let (bound, persistent): (Vec<_>, Vec<_>) =
                records.into_iter().partition(|(_, record)| record.lifetime == Lifetime::Session);
            let batches: Vec<_> = bound.chunks(WRITES).chain(persistent.chunks(WRITES)).map(<[_]>::to_vec).collect();
            batches.into_iter().map(move |batch| self.write_batch(service, half, batch, why))
        });
        // Each is encoded when its turn comes: the server works on those before it meanwhile.
        let done = Few::at_most(AT_ONCE, batches.collect()).await;
        // It may be on another server, which must not hold this up. Renewals see to the rest.
        let _ = timeout(SPARE, self.index(self.not_indexed(services))).await;
        let outcomes: BTreeMap<usize, Result<Epoch>> = done.into_iter().flatten().collect();
        outcomes.into_values().collect()
    }

    /// Writes what one script may, by its number.
    async fn write_batch(
        &self,
        service: &ServiceName,
        half: Half,
        records: Vec<(usize, &Record)>,
        why: Intent,
    ) -> Vec<(usize, Result<Epoch>)> {
        let (mut done, mut writes) = (Vec::with_capacity(records.len()), Vec::with_capacity(records.len()));
        for (index, record) in records {
            let epoch = first_epoch(record, why);
            let expected = match self.held().get(&record.key) {
                Some((held, value)) if why == Intent::Restore && *held <= record.epoch => digest(value),
                _ => Vec::new(),
            };
            let mut write = Write { index, record, epoch, expected, field: String::new(), value: Vec::new() };
            match self.encode(&mut write, epoch) {
                Ok(()) => writes.push(write),
                Err(error) => done.push((index, Err(error))),
            }
        }
        for chunk in chunks(writes) {
            done.extend(self.write(service, half, chunk, why).await);
        }
        done
    }

    fn encode(&self, write: &mut Write<'_>, epoch: Epoch) -> Result<()> {
        let record = Record { owner: self.owner.clone(), epoch, ..write.record.clone() };
        (write.field, write.value) = self.space().encode(&record, self.ttl_of(write))?;
        write.epoch = epoch;
        Ok(())
    }

    /// In ms; 0 for ever.
    fn ttl_of(&self, write: &Write<'_>) -> u64 {
        if write.is_bound() { self.ttl.as_millis().try_into().unwrap_or(u64::MAX) } else { 0 }
    }

    /// Writes one chunk: on top of what may be replaced, and after a look at what else is there.
    async fn write(
        &self,
        service: &ServiceName,
        half: Half,
        mut chunk: Vec<Write<'_>>,
        why: Intent,
    ) -> Vec<(usize, Result<Epoch>)> {
        let mut done = Vec::with_capacity(chunk.len());
        let mut failure = Failure::new(Class::NotNow, "others changed the same keys, every time");
        for _ in 0..ROUNDS {
            match self.put_once(service, half, &chunk, why).await {
                Ok(found) => {
                    let mut again = Vec::new();
                    for (mut write, found) in chunk.into_iter().zip(found) {
                        let outcome = match found {
                            None => Some(Ok(write.epoch)),
                            Some(found) => self.weigh(&mut write, found, why),
                        };
                        match outcome {
                            None => again.push(write),
                            Some(outcome) => {
                                match &outcome {
                                    Ok(epoch) => {
                                        self.held().insert(write.record.key.clone(), (*epoch, write.value));
                                    }
                                    Err(_) => {
                                        self.held().remove(&write.record.key);
                                    }
                                }
                                done.push((write.index, outcome));
                            }
                        }
                    }
                    chunk = again;
                    if chunk.is_empty() {
                        return done;
                    }
                }
                Err(error) => {
                    failure = error;
                    break;
                }
            }
        }
        let failed = |write: &Write<'_>| failure.during(format!("cannot register {}", write.record.key));
        done.extend(chunk.iter().map(|write| (write.index, Err(failed(write)))));
        done
    }

    /// One script: for each record what is there instead, if something is.
    async fn put_once(
        &self,
        service: &ServiceName,
        half: Half,
        chunk: &[Write<'_>],
        why: Intent,
    ) -> Result<Vec<Option<(Vec<u8>, Vec<u8>)>>, Failure> {
        let mode: &[u8] = if why == Intent::Claim { b"claim" } else { b"restore" };
        let life = chunk.first().map_or(0, |write| self.ttl_of(write));
        let puts = chunk.iter().map(|write| (write.field.as_bytes(), write.value.as_slice()));
        let mut args = vec![self.ttl_arg(), life.to_string().into_bytes(), mode.to_vec(), Message::of_puts(puts)];
        args.extend(chunk.iter().map(|write| write.expected.clone()));
        let Value::Array(mut found) = self.run(&PUT, service, half, true, args).await? else {
            return Err(Failure::odd("the outcome of a put"));
        };
        if is_word(found.first(), "gone") {
            return Err(Failure::new(Class::Gone, "the owner has left"));
        }
        match (found.pop(), found.pop()) {
            (Some(Value::Int(fresh)), Some(Value::BulkString(head)))
                if found.is_empty() || found.len() == chunk.len() =>
            {
                self.note_head(service, half, &head);
                if fresh == 1 {
                    // The index may be gone, too.
                    self.indexed().remove(service);
                }
            }
            _ => return Err(Failure::odd("the outcome of a put")),
        }
        // All are there.
        found.resize(chunk.len(), Value::Nil);
        let found = found.into_iter().map(|found| match found {
            Value::Array(_) => {
                redis::from_redis_value(found).map(Some).map_err(|_| Failure::odd("the outcome of a put"))
            }
            _ => Ok(None),
        });
        found.collect()
    }

    /// Takes note of what is there: the outcome, or `None` if the record is to be put on top of it.
    fn weigh(&self, write: &mut Write<'_>, (digest, value): (Vec<u8>, Vec<u8>), why: Intent) -> Option<Result<Epoch>> {
        let current = self.space().decode(&write.record.key, &write.field, &value).ok();
        let epoch = match (current, why) {
            (Some(current), Intent::Claim) => current.epoch.saturating_add(1),
            (Some(current), Intent::Restore) if current.owner != self.owner || current.epoch > write.record.epoch => {
                let ours = current.owner == self.owner;
                let holder = if ours { "is newer in the store" } else { "is held by another owner" };
                let message = format!("cannot restore {}: it {holder}", write.record.key);
                return Some(Err(Error::new(ErrorKind::Conflict, message).with_backend(NAME)));
            }
            _ => first_epoch(write.record, why),
        };
        write.expected = digest;
        self.encode(write, epoch).err().map(Err)
    }

    pub(crate) async fn remove_all(&self, keys: &[Key]) -> Vec<Result<bool>> {
        let mut outcomes: BTreeMap<usize, Result<bool>> = BTreeMap::new();
        let chunks = removals(keys).into_iter().map(|removal| async move {
            let removed = self.take_away(&removal, false).await;
            (removal.keys, removed)
        });
        for (keys, removed) in join_all(chunks).await {
            match removed {
                Ok(removed) => {
                    keys.iter().for_each(|(_, key)| drop(self.held().remove(key)));
                    outcomes.extend(keys.iter().map(|(index, _)| *index).zip(removed.into_iter().map(Ok)));
                }
                Err(failure) => outcomes.extend(
                    keys.into_iter().map(|(index, key)| (index, Err(failure.during(format!("cannot remove {key}"))))),
                ),
            }
        }
        outcomes.into_values().collect()
    }

    /// Removes the keys and marks us as gone, also where we put what is not among them: it may still land there.
    pub(crate) async fn leave(&self, keys: &[Key]) -> Result<()> {
        let used: Vec<_> = self.used().keys().cloned().collect();
        let marks = used.iter().map(|(service, half)| Removal { service, half: *half, force: false, keys: Vec::new() });
        let removals: Vec<_> = removals(keys).into_iter().chain(marks).collect();
        let left = removals.iter().map(|removal| async move {
            let left = self.take_away(removal, true).await;
            left.map_err(|failure| failure.during(format!("cannot leave {}", removal.service)))
        });
        join_all(left).await.into_iter().collect::<Result<Vec<_>>>()?;
        self.used().clear();
        self.indexed().clear();
        self.held().clear();
        Ok(())
    }

    /// Removes what is ours; for each key whether it was.
    async fn take_away(&self, removal: &Removal<'_>, leaving: bool) -> Result<Vec<bool>, Failure> {
        let force: &[u8] = if removal.force { b"1" } else { b"0" };
        let gone = if leaving { self.long_ms().to_string() } else { String::new() };
        let mut args = vec![force.to_vec(), gone.into_bytes()];
        args.extend(removal.keys.iter().map(|(_, key)| self.space().field(key).into_bytes()));
        let removed = self.run(&REMOVE, removal.service, removal.half, leaving, args).await?;
        let mut removed: Vec<bool> =
            redis::from_redis_value(removed).map_err(|_| Failure::odd("the outcome of a removal"))?;
        // Where there is no history there is nothing to remove.
        removed.resize(removal.keys.len(), false);
        Ok(removed)
    }

    /// Those of the keys that are not ours any more, or, looking only, not alive.
    pub(crate) async fn renew_all(&self, keys: &[Key], looking: bool) -> Result<Vec<Key>, Failure> {
        let mut groups: Group<'_, &Key> = BTreeMap::new();
        for key in keys {
            groups.entry(group_of(key)).or_default().push(key);
        }
        let services = if looking { Vec::new() } else { services_of(&groups) };
        let indexed = self.index(self.not_indexed(services));
        let chunks = groups.iter().flat_map(|((service, half), keys)| {
            keys.chunks(RENEWALS).map(move |chunk| self.renew_chunk(service, *half, chunk, looking))
        });
        let (done, _) = tokio::join!(join_all(chunks.collect::<Vec<_>>()), timeout(SPARE, indexed));
        Ok(done.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
    }

    async fn renew_chunk(
        &self,
        service: &ServiceName,
        half: Half,
        keys: &[&Key],
        looking: bool,
    ) -> Result<Vec<Key>, Failure> {
        let dry: &[u8] = if looking { b"1" } else { b"0" };
        let place = (service.clone(), half);
        let head = if looking { None } else { self.used().get(&place).map(|place| place.head.clone()) };
        let mut args = vec![self.ttl_arg(), dry.to_vec(), head.unwrap_or_default().into_bytes()];
        args.extend(keys.iter().map(|key| self.space().field(key).into_bytes()));
        let missing = match self.run(&RENEW, service, half, false, args).await? {
            Value::Nil => {
                if let Some(place) = self.used().get_mut(&place) {
                    place.head.clear();
                }
                return Ok(keys.iter().copied().cloned().collect());
            }
            missing => redis::from_redis_value::<Vec<usize>>(missing).map_err(|_| Failure::odd("a renewal"))?,
        };
        Ok(missing.into_iter().filter_map(|position| keys.get(position)).copied().cloned().collect())
    }

    /// Keeps services in the index, which may be on another server: where that fails, a later renewal mends it.
    async fn index(&self, services: Vec<&ServiceName>) {
        if services.is_empty() {
            return;
        }
        let mut args = vec![self.long_ms().to_string().into_bytes()];
        args.extend(services.iter().map(|service| encode_segment(service).as_bytes().to_vec()));
        let (slot, key) = self.space().index();
        let request = Request::Script { script: &INDEX, keys: vec![key], args };
        let asked = Instant::now();
        match self.store().ask(slot, &request).await {
            Ok(_) => self.indexed().extend(services.into_iter().map(|service| (service.clone(), asked))),
            Err(failure) => {
                tracing::debug!(backend = NAME, error = %failure, "the index of services was not refreshed");
            }
        }
    }

    /// Those of the services that we have not put into the index within a ttl.
    fn not_indexed<'a>(&self, mut services: Vec<&'a ServiceName>) -> Vec<&'a ServiceName> {
        let indexed = self.indexed();
        services.retain(|service| indexed.get(*service).is_none_or(|at| at.elapsed() > self.ttl));
        services
    }

    /// Runs a script of one service, under our owner token; `gone` as in [`Reader::run`](crate::read::Reader::run).
    async fn run(
        &self,
        script: &'static Script,
        service: &ServiceName,
        half: Half,
        gone: bool,
        rest: Vec<Vec<u8>>,
    ) -> Result<Value, Failure> {
        let keys = self.keys_of(service, half);
        self.reader.run(script, &keys, half, (self.owner.as_str(), gone), rest).await
    }

    fn ttl_arg(&self) -> Vec<u8> {
        self.ttl.as_millis().to_string().into_bytes()
    }

    /// Long after the ttl, in ms: how long what nobody renews is remembered.
    fn long_ms(&self) -> u128 {
        4 * self.ttl.as_millis() + 60_000
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn indexed(&self) -> MutexGuard<'_, HashMap<ServiceName, Instant>> {
        self.indexed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_used<'a>(&self, groups: impl Iterator<Item = (&'a ServiceName, Half)>) {
        let mut used = self.used();
        for (service, half) in groups {
            let place = || Place { keys: Arc::new(self.space().keys(service, half)), head: String::new() };
            used.entry((service.clone(), half)).or_insert_with(place);
        }
    }

    /// The keys of one half of a service. They are spelled once, where we put anything.
    fn keys_of(&self, service: &ServiceName, half: Half) -> Arc<Keys> {
        let known = self.used().get(&(service.clone(), half)).map(|place| place.keys.clone());
        known.unwrap_or_else(|| Arc::new(self.space().keys(service, half)))
    }

    /// Several puts are in flight: the latest head counts.
    fn note_head(&self, service: &ServiceName, half: Half, head: &[u8]) {
        let mut used = self.used();
        let Some(place) = used.get_mut(&(service.clone(), half)) else { return };
        let head = String::from_utf8_lossy(head);
        if id_of(&head) > id_of(&place.head) {
            place.head = head.into_owned();
        }
    }
}

fn group_of(key: &Key) -> (&ServiceName, Half) {
    (&key.service, Half::of(key.directory))
}

fn is_word(value: Option<&Value>, word: &str) -> bool {
    matches!(value, Some(Value::BulkString(text)) if text == word.as_bytes())
}

fn services_of<'a, T>(groups: &Group<'a, T>) -> Vec<&'a ServiceName> {
    groups.keys().filter(|(_, half)| *half == Half::Followed).map(|(service, _)| *service).collect()
}

fn removals(keys: &[Key]) -> Vec<Removal<'_>> {
    let mut groups: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (index, key) in keys.iter().enumerate() {
        groups.entry((group_of(key), key.directory == Directory::Overrides)).or_default().push((index, key));
    }
    let removals = groups.into_iter().flat_map(|(((service, half), force), keys)| {
        let chunks: Vec<_> = keys.chunks(WRITES).map(<[_]>::to_vec).collect();
        chunks.into_iter().map(move |keys| Removal { service, half, force, keys })
    });
    removals.collect()
}

/// What the server calls `sha1hex`.
fn digest(value: &[u8]) -> Vec<u8> {
    sha1_smol::Sha1::from(value).digest().to_string().into_bytes()
}

/// The epoch of a key that nobody holds.
fn first_epoch(record: &Record, why: Intent) -> Epoch {
    match why {
        Intent::Claim => 1,
        Intent::Restore => record.epoch,
    }
}

/// Not too large for one script.
fn chunks(writes: Vec<Write<'_>>) -> Vec<Vec<Write<'_>>> {
    let size = |write: &Write<'_>| write.field.len() + write.value.len();
    if !writes.is_empty() && writes.iter().map(size).sum::<usize>() <= BYTES {
        return vec![writes];
    }
    let (mut chunks, mut bytes): (Vec<Vec<Write<'_>>>, usize) = (Vec::new(), 0);
    for write in writes {
        let more = size(&write);
        match chunks.last_mut() {
            Some(chunk) if bytes + more <= BYTES => {
                bytes += more;
                chunk.push(write);
            }
            _ => {
                bytes = more;
                chunks.push(vec![write]);
            }
        }
    }
    chunks
}
