//! Where everything of a service lies in Redis, and how a value and an entry of the log look.
//!
//! All keys of a service share one hash tag, and so lie on one slot of a Cluster.

use std::{borrow::Cow, sync::Arc};

use redis::Value;
use registry_core::{
    Directory, Key, Layout, Malformed, Place, Record, Result, ServiceName, decode_segment, encode_segment,
};

use crate::error::{Failure, NAME};

/// How many slots a Cluster has.
pub(crate) const SLOTS: u16 = 16384;
/// The fields of a records key that say something of the service begin with this. No name is encoded so.
pub(crate) const META: u8 = b'~';
/// The field with the head of the log.
pub(crate) const HEAD: &[u8] = b"~head";

/// The keys of one prefix, and the records at them.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    root: Arc<str>,
    database: u32,
    pub(crate) layout: Arc<dyn Layout>,
    malformed: Arc<Malformed>,
}

/// The two halves of a service: what is followed, with a log, and the announced readers, without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Half {
    Followed,
    Consumers,
}

impl Half {
    pub(crate) fn of(directory: Directory) -> Self {
        if directory == Directory::Consumers { Self::Consumers } else { Self::Followed }
    }
}

/// The keys of one half of a service.
#[derive(Clone, Debug)]
pub(crate) struct Keys {
    pub(crate) slot: u16,
    pub(crate) records: String,
    pub(crate) expiry: String,
    pub(crate) log: String,
    /// Followed by an owner.
    gone: String,
    pub(crate) channel: String,
}

impl Keys {
    /// The keys as the scripts of a service take them; with the mark of an owner that is gone for good, where that matters.
    pub(crate) fn of(&self, half: Half, gone: Option<&str>) -> Vec<Cow<'_, str>> {
        let log = (half == Half::Followed).then_some(&self.log);
        let gone = gone.map(|owner| [&self.gone, &*encode_segment(owner)].concat());
        let keys = [&self.records, &self.expiry].into_iter().chain(log);
        keys.map(Cow::from).chain(gone.map(Cow::from)).collect()
    }
}

impl Space {
    pub(crate) fn new(prefix: &str, database: u32, layout: Arc<dyn Layout>) -> Self {
        let parts = prefix.split('/').filter(|part| !part.is_empty());
        // A brace in the prefix would end the hash tag.
        let root: String = parts.map(|part| encode_segment(part) + "/").collect();
        Self { root: root.into(), database, layout, malformed: Arc::new(Malformed::new(NAME)) }
    }

    pub(crate) fn with_layout(&self, layout: Arc<dyn Layout>) -> Self {
        Self { layout, ..self.clone() }
    }

    pub(crate) fn keys(&self, service: &ServiceName, half: Half) -> Keys {
        let tag = format!("{}{}", self.root, encode_segment(service));
        let part = match half {
            Half::Followed => "",
            Half::Consumers => "consumers:",
        };
        Keys {
            slot: slot_of(tag.as_bytes()),
            records: format!("{{{tag}}}:{part}records"),
            expiry: format!("{{{tag}}}:{part}expiry"),
            log: format!("{{{tag}}}:{part}log"),
            gone: format!("{{{tag}}}:gone:"),
            channel: format!("{{{tag}}}:log:{}", self.database),
        }
    }

    /// The index of services, and its slot.
    pub(crate) fn index(&self) -> (u16, String) {
        let key = format!("{{{}}}:services", self.root);
        // An empty tag is none.
        (slot_of(if self.root.is_empty() { key.as_bytes() } else { self.root.as_bytes() }), key)
    }

    /// The field that a record lies at.
    pub(crate) fn field(&self, key: &Key) -> String {
        self.layout.path(key)
    }

    /// What lies at a field, if it is a record of this service.
    pub(crate) fn place(&self, service: &ServiceName, field: &[u8]) -> Option<Key> {
        match self.layout.place(std::str::from_utf8(field).ok()?)? {
            Place::Record(key) if key.service == *service => Some(key),
            _ => None,
        }
    }

