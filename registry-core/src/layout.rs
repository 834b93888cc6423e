//! How keys and records look in a store: everything that spells a path or a byte of a record, behind one seam.
//!
//! The native layout of a service:
//!
//! ```text
//! {service}/consumers/{id}     readers that announce themselves (never in a watched range)
//! {service}/left/{owner}       departure marks
//! {service}/overrides/{id}     what an operator sets
//! {service}/providers/{id}     the instances
//! ```
//!
//! Every part is one [segment](crate::encode_segment). Marks, overrides and providers are neighbours in the order of
//! bytes, and marks come first, so that one range watch sees the mark of a removal before the removal.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    fmt,
    thread::LocalKey,
    time::{Duration, UNIX_EPOCH},
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, Error as _},
};
use serde_json::{Map, Value, value::RawValue};

use crate::{
    Content, Directory, Endpoint, Epoch, Error, ErrorKind, Instance, InstanceId, Key, Lifetime, Metadata, Override,
    Owner, Record, Result, ServiceName, Status, decode_segment, encode_segment, instance::DEFAULT_WEIGHT,
};

/// The largest encoded record, in bytes.
pub const MAX_RECORD_BYTES: usize = 64 * 1024;

/// One path of a store, relative to the registry's prefix and without a leading `/`, and the bytes there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The path.
    pub path: String,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// What a path names.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// A record.
    Record(Key),
    /// The departure mark of an owner.
    Mark(ServiceName, Owner),
}

/// Spells keys as paths and records as bytes, and back. All paths are relative to the registry's prefix.
pub trait Layout: fmt::Debug + Send + Sync + 'static {
    /// The path of a record.
    fn path(&self, key: &Key) -> String;

    /// The path under which all records of a directory lie, with the separator at its end.
    fn directory(&self, service: &ServiceName, directory: Directory) -> String;

    /// The smallest range of paths, from inclusive to exclusive, that holds the departure marks, overrides and
    /// providers of a service and no consumers.
    fn followed(&self, service: &ServiceName) -> (String, String);

    /// The path of an owner's departure mark.
    fn mark(&self, service: &ServiceName, owner: &Owner) -> String;

    /// The bytes of a departure mark for the instances that leave.
    fn encode_mark(&self, ids: &[InstanceId]) -> Vec<u8>;

    /// The instances that a departure mark names. What cannot be read names none.
    fn decode_mark(&self, bytes: &[u8]) -> Vec<InstanceId>;

    /// What a path names, or `None` if it is not ours.
    fn place(&self, path: &str) -> Option<Place>;

    /// The record as entries of the store; the first is the one at [`path`](Self::path), whose bytes carry owner and
    /// epoch.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if it is larger than [`MAX_RECORD_BYTES`].
    fn encode(&self, record: &Record) -> Result<Vec<Entry>>;

    /// The record of `key` from its entries.
    ///
    /// # Errors
    /// [`ErrorKind::Malformed`], naming the key and what is wrong.
    fn decode(&self, key: &Key, entries: &[(&str, &[u8])]) -> Result<Record>;
}

/// The library's own layout: versioned JSON, one entry a record.
///
/// A record from a newer version is read as far as it is understood, and fields that are not understood survive; their
/// numbers as far as 64 bits hold them.
#[derive(Clone, Copy, Debug, Default)]
pub struct NativeLayout;

/// What most records have room in.
const USUAL_BYTES: usize = 512;
/// The version of the record format that is written.
const VERSION: u64 = 1;
const LEFT: &str = "left";
/// How many characters say why a record cannot be read.
const LONGEST_REASON: usize = 200;

impl Layout for NativeLayout {
    fn path(&self, key: &Key) -> String {
        let mut path = self.directory(&key.service, key.directory);
        path.push_str(&encode_segment(&key.id));
        path
    }

    fn directory(&self, service: &ServiceName, directory: Directory) -> String {
        let (service, directory) = (encode_segment(service), directory.as_str());
        // With room for an id.
        let mut path = String::with_capacity(service.len() + directory.len() + 64);
        for part in [&*service, "/", directory, "/"] {
            path.push_str(part);
        }
        path
    }

