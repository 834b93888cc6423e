//! The Redis scripts against a model: four owners and four readers do what comes to mind, on a store that is wiped,
//! rolled back, evicted from and written to by hand meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::StreamExt;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use redis::{Value, aio::MultiplexedConnection, cmd};
use registry_core::{
    Backend, Content, Directory, ErrorKind, Instance, Intent, Key, Lifetime, Owner, Record, ServiceName, Update,
};
use registry_redis::RedisBackend;
use registry_tests::servers::Redis;
use tokio::time::{Instant, sleep};

use crate::{EXPIRY, LOG, RECORDS, SECOND, Store, unchecked};

const STEPS: usize = 3000;
/// Names the variable that repeats a run, as far as what happens in it is chosen.
const SEED: &str = "REGISTRY_TEST_SEED";
const POLL: Duration = Duration::from_millis(100);
/// For what a poll and a few round trips bring about, on a busy machine.
const SOON: Duration = Duration::from_secs(10);
const SERVICE: &str = "orders";
const KEYS: [&str; 3] = [RECORDS, EXPIRY, LOG];

fn key(id: usize) -> Key {
    Key::provider(SERVICE.parse().unwrap(), format!("i{id}").parse().unwrap())
}

fn record(id: usize, owner: &Owner, epoch: u64, weight: u32) -> Record {
    let mut instance = Instance::builder(SERVICE, format!("i{id}")).build().unwrap();
    instance.weight = weight;
    let content = Content::Instance(instance.into());
    Record { key: key(id), owner: owner.clone(), epoch, lifetime: Lifetime::Session, content }
}

/// What a record says: owner, epoch, weight.
type Said = (String, u64, u32);
type Set = BTreeMap<Key, Said>;
/// What a reader sees, and who it was told is gone, in order.
type Seen = Mutex<(Set, Vec<Key>)>;

fn said(record: &Record) -> Said {
    let weight = match &record.content {
        Content::Instance(instance) => instance.weight,
        _ => 0,
    };
    (record.owner.to_string(), record.epoch, weight)
}