    /// A record as field and value. Readers see it by its first entry, and only that one is written.
    pub(crate) fn encode(&self, record: &Record, ttl: u64) -> Result<(String, Vec<u8>)> {
        let entries = self.layout.encode(record).map_err(|error| error.with_backend(NAME))?;
        let Some(entry) = entries.into_iter().next() else {
            let message = format!("the layout spells {} as nothing", record.key);
            return Err(registry_core::Error::new(registry_core::ErrorKind::Unsupported, message).with_backend(NAME));
        };
        let owner = encode_segment(record.owner.as_str());
        let mut value = Vec::with_capacity(owner.len() + NUMBERS + entry.bytes.len());
        value.extend_from_slice(owner.as_bytes());
        push_numbers(&mut value, [record.epoch, ttl]);
        value.extend_from_slice(&entry.bytes);
        Ok((entry.path, value))
    }

    pub(crate) fn decode(&self, key: &Key, field: &str, value: &[u8]) -> Result<Record> {
        self.layout.decode(key, &[(field, bytes_of(value))])
    }

    /// The record of a value; one that is malformed is counted, logged once and skipped.
    pub(crate) fn read(&self, key: &Key, field: &[u8], value: &[u8]) -> Option<Record> {
        let field = std::str::from_utf8(field).unwrap_or_default();
        self.malformed.read(&*self.layout, key, &[(field, bytes_of(value))])
    }
}

/// What [`push_numbers`] adds, as a rule at most.
const NUMBERS: usize = 24;

/// Adds numbers, with a space before each and one after them.
fn push_numbers(text: &mut Vec<u8>, numbers: [u64; 2]) {
    for number in numbers {
        text.push(b' ');
        text.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }
    text.push(b' ');
}

/// A value without what comes before the record: owner, epoch and ttl. One that was written by hand may have none.
fn bytes_of(value: &[u8]) -> &[u8] {
    let mut parts = value.splitn(4, |byte| *byte == b' ');
    let is_number =
        |part: Option<&[u8]>| part.is_some_and(|part| !part.is_empty() && part.iter().all(u8::is_ascii_digit));
    let owned =
        parts.next().is_some_and(|owner| !owner.is_empty()) && is_number(parts.next()) && is_number(parts.next());
    parts.next().filter(|_| owned).unwrap_or(value)
}

/// The slot of a hash tag: CRC16, as the Cluster's specification has it.
fn slot_of(tag: &[u8]) -> u16 {
    let step = |crc: u16, _| if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
    tag.iter().fold(0, |crc, byte| (0..8).fold(crc ^ (u16::from(*byte) << 8), step)) % SLOTS
}

/// One entry of a log: what one script changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The head before it.
    pub(crate) previous: String,
    /// The head with it.
    pub(crate) head: String,
    pub(crate) changes: Vec<Change>,
}

/// What happened to one record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) what: What,
    pub(crate) field: Vec<u8>,
    /// What was put, where that is said: the log leaves it out of what was put together with others.
    pub(crate) value: Option<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Put,
    /// In good order, by its owner.
    Left,
    /// Its ttl was over, or it was an override that somebody took back.
    Gone,
}

impl What {
    fn parse(word: &[u8]) -> Option<Self> {
        match word {
            b"put" => Some(Self::Put),
            b"left" => Some(Self::Left),
            b"gone" | b"dropped" => Some(Self::Gone),
            _ => None,
        }
    }
}

impl Entry {
    /// Entries as `XRANGE` answers them.
    pub(crate) fn parse_all(answer: Value) -> Result<Vec<Self>, Failure> {
        let Value::Array(entries) = answer else { return Err(Failure::odd("a range of the log")) };
        entries.into_iter().map(|entry| Self::parse(entry).ok_or_else(|| Failure::odd("an entry of the log"))).collect()
    }

