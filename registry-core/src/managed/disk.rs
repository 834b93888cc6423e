//! *Disk*: the sets of followed services, kept for a process that starts while the store is down. One file for each
//! service, which is replaced as a whole:
//!
//! ```text
//! service-registry 1 {SHA-1 of all that follows}
//! {"backend":"etcd","namespace":"h1:2379/shop","service":"orders","live_at":1700000000000}
//! orders/providers/7f3a {"v":1,…}
//! orders/providers/9c21 {"v":1,…}
//! ```
//!
//! The instances are as the native layout spells them, with the operator's overrides merged in. What is wrong with a
//! file or with the disk is logged once, and never anything worse.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Read, Write},
    path::{self, Path, PathBuf},
    str,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use sha1_smol::Sha1;
use tokio::{
    sync::Semaphore,
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    Shared,
    follow::{Follow, Views},
};
use crate::{
    Backend, Content, Directory, Error, Freshness, Instance, InstanceId, Key, Layout, Lifetime, NativeLayout, Options,
    Owner, Place, Record, Result, ServiceName, Snapshot, encode_segment,
};

/// What a file begins with, and the version of its format.
const MAGIC: &str = "service-registry";
const VERSION: &str = "1";
const EXTENSION: &str = "snapshot";
/// What the name of a file that is being written begins with. One that is left over was of a process that died.
const UNFINISHED: &str = ".unfinished-";
const LEFT_OVER_AFTER: Duration = Duration::from_secs(60 * 60);
/// How much is written into a file, or read, its first line left out.
const LARGEST: u64 = 64 * 1024 * 1024;
const LONGEST_FIRST_LINE: u64 = 100;
/// How much of a service's name is in the name of its file. File systems take 255 bytes, all of it may need 765.
const LONGEST_NAME: usize = 150;
/// A file is written at most once within this.
const PACE: Duration = Duration::from_secs(1);
/// What could not be written is written again after this.
const RETRY: Duration = Duration::from_secs(30);
/// How many files are read at once, so that a disk that hangs does not take all threads that may block.
const READS: usize = 4;
/// How far a clock may have been set back. What is newer than that is not believed.
const SKEW: Duration = Duration::from_secs(60);
/// Whom the records in a file belong to: to nobody, since they only show what there was.
const OWNER: &str = "disk";

/// The files of one registry.
#[derive(Debug)]
pub(super) struct Disk {
    dir: PathBuf,
    backend: &'static str,
    namespace: String,
    max_age: Duration,
    largest: u64,
    reads: Arc<Semaphore>,
    /// Nothing is written any more.
    pub(super) done: CancellationToken,
}

/// What a file tells.
#[derive(Debug)]
pub(super) struct Remembered {
    /// Sorted by id, and not empty.
    pub(super) instances: Vec<Arc<Instance>>,
    /// When they were last known to be live.
    pub(super) live_at: SystemTime,
}

/// The second line of a file.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Head {
    backend: String,
    namespace: String,
    service: String,
    /// Milliseconds since 1970.
    live_at: u64,
}

impl Disk {
    /// The directory that the options name, if they do. It is made if it is not there.
    pub(super) fn open<B: Backend>(options: &Options, backend: &B) -> Result<Option<Arc<Self>>> {
        let Some(dir) = &options.snapshot_dir else { return Ok(None) };
        let made = path::absolute(dir).and_then(|dir| fs::create_dir_all(&dir).map(|()| dir));
        let dir =
            made.map_err(|error| Error::invalid(format!("cannot make snapshot_dir {dir:?}")).with_source(error))?;
        Ok(Some(Arc::new(Self {
            dir,
            backend: backend.name(),
            namespace: backend.namespace(),
            max_age: options.snapshot_max_age,
            largest: LARGEST,
            reads: Arc::new(Semaphore::new(READS)),
            done: CancellationToken::new(),
        })))
    }

