//! The requests that we make, each bounded in size and time.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt, future::join_all, stream};
use registry_core::{Directory, Key, Record, ServiceName};
use tokio::time::Instant;
use zookeeper_client::{Client, CreateMode, Error as ClientError, MultiReadResult, MultiReader, Stat};

use crate::{
    acl::AclList,
    error::{Class, Failure, SUSPECT},
    session::{Link, Session},
    space::{Node, Space},
};

/// How many bytes go into one request. A server ends the connection at its `jute.maxbuffer`, 1 MB by default.
pub(crate) const BYTES: usize = 500_000;
/// How long we keep to smaller requests, once a server hung up on larger ones.
const BELIEVED: Duration = Duration::from_secs(600);
/// How many nodes are read at once.
const NODES: usize = 500;
/// How many such requests are in flight.
const AT_ONCE: usize = 4;
/// What the request for a node has beyond its path.
const OVERHEAD: usize = 32;

/// The part of ZooKeeper that is ours, through our session.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    pub(crate) session: Session,
    pub(crate) space: Space,
    pub(crate) acl: AclList,
    pub(crate) budget: Budget,
}

/// How many bytes a request may have. A server does not tell its `jute.maxbuffer`, but hangs up on what is larger. Once may
/// be for another reason; twice in a row makes the requests smaller, for a while.
#[derive(Clone, Debug, Default)]
pub(crate) struct Budget(Arc<Mutex<Learned>>);

#[derive(Debug, Default)]
struct Learned {
    /// The size of the request that the connection was lost under last, if none as large has passed since.
    lost: Option<usize>,
    /// How many bytes are safe, and since when we believe so.
    safe: Option<(usize, Instant)>,
}

impl Budget {
    pub(crate) fn get(&self) -> usize {
        self.lock().safe.filter(|(_, since)| since.elapsed() < BELIEVED).map_or(BYTES, |(bytes, _)| bytes)
    }

    /// Draws the conclusions from what became of a request of so many bytes, and passes that on.
    pub(crate) fn learn<T>(&self, bytes: usize, outcome: Result<T, Failure>) -> Result<T, Failure> {
        let outcome = outcome.map_err(|failure| failure.under(bytes));
        let mut learned = self.lock();
        match &outcome {
            Ok(_) => learned.lost = learned.lost.filter(|lost| bytes < *lost),
            Err(Failure::HungUp(_)) => {
                if let Some(lost) = learned.lost.replace(bytes) {
                    learned.safe = Some(((bytes.min(lost) / 2).max(SUSPECT), Instant::now()));
                }
            }
            Err(_) => {}
        }
        drop(learned);
        outcome
    }

    /// Locked for a look or an edit, never across an `.await`.
    fn lock(&self) -> MutexGuard<'_, Learned> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a record of so many bytes may be too large by itself.
    pub(crate) fn suspects(&self, bytes: usize) -> bool {
        bytes > self.get()
    }
}

/// A node as it was read.
pub(crate) struct Found {
    pub(crate) bytes: Vec<u8>,
    pub(crate) stat: Stat,
}

/// A directory as it was read.
pub(crate) struct Listed {
    pub(crate) records: Vec<Record>,
    /// `None` if there is no such directory.
    pub(crate) stat: Option<Stat>,
}

impl Store {
    /// The nodes at these paths, in order; `None` where there is none.
    pub(crate) async fn read(&self, link: &Link, paths: &[&str]) -> Result<Vec<Option<Found>>, Failure> {
        let found = self.look(link, paths).await?;
        Ok(found.into_iter().collect::<Result<_, _>>()?)
    }

    /// The same, with an outcome for each node.
    pub(crate) async fn look(
        &self,
        link: &Link,
        paths: &[&str],
    ) -> Result<Vec<Result<Option<Found>, ClientError>>, Failure> {
        let mut all = Vec::with_capacity(paths.len());
        self.each(link, paths, |found| all.push(found)).await?;
        Ok(all)
    }

