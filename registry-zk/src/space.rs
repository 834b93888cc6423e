//! Where the layout's paths and bytes lie in ZooKeeper: below one root, in one node for each record.
//!
//! ```text
//! /{prefix}                                 persistent
//! /{prefix}/{service}                       container
//! /{prefix}/{service}/providers             container
//! /{prefix}/{service}/providers/{id}        ephemeral
//! /{prefix}/{service}/providers/~left~{id}  departure mark: made and deleted with the removal of {id}
//! ```
//!
//! The layout's segments are percent-encoded ASCII, without `~`: ZooKeeper takes them all, and no id looks like a mark.

use std::sync::Arc;

use registry_core::{
    Directory, Error, ErrorKind, Key, Layout, Malformed, Place, Record, Result, ServiceName, decode_segment,
};

use crate::error::NAME;

/// What the name of a departure mark begins with.
const LEFT: &str = "~left~";

/// The part of ZooKeeper that is ours.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    /// `` or `/{prefix}`.
    root: String,
    layout: Arc<dyn Layout>,
    malformed: Arc<Malformed>,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    Record(Key),
    /// The departure mark of the record at this path.
    Mark(String),
    Other,
}

impl Space {
    pub(crate) fn new(prefix: &str, layout: Arc<dyn Layout>) -> Self {
        let prefix = prefix.trim_matches('/');
        let root = if prefix.is_empty() { String::new() } else { format!("/{prefix}") };
        Self { root, layout, malformed: Arc::new(Malformed::new(NAME)) }
    }

    pub(crate) fn with_layout(self, layout: Arc<dyn Layout>) -> Self {
        Self { layout, ..self }
    }

    /// The path of the root.
    pub(crate) fn root(&self) -> &str {
        if self.root.is_empty() { "/" } else { &self.root }
    }

    /// The root and what it lies in, from the top, without `/`.
    pub(crate) fn roots(&self) -> Vec<&str> {
        let ends = self.root.match_indices('/').skip(1).map(|(end, _)| end).chain([self.root.len()]);
        ends.filter(|end| *end > 0).map(|end| &self.root[..end]).collect()
    }

    pub(crate) fn key(&self, key: &Key) -> String {
        self.absolute(&self.layout.path(key))
    }

    /// The path of a directory's node.
    pub(crate) fn directory(&self, service: &ServiceName, directory: Directory) -> String {
        self.absolute(self.layout.directory(service, directory).trim_end_matches('/'))
    }

    /// The nodes between the root and a record, from the top.
    pub(crate) fn parents<'a>(&self, path: &'a str) -> Vec<&'a str> {
        let below = self.root.len() + 1;
        path.match_indices('/').map(|(end, _)| end).filter(|end| *end > below).map(|end| &path[..end]).collect()
    }

    /// The service whose node, right below the root, has this name.
    pub(crate) fn service(&self, segment: &str) -> Option<ServiceName> {
        let service = ServiceName::parse(decode_segment(segment)?).ok()?;
        self.layout.directory(&service, Directory::Providers).starts_with(&format!("{segment}/")).then_some(service)
    }

    pub(crate) fn node(&self, path: &str) -> Node {
        let Some(relative) = path.strip_prefix(&self.root).and_then(|path| path.strip_prefix('/')) else {
            return Node::Other;
        };
        if let Some((directory, name)) = path.rsplit_once('/')
            && let Some(name) = name.strip_prefix(LEFT)
        {
            return Node::Mark(format!("{directory}/{name}"));
        }
        match self.layout.place(relative) {
            Some(Place::Record(key)) => Node::Record(key),
            _ => Node::Other,
        }
    }

    /// The path of the departure mark of a record.
    pub(crate) fn mark(&self, path: &str) -> String {
        let (directory, name) = path.rsplit_once('/').unwrap_or_default();
        format!("{directory}/{LEFT}{name}")
    }

    /// The bytes of a record.
    pub(crate) fn encode(&self, record: &Record) -> Result<Vec<u8>> {
        let mut entries = self.layout.encode(record)?;
        match (entries.pop(), entries.is_empty()) {
            (Some(entry), true) if self.absolute(&entry.path) == self.key(&record.key) => Ok(entry.bytes),
            _ => {
                let message = format!("the layout spells {} as anything but one node", record.key);
                Err(Error::new(ErrorKind::Unsupported, message))
            }
        }
    }

    pub(crate) fn decode(&self, key: &Key, bytes: &[u8]) -> Result<Record> {
        self.layout.decode(key, &[(&self.layout.path(key), bytes)])
    }

    /// The record at a key; one that is malformed is counted, logged once and skipped.
    pub(crate) fn read(&self, key: &Key, bytes: &[u8]) -> Option<Record> {
        self.malformed.read(&*self.layout, key, &[(&self.layout.path(key), bytes)])
    }

    fn absolute(&self, path: &str) -> String {
        format!("{}/{path}", self.root)
    }
}

#[cfg(test)]
mod tests {
    use registry_core::NativeLayout;

    use super::*;

    fn space(prefix: &str) -> Space {
        Space::new(prefix, Arc::new(NativeLayout))
    }

    #[test]
    fn nodes_lie_under_the_prefix_and_nothing_else_does() {
        let key = Key::provider("a/b".parse().unwrap(), "~left~".parse().unwrap());
        for (prefix, root, roots, expected) in [
            ("services", "/services", vec!["/services"], "/services/a%2Fb/providers/%7Eleft%7E"),
            ("/a/b/", "/a/b", vec!["/a", "/a/b"], "/a/b/a%2Fb/providers/%7Eleft%7E"),
            ("", "/", vec![], "/a%2Fb/providers/%7Eleft%7E"),
        ] {
            let space = space(prefix);
            assert_eq!((space.root(), space.roots(), space.key(&key).as_str()), (root, roots, expected));
            assert_eq!(space.node(expected), Node::Record(key.clone()));
            let mark = space.mark(expected);
            assert_eq!(space.node(&mark), Node::Mark(expected.to_owned()), "{mark}");
            let directory = space.directory(&key.service, Directory::Providers);
            assert_eq!(space.parents(expected), [directory.strip_suffix("/providers").unwrap(), directory.as_str()]);
            assert_eq!(space.service("a%2Fb"), Some(key.service.clone()));
        }
        let space = space("services");
        assert_eq!(space.node("/services-old/orders/providers/7f3a"), Node::Other);
        assert_eq!(space.node("/services/orders/providers"), Node::Other);
        assert_eq!(space.service("~"), None);
    }
}