    fn parse(entry: Value) -> Option<Self> {
        let Value::Array(parts) = entry else { return None };
        let [Value::BulkString(id), Value::Array(words)] = <[Value; 2]>::try_from(parts).ok()? else { return None };
        let mut entry = Self { head: String::from_utf8(id).ok()?, ..Self::default() };
        let mut words = words.into_iter();
        while let (Some(Value::BulkString(name)), Some(Value::BulkString(word))) = (words.next(), words.next()) {
            match (name.as_slice(), What::parse(&name)) {
                (b"p", _) => entry.previous = String::from_utf8(word).ok()?,
                (b"n", _) => entry.head = format!("{}/{}", entry.head, String::from_utf8(word).ok()?),
                (b"v", _) => entry.changes.last_mut()?.value = Some(word),
                (_, Some(what)) => entry.changes.push(Change { what, field: word, value: None }),
                // Of a version to come.
                _ => {}
            }
        }
        Some(entry)
    }

    /// About how much memory it takes.
    pub(crate) fn size(&self) -> usize {
        let of = |change: &Change| size_of::<Change>() + change.field.len() + change.value.as_ref().map_or(0, Vec::len);
        size_of::<Self>() + self.previous.len() + self.head.len() + self.changes.iter().map(of).sum::<usize>()
    }
}

/// What a message of a channel says: how the head moved, and mostly by which entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) head: String,
    pub(crate) entry: Option<Entry>,
}

impl Message {
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let mut rest = payload;
        let previous = String::from_utf8(word(&mut rest).to_vec()).ok()?;
        let head = String::from_utf8(word(&mut rest).to_vec()).ok().filter(|head| !head.is_empty())?;
        let mut changes = Vec::new();
        while !rest.is_empty() {
            changes.push(Self::change(&mut rest)?);
        }
        let entry = (!changes.is_empty()).then(|| Entry { previous, head: head.clone(), changes });
        Some(Self { head, entry })
    }

    /// The part of a message that says that fields and values were put.
    pub(crate) fn of_puts<'a>(puts: impl Iterator<Item = (&'a [u8], &'a [u8])> + Clone) -> Vec<u8> {
        let size = |(field, value): (&[u8], &[u8])| "put".len() + NUMBERS + field.len() + value.len();
        let mut said = Vec::with_capacity(puts.clone().map(size).sum());
        for (field, value) in puts {
            said.extend_from_slice(b"put");
            push_numbers(&mut said, [field.len() as u64, value.len() as u64]);
            said.extend_from_slice(field);
            said.extend_from_slice(value);
        }
        said
    }

    /// `{what} {length of the field} {length of the value} {field}{value}`.
    fn change(rest: &mut &[u8]) -> Option<Change> {
        let what = What::parse(word(rest))?;
        let mut length = || std::str::from_utf8(word(rest)).ok()?.parse::<usize>().ok();
        let (field, value) = (length()?, length()?);
        let (field, more) = rest.split_at_checked(field)?;
        let (value, more) = more.split_at_checked(value)?;
        *rest = more;
        Some(Change { what, field: field.to_vec(), value: (what == What::Put).then(|| value.to_vec()) })
    }
}

/// What comes before the next space; it is taken off, with the space.
fn word<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let mut parts = rest.splitn(2, |byte| *byte == b' ');
    let word = parts.next().unwrap_or_default();
    *rest = parts.next().unwrap_or_default();
    word
}

/// A point in the history of a service: its epoch, which a wiped store does not have, and the head of its log. Its text
/// is the cursor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) epoch: String,
    pub(crate) head: String,
    /// From here everything has to be read: the log does not tell all that comes after.
    pub(crate) anew: bool,
}

/// What stands for an epoch or a head where there is none.
pub(crate) const NONE: &str = "-";
/// What a cursor from which everything has to be read begins with. No epoch is spelled so.
const ANEW: &str = "~anew ";