    fn followed(&self, service: &ServiceName) -> (String, String) {
        let service = encode_segment(service);
        // '0' follows '/' in ASCII: the end of everything below `providers/`.
        (format!("{service}/{LEFT}/"), format!("{service}/{}0", Directory::Providers.as_str()))
    }

    fn mark(&self, service: &ServiceName, owner: &Owner) -> String {
        format!("{}/{LEFT}/{}", encode_segment(service), encode_segment(owner.as_str()))
    }

    fn encode_mark(&self, ids: &[InstanceId]) -> Vec<u8> {
        serde_json::to_vec(&Mark { v: VERSION, left: ids.iter().map(|id| id.as_str().into()).collect() })
            .unwrap_or_default()
    }

    fn decode_mark(&self, bytes: &[u8]) -> Vec<InstanceId> {
        let mark: Mark = serde_json::from_slice(bytes).unwrap_or_default();
        mark.left.iter().filter_map(|id| InstanceId::parse(id).ok()).collect()
    }

    fn place(&self, path: &str) -> Option<Place> {
        let mut parts = path.split('/');
        let (service, directory, id) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        let service = decode_segment(service)?;
        let service = as_before(&SERVICE, |before| **before == *service, || ServiceName::parse(&service)).ok()?;
        let id = InstanceId::parse(decode_segment(id)?).ok()?;
        if directory == LEFT {
            return Some(Place::Mark(service, Owner::parse(&id).ok()?));
        }
        let directory = [Directory::Providers, Directory::Consumers, Directory::Overrides]
            .into_iter()
            .find(|known| known.as_str() == directory)?;
        Some(Place::Record(Key { service, directory, id }))
    }

    fn encode(&self, record: &Record) -> Result<Vec<Entry>> {
        let mut bytes = Vec::with_capacity(USUAL_BYTES);
        match &record.content {
            Content::Instance(instance) => {
                let known = known_fields(record, instance);
                match &instance.unknown {
                    None => serde_json::to_writer(&mut bytes, &known),
                    Some(unknown) => serde_json::to_writer(&mut bytes, &WithUnknown { known, unknown }),
                }
            }
            Content::Override(set) => serde_json::to_writer(
                &mut bytes,
                &OverrideFields {
                    v: VERSION,
                    owner: record.owner.as_str(),
                    epoch: record.epoch,
                    status: set.status,
                    weight: set.weight,
                },
            ),
        }
        .map_err(|error| Error::invalid(format!("cannot encode {}", record.key)).with_source(error))?;
        if bytes.len() > MAX_RECORD_BYTES {
            return Err(Error::invalid(format!(
                "the record of {} has {} bytes, at most {MAX_RECORD_BYTES} are allowed",
                record.key,
                bytes.len()
            )));
        }
        Ok(vec![Entry { path: self.path(&record.key), bytes }])
    }

    fn decode(&self, key: &Key, entries: &[(&str, &[u8])]) -> Result<Record> {
        let malformed = |why: &dyn fmt::Display| {
            let why = shortened(why.to_string());
            Error::new(ErrorKind::Malformed, format!("the record of {key} cannot be read: {why}"))
        };
        let &[(_, bytes)] = entries else { return Err(malformed(&format!("{} entries", entries.len()))) };
        if bytes.len() > MAX_RECORD_BYTES {
            return Err(malformed(&format!("{} bytes", bytes.len())));
        }
        if key.directory == Directory::Overrides {
            let mut fields = Lenient::parse(bytes).map_err(|why| malformed(&why))?;
            let (owner, epoch) = fields.ownership().map_err(|why| malformed(&why))?;
            // One that is not understood must not bring traffic; an absent one sets none.
            let absent = fields.map.contains_key("status").then_some(Status::Down);
            let status = fields.take("status", absent).map_err(|why| malformed(&why))?;
            let weight = fields.take("weight", None).map_err(|why| malformed(&why))?;
            let content = Content::Override(Override { status, weight });
            return Ok(Record { key: key.clone(), owner, epoch, lifetime: Lifetime::Persistent, content });
        }
        // Checked once, and not each string by itself.
        let text = std::str::from_utf8(bytes);
        let (fields, unknown) = match text.map(serde_json::from_str::<Fields<'_>>) {
            Ok(Ok(fields)) => (fields, None),
            _ => Lenient::parse(bytes).and_then(Lenient::fields).map_err(|why| malformed(&why))?,
        };
        let owner = as_before(&OWNER, |before| before.as_str() == fields.owner, || Owner::parse(&fields.owner))
            .map_err(|error| malformed(&error))?;
        let mut endpoints = fields.endpoints;
        // Read one by one, it has room for more; ten thousand are kept.
        endpoints.shrink_to_fit();
        let instance = Instance {
            id: key.id.clone(),
            service: key.service.clone(),
            endpoints,
            version: fields.version,
            zone: fields.zone,
            weight: fields.weight,
            status: fields.status,
            metadata: fields.metadata,
            registered_at: fields.registered_at.and_then(|ms| UNIX_EPOCH.checked_add(Duration::from_millis(ms))),
            unknown: unknown.map(Into::into),
        };
        let lifetime = Lifetime::Session;
        Ok(Record {
            key: key.clone(),
            owner,
            epoch: fields.epoch,
            lifetime,
            content: Content::Instance(instance.into()),
        })
    }
}