    /// What is kept of a service. If there is something and it cannot be used, the log says why.
    pub(super) async fn recall(self: Arc<Self>, service: &ServiceName) -> Option<Remembered> {
        let permit = self.reads.clone().acquire_owned().await.ok()?;
        let (disk, name) = (self.clone(), service.clone());
        let read = spawn_blocking(move || {
            let _permit = permit;
            disk.read(&name, SystemTime::now())
        });
        let outcome = read.await.unwrap_or_else(|error| Err(error.to_string()));
        outcome.unwrap_or_else(|why| {
            let path = self.path(service);
            warn!(service = %service, path = %path.display(), why, "what is kept on disk is not used");
            None
        })
    }

    fn read(&self, service: &ServiceName, now: SystemTime) -> Result<Option<Remembered>, String> {
        let bytes = match read_bounded(&self.path(service), self.largest + LONGEST_FIRST_LINE) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let remembered = self.decode(service, &bytes)?;
        let human = |duration: Duration| humantime::format_duration(Duration::from_secs(duration.as_secs()));
        match now.duration_since(remembered.live_at) {
            Ok(age) if age > self.max_age => {
                Err(format!("it is {} old, at most {} are allowed", human(age), human(self.max_age)))
            }
            Err(ahead) if ahead.duration() > SKEW => {
                Err(format!("it is from {} in the future: the clock was set back", human(ahead.duration())))
            }
            _ => Ok(Some(remembered)),
        }
    }

    /// Puts a file in place of the one that is there, if any: a reader sees one or the other, whole.
    fn write(&self, snapshot: &Snapshot, live_at: SystemTime) -> Result<(), String> {
        let bytes = self.encode(snapshot, live_at)?;
        let write = || {
            fs::create_dir_all(&self.dir)?;
            let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.dir)?;
            file.write_all(&bytes)?;
            file.as_file().sync_all()?;
            file.persist(self.path(snapshot.service())).map(drop).map_err(|error| error.error)
        };
        write().map_err(|error: io::Error| error.to_string())
    }

    /// Takes out what processes left that died while they wrote. What cannot be looked at stays.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED);
            let modified = entry.metadata().and_then(|about| about.modified()).ok();
            let age = modified.and_then(|modified| modified.elapsed().ok());
            if unfinished && age.is_some_and(|age| age > LEFT_OVER_AFTER) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// A part of the service's name for people, and a digest that tells services and namespaces apart.
    fn path(&self, service: &ServiceName) -> PathBuf {
        let mut name = encode_segment(service).into_owned();
        name.truncate(LONGEST_NAME);
        let whole = format!("{}\n{}\n{service}", self.backend, self.namespace);
        let mut digest = digest(whole.as_bytes());
        digest.truncate(16);
        self.dir.join(format!("{name}.{digest}.{EXTENSION}"))
    }

    fn encode(&self, snapshot: &Snapshot, live_at: SystemTime) -> Result<Vec<u8>, String> {
        let since = live_at.duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?;
        let head = Head {
            live_at: u64::try_from(since.as_millis()).map_err(|error| error.to_string())?,
            ..self.head(snapshot.service())
        };
        let mut body = serde_json::to_vec(&head).map_err(|error| error.to_string())?;
        body.push(b'\n');
        for instance in snapshot.instances() {
            for entry in NativeLayout.encode(&record(instance)?).map_err(|error| error.to_string())? {
                body.extend_from_slice(entry.path.as_bytes());
                body.push(b' ');
                body.extend_from_slice(&entry.bytes);
                body.push(b'\n');
            }
            // Before it is all in memory.
            if body.len() as u64 > self.largest {
                return Err(format!("it has more than {} bytes", self.largest));
            }
        }
        Ok([format!("{MAGIC} {VERSION} {}\n", digest(&body)).as_bytes(), &body].concat())
    }

    fn decode(&self, service: &ServiceName, bytes: &[u8]) -> Result<Remembered, String> {
        let text = str::from_utf8(bytes).map_err(|_| "it is damaged: it is not UTF-8")?;
        let (first, body) = text.split_once('\n').ok_or("it is damaged: its first line has no end")?;
        match first.split(' ').collect::<Vec<_>>()[..] {
            [MAGIC, VERSION, sum] if sum == digest(body.as_bytes()) => {}
            [MAGIC, VERSION, _] => return Err("it is damaged or cut off: its checksum is another".to_owned()),
            [MAGIC, ..] => return Err("it has another format version".to_owned()),
            _ => return Err("it is damaged: its first line is not one of ours".to_owned()),
        }
        let (head, records) = body.split_once('\n').ok_or("it has no head")?;
        let head: Head = serde_json::from_str(head).map_err(|error| error.to_string())?;
        if head != (Head { live_at: head.live_at, ..self.head(service) }) {
            return Err(format!("it is of {:?} at {} {}", head.service, head.backend, head.namespace));
        }
        let live_at = UNIX_EPOCH.checked_add(Duration::from_millis(head.live_at)).ok_or("its time is out of range")?;
        let instances: BTreeMap<InstanceId, Arc<Instance>> =
            records.lines().map(|line| instance(service, line)).collect::<Result<_, _>>()?;
        if instances.is_empty() {
            return Err("it has no instances".to_owned());
        }
        Ok(Remembered { instances: instances.into_values().collect(), live_at })
    }

    fn head(&self, service: &ServiceName) -> Head {
        Head {
            backend: self.backend.to_owned(),
            namespace: self.namespace.clone(),
            service: service.to_string(),
            live_at: 0,
        }
    }
}