/// A reader that applies what it is told, and subscribes again from its cursor when that ends.
fn follow(backend: Arc<RedisBackend>) -> Arc<Seen> {
    let seen = Arc::new(Mutex::new((Set::new(), Vec::new())));
    let told = seen.clone();
    tokio::spawn(async move {
        let mut cursor = None;
        loop {
            let service: ServiceName = SERVICE.parse().unwrap();
            let Ok(mut stream) = backend.subscribe(&service, cursor.clone()).await else { continue };
            while let Some(Ok(item)) = stream.next().await {
                let mut told = told.lock().unwrap();
                cursor = item.cursor.or(cursor);
                for update in item.updates {
                    match update {
                        Update::Reset { records, .. } => {
                            let now: Set = records.iter().map(|record| (record.key.clone(), said(record))).collect();
                            let gone: Vec<_> = told.0.keys().filter(|key| !now.contains_key(key)).cloned().collect();
                            told.1.extend(gone);
                            told.0 = now;
                        }
                        Update::Upsert(record) => drop(told.0.insert(record.key.clone(), said(&record))),
                        Update::Remove { key, .. } => {
                            told.0.remove(&key);
                            told.1.push(key);
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
    });
    seen
}

async fn eventually(what: &str, holds: impl Fn() -> Result<(), String>) {
    let start = Instant::now();
    while let Err(seen) = holds() {
        assert!(start.elapsed() < SOON, "never: {what}; {seen}");
        sleep(Duration::from_millis(2)).await;
    }
}

/// One whose records outlive the test.
fn backend(store: &Store) -> RedisBackend {
    let options = unchecked().ttl(3600 * SECOND).request_timeout(SOON);
    RedisBackend::new(store.config(options).poll(POLL)).unwrap()
}

struct World {
    rng: StdRng,
    store: Store,
    admin: MultiplexedConnection,
    owners: Vec<RedisBackend>,
    readers: Vec<Arc<Seen>>,
    model: Set,
    snapshots: Vec<([Option<Vec<u8>>; 3], Set)>,
    weight: u32,
    /// Owners whose last put may have been rolled back: they are told so once, by the loss of everything.
    rolled_back: BTreeSet<usize>,
}

impl World {
    fn some_ids(&mut self) -> Vec<usize> {
        let ids: Vec<usize> = (0..12).collect();
        let count = self.rng.random_range(1..=4);
        ids.choose_multiple(&mut self.rng, count).copied().collect()
    }

    async fn put(&mut self, owner: usize, why: Intent) {
        let token = self.owners[owner].owner().clone();
        let (mut records, mut expected) = (Vec::new(), Vec::new());
        for id in self.some_ids() {
            self.weight += self.rng.random_range(0..2);
            let held = self.model.get(&key(id)).cloned();
            let epoch = self.rng.random_range(1..6);
            let outcome = match (&held, why) {
                (held, Intent::Claim) => Ok(held.as_ref().map_or(1, |held| held.1 + 1)),
                (Some(held), Intent::Restore) if held.0 != token.as_str() || held.1 > epoch => Err(ErrorKind::Conflict),
                _ => Ok(epoch),
            };
            if let Ok(epoch) = outcome {
                self.model.insert(key(id), (token.to_string(), epoch, self.weight));
            }
            records.push(record(id, &token, epoch, self.weight));
            expected.push(outcome);
        }
        let outcomes = self.owners[owner].put(&records, why).await;
        let outcomes: Vec<_> = outcomes.into_iter().map(|outcome| outcome.map_err(|error| error.kind())).collect();
        assert_eq!(outcomes, expected, "{why:?} {records:?}");
    }

    async fn remove(&mut self, owner: usize) {
        let token = self.owners[owner].owner().to_string();
        let keys: Vec<_> = self.some_ids().into_iter().map(key).collect();
        let removed = self.owners[owner].remove(&keys).await;
        for (key, removed) in keys.iter().zip(removed) {
            let ours = self.model.get(key).is_some_and(|held| held.0 == token);
            assert_eq!(removed.unwrap(), ours, "{key}");
            if ours {
                self.model.remove(key);
            }
        }
    }

    async fn renew(&mut self, owner: usize) {
        let token = self.owners[owner].owner().to_string();
        let keys: Vec<_> = self.some_ids().into_iter().map(key).collect();
        let length = self.log_length().await;
        let (held, missing): (Vec<_>, Vec<_>) =
            keys.iter().cloned().partition(|key| self.model.get(key).is_some_and(|held| held.0 == token));
        let told = self.owners[owner].renew(&keys).await.unwrap().missing;
        assert!(
            told == missing || (told == keys && self.rolled_back.remove(&owner)),
            "{told:?} instead of {missing:?}"
        );
        assert_eq!(self.owners[owner].verify(&keys).await.unwrap(), held);
        assert_eq!(self.log_length().await, length, "a heartbeat writes no entry");
    }

    async fn log_length(&mut self) -> u64 {
        cmd("XLEN").arg(LOG).query_async(&mut self.admin).await.unwrap()
    }

    /// An owner that leaves, and whose last request arrives after that.
    async fn leave_and_come_late(&mut self) {
        let owner = backend(&self.store);
        let id = self.rng.random_range(0..12);
        let epoch = self.model.get(&key(id)).map_or(1, |held| held.1 + 1);
        let ours = record(id, owner.owner(), 0, 1);
        assert_eq!(owner.put(std::slice::from_ref(&ours), Intent::Claim).await.remove(0).unwrap(), epoch);
        owner.close(&[key(id)]).await.unwrap();
        self.model.remove(&key(id));
        let late = owner.put(&[ours], Intent::Claim).await.remove(0).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Closed);
    }

    async fn by_hand(&mut self) {
        let id = self.rng.random_range(0..12);
        self.weight += 1;
        let json = format!(r#"{{"v":1,"owner":"hand","epoch":3,"weight":{}}}"#, self.weight);
        let field = format!("{SERVICE}/providers/i{id}");
        let head = format!("hand-{}", self.weight);
        let set = cmd("HSET").arg(RECORDS).arg(&field).arg(json).arg("~head").arg(head).to_owned();
        set.exec_async(&mut self.admin).await.unwrap();
        cmd("ZREM").arg(EXPIRY).arg(&field).exec_async(&mut self.admin).await.unwrap();
        self.model.insert(key(id), ("hand".to_owned(), 3, self.weight));
    }

    async fn snapshot(&mut self) {
        let mut dump = [None, None, None];
        for (dump, key) in dump.iter_mut().zip(KEYS) {
            *dump = match cmd("DUMP").arg(key).query_async(&mut self.admin).await.unwrap() {
                Value::BulkString(bytes) => Some(bytes),
                _ => None,
            };
        }
        self.snapshots.push((dump, self.model.clone()));
    }

    /// As after a failover to a replica that was behind, or from a backup.
    async fn roll_back(&mut self) {
        let Some((dump, model)) = self.snapshots.choose(&mut self.rng).cloned() else { return };
        let mut orders = redis::pipe();
        orders.atomic().del(&KEYS);
        for (dump, key) in dump.iter().zip(KEYS) {
            if let Some(dump) = dump {
                orders.cmd("RESTORE").arg(key).arg(0).arg(dump);
            }
        }
        orders.exec_async(&mut self.admin).await.unwrap();
        self.model = model;
        self.rolled_back = (0..self.owners.len()).collect();
    }

    async fn evict(&mut self) {
        let one = self.rng.random_range(0..3);
        cmd("DEL").arg(KEYS[one]).exec_async(&mut self.admin).await.unwrap();
        if one == 0 {
            self.model.clear();
        }
    }

    async fn sync(&self) {
        for (index, reader) in self.readers.iter().enumerate() {
            let same = || {
                let seen = reader.lock().unwrap();
                let same = seen.0 == self.model;
                same.then_some(()).ok_or_else(|| format!("{:?} instead of {:?}", seen.0, self.model))
            };
            eventually(&format!("reader {index} sees what is there"), same).await;
        }
        let listed = self.owners[0].list(&SERVICE.parse().unwrap(), Directory::Providers).await.unwrap();
        let listed: Set = listed.iter().map(|record| (record.key.clone(), said(record))).collect();
        assert_eq!(listed, self.model);
    }

    async fn step(&mut self) {
        let owner = self.rng.random_range(0..self.owners.len());
        match self.rng.random_range(0..1000) {
            0..300 => self.put(owner, Intent::Claim).await,
            300..520 => self.put(owner, Intent::Restore).await,
            520..680 => self.remove(owner).await,
            680..880 => self.renew(owner).await,
            880..930 => self.sync().await,
            930..945 => self.by_hand().await,
            945..960 => self.snapshot().await,
            960..966 => self.roll_back().await,
            966..974 => self.evict().await,
            974..982 => self.leave_and_come_late().await,
            982..990 => cmd("SCRIPT").arg("FLUSH").exec_async(&mut self.admin).await.unwrap(),
            990..995 => {
                cmd("FLUSHALL").exec_async(&mut self.admin).await.unwrap();
                self.model.clear();
            }
            _ => cmd("XTRIM").arg(LOG).arg("MAXLEN").arg(1).exec_async(&mut self.admin).await.unwrap(),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_owners_and_readers_agree_with_the_model() {
    let seed = std::env::var(SEED).map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("{SEED}={seed}");
    let store = Store::start(Redis::new()).await;
    let owners = (0..4).map(|_| backend(&store)).collect();
    let readers = (0..4).map(|_| follow(Arc::new(backend(&store)))).collect();
    let (admin, rng) = (store.bare().await, StdRng::seed_from_u64(seed));
    let (model, snapshots) = (Set::new(), Vec::new());
    let mut world =
        World { rng, store, admin, owners, readers, model, snapshots, weight: 0, rolled_back: BTreeSet::new() };
    for _ in 0..STEPS {
        world.step().await;
    }
    world.sync().await;
}