#[derive(Default, Serialize, Deserialize)]
struct Mark {
    v: u64,
    left: Vec<String>,
}

/// The fields of an instance's record that this version knows. Reading them straight is the common case; a record with
/// more, or from a newer version, goes through [`Lenient`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    #[allow(dead_code, reason = "what is read here needs no distinction")]
    v: u64,
    #[serde(borrow)]
    owner: Cow<'a, str>,
    epoch: Epoch,
    #[serde(default)]
    endpoints: Vec<Endpoint>,
    #[serde(default)]
    version: Option<String>,
    #[serde(default)]
    zone: Option<String>,
    #[serde(default = "default_weight")]
    weight: u32,
    #[serde(default)]
    status: Status,
    #[serde(default, deserialize_with = "labels")]
    metadata: Metadata,
    /// Milliseconds since 1970.
    #[serde(default)]
    registered_at: Option<u64>,
}

// What was read last on this thread. Of the thousands of records that are read one after the other most have the same
// service, many the same labels: they share it from the start, and it is read once.
thread_local! {
    static SERVICE: RefCell<Option<ServiceName>> = const { RefCell::new(None) };
    static OWNER: RefCell<Option<Owner>> = const { RefCell::new(None) };
    /// As they were spelled, the latest first.
    static LABELS: RefCell<VecDeque<(Box<str>, Metadata)>> = const { RefCell::new(VecDeque::new()) };
}

/// How many different labels are remembered, and how many bytes they have at most.
const KNOWN_LABELS: usize = 8;
const LONGEST_LABELS: usize = 1024;

/// The same as before, if it is.
fn as_before<T: Clone>(
    before: &'static LocalKey<RefCell<Option<T>>>,
    is: impl FnOnce(&T) -> bool,
    parse: impl FnOnce() -> Result<T>,
) -> Result<T> {
    before.with_borrow_mut(|before| match before {
        Some(before) if is(before) => Ok(before.clone()),
        _ => Ok(before.insert(parse()?).clone()),
    })
}

fn labels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Metadata, D::Error> {
    let text = <&RawValue>::deserialize(deserializer)?.get();
    LABELS.with_borrow_mut(|known| {
        if let Some((_, labels)) = known.iter().find(|(spelled, _)| **spelled == *text) {
            return Ok(labels.clone());
        }
        let labels: Metadata = serde_json::from_str(text).map_err(D::Error::custom)?;
        if text.len() <= LONGEST_LABELS {
            known.truncate(KNOWN_LABELS - 1);
            known.push_front((text.into(), labels.clone()));
        }
        Ok(labels)
    })
}

/// [`Fields`] as they are written.
#[derive(Serialize)]
struct Written<'a> {
    v: u64,
    owner: &'a str,
    epoch: Epoch,
    endpoints: &'a [Endpoint],
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    zone: Option<&'a str>,
    weight: u32,
    status: Status,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    registered_at: Option<u64>,
}

