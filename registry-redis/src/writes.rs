//! Puts, renewals and removals: one script for each service and batch, all of them in the same round trip.
//!
//! A script replaces a record only if it may: an absent or dead one, or the very one that we put last or that was seen, by
//! its digest. So a request that was given up and is applied late changes nothing that is newer.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    iter,
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
    read::{bytes, number},
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

/// Digest and value of what is there instead of a record, by its position.
type Taken = BTreeMap<usize, (Vec<u8>, Vec<u8>)>;

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

/// The half of a service: what belongs to the same one can be in one script.
type Group<'a> = (&'a ServiceName, Half);

impl RedisBackend {
    pub(crate) async fn write_all(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        let mut all: Vec<(usize, &Record)> = records.iter().enumerate().collect();
        all.sort_by(|(_, a), (_, b)| script_of(a).cmp(&script_of(b)));
        let groups = || {
            let groups = all.chunk_by(|(_, a), (_, b)| script_of(a) == script_of(b));
            groups.filter_map(|records| Some((group_of(&records.first()?.1.key), records)))
        };
        self.note_used(groups().map(|(group, _)| group));
        let batches = groups().flat_map(|(group, records)| {
            records.chunks(WRITES).map(move |records| self.write_batch(group, records, why))
        });
        // Each is encoded when its turn comes: the server works on those before it meanwhile.
        let done = Few::at_most(AT_ONCE, batches.collect()).await;
        // It may be on another server, which must not hold this up. Renewals see to the rest.
        let not_indexed = self.not_indexed(services_of(groups().map(|(group, _)| group)));
        if !not_indexed.is_empty() {
            let _ = timeout(SPARE, self.index(not_indexed)).await;
        }
        let mut done: Vec<_> = done.into_iter().flatten().collect();
        done.sort_unstable_by_key(|(index, _)| *index);
        done.into_iter().map(|(_, outcome)| outcome).collect()
    }

    /// Writes what one script may, by its number.
    async fn write_batch(
        &self,
        group: Group<'_>,
        records: &[(usize, &Record)],
        why: Intent,
    ) -> Vec<(usize, Result<Epoch>)> {
        let (mut done, mut writes) = (Vec::with_capacity(records.len()), Vec::with_capacity(records.len()));
        for &(index, record) in records {
            let epoch = first_epoch(record, why);
            let expected = match why {
                Intent::Claim => Vec::new(),
                Intent::Restore => self.expected(record),
            };
            let mut write = Write { index, record, epoch, expected, field: String::new(), value: Vec::new() };
            match self.encode(&mut write, epoch) {
                Ok(()) => writes.push(write),
                Err(error) => done.push((index, Err(error))),
            }
        }
        for chunk in chunks(writes) {
            done.extend(self.write(group, chunk, why).await);
        }
        done
    }

    /// The digest of what we put there last, if that is what the record is to replace.
    fn expected(&self, record: &Record) -> Vec<u8> {
        let held = self.held();
        let value = held.get(&record.key).filter(|(epoch, _)| *epoch <= record.epoch);
        value.map(|(_, value)| digest(value)).unwrap_or_default()
    }

    fn encode(&self, write: &mut Write<'_>, epoch: Epoch) -> Result<()> {
        let record = Record { owner: self.owner.clone(), epoch, ..write.record.clone() };
        (write.field, write.value) = self.space().encode(&record, self.ttl_of(write))?;
        write.epoch = epoch;
        Ok(())
    }

    /// In ms; 0 for ever.
    fn ttl_of(&self, write: &Write<'_>) -> u64 {
        if write.is_bound() { self.ttl_ms() } else { 0 }
    }

