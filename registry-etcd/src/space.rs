//! Where the layout's paths and bytes lie in etcd: one prefix, one separator, nothing else.

use std::sync::Arc;

use etcd_client::KeyValue;
use registry_core::{Directory, Entry, InstanceId, Key, Layout, Malformed, Owner, Place, Record, Result, ServiceName};

use crate::error::NAME;

/// A range of keys, from inclusive to exclusive.
pub(crate) type Range = (Vec<u8>, Vec<u8>);

/// The part of etcd that is ours.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    /// `/` or `/{prefix}/`.
    root: String,
    layout: Arc<dyn Layout>,
    malformed: Arc<Malformed>,
}

impl Space {
    pub(crate) fn new(prefix: &str, layout: Arc<dyn Layout>) -> Self {
        let prefix = prefix.trim_matches('/');
        let root = if prefix.is_empty() { "/".to_owned() } else { format!("/{prefix}/") };
        Self { root, layout, malformed: Arc::new(Malformed::new(NAME)) }
    }

    pub(crate) fn with_layout(self, layout: Arc<dyn Layout>) -> Self {
        Self { layout, ..self }
    }

    pub(crate) fn key(&self, key: &Key) -> String {
        self.absolute(&self.layout.path(key))
    }

    pub(crate) fn mark(&self, service: &ServiceName, owner: &Owner, ids: &[InstanceId]) -> (String, Vec<u8>) {
        (self.absolute(&self.layout.mark(service, owner)), self.layout.encode_mark(ids))
    }

    pub(crate) fn all(&self) -> Range {
        (self.root.clone().into_bytes(), after_all_below(&self.root))
    }

    pub(crate) fn directory(&self, service: &ServiceName, directory: Directory) -> Range {
        let path = self.absolute(&self.layout.directory(service, directory));
        let end = after_all_below(&path);
        (path.into_bytes(), end)
    }

    pub(crate) fn followed(&self, service: &ServiceName) -> Range {
        let (from, to) = self.layout.followed(service);
        (self.absolute(&from).into_bytes(), self.absolute(&to).into_bytes())
    }

    /// What lies at a key, or `None` if it is not ours.
    pub(crate) fn place(&self, key: &[u8]) -> Option<Place> {
        self.layout.place(std::str::from_utf8(key).ok()?.strip_prefix(&self.root)?)
    }

    /// A record as entries with whole keys.
    pub(crate) fn encode(&self, record: &Record) -> Result<Vec<Entry>> {
        let mut entries = self.layout.encode(record)?;
        entries.iter_mut().for_each(|entry| entry.path.insert_str(0, &self.root));
        Ok(entries)
    }

    pub(crate) fn decode(&self, key: &Key, kv: &KeyValue) -> Result<Record> {
        self.layout.decode(key, &[(self.relative(kv), kv.value())])
    }

    /// The record at a key; one that is malformed is counted, logged once and skipped.
    pub(crate) fn read(&self, key: &Key, kv: &KeyValue) -> Option<Record> {
        self.malformed.read(&*self.layout, key, &[(self.relative(kv), kv.value())])
    }

    fn relative<'a>(&self, kv: &'a KeyValue) -> &'a str {
        kv.key_str().ok().and_then(|path| path.strip_prefix(&self.root)).unwrap_or_default()
    }

    pub(crate) fn left(&self, service: &ServiceName, mark: &[u8]) -> impl Iterator<Item = Key> {
        let service = service.clone();
        self.layout.decode_mark(mark).into_iter().map(move |id| Key::provider(service.clone(), id))
    }

    fn absolute(&self, path: &str) -> String {
        format!("{}{path}", self.root)
    }
}

/// The end of the range of all keys that begin with `prefix`, which ends in a separator.
fn after_all_below(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1; // UTF-8 has no byte 0xff
    }
    end
}

#[cfg(test)]
mod tests {
    use registry_core::NativeLayout;

    use super::*;

    #[test]
    fn keys_lie_under_the_prefix_and_nothing_else_does() {
        let key = Key::provider("orders".parse().unwrap(), "7f3a".parse().unwrap());
        for (prefix, expected) in [
            ("services", "/services/orders/providers/7f3a"),
            ("/a/b/", "/a/b/orders/providers/7f3a"),
            ("", "/orders/providers/7f3a"),
        ] {
            let space = Space::new(prefix, Arc::new(NativeLayout));
            assert_eq!(space.key(&key), expected);
            assert_eq!(space.place(expected.as_bytes()), Some(Place::Record(key.clone())));
            let (from, to) = space.followed(&key.service);
            assert!(from.as_slice() <= expected.as_bytes() && expected.as_bytes() < to.as_slice());
            let (from, to) = space.directory(&key.service, Directory::Providers);
            assert!(from.as_slice() <= expected.as_bytes() && expected.as_bytes() < to.as_slice());
        }
        let space = Space::new("services", Arc::new(NativeLayout));
        assert_eq!(space.all(), (b"/services/".to_vec(), b"/services0".to_vec()));
        assert_eq!(space.place(b"/services-old/orders/providers/7f3a"), None);
        assert_eq!(space.place(b"\xff"), None);
    }
}