#[derive(Serialize)]
struct WithUnknown<'a> {
    #[serde(flatten)]
    known: Written<'a>,
    #[serde(flatten)]
    unknown: &'a Map<String, Value>,
}

#[derive(Serialize)]
struct OverrideFields<'a> {
    v: u64,
    owner: &'a str,
    epoch: Epoch,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weight: Option<u32>,
}

/// A reason for the log: it repeats what it does not like, which may be nearly the whole record.
fn shortened(mut why: String) -> String {
    if let Some((end, _)) = why.char_indices().nth(LONGEST_REASON) {
        why.truncate(end);
        why.push('…');
    }
    why
}

fn default_weight() -> u32 {
    DEFAULT_WEIGHT
}

fn known_fields<'a>(record: &'a Record, instance: &'a Instance) -> Written<'a> {
    Written {
        v: VERSION,
        owner: record.owner.as_str(),
        epoch: record.epoch,
        endpoints: &instance.endpoints,
        version: instance.version.as_deref(),
        zone: instance.zone.as_deref(),
        weight: instance.weight,
        status: instance.status,
        metadata: &instance.metadata,
        registered_at: instance
            .registered_at
            .and_then(|at| at.duration_since(UNIX_EPOCH).ok())
            .and_then(|since| u64::try_from(since.as_millis()).ok()),
    }
}

/// A record read field by field: what is unknown is kept, and in a record from a newer version a known field with a
/// value that is not understood takes its default.
struct Lenient {
    map: Map<String, Value>,
    newer: bool,
}