impl Position {
    pub(crate) fn new(epoch: Option<String>, head: Option<String>) -> Self {
        let or_none = |word: Option<String>| word.unwrap_or_else(|| NONE.to_owned());
        Self { epoch: or_none(epoch), head: or_none(head), anew: false }
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (text, anew) = text.strip_prefix(ANEW).map_or((text, false), |text| (text, true));
        let (epoch, head) = text.split_once(' ')?;
        Some(Self { epoch: decode_segment(epoch)?.into_owned(), head: head.to_owned(), anew })
    }

    /// A position that no store has been at.
    pub(crate) fn elsewhere() -> Self {
        Self::new(Some("elsewhere".to_owned()), None)
    }

    pub(crate) fn cursor(&self) -> registry_core::Cursor {
        let anew = if self.anew { ANEW } else { "" };
        // Epochs and heads may have been written by hand.
        registry_core::Cursor::new([anew, &encode_segment(&self.epoch), " ", &self.head].concat())
    }

    /// The entry's id within the log; `None` if the head was not written by a script.
    pub(crate) fn id(&self) -> Option<&str> {
        let (id, _) = self.head.split_once('/')?;
        parse_id(id).map(|_| id)
    }
}

/// The id in a head, to be compared; `None` if the head was not written by a script.
pub(crate) fn id_of(head: &str) -> Option<(u64, u64)> {
    parse_id(head.split_once('/')?.0)
}

