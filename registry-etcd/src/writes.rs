//! Puts and removals: as few transactions as possible, each with a condition for each of its keys.
//!
//! Every write is guarded by the `mod_revision` that was seen, 0 for an absent key. So a request that was given up and
//! is applied late changes nothing that is newer, and repeating one is safe.

use std::collections::BTreeMap;

use etcd_client::{Compare, CompareOp, KeyValue, PutOptions, ResponseHeader, Txn, TxnOp, TxnOpResponse, TxnResponse};
use registry_core::{
    Directory, Entry, Epoch, Error, ErrorKind, Few, InstanceId, Intent, Key, Lifetime, Record, Result, ServiceName,
};

use crate::{
    backend::EtcdBackend,
    error::{Class, Failure, NAME},
    session::{Hold, PERSISTENT},
};

/// How many operations go into one transaction; a server takes 128.
const OPERATIONS: usize = 100;
/// How many bytes go into one transaction; a server takes 1.5 MiB.
const BYTES: usize = 1 << 20;
/// How many transactions of one call are in flight.
const AT_ONCE: usize = 8;
/// How often a write that others overtook is tried.
const ROUNDS: usize = 5;

/// A record on its way into the store.
struct Write<'a> {
    /// Which of the caller's records it is.
    index: usize,
    record: &'a Record,
    hold: Hold,
    /// The `mod_revision` that the key must have, 0 if it must be absent.
    expected: i64,
    epoch: Epoch,
    entries: Vec<Entry>,
    /// This call has sent it before; it may be what is there.
    sent: bool,
}

/// What is about to be removed, as it was last seen.
struct Removal<'a> {
    index: usize,
    key: &'a Key,
    seen: Option<KeyValue>,
    /// It was ours once; if it is absent then, it is us who removed it, or its lease.
    was_ours: bool,
}

impl EtcdBackend {
    pub(crate) async fn write_all(&self, records: &[Record], why: Intent) -> Vec<Result<Epoch>> {
        let mut outcomes: BTreeMap<usize, Result<Epoch>> = BTreeMap::new();
        let mut writes = Vec::new();
        for (index, record) in records.iter().enumerate() {
            let hold = Hold { lease: PERSISTENT, written: 0, fresh: true };
            let mut write = Write { index, record, hold, expected: 0, epoch: 0, entries: Vec::new(), sent: false };
            match self.encode(&mut write, first_epoch(record, why)) {
                Ok(()) => writes.push(write),
                Err(error) => drop(outcomes.insert(index, Err(error))),
            }
        }
        if let Err(failure) = self.hang(&mut writes).await {
            let (stuck, free): (Vec<_>, _) = writes.into_iter().partition(|write| write.is_bound());
            outcomes.extend(stuck.iter().map(|write| (write.index, Err(cannot_put(write.record, &failure)))));
            writes = free;
        }
        if why == Intent::Restore {
            // As we left it, if nobody else wrote or deleted it: then one round is enough.
            writes.iter_mut().for_each(|write| write.expected = write.hold.written);
        }
        let chunks: Vec<_> = chunks(writes).into_iter().map(|chunk| self.write(chunk, why)).collect();
        let done = Few::at_most(AT_ONCE, chunks).await;
        outcomes.extend(done.into_iter().flatten());
        outcomes.into_values().collect()
    }