    /// The same, told one after the other as the answers come.
    async fn each(
        &self,
        link: &Link,
        paths: &[&str],
        mut tell: impl FnMut(Result<Option<Found>, ClientError>),
    ) -> Result<(), Failure> {
        let requests: Vec<_> =
            chunks(paths, self.budget.get()).into_iter().map(|chunk| self.look_at(link, chunk)).collect();
        let mut answers = stream::iter(requests).buffered(AT_ONCE);
        while let Some(answer) = answers.next().await {
            answer?.into_iter().for_each(&mut tell);
        }
        Ok(())
    }

    async fn look_at(&self, link: &Link, paths: &[&str]) -> Result<Vec<Result<Option<Found>, ClientError>>, Failure> {
        let answers = {
            let mut reader = multi_reader(link.client(), paths)?;
            reader.commit()
        };
        let bytes = paths.iter().map(|path| path.len() + OVERHEAD).sum();
        let answers = self.budget.learn(bytes, self.session.call(link, answers).await)?;
        let found = answers.into_iter().map(|answer| match answer {
            MultiReadResult::Data { data, stat } => Ok(Some(Found { bytes: data, stat })),
            MultiReadResult::Error { err: ClientError::NoNode } => Ok(None),
            MultiReadResult::Error { err } => Err(err),
            _ => Err(ClientError::UnexpectedError("an answer to another question".to_owned())),
        });
        Ok(found.collect())
    }

    /// All records of a directory.
    pub(crate) async fn list(
        &self,
        link: &Link,
        service: &ServiceName,
        directory: Directory,
    ) -> Result<Listed, Failure> {
        let path = self.space.directory(service, directory);
        let (names, stat) = match self.session.call(link, link.client().get_children(&path)).await {
            Ok(answer) => answer,
            Err(failure) if failure.class() == Class::Absent => return Ok(Listed { records: Vec::new(), stat: None }),
            Err(failure) => return Err(failure),
        };
        let paths = names.into_iter().map(|name| format!("{path}/{name}"));
        let keys: Vec<(Key, String)> = paths
            .filter_map(|path| match self.space.node(&path) {
                Node::Record(key) => Some((key, path)),
                _ => None,
            })
            .collect();
        Ok(Listed { records: self.records(link, &keys).await?, stat: Some(stat) })
    }

    /// The records at these paths, without those that are gone or malformed, or that we may not read.
    async fn records(&self, link: &Link, keys: &[(Key, String)]) -> Result<Vec<Record>, Failure> {
        let paths: Vec<_> = keys.iter().map(|(_, path)| path.as_str()).collect();
        let mut records = Vec::with_capacity(keys.len());
        let (mut readable, mut refused) = (keys.is_empty(), None);
        let mut keys = keys.iter().map(|(key, _)| key);
        // One by one: of ten thousand there need not be what was read and the records, too.
        let told = self.each(link, &paths, |found| match (keys.next(), found) {
            (Some(key), Ok(found)) => {
                readable = true;
                records.extend(found.and_then(|found| self.space.read(key, &found.bytes)));
            }
            (_, Err(error)) => refused = Some(error),
            (None, Ok(_)) => {}
        });
        told.await?;
        match refused {
            // One that is closed to us must not hide the others; if all of them are, it is our rights.
            Some(error) if !readable => Err(error.into()),
            _ => Ok(records),
        }
    }

    /// The state of nodes, without a permission to read them; `None` where there is none.
    pub(crate) async fn stats(&self, link: &Link, paths: &[&str]) -> Result<Vec<Option<Stat>>, Failure> {
        // Each request leaves when it is made, and the answers are waited for together.
        let requests: Vec<_> =
            paths.iter().map(|path| self.session.call(link, link.client().check_stat(path))).collect();
        join_all(requests).await.into_iter().collect()
    }