/// An id of an entry, to be compared.
fn parse_id(id: &str) -> Option<(u64, u64)> {
    let (ms, sequence) = id.split_once('-')?;
    Some((ms.parse().ok()?, sequence.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use registry_core::NativeLayout;

    use super::*;

    fn space(prefix: &str) -> Space {
        Space::new(prefix, 3, Arc::new(NativeLayout))
    }

    #[test]
    fn all_keys_of_a_service_share_one_hash_tag() {
        let service: ServiceName = "user/{a}".parse().unwrap();
        let keys = space("se{r}vices/eu").keys(&service, Half::Followed);
        assert_eq!(keys.records, "{se%7Br%7Dvices/eu/user%2F%7Ba%7D}:records");
        assert_eq!(keys.channel, "{se%7Br%7Dvices/eu/user%2F%7Ba%7D}:log:3");
        let of = keys.of(Half::Followed, Some("o"));
        assert_eq!((of.len(), &*of[3]), (4, "{se%7Br%7Dvices/eu/user%2F%7Ba%7D}:gone:o"));
        assert_eq!(keys.of(Half::Consumers, None).len(), 2);
        let consumers = space("se{r}vices/eu").keys(&service, Half::Consumers);
        assert_eq!(consumers.slot, keys.slot);
        assert_ne!(consumers.records, keys.records);
        assert_eq!(space("").keys(&service, Half::Followed).records, "{user%2F%7Ba%7D}:records");
        assert_eq!(space("a").index().1, "{a/}:services");
        assert_eq!(space("").index().1, "{}:services");
    }

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!((slot_of(b"123456789"), slot_of(b"foo"), slot_of(b"")), (0x31C3 % SLOTS, 12182, 0));
    }

    #[test]
    fn a_value_is_a_record_with_or_without_an_envelope() {
        for (value, bytes) in [
            (&b"o 1 15000 {\"v\":1}"[..], &b"{\"v\":1}"[..]),
            (b"o 1 0 ", b""),
            (b"{\"v\": 1, \"a\": 2}", b"{\"v\": 1, \"a\": 2}"),
            (b"garbage", b"garbage"),
            (b"", b""),
            (b"a b c d", b"a b c d"),
            (b" 1 1 x", b" 1 1 x"),
        ] {
            assert_eq!(bytes_of(value), bytes);
        }
    }

    fn change(what: What, field: &[u8], value: Option<&[u8]>) -> Change {
        Change { what, field: field.to_vec(), value: value.map(<[u8]>::to_vec) }
    }

    #[test]
    fn messages_tell_what_changed_or_only_that_something_did() {
        let said = b"1-0/a 2-0/b put 3 14 s/1o 1 9 {\"a\": 1}left 4 0 s/ 2put 1 0 x";
        let entry = Message::parse(said).unwrap().entry.unwrap();
        assert_eq!((entry.previous.as_str(), entry.head.as_str()), ("1-0/a", "2-0/b"));
        let expected = [
            change(What::Put, b"s/1", Some(b"o 1 9 {\"a\": 1}")),
            change(What::Left, b"s/ 2", None),
            change(What::Put, b"x", Some(b"")),
        ];
        assert_eq!(entry.changes, expected);
        let puts = [(&b"s/1"[..], &b"o 1 9 {\"a\": 1}"[..]), (b"x", b"")];
        let said = [b"1-0/a 2-0/b ".to_vec(), Message::of_puts(puts.into_iter())].concat();
        let entry = Message::parse(&said).unwrap().entry.unwrap();
        assert_eq!(entry.changes, [expected[0].clone(), expected[2].clone()]);
        assert_eq!(Message::parse(b"1-0/a 2-0/b").unwrap(), Message { head: "2-0/b".to_owned(), entry: None });
        for bad in [
            &b"\xff"[..],
            b"",
            b"look",
            b"a b put",
            b"a b put 3 1 s/1",
            b"a b put 3 x s/1v",
            b"a b put -1 1 s",
            b"a b took 1 1 sv",
            b"a b put 18446744073709551615 1 s",
        ] {
            assert_eq!(Message::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_size_of_an_entry_counts_its_heads_too() {
        let long = "x".repeat(100_000);
        let message = Message::parse(format!("{long} y{long} put 1 1 xy").as_bytes()).unwrap();
        assert!(message.entry.unwrap().size() > 200_000);
    }

    #[test]
    fn entries_name_the_one_before_and_what_changed() {
        let bulk = |word: &str| Value::BulkString(word.into());
        let of = |words: &[&str]| {
            let words = words.iter().map(|word| bulk(word)).collect();
            Entry::parse_all(Value::Array(vec![Value::Array(vec![bulk("2-0"), Value::Array(words)])]))
        };
        let one = of(&["p", "1-0/a", "n", "b", "put", "s/1", "v", "o 1 9 {}"]).unwrap().remove(0);
        assert_eq!((one.previous.as_str(), one.head.as_str()), ("1-0/a", "2-0/b"));
        assert_eq!(one.changes, [change(What::Put, b"s/1", Some(b"o 1 9 {}"))]);
        let many = of(&["p", "1-0/a", "n", "b", "put", "s/1", "dropped", "s/2", "new", "?", "left", "s/3"]).unwrap();
        let expected =
            [change(What::Put, b"s/1", None), change(What::Gone, b"s/2", None), change(What::Left, b"s/3", None)];
        assert_eq!(many[0].changes, expected);
        assert!(of(&["v", "of nothing"]).is_err() && Entry::parse_all(Value::Nil).is_err());
    }

    #[test]
    fn positions_round_trip_and_know_their_id() {
        for anew in [false, true] {
            let position = Position { epoch: "e".into(), head: "5-1/n".into(), anew };
            assert_eq!(Position::parse(position.cursor().as_str()), Some(position.clone()));
            assert_eq!(position.id(), Some("5-1"));
        }
        for (epoch, head) in [("e", "by hand"), ("e", "anew"), ("by hand", "5-1/n"), ("~anew", "h"), ("", "")] {
            for anew in [false, true] {
                let position = Position { epoch: epoch.into(), head: head.into(), anew };
                assert_eq!(Position::parse(position.cursor().as_str()), Some(position));
            }
        }
        assert_eq!(Position::new(Some("e".into()), Some("by-hand".into())).id(), None);
        assert_eq!(Position::parse("garbage"), None);
        assert!(parse_id("10-0") > parse_id("9-12"));
    }
}