    /// Gives each record that needs one a lease.
    async fn hang(&self, writes: &mut [Write<'_>]) -> Result<(), Failure> {
        let mut bound: Vec<_> = writes.iter_mut().filter(|write| write.is_bound()).collect();
        if bound.is_empty() {
            return Ok(());
        }
        let keys: Vec<_> = bound.iter().map(|write| &write.record.key).collect();
        let holds = self.session.hold(&keys).await?;
        bound.iter_mut().zip(holds).for_each(|(write, hold)| write.hold = hold);
        Ok(())
    }

    fn encode(&self, write: &mut Write<'_>, epoch: Epoch) -> Result<()> {
        let record = Record { owner: self.owner.clone(), epoch, ..write.record.clone() };
        write.entries = self.space.encode(&record).map_err(|error| error.with_backend(NAME))?;
        if write.entries.is_empty() {
            let message = format!("the layout spells {} as nothing", record.key);
            return Err(Error::new(ErrorKind::Unsupported, message).with_backend(NAME));
        }
        write.epoch = epoch;
        Ok(())
    }

    /// Writes one chunk: on top of what was last seen, until nothing is left to write.
    async fn write(&self, mut chunk: Vec<Write<'_>>, why: Intent) -> Vec<(usize, Result<Epoch>)> {
        let mut done = Vec::with_capacity(chunk.len());
        // What is new to us is most likely absent. What we hold is there, but where?
        let mut look = chunk.iter().any(|write| !write.hold.fresh && write.expected == 0);
        let mut failure = Failure::Contended;
        for _ in 0..ROUNDS {
            match self.round(&mut chunk, &mut done, look, why).await {
                Ok(()) if chunk.is_empty() => return done,
                Ok(()) => look = true,
                // The store does not tell which one: ask for all of them, then hang these on one that lives.
                Err(gone) if gone.class() == Class::LeaseGone => {
                    let moved = async {
                        self.session.sift().await?;
                        self.hang(&mut chunk).await
                    };
                    if let Err(refused) = moved.await {
                        failure = refused;
                        break;
                    }
                }
                Err(other) => {
                    failure = other;
                    break;
                }
            }
        }
        let failed = |write: &Write<'_>| self.settled(write, Err(cannot_put(write.record, &failure)));
        done.extend(chunk.iter().map(|write| (write.index, failed(write))));
        done
    }

    /// Looks what is there, if asked to, and puts the rest of the chunk.
    async fn round(
        &self,
        chunk: &mut Vec<Write<'_>>,
        done: &mut Vec<(usize, Result<Epoch>)>,
        look: bool,
        why: Intent,
    ) -> Result<(), Failure> {
        if look {
            let looks = || chunk.iter().map(|write| self.look(&write.record.key)).collect::<Vec<_>>();
            let answers = self.pool.txn(|| Txn::new().and_then(looks())).await?.op_responses();
            for (mut write, answer) in std::mem::take(chunk).into_iter().zip(answers) {
                match self.weigh(&mut write, found(answer), why) {
                    None => chunk.push(write),
                    Some(outcome) => done.push((write.index, self.settled(&write, outcome))),
                }
            }
        }
        if chunk.is_empty() {
            return Ok(());
        }
        chunk.iter_mut().for_each(|write| write.sent = true);
        let answer = self.pool.txn(|| puts(chunk)).await?;
        if answer.succeeded() {
            let revision = answer.header().map_or(0, ResponseHeader::revision);
            for write in chunk.drain(..) {
                done.push((write.index, self.settled(&write, Ok(write.epoch))));
                self.session.wrote(&write.record.key, revision);
            }
        }
        Ok(())
    }

    /// Takes note of what is there: the outcome, or `None` if the record is to be put on top of it.
    fn weigh(&self, write: &mut Write<'_>, found: Option<KeyValue>, why: Intent) -> Option<Result<Epoch>> {
        // The store has it already: readers need not hear of it again.
        let same = |write: &Write<'_>| {
            let same = |kv: &KeyValue| kv.lease() == write.hold.lease && kv.value() == write.entries[0].bytes;
            found.as_ref().is_some_and(same)
        };
        if write.sent && same(write) {
            return Some(Ok(write.epoch));
        }
        let current = found.as_ref().and_then(|kv| self.space.decode(&write.record.key, kv).ok());
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
        write.expected = found.as_ref().map_or(0, KeyValue::mod_revision);
        if epoch != write.epoch
            && let Err(error) = self.encode(write, epoch)
        {
            return Some(Err(error));
        }
        same(write).then_some(Ok(epoch))
    }

    /// Keeps the books: what was not written does not hang on a lease.
    fn settled(&self, write: &Write<'_>, outcome: Result<Epoch>) -> Result<Epoch> {
        match &outcome {
            Ok(_) if !write.is_bound() => self.session.hold_persistent(&write.record.key),
            Err(error) if write.hold.fresh || error.kind() == ErrorKind::Conflict => {
                self.session.release(&write.record.key);
            }
            _ => {}
        }
        outcome
    }