    /// Makes the nodes that records at these paths lie in, as far as they are missing. One that vanishes meanwhile, as
    /// empty containers do, is not made again.
    pub(crate) async fn make_parents(&self, link: &Link, paths: &[&str]) -> Result<(), Failure> {
        let root = self.space.root();
        let mut parents: Vec<_> = paths.iter().flat_map(|path| self.space.parents(path)).collect();
        parents.push(root);
        // From the top: what lies in another sorts after it.
        parents.sort_unstable();
        parents.dedup();
        let there = self.stats(link, &parents).await?;
        let missing: Vec<_> =
            parents.iter().zip(there).filter(|(_, stat)| stat.is_none()).map(|(path, _)| *path).collect();
        if missing.contains(&root) {
            self.make_root(link).await?;
        }
        let container = CreateMode::Container.with_acls(self.acl.acls());
        let containers = missing.iter().filter(|path| **path != root);
        let requests: Vec<_> =
            containers.map(|path| self.session.call(link, link.client().create(path, b"", &container))).collect();
        for outcome in join_all(requests).await {
            match outcome {
                Err(failure) if !matches!(failure.class(), Class::Overtaken | Class::Absent) => return Err(failure),
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes the root, and what it lies in: nodes that stay, as the root's age tells a history from another.
    async fn make_root(&self, link: &Link) -> Result<(), Failure> {
        let persistent = CreateMode::Persistent.with_acls(self.acl.acls());
        let roots = self.space.roots();
        let there = self.stats(link, &roots).await?;
        for (root, _) in roots.iter().zip(there).filter(|(_, stat)| stat.is_none()) {
            match self.session.call(link, link.client().create(root, b"", &persistent)).await {
                Ok(_) | Err(Failure::Client(ClientError::NodeExists)) => {}
                Err(Failure::Client(error)) if !matches!(crate::error::classify(&error), Class::Lost) => {
                    return Err(Failure::NoRoot(self.space.root().to_owned(), error));
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(())
    }
}

fn multi_reader<'a>(client: &'a Client, paths: &[&str]) -> Result<MultiReader<'a>, ClientError> {
    let mut reader = client.new_multi_reader();
    for path in paths {
        reader.add_get_data(path)?;
    }
    Ok(reader)
}

/// Paths that go into one request.
fn chunks<'a, 'b>(paths: &'a [&'b str], budget: usize) -> Vec<&'a [&'b str]> {
    let (mut chunks, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (index, path) in paths.iter().enumerate() {
        let more = path.len() + OVERHEAD;
        if index > start && (index - start >= NODES || bytes + more > budget) {
            chunks.push(&paths[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += more;
    }
    if start < paths.len() {
        chunks.push(&paths[start..]);
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_bounded_by_count_and_bytes() {
        let sizes = |paths: &[&str]| chunks(paths, BYTES).iter().map(|chunk| chunk.len()).collect::<Vec<_>>();
        assert_eq!(sizes(&[]), [0; 0]);
        assert_eq!(sizes(&["/a"; 500]), [500]);
        assert_eq!(sizes(&["/a"; 1001]), [500, 500, 1]);
        let long = "x".repeat(BYTES / 2 - OVERHEAD);
        assert_eq!(sizes(&[long.as_str(); 3]), [2, 1]);
        let too_long = "x".repeat(2 * BYTES);
        assert_eq!(sizes(&["/a", &too_long, "/a"]), [1, 1, 1]);
    }

    #[test]
    fn a_request_that_the_connection_was_lost_under_makes_the_next_ones_smaller() {
        let budget = Budget::default();
        let lost = |bytes| drop(budget.learn::<()>(bytes, Err(Failure::Interrupted)));
        let passed = |bytes| drop(budget.learn(bytes, Ok(())));
        lost(500);
        lost(400_000);
        passed(400_000);
        lost(300_000);
        passed(1000);
        assert_eq!(budget.get(), BYTES, "each may have been for another reason");
        for (bytes, expected) in [(400_000, 150_000), (150_000, 75_000), (12_000, SUSPECT)] {
            lost(bytes);
            assert_eq!(budget.get(), expected);
        }
        assert!(budget.suspects(SUSPECT + 1) && !budget.suspects(SUSPECT));
    }
}