fn read_bounded(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    // Before it is opened: to open a pipe waits for whoever writes into it.
    let about = fs::metadata(path)?;
    if !about.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    if about.len() > most {
        return Err(io::Error::other(format!("it has {} bytes, at most {most} are read", about.len())));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn digest(bytes: &[u8]) -> String {
    Sha1::from(bytes).digest().to_string()
}

fn record(instance: &Arc<Instance>) -> Result<Record, String> {
    Ok(Record {
        key: Key::provider(instance.service.clone(), instance.id.clone()),
        owner: Owner::parse(OWNER).map_err(|error| error.to_string())?,
        epoch: 0,
        lifetime: Lifetime::Session,
        content: Content::Instance(instance.clone()),
    })
}

fn instance(service: &ServiceName, line: &str) -> Result<(InstanceId, Arc<Instance>), String> {
    let (path, bytes) = line.split_once(' ').ok_or("a record has no path")?;
    let key = match NativeLayout.place(path) {
        Some(Place::Record(key)) if key.service == *service && key.directory == Directory::Providers => key,
        _ => return Err("a record is not of an instance of the service".to_owned()),
    };
    let record = NativeLayout.decode(&key, &[(path, bytes.as_bytes())]).map_err(|error| error.to_string())?;
    match record.content {
        Content::Instance(instance) => Ok((key.id, instance)),
        Content::Override(_) => Err(format!("the record of {key} is not an instance")),
    }
}

/// Keeps what readers have on disk, as it changes, until the registry ends, and then once more.
pub(super) async fn keep_on_disk<B: Backend>(shared: Arc<Shared<B>>, disk: Arc<Disk>) {
    let _done = disk.done.clone().drop_guard();
    let mut keeper = Keeper { disk, kept: HashMap::new() };
    keeper.sweep().await;
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while shared.stop.run_until_cancelled(pace.tick()).await.is_some() {
        keeper.look(&shared.follows.all());
        keeper.write(Kept::is_due).await;
    }
    keeper.look(&shared.follows.all());
    keeper.write(|_| true).await;
}

/// Which services have a file, and which of the files are behind.
struct Keeper {
    disk: Arc<Disk>,
    kept: HashMap<ServiceName, Kept>,
}

/// One service.
struct Kept {
    follow: Arc<Follow>,
    /// The last set that was written, or could not be.
    tried: Option<Snapshot>,
    /// It could not be.
    failed: bool,
    /// When it is tried again, changed or not.
    again: Instant,
}

impl Kept {
    /// What is worth a file: a set that follows the store, holds nothing back and is not empty.
    fn live(&self) -> Option<Snapshot> {
        let snapshot = self.follow.view.load();
        (snapshot.freshness() == Freshness::Live && !snapshot.is_empty()).then(|| Snapshot::clone(&snapshot))
    }

    fn is_due(&self) -> bool {
        let known = self.tried.as_ref().is_some_and(|tried| tried.shares_set(&self.follow.view.load()));
        Instant::now() >= self.again || !known && !self.failed
    }
}

impl Keeper {
    async fn sweep(&self) {
        let disk = self.disk.clone();
        // Whatever came of it.
        let _ = spawn_blocking(move || disk.sweep()).await;
    }

    /// Takes up what is followed now, and lets go of what is not.
    fn look(&mut self, follows: &Views) {
        self.kept.retain(|service, kept| follows.get(service).is_some_and(|now| Arc::ptr_eq(now, &kept.follow)));
        for (service, follow) in follows {
            self.kept.entry(service.clone()).or_insert_with(|| Kept {
                follow: follow.clone(),
                tried: None,
                failed: false,
                again: Instant::now(),
            });
        }
    }

    /// Writes those of the live sets that are `due`, one after the other.
    async fn write(&mut self, due: impl Fn(&Kept) -> bool) {
        let snapshots: Vec<_> = self.kept.values().filter(|kept| due(kept)).filter_map(Kept::live).collect();
        if snapshots.is_empty() {
            return;
        }
        let (disk, live_at) = (self.disk.clone(), SystemTime::now());
        let written = spawn_blocking(move || {
            let write = |snapshot: Snapshot| (disk.write(&snapshot, live_at), snapshot);
            snapshots.into_iter().map(write).collect::<Vec<_>>()
        });
        // It fails only if the runtime goes down.
        for (outcome, snapshot) in written.await.unwrap_or_default() {
            self.note(outcome, snapshot);
        }
    }

    fn note(&mut self, outcome: Result<(), String>, snapshot: Snapshot) {
        let (service, path) = (snapshot.service().clone(), self.disk.path(snapshot.service()));
        let Some(kept) = self.kept.get_mut(&service) else { return };
        match &outcome {
            Err(why) if !kept.failed => {
                warn!(%service, path = %path.display(), why, "cannot be kept on disk; trying again");
            }
            Err(why) => debug!(%service, path = %path.display(), why, "still cannot be kept on disk"),
            Ok(()) if kept.failed => info!(%service, path = %path.display(), "kept on disk again"),
            Ok(()) => {}
        }
        kept.failed = outcome.is_err();
        kept.again = Instant::now() + if kept.failed { RETRY } else { self.disk.max_age / 4 };
        kept.tried = Some(snapshot);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        thread,
    };

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::memory::{MemoryBackend, MemoryStore};

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    const SECOND: Duration = Duration::from_secs(1);

    fn disk(dir: &TempDir) -> Arc<Disk> {
        let backend = MemoryBackend::new(MemoryStore::new(), SECOND);
        Disk::open(&Options::default().snapshot_dir(dir.path()), &backend).unwrap().unwrap()
    }

    fn orders() -> ServiceName {
        "orders".parse().unwrap()
    }

    fn set(ids: impl IntoIterator<Item = String>) -> Snapshot {
        let instances = ids.into_iter().map(|id| Instance::builder("orders", id).build().unwrap().into());
        Snapshot::pending(orders()).with_instances(instances.collect(), Freshness::Live)
    }

    fn ab() -> Snapshot {
        set(["a", "b"].map(str::to_owned))
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_set_is_used_until_its_age_is_over_and_not_if_it_is_from_the_future() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(&dir);
        let written = at(1_000_000);
        disk.write(&ab(), written).unwrap();
        for now in [written, written + DAY, written - SKEW] {
            let read = disk.read(&orders(), now).unwrap().unwrap();
            assert_eq!((read.instances.as_slice(), read.live_at), (ab().instances(), written));
        }
        let why = disk.read(&orders(), written + DAY + SECOND).unwrap_err();
        assert_eq!(why, "it is 1day 1s old, at most 1day are allowed");
        let why = disk.read(&orders(), written - SKEW - SECOND).unwrap_err();
        assert_eq!(why, "it is from 1m 1s in the future: the clock was set back");
    }

    #[cfg(unix)]
    #[test]
    fn only_its_own_user_can_read_a_file() {
        use std::os::unix::fs::PermissionsExt;

        let dir = tempfile::tempdir().unwrap();
        let disk = disk(&dir);
        disk.write(&ab(), at(1)).unwrap();
        let mode = fs::metadata(disk.path(&orders())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn two_writers_of_one_file_never_show_a_reader_half_of_one() {
        let dir = tempfile::tempdir().unwrap();
        // Like processes: nothing in common but the directory.
        let (one, other, reader) = (disk(&dir), disk(&dir), disk(&dir));
        let (small, large) = (ab(), set((0..500).map(|id| format!("{id:03}"))));
        one.write(&small, at(1)).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let write =
                |disk: Arc<Disk>, set: Snapshot| move || (0..100).for_each(|_| disk.write(&set, at(1)).unwrap());
            let writers = [scope.spawn(write(one, small)), scope.spawn(write(other, large))];
            let reading = scope.spawn(|| {
                let mut seen = [0; 2];
                while !done.load(Ordering::Relaxed) {
                    match reader.read(&orders(), at(1)).unwrap().unwrap().instances.len() {
                        2 => seen[0] += 1,
                        500 => seen[1] += 1,
                        other => panic!("{other} instances"),
                    }
                }
                seen
            });
            for writer in writers {
                writer.join().unwrap();
            }
            done.store(true, Ordering::Relaxed);
            let seen = reading.join().unwrap();
            assert!(seen.iter().sum::<u32>() > 0, "{seen:?}");
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left over");
    }

    #[test]
    fn what_a_dead_process_left_unfinished_is_swept_and_what_a_living_one_writes_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(&dir);
        disk.write(&ab(), at(1)).unwrap();
        let left_over = dir.path().join(format!("{UNFINISHED}old"));
        fs::write(&left_over, "{").unwrap();
        File::open(&left_over).unwrap().set_modified(SystemTime::now() - 2 * LEFT_OVER_AFTER).unwrap();
        let being_written = dir.path().join(format!("{UNFINISHED}new"));
        fs::write(&being_written, "{").unwrap();
        disk.sweep();
        assert!(!left_over.exists() && being_written.exists() && disk.path(&orders()).exists());
    }

    #[test]
    fn a_set_that_is_too_large_is_not_written_and_what_was_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk { largest: 10_000, ..Arc::into_inner(disk(&dir)).unwrap() };
        let up_to = |count: u32| set((0..count).map(|id| format!("{id:04}")));
        // Each has about a hundred bytes.
        disk.write(&up_to(70), at(1)).unwrap();
        assert_eq!(disk.write(&up_to(130), at(1)).unwrap_err(), "it has more than 10000 bytes");
        assert_eq!(disk.read(&orders(), at(1)).unwrap().unwrap().instances.len(), 70);
    }

    proptest! {
        #[test]
        fn any_damage_is_told(place in any::<proptest::sample::Index>(), byte: u8, cut: bool) {
            let dir = tempfile::tempdir().unwrap();
            let disk = disk(&dir);
            let whole = disk.encode(&ab(), at(1)).unwrap();
            let place = place.index(whole.len());
            let mut damaged = whole.clone();
            if cut {
                damaged.truncate(place);
            } else {
                damaged[place] = byte;
            }
            prop_assert_eq!(disk.decode(&orders(), &damaged).is_ok(), damaged == whole);
        }

        #[test]
        fn decoders_take_any_text(text: String, bytes: Vec<u8>) {
            let dir = tempfile::tempdir().unwrap();
            let disk = disk(&dir);
            let signed = format!("{MAGIC} {VERSION} {}\n{text}", digest(text.as_bytes()));
            for bytes in [bytes.as_slice(), text.as_bytes(), signed.as_bytes()] {
                let _ = disk.decode(&orders(), bytes);
            }
        }
    }
}