    /// Writes one chunk: on top of what may be replaced, and after a look at what else is there.
    async fn write(&self, group: Group<'_>, mut chunk: Vec<Write<'_>>, why: Intent) -> Vec<(usize, Result<Epoch>)> {
        let mut done = Vec::with_capacity(chunk.len());
        let mut failure = Failure::new(Class::NotNow, "others changed the same keys, every time");
        for _ in 0..ROUNDS {
            match self.put_once(group, &chunk, why).await {
                Ok(mut taken) => {
                    let mut again = Vec::new();
                    for (position, mut write) in chunk.into_iter().enumerate() {
                        let outcome = match taken.remove(&position) {
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

    /// One script: what is there instead of some of the records, by their position in the chunk.
    async fn put_once(&self, group: Group<'_>, chunk: &[Write<'_>], why: Intent) -> Result<Taken, Failure> {
        let mode: &[u8] = if why == Intent::Claim { b"claim" } else { b"restore" };
        let life = chunk.first().map_or(0, |write| self.ttl_of(write));
        let puts = chunk.iter().map(|write| (write.field.as_bytes(), write.value.as_slice()));
        let mut args = vec![number(self.ttl_ms()), number(life), mode.into(), Message::of_puts(puts).into()];
        args.extend(chunk.iter().map(|write| Cow::from(&write.expected)));
        let (head, fresh, taken) = put_of(self.run(&PUT, group, true, args).await?, chunk.len())?;
        self.note_head(group, &head);
        if fresh {
            // The index may be gone, too.
            self.indexed().remove(group.0);
        }
        Ok(taken)
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
        let gone = if leaving { number(self.long_ms()) } else { Cow::default() };
        let mut args = vec![force.into(), gone];
        args.extend(removal.keys.iter().map(|(_, key)| bytes(self.space().field(key).into())));
        let removed = self.run(&REMOVE, (removal.service, removal.half), leaving, args).await?;
        let mut removed: Vec<bool> =
            redis::from_redis_value(removed).map_err(|_| Failure::odd("the outcome of a removal"))?;
        // Where there is no history there is nothing to remove.
        removed.resize(removal.keys.len(), false);
        Ok(removed)
    }

    /// Those of the keys that are not ours any more, or, looking only, not alive.
    pub(crate) async fn renew_all(&self, keys: &[Key], looking: bool) -> Result<Vec<Key>, Failure> {
        let mut groups: BTreeMap<Group<'_>, Vec<&Key>> = BTreeMap::new();
        for key in keys {
            groups.entry(group_of(key)).or_default().push(key);
        }
        let services = if looking { Vec::new() } else { services_of(groups.keys().copied()) };
        let indexed = self.index(self.not_indexed(services));
        let chunks = groups
            .iter()
            .flat_map(|(group, keys)| keys.chunks(RENEWALS).map(move |chunk| self.renew_chunk(*group, chunk, looking)));
        let (done, _) = tokio::join!(join_all(chunks.collect::<Vec<_>>()), timeout(SPARE, indexed));
        Ok(done.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
    }

    async fn renew_chunk(&self, group: Group<'_>, keys: &[&Key], looking: bool) -> Result<Vec<Key>, Failure> {
        let dry: &[u8] = if looking { b"1" } else { b"0" };
        let place = (group.0.clone(), group.1);
        let head = if looking { None } else { self.used().get(&place).map(|place| place.head.clone()) };
        let mut args = vec![number(self.ttl_ms()), dry.into(), bytes(head.unwrap_or_default().into())];
        args.extend(keys.iter().map(|key| bytes(self.space().field(key).into())));
        let missing = match self.run(&RENEW, group, false, args).await? {
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
        let names = services.iter().map(|service| bytes(encode_segment(service)));
        let args = iter::once(number(self.long_ms())).chain(names).collect();
        let (slot, key) = self.space().index();
        let request = Request::Script { script: &INDEX, keys: vec![key.into()], args };
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
        group: Group<'_>,
        gone: bool,
        rest: Vec<Cow<'_, [u8]>>,
    ) -> Result<Value, Failure> {
        let keys = self.keys_of(group);
        self.reader.run(script, &keys, group.1, (self.owner.as_str(), gone), rest).await
    }

    fn ttl_ms(&self) -> u64 {
        self.ttl.as_millis().try_into().unwrap_or(u64::MAX)
    }

    /// Long after the ttl, in ms: how long what nobody renews is remembered.
    fn long_ms(&self) -> u64 {
        self.ttl_ms().saturating_mul(4).saturating_add(60_000)
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

    fn note_used<'a>(&self, groups: impl Iterator<Item = Group<'a>>) {
        let mut used = self.used();
        for (service, half) in groups {
            let place = || Place { keys: Arc::new(self.space().keys(service, half)), head: String::new() };
            used.entry((service.clone(), half)).or_insert_with(place);
        }
    }

    /// The keys of one half of a service. They are spelled once, where we put anything.
    fn keys_of(&self, (service, half): Group<'_>) -> Arc<Keys> {
        let known = self.used().get(&(service.clone(), half)).map(|place| place.keys.clone());
        known.unwrap_or_else(|| Arc::new(self.space().keys(service, half)))
    }

    /// Several puts are in flight: the latest head counts.
    fn note_head(&self, (service, half): Group<'_>, head: &[u8]) {
        let mut used = self.used();
        let Some(place) = used.get_mut(&(service.clone(), half)) else { return };
        let head = String::from_utf8_lossy(head);
        if id_of(&head) > id_of(&place.head) {
            place.head = head.into_owned();
        }
    }
}

fn group_of(key: &Key) -> Group<'_> {
    (&key.service, Half::of(key.directory))
}

/// What tells the scripts of records apart: those of one live equally long.
fn script_of(record: &Record) -> (Group<'_>, bool) {
    (group_of(&record.key), record.lifetime == Lifetime::Session)
}

/// What a put of so many answers: the head, whether it began a new history, and what was there instead of some of them.
fn put_of(answer: Value, count: usize) -> Result<(Vec<u8>, bool, Taken), Failure> {
    let odd = || Failure::odd("the outcome of a put");
    let mut answer = match answer {
        // All are there.
        Value::BulkString(head) => return Ok((head, false, Taken::new())),
        Value::Array(answer) => answer.into_iter(),
        _ => return Err(odd()),
    };
    let (head, fresh) = match (answer.next(), answer.next()) {
        (Some(Value::BulkString(word)), None) if word == b"gone" => {
            return Err(Failure::new(Class::Gone, "the owner has left"));
        }
        (Some(Value::BulkString(head)), Some(Value::Int(fresh))) => (head, fresh == 1),
        _ => return Err(odd()),
    };
    let mut taken = Taken::new();
    while let Some(position) = answer.next() {
        let (Value::Int(position), Some(Value::BulkString(digest)), Some(Value::BulkString(value))) =
            (position, answer.next(), answer.next())
        else {
            return Err(odd());
        };
        let position = usize::try_from(position).ok().filter(|position| *position < count).ok_or_else(odd)?;
        taken.insert(position, (digest, value));
    }
    Ok((head, fresh, taken))
}

fn services_of<'a>(groups: impl Iterator<Item = Group<'a>>) -> Vec<&'a ServiceName> {
    let followed = groups.filter(|(_, half)| *half == Half::Followed);
    let mut services: Vec<_> = followed.map(|(service, _)| service).collect();
    services.dedup();
    services
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

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    #[test]
    fn what_was_not_put_is_named_by_its_position() {
        assert_eq!(put_of(text("1-0/a"), 4).unwrap(), (b"1-0/a".to_vec(), false, Taken::new()));
        let began = put_of(Value::Array(vec![text("1-0/a"), Value::Int(1)]), 4).unwrap();
        assert_eq!(began, (b"1-0/a".to_vec(), true, Taken::new()));
        let one = [Value::Int(3), text("digest"), text("o 1 9 {}")];
        let answer = [vec![text("1-0/a"), Value::Int(0)], one.to_vec()].concat();
        let (_, fresh, taken) = put_of(Value::Array(answer.clone()), 4).unwrap();
        assert!(!fresh);
        assert_eq!(taken, Taken::from([(3, (b"digest".to_vec(), b"o 1 9 {}".to_vec()))]));
        let gone = put_of(Value::Array(vec![text("gone")]), 4).unwrap_err();
        assert!(gone.to_string().contains("the owner has left"), "{gone}");
        for odd in [
            Value::Nil,
            Value::Array(vec![]),
            Value::Array(vec![text("1-0/a")]),
            Value::Array(answer[..4].to_vec()),
            Value::Array([&answer[..2], &[Value::Int(-1), text("d"), text("v")]].concat()),
        ] {
            assert!(put_of(odd.clone(), 4).is_err(), "{odd:?}");
        }
        assert!(put_of(Value::Array(answer), 3).is_err(), "there is no fourth");
    }
}