impl Lenient {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut map: Map<String, Value> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let version = map.remove("v").and_then(|v| v.as_u64()).ok_or("there is no format version \"v\"")?;
        Ok(Self { map, newer: version > VERSION })
    }

    fn take<T: DeserializeOwned>(&mut self, name: &str, default: T) -> Result<T, String> {
        match self.map.remove(name) {
            None => Ok(default),
            Some(value) => match serde_json::from_value(value) {
                Ok(value) => Ok(value),
                Err(_) if self.newer => Ok(default),
                Err(error) => Err(format!("field {name:?}: {error}")),
            },
        }
    }

    fn ownership(&mut self) -> Result<(Owner, Epoch), String> {
        let owner: String = self.take("owner", String::new())?;
        Ok((Owner::parse(&owner).map_err(|error| error.to_string())?, self.take("epoch", 0)?))
    }

    fn fields(mut self) -> Result<(Fields<'static>, Option<Map<String, Value>>), String> {
        // An unknown status must not bring traffic; an absent one means up, as it always did.
        let absent = if self.map.contains_key("status") { Status::Down } else { Status::Up };
        let fields = Fields {
            v: VERSION,
            owner: self.take("owner", String::new())?.into(),
            epoch: self.take("epoch", 0)?,
            endpoints: self.take("endpoints", Vec::new())?,
            version: self.take("version", None)?,
            zone: self.take("zone", None)?,
            weight: self.take("weight", DEFAULT_WEIGHT)?,
            status: self.take("status", absent)?,
            metadata: self.take("metadata", Metadata::default())?,
            registered_at: self.take("registered_at", None)?,
        };
        Ok((fields, (!self.map.is_empty()).then_some(self.map)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(directory: Directory) -> Key {
        Key { service: "orders".parse().unwrap(), directory, id: "a/b".parse().unwrap() }
    }

    fn record(instance: Instance) -> Record {
        let key = Key::provider(instance.service.clone(), instance.id.clone());
        let content = Content::Instance(instance.into());
        Record { key, owner: Owner::random(), epoch: 3, lifetime: Lifetime::Session, content }
    }

    fn decode(key: &Key, json: &str) -> Result<Record> {
        NativeLayout.decode(key, &[("", json.as_bytes())])
    }

    fn instance(record: &Record) -> &Instance {
        let Content::Instance(instance) = &record.content else { panic!("not an instance") };
        instance
    }

    #[test]
    fn paths_are_segments_and_marks_come_first_in_the_followed_range() {
        let service = ServiceName::parse("a/b").unwrap();
        let (from, to) = NativeLayout.followed(&service);
        let path =
            |directory| NativeLayout.path(&Key { service: service.clone(), directory, id: "x".parse().unwrap() });
        let mark = NativeLayout.mark(&service, &Owner::random());
        assert_eq!(path(Directory::Providers), "a%2Fb/providers/x");
        assert!(
            from <= mark
                && mark < path(Directory::Overrides)
                && path(Directory::Overrides) < path(Directory::Providers)
        );
        assert!(path(Directory::Providers) < to && path(Directory::Consumers) < from);
    }

    #[test]
    fn unknown_fields_survive_a_round_trip() {
        let key = key(Directory::Providers);
        let first = decode(&key, r#"{"v":1,"owner":"o","epoch":2,"shard":{"n":7},"weight":5}"#).unwrap();
        assert_eq!(instance(&first).weight, 5);
        let bytes = NativeLayout.encode(&first).unwrap().remove(0).bytes;
        assert!(String::from_utf8(bytes.clone()).unwrap().contains(r#""shard":{"n":7}"#));
        assert_eq!(NativeLayout.decode(&key, &[("", &bytes)]).unwrap(), first);
    }

    #[test]
    fn numbers_of_unknown_fields_survive_to_the_last_digit() {
        let key = key(Directory::Providers);
        let json = r#"{"v":1,"owner":"o","epoch":2,"x":[-4.6959280129329205e170,0.30000000000000004,5e-324]}"#;
        let first = decode(&key, json).unwrap();
        let bytes = NativeLayout.encode(&first).unwrap().remove(0).bytes;
        assert!(String::from_utf8_lossy(&bytes).contains("-4.6959280129329205e+170,0.30000000000000004,5e-324"));
        assert_eq!(NativeLayout.decode(&key, &[("", &bytes)]).unwrap(), first);
    }

    #[test]
    fn an_error_repeats_a_little_of_the_record_only() {
        let long = "x".repeat(10_000);
        for field in
            [format!("\"weight\":\"{long}\""), format!("\"status\":\"{long}\""), format!("\"endpoints\":[\"{long}\"]")]
        {
            for directory in [Directory::Providers, Directory::Overrides] {
                let json = format!("{{\"v\":1,\"owner\":\"o\",\"epoch\":2,{field}}}");
                let Err(error) = decode(&key(directory), &json) else { continue };
                assert!(error.to_string().len() < 500, "{} bytes", error.to_string().len());
            }
        }
    }

    #[test]
    fn what_records_have_in_common_is_shared_and_nothing_else() {
        let record = |service: &str, owner: &str, labels: &str| {
            let Some(Place::Record(key)) = NativeLayout.place(&format!("{service}/providers/1")) else {
                panic!("not a record")
            };
            decode(&key, &format!(r#"{{"v":1,"owner":"{owner}","epoch":2,"metadata":{labels}}}"#)).unwrap()
        };
        let labels = |record: &Record| instance(record).metadata.clone();
        let [first, second] = [(); 2].map(|()| record("orders", "o", r#"{"commit":"3f9c"}"#));
        assert_eq!(first, second);
        assert!(std::ptr::eq(first.key.service.as_str(), second.key.service.as_str()));
        assert!(std::ptr::eq(first.owner.as_str(), second.owner.as_str()));
        assert!(std::ptr::eq(&*labels(&first), &*labels(&second)));
        for round in 0..2 * KNOWN_LABELS {
            let other = record(&format!("orders-{round}"), &format!("o-{round}"), &format!(r#"{{"n":"{round}"}}"#));
            assert_eq!(*other.key.service, *format!("orders-{round}"));
            assert_eq!(other.owner.as_str(), format!("o-{round}"));
            assert_eq!(labels(&other)["n"], round.to_string());
        }
        assert_eq!(record("orders", "o", r#"{"commit":"3f9c"}"#), first);
        for bad in ["null", "7", r#"{"commit":7}"#] {
            let json = format!(r#"{{"v":1,"owner":"o","epoch":2,"metadata":{bad}}}"#);
            let error = decode(&first.key, &json).unwrap_err().to_string();
            assert!(error.contains("metadata"), "{error}");
        }
    }

    #[test]
    fn a_newer_record_is_read_as_far_as_it_is_understood() {
        let key = key(Directory::Providers);
        let newer =
            decode(&key, r#"{"v":9,"owner":"o","epoch":2,"status":"hibernating","weight":"lots","zone":"a"}"#).unwrap();
        assert_eq!((instance(&newer).status, instance(&newer).weight), (Status::Down, DEFAULT_WEIGHT));
        assert_eq!(instance(&newer).zone.as_deref(), Some("a"));
        assert!(decode(&key, r#"{"v":1,"owner":"o","epoch":2,"weight":"lots"}"#).is_err());
    }

    #[test]
    fn a_record_over_the_limit_is_refused_with_its_size() {
        let big = Instance::builder("orders", "1").metadata("x", "y".repeat(MAX_RECORD_BYTES)).build().unwrap();
        let error = NativeLayout.encode(&record(big)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("at most 65536"), "{error}");
    }

    #[test]
    fn overrides_and_marks_round_trip() {
        let key = key(Directory::Overrides);
        let content = Content::Override(Override { status: Some(Status::Draining), weight: Some(0) });
        let put =
            Record { key: key.clone(), owner: Owner::random(), epoch: 1, lifetime: Lifetime::Persistent, content };
        let bytes = NativeLayout.encode(&put).unwrap().remove(0).bytes;
        assert_eq!(NativeLayout.decode(&key, &[("", &bytes)]).unwrap(), put);
        let ids: Vec<InstanceId> = ["a", "b/c"].iter().map(|id| id.parse().unwrap()).collect();
        assert_eq!(NativeLayout.decode_mark(&NativeLayout.encode_mark(&ids)), ids);
        assert!(NativeLayout.decode_mark(b"\xff").is_empty());
    }

    #[test]
    fn an_override_sets_only_what_it_names() {
        let key = key(Directory::Overrides);
        let set = |json: &str| match decode(&key, json).unwrap().content {
            Content::Override(set) => (set.status, set.weight),
            other => panic!("{other:?}"),
        };
        assert_eq!(set(r#"{"v":1,"owner":"o","epoch":1,"weight":5}"#), (None, Some(5)));
        assert_eq!(set(r#"{"v":1,"owner":"o","epoch":1,"status":"draining"}"#), (Some(Status::Draining), None));
        assert_eq!(set(r#"{"v":1,"owner":"o","epoch":1}"#), (None, None));
        assert_eq!(set(r#"{"v":9,"owner":"o","epoch":1,"status":"hibernating"}"#), (Some(Status::Down), None));
    }

    fn instances() -> impl Strategy<Value = Instance> {
        let text = "\\PC{1,20}";
        let port = 1..=u16::MAX;
        (text, text, proptest::collection::btree_map(text, text, 0..4), any::<u32>(), port, any::<Option<u32>>())
            .prop_map(|(service, id, metadata, weight, port, at)| {
                let mut instance = Instance::builder(service, id).endpoint(format!("http://h:{port}")).build().unwrap();
                instance.metadata = metadata.into();
                instance.weight = weight;
                instance.registered_at = at.map(|ms| UNIX_EPOCH + Duration::from_millis(ms.into()));
                instance
            })
    }

    proptest! {
        #[test]
        fn every_record_and_its_path_round_trip(instance in instances()) {
            let record = record(instance);
            let entry = NativeLayout.encode(&record).unwrap().remove(0);
            prop_assert_eq!(NativeLayout.place(&entry.path), Some(Place::Record(record.key.clone())));
            prop_assert_eq!(NativeLayout.decode(&record.key, &[(&entry.path, &entry.bytes)]).unwrap(), record);
        }

        #[test]
        fn decoders_take_any_bytes(bytes: Vec<u8>, text: String) {
            for directory in [Directory::Providers, Directory::Overrides] {
                let _ = NativeLayout.decode(&key(directory), &[("", &bytes)]);
                let _ = NativeLayout.decode(&key(directory), &[("", text.as_bytes())]);
            }
            NativeLayout.decode_mark(&bytes);
            NativeLayout.place(&text);
        }
    }
}