    pub(crate) async fn remove_all(&self, keys: &[Key]) -> Vec<Result<bool>> {
        let mut order: Vec<_> = keys.iter().enumerate().collect();
        // One service after the other, so that a chunk needs few marks.
        order.sort_by_key(|(_, key)| (&key.service, key.directory));
        // Each key takes an operation, and may need a mark of its own.
        let chunks: Vec<_> = order.chunks(OPERATIONS / 2).map(|chunk| self.remove_chunk(chunk)).collect();
        let done = Few::at_most(AT_ONCE, chunks).await;
        let outcomes: BTreeMap<usize, Result<bool>> = done.into_iter().flatten().collect();
        outcomes.into_values().collect()
    }

    async fn remove_chunk(&self, keys: &[(usize, &Key)]) -> Vec<(usize, Result<bool>)> {
        let removal = |&(index, key)| Removal { index, key, seen: None, was_ours: false };
        let mut removals: Vec<_> = keys.iter().map(removal).collect();
        let outcome = self.take_away(&mut removals).await;
        let outcome_of = |removal: Removal<'_>| match &outcome {
            Ok(()) => {
                self.session.release(removal.key);
                (removal.index, Ok(removal.was_ours && removal.seen.is_none()))
            }
            Err(failure) => (removal.index, Err(failure.during(format!("cannot remove {}", removal.key)))),
        };
        removals.into_iter().map(outcome_of).collect()
    }

    /// Looks whose they are, then removes ours together with their marks: all of them, or none if one of them changed.
    async fn take_away(&self, removals: &mut [Removal<'_>]) -> Result<(), Failure> {
        let looks = removals.iter().map(|removal| self.look(removal.key)).collect::<Vec<_>>();
        let answer = self.pool.txn(|| Txn::new().and_then(looks.clone())).await?;
        self.see(removals, &answer);
        let mut marking = true;
        for _ in 0..ROUNDS {
            let ours: Vec<_> = removals.iter().filter(|removal| removal.was_ours && removal.seen.is_some()).collect();
            if ours.is_empty() {
                return Ok(());
            }
            let marked = marking && ours.iter().any(|removal| removal.is_marked());
            match self.remove(&ours, marked, &looks).await {
                Ok(answer) if answer.succeeded() => {
                    removals.iter_mut().filter(|removal| removal.was_ours).for_each(|removal| removal.seen = None);
                    return Ok(());
                }
                Ok(answer) => self.see(removals, &answer),
                Err(gone) if gone.class() == Class::LeaseGone => self.session.sift().await?,
                // A deletion needs no room, a mark does. Without it readers take those who leave for crashed: late is
                // better than never.
                Err(full) if full.class() == Class::Full && marked => marking = false,
                Err(failure) => return Err(failure),
            }
        }
        Err(Failure::Contended)
    }

    /// Removes `ours` if all is as it was seen, and else takes the `looks`.
    async fn remove(&self, ours: &[&Removal<'_>], marked: bool, looks: &[TxnOp]) -> Result<TxnResponse, Failure> {
        // The marks go by themselves, with our session.
        let lease = if marked { Some(self.session.any().await?) } else { None };
        self.pool.txn(|| self.removal(ours, lease).or_else(looks)).await
    }

    fn look(&self, key: &Key) -> TxnOp {
        TxnOp::get(self.space.key(key), None)
    }

    /// Takes note of what is there now.
    fn see(&self, removals: &mut [Removal<'_>], answer: &TxnResponse) {
        for (removal, answer) in removals.iter_mut().zip(answer.op_responses()) {
            removal.seen = found(answer);
            let Some(kv) = &removal.seen else { continue };
            // Operators come back as another owner, so an override is anybody's.
            removal.was_ours = removal.key.directory == Directory::Overrides || self.is_ours(removal.key, kv);
        }
    }

    fn is_ours(&self, key: &Key, kv: &KeyValue) -> bool {
        self.space.decode(key, kv).is_ok_and(|record| record.owner == self.owner)
    }

    /// If all is as it was seen: the marks, first, so that readers meet them before the removals; then the removals.
    /// The marks hang on `lease`; without one there are none.
    fn removal(&self, ours: &[&Removal<'_>], lease: Option<i64>) -> Txn {
        let mut leaving: BTreeMap<&ServiceName, Vec<InstanceId>> = BTreeMap::new();
        for removal in ours.iter().filter(|removal| removal.is_marked()) {
            leaving.entry(&removal.key.service).or_default().push(removal.key.id.clone());
        }
        let marks = lease.into_iter().flat_map(|lease| {
            leaving.iter().map(move |(service, ids)| {
                let (key, mark) = self.space.mark(service, &self.owner, ids);
                TxnOp::put(key, mark, Some(PutOptions::new().with_lease(lease)))
            })
        });
        let deletions = ours.iter().map(|removal| TxnOp::delete(self.space.key(removal.key), None));
        let conditions = ours.iter().map(|removal| {
            let seen = removal.seen.as_ref().map_or(0, KeyValue::mod_revision);
            Compare::mod_revision(self.space.key(removal.key), CompareOp::Equal, seen)
        });
        Txn::new().when(conditions.collect::<Vec<_>>()).and_then(marks.chain(deletions).collect::<Vec<_>>())
    }

    /// Those of the keys that the store has with our token: the check for what hangs on no lease.
    pub(crate) async fn present(&self, keys: &[&Key]) -> Result<Vec<Key>, Failure> {
        let mut present = Vec::new();
        for chunk in keys.chunks(OPERATIONS) {
            let looks = || chunk.iter().map(|key| self.look(key)).collect::<Vec<_>>();
            let answers = self.pool.txn(|| Txn::new().and_then(looks())).await?.op_responses();
            let seen = chunk.iter().zip(answers.into_iter().map(found));
            let ours = seen.filter(|(key, kv)| kv.as_ref().is_some_and(|kv| self.is_ours(key, kv)));
            present.extend(ours.map(|(key, _)| Key::clone(key)));
        }
        Ok(present)
    }
}

impl Removal<'_> {
    /// Only the instances of a service are missed by readers.
    fn is_marked(&self) -> bool {
        self.key.directory == Directory::Providers
    }
}

impl Write<'_> {
    fn is_bound(&self) -> bool {
        self.record.lifetime == Lifetime::Session
    }

    /// What it adds to a request: the key is also in a condition.
    fn bytes(&self) -> usize {
        self.entries.iter().map(|entry| 2 * entry.path.len() + entry.bytes.len()).sum()
    }

    fn key(&self) -> &str {
        &self.entries[0].path
    }
}

/// Puts all of the records if all of the keys are as expected.
///
/// A transaction within the transaction for each key would let the others pass, but servers before 3.4.42, 3.5.28 and
/// 3.6.9 do not check permissions in there (CVE-2026-33343): a missing one would go unnoticed.
fn puts(chunk: &[Write<'_>]) -> Txn {
    let put = |write: &Write<'_>, entry: &Entry| {
        let on_lease = PutOptions::new().with_lease(write.hold.lease);
        TxnOp::put(entry.path.as_str(), entry.bytes.clone(), Some(on_lease))
    };
    let condition = |write: &Write<'_>| Compare::mod_revision(write.key(), CompareOp::Equal, write.expected);
    Txn::new().when(chunk.iter().map(condition).collect::<Vec<_>>()).and_then(
        chunk.iter().flat_map(|write| write.entries.iter().map(|entry| put(write, entry))).collect::<Vec<_>>(),
    )
}

/// The epoch of a key that nobody holds.
fn first_epoch(record: &Record, why: Intent) -> Epoch {
    match why {
        Intent::Claim => 1,
        Intent::Restore => record.epoch,
    }
}

/// Writes that go together: on the same lease, and not too many or too large for one transaction.
fn chunks(mut writes: Vec<Write<'_>>) -> Vec<Vec<Write<'_>>> {
    writes.sort_by_key(|write| write.hold.lease);
    let (mut chunks, mut operations, mut bytes): (Vec<Vec<Write<'_>>>, _, _) = (Vec::new(), 0, 0);
    for write in writes {
        operations += write.entries.len();
        bytes += write.bytes();
        match chunks.last_mut() {
            Some(chunk) if operations <= OPERATIONS && bytes <= BYTES && chunk[0].hold.lease == write.hold.lease => {
                chunk.push(write);
            }
            _ => {
                (operations, bytes) = (write.entries.len(), write.bytes());
                chunks.push(vec![write]);
            }
        }
    }
    chunks
}

/// The one key that a get of a transaction was for.
fn found(answer: TxnOpResponse) -> Option<KeyValue> {
    match answer {
        TxnOpResponse::Get(mut found) => found.take_kvs().pop(),
        _ => None,
    }
}

fn cannot_put(record: &Record, failure: &Failure) -> Error {
    failure.during(format!("cannot put {}", record.key))
}
