//! Input that others control, at random: connection strings, cursors, messages, and the answers of servers.
//!
//! Most of it is valid input with a few edits, for noise alone does not get far into a parser. Nothing may panic, and
//! what is read holds no more than what it was read from: no length that is claimed within is believed.
//!
//! `PROPTEST_CASES` raises the number of cases.

use std::{
    io::Write,
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use futures::StreamExt;
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    test_runner::TestRunner,
};
use redis::{Parser, PushKind, Value, VerbatimFormat, parse_redis_value};
use registry_core::{
    Backend, Content, Directory, Instance, Intent, Key, Lifetime, Location, NativeLayout, Options, Owner, Record,
    Result, ServiceName,
};
use tokio::time::timeout;

use crate::{
    backend::RedisBackend,
    config::RedisConfig,
    error::Failure,
    link::{Address, Server, Wires},
    space::{Change, Entry, Message, Position, SLOTS, Space, What, id_of},
    store::{parse_master, parse_slots},
};

fn at_least(cases: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.max(cases), ..config }
}

/// Where, how many bytes are taken out there, and what is put in.
type Edit = (Index, usize, Vec<u8>);

fn edits(pieces: &'static [&'static str]) -> impl Strategy<Value = Vec<Edit>> {
    let taken = prop_oneof![4 => 0..4usize, 1 => 0..100usize];
    let put = prop_oneof![
        Just(Vec::new()),
        any::<u8>().prop_map(|byte| vec![byte]),
        select(pieces).prop_map(|piece| piece.as_bytes().to_vec()),
    ];
    vec((any::<Index>(), taken, put), 0..4)
}

fn edited(bytes: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, taken, put) in edits {
        let from = at.index(bytes.len() + 1);
        let to = (from + taken).min(bytes.len());
        bytes.splice(from..to, put.iter().copied());
    }
    bytes
}

fn noise() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..8).prop_map(String::from_iter)
}

fn joined(pieces: &'static [&'static str]) -> impl Strategy<Value = String> {
    vec(select(pieces), 0..12).prop_map(|pieces| pieces.concat())
}

fn service() -> ServiceName {
    "orders".parse().unwrap()
}

fn space() -> Space {
    Space::new("", 0, Arc::new(NativeLayout))
}

fn somewhere() -> Address {
    Address { host: "here".into(), port: 1 }
}

const URL_PIECES: &[&str] = &[
    "redis",
    "rediss",
    "+sentinel",
    "+cluster",
    "://",
    ":",
    "/",
    "?",
    "&",
    "=",
    "%",
    "%2F",
    "%00",
    "%ff",
    ",",
    "[::1]",
    "[::1%a]",
    "..",
    "0",
    "65536",
    "db=",
    "db=99999999999",
    "poll=",
    "poll=1ms",
    "1s",
    "master=",
    "sentinel_user=u",
    "sentinel_password=",
    "ca=",
    "cert=/c",
    "key=/k",
    "server_name=",
    "ttl=9999999999y",
    "\u{85}",
    "ä",
];

proptest! {
    #![proptest_config(at_least(20_000))]

    #[test]
    fn a_connection_string_is_a_configuration_without_its_passwords_or_refused(
        scheme in select(&["redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "redis+ring"][..]),
        rest in select(&[
            "h1", "h1:1,[2001:db8::1]/a/b?ttl=7s&poll=500ms&db=0", "s?master=m&sentinel_user=u&server_name=r",
        ][..]),
        edits in edits(URL_PIECES),
        (before, after) in (joined(URL_PIECES), joined(URL_PIECES)),
    ) {
        let rest = String::from_utf8_lossy(&edited(rest.as_bytes(), &edits)).into_owned();
        let mark = if rest.contains('?') { '&' } else { '?' };
        let hidden: String = before.bytes().map(|byte| format!("%{byte:02x}")).collect();
        for url in [
            format!("{scheme}://app:{before}hunter2{after}@{rest}"),
            format!("{scheme}://app:{hidden}hunter2@{rest}"),
            format!("{scheme}://{rest}{mark}sentinel_password={hidden}hunter2"),
        ] {
            let config = url.parse::<Location>().and_then(RedisConfig::from_location);
            prop_assert!(!format!("{config:?}").contains("hunter2"), "{url:?}: {config:?}");
            if let Ok(config) = config {
                prop_assert_eq!(config.addresses().unwrap().len(), config.endpoints.len());
            }
        }
    }
}

const WORDS: &[&str] = &[
    "-",
    "e",
    "5-1/n",
    "6-0/m",
    "18446744073709551615-18446744073709551615/x",
    "5-1",
    "/",
    " ",
    "~anew ",
    " anew",
    "anew",
    "\0",
    "ä",
    "%20",
    "look",
];

proptest! {
    #![proptest_config(at_least(15_000))]

    #[test]
    fn a_position_survives_as_text_whatever_its_words_are(
        epoch in proptest::option::of(joined(WORDS)),
        head in proptest::option::of(joined(WORDS)),
        anew in any::<bool>(),
    ) {
        let position = Position { anew, ..Position::new(epoch, head) };
        prop_assert_eq!(Position::parse(position.cursor().as_str()), Some(position));
    }

    #[test]
    fn a_cursor_is_a_position_or_refused(noise in noise(), joined in joined(WORDS)) {
        for text in [noise, joined] {
            if let Some(position) = Position::parse(&text) {
                prop_assert_eq!(position.id().is_some(), id_of(&position.head).is_some());
                prop_assert_eq!(Position::parse(position.cursor().as_str()), Some(position));
            }
        }
    }
}

/// How many bytes a change holds.
fn held_by(change: &Change) -> usize {
    change.field.len() + change.value.as_ref().map_or(0, Vec::len)
}

fn held(entry: &Entry) -> usize {
    entry.previous.len() + entry.head.len() + entry.changes.iter().map(held_by).sum::<usize>()
}

fn check_entry(entry: &Entry, most: usize) {
    assert!(held(entry) <= most, "{} of {most}", held(entry));
    assert!(entry.size() >= held(entry) + size_of_val(&*entry.changes), "what waits is bounded by this");
    for change in &entry.changes {
        if let (Some(key), Some(value)) = (space().place(&service(), &change.field), &change.value) {
            space().read(&key, &change.field, value);
        }
    }
}

fn spelled(message: &Message) -> Vec<u8> {
    let Some(entry) = &message.entry else { return [b"- ", message.head.as_bytes()].concat() };
    let mut bytes = format!("{} {} ", entry.previous, entry.head).into_bytes();
    for Change { what, field, value } in &entry.changes {
        let what = match what {
            What::Put => "put",
            What::Left => "left",
            What::Gone => "gone",
        };
        let value = value.as_deref().unwrap_or_default();
        bytes.extend(format!("{what} {} {} ", field.len(), value.len()).into_bytes());
        bytes.extend([field, value].concat());
    }
    bytes
}

fn check_message(payload: &[u8]) {
    let Some(message) = Message::parse(payload) else { return };
    assert!(message.head.len() <= payload.len());
    if let Some(entry) = &message.entry {
        check_entry(entry, 2 * payload.len());
    }
    assert_eq!(Message::parse(&spelled(&message)), Some(message));
}

const MESSAGES: &[&str] = &[
    "5-1/n 6-0/m",
    "5-1/n 6-0/m put 18 17 orders/providers/1o 1 9 {\"v\":1,\"a\":2}",
    "5-1/n 6-0/m left 18 0 orders/providers/1gone 18 0 orders/providers/2dropped 1 0 xput 0 0 ",
];

const MESSAGE_PIECES: &[&str] = &[
    " ",
    "put ",
    "left ",
    "gone ",
    "dropped ",
    "put 1 1 xy",
    "left 1 0 x",
    "0 ",
    "1 ",
    "-1 ",
    "+1 ",
    "18446744073709551615 ",
    "18446744073709551616 ",
    "9223372036854775807 ",
    "a ",
    "5-1/n ",
    "x",
    "{\"v\":1}",
    "orders/providers/1",
    "\0",
    "ä",
];

proptest! {
    #![proptest_config(at_least(20_000))]

    #[test]
    fn a_message_with_edits_is_read_or_refused(message in select(MESSAGES), edits in edits(MESSAGE_PIECES)) {
        check_message(&edited(message.as_bytes(), &edits));
    }

    #[test]
    fn a_message_of_pieces_is_read_or_refused(pieces in joined(MESSAGE_PIECES), bytes in vec(any::<u8>(), 0..30)) {
        check_message(pieces.as_bytes());
        check_message(&bytes);
        check_message(format!("5-1/n 6-0/m {pieces}").as_bytes());
    }
}

fn bulk(word: impl AsRef<[u8]>) -> Value {
    Value::BulkString(word.as_ref().to_vec())
}

fn bulks(words: &[&str]) -> Value {
    Value::Array(words.iter().map(bulk).collect())
}

fn said(line: &str) -> Value {
    parse_redis_value(format!("-{line}\r\n").as_bytes()).unwrap()
}

/// What a server may say instead of an answer. Nobody is named who could be connected to.
const ERRORS: &[&str] = &[
    "ERR",
    "ERR x",
    "NOSCRIPT No matching script",
    "READONLY no",
    "OOM no",
    "LOADING",
    "NOPERM no",
    "WRONGTYPE no",
    "NOAUTH",
    "MOVED",
    "MOVED 1",
    "ASK 1 nowhere",
    "ERR Error running script: -OOM no",
    "ERR unknown command 'X', with args beginning with: 'Y'",
    "CROSSSLOT no",
    "X",
];

const TEXTS: &[&str] = &[
    "",
    "0",
    "1",
    "-1",
    "1e3",
    "500",
    "18446744073709551615",
    "18446744073709551616",
    "9223372036854775808",
    "e",
    "-",
    "5-1/n",
    "6-0/m",
    "6-0",
    "7-0/z",
    "p",
    "n",
    "v",
    "put",
    "left",
    "gone",
    "orders",
    "orders/providers/1",
    "~head",
    "gone",
    "o 1 9 {\"v\":1,\"owner\":\"o\",\"epoch\":1}",
    "{\"v\":1,\"owner\":\"o\",\"epoch\":18446744073709551615}",
    "nan",
    "inf",
    "master",
    "a%2fb",
    "%",
    "h",
    "?",
];

fn value() -> BoxedStrategy<Value> {
    let leaf = prop_oneof![
        1 => Just(Value::Nil),
        2 => prop_oneof![any::<i64>(), -2..3i64, Just(i64::MAX), Just(i64::MIN)].prop_map(Value::Int),
        6 => select(TEXTS).prop_map(bulk),
        1 => vec(any::<u8>(), 0..4).prop_map(Value::BulkString),
        1 => select(TEXTS).prop_map(|text| Value::SimpleString(text.to_owned())),
        1 => prop_oneof![
            Just(Value::Okay),
            any::<bool>().prop_map(Value::Boolean),
            any::<f64>().prop_map(Value::Double),
            select(TEXTS).prop_map(|text| Value::VerbatimString { format: VerbatimFormat::Text, text: text.to_owned() }),
            select(TEXTS).prop_map(|text| Value::BigNumber(text.into())),
            select(ERRORS).prop_map(said),
        ],
    ];
    let tree = leaf.prop_recursive(3, 12, 4, |inner| {
        let pairs = vec((inner.clone(), inner.clone()), 0..3);
        prop_oneof![
            4 => vec(inner.clone(), 0..5).prop_map(Value::Array),
            1 => vec(inner.clone(), 0..5).prop_map(Value::Set),
            1 => pairs.clone().prop_map(Value::Map),
            1 => (inner.clone(), pairs).prop_map(|(data, attributes)| Value::Attribute { data: data.into(), attributes }),
            1 => vec(inner, 0..3).prop_map(|data| Value::Push { kind: PushKind::Message, data }),
        ]
    });
    tree.boxed()
}

/// The way to a part of an answer, and what becomes of it: something else, or it is left out with all that follows it.
type Graft = (Vec<Index>, Option<Value>);

fn graft() -> impl Strategy<Value = Graft> {
    (vec(any::<Index>(), 0..4), proptest::option::weighted(0.8, value()))
}

fn parts(value: &mut Value) -> Vec<&mut Value> {
    match value {
        Value::Array(values) | Value::Set(values) | Value::Push { data: values, .. } => values.iter_mut().collect(),
        Value::Map(pairs) => pairs.iter_mut().flat_map(|(key, value)| [key, value]).collect(),
        Value::Attribute { data, .. } => vec![&mut **data],
        _ => Vec::new(),
    }
}

fn grafted(mut whole: Value, grafts: &[Graft]) -> Value {
    for (way, new) in grafts {
        let mut part = &mut whole;
        for (step, at) in way.iter().enumerate() {
            let count = parts(part).len();
            if count == 0 {
                break;
            }
            let at = at.index(count);
            match part {
                Value::Array(values) if new.is_none() && step + 1 == way.len() => {
                    values.truncate(at);
                    break;
                }
                _ => part = parts(part).swap_remove(at),
            }
        }
        if let Some(new) = new {
            *part = new.clone();
        }
    }
    whole
}

/// How many bytes of text an answer holds, or could be written as.
fn text_of(value: &mut Value) -> usize {
    let own = match value {
        Value::BulkString(bytes) => bytes.len(),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => text.len(),
        Value::BigNumber(digits) => digits.len(),
        Value::Double(number) => number.to_string().len(),
        _ => 20,
    };
    own + parts(value).into_iter().map(text_of).sum::<usize>()
}

fn entry(id: &str, words: &[&str]) -> Value {
    Value::Array(vec![bulk(id), bulks(words)])
}

fn hello() -> Value {
    let pair = |name: &str, value: &str| (bulk(name), bulk(value));
    Value::Map(vec![
        pair("server", "redis"),
        pair("version", "7.2.4"),
        (bulk("proto"), Value::Int(3)),
        pair("mode", "standalone"),
        pair("role", "master"),
        (bulk("modules"), Value::Array(Vec::new())),
    ])
}

const FIELD: &str = "orders/providers/1";
const RECORD: &str = "o 1 9 {\"v\":1,\"owner\":\"o\",\"epoch\":1}";

fn range() -> Value {
    Value::Array(vec![
        entry("6-0", &["p", "5-1/n", "n", "m", "put", FIELD, "left", "orders/providers/2"]),
        entry("7-0", &["p", "6-0/m", "n", "z", "put", FIELD, "v", RECORD]),
    ])
}

fn slots() -> Value {
    let node = |host: &str| Value::Array(vec![bulk(host), Value::Int(7000), bulk("0123"), Value::Array(Vec::new())]);
    let range = |from, to| Value::Array(vec![Value::Int(from), Value::Int(to), node("10.0.0.1"), node("10.0.0.2")]);
    Value::Array(vec![range(0, 8191), range(8192, 16383)])
}

fn check_answer(answer: &Value) {
    let most = text_of(&mut answer.clone());
    if let Ok(entries) = Entry::parse_all(answer.clone()) {
        // The head of an entry is its id, and each of its words.
        let separators: usize = entries.iter().map(|entry| entry.head.len()).sum();
        assert!(entries.iter().map(held).sum::<usize>() <= most + separators);
        entries.iter().for_each(|entry| check_entry(entry, most + entry.head.len()));
    }
    if let Some(map) = parse_slots(&somewhere(), answer.clone()) {
        for slot in [0, 1, SLOTS - 1, u16::MAX] {
            map.server_of(slot);
        }
    }
    if let Some((_, address)) = parse_master(&somewhere(), answer.clone()) {
        assert!(address.host.len() <= most.max(4));
    }
    if let Some(server) = Server::parse(answer.clone()) {
        server.has_sharded_channels();
        WIRES.with(|wires| drop(wires.check(&somewhere(), &server)));
    }
    if let Err(error) = answer.clone().extract_error() {
        let failure = Failure::from(error);
        assert!(!failure.during("x").to_string().is_empty());
    }
}

thread_local! {
    static WIRES: Wires = Wires::to_servers(&RedisConfig::new(["h"]), "standalone").unwrap();
}

proptest! {
    #![proptest_config(at_least(15_000))]

    #[test]
    fn an_answer_with_grafts_is_read_or_refused(
        answer in select(vec![range(), slots(), hello(), bulks(&["ip", "10.0.0.1", "port", "6379", "config-epoch", "3"])]),
        grafts in vec(graft(), 0..3),
    ) {
        check_answer(&grafted(answer, &grafts));
    }

    #[test]
    fn any_answer_is_read_or_refused(answer in value()) {
        check_answer(&answer);
        check_answer(&Value::Array(vec![answer]));
    }

    /// Through the client's own parser, which is to take no claimed length for true.
    #[test]
    fn bytes_of_an_answer_with_edits_are_read_or_refused(
        answer in select(vec![range(), slots(), hello(), said("MOVED 3999 127.0.0.1:6381")]),
        edits in edits(&[
            "\r\n", "*", "$", "%", "|", "~", ">", "*2147483647\r\n", "%1000000000\r\n", "|1000000000\r\n",
            "~1000000000\r\n", "$9223372036854775807\r\n", ">1000000000\r\n", "=1000000000\r\n", "*-1\r\n", "$-1\r\n",
            "|-1\r\n", "%-1\r\n", "*1\r\n*1\r\n*1\r\n*1\r\n", ":99999999999999999999\r\n", "_\r\n", "#t\r\n", ",nan\r\n", "-MOVED 1 [::1]:7\r\n",
        ]),
    ) {
        if let Ok(answer) = parse_redis_value(&edited(&bytes_of(&answer), &edits)) {
            check_answer(&answer);
        }
    }

    #[test]
    fn an_error_of_a_server_has_a_class(
        line in select(ERRORS),
        edits in edits(&[" ", ":", "-", "'", "\"", "MOVED ", "ASK ", "[::1]:7", ":65536", "h:1", "OOM", "ERR ", "AUTH"]),
    ) {
        let line = String::from_utf8_lossy(&edited(line.as_bytes(), &edits)).replace(['\r', '\n'], " ");
        check_answer(&said(&line));
        somewhere().said_by(&line);
    }
}

/// An answer as a server writes it.
fn bytes_of(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    write(value, &mut bytes);
    bytes
}

fn write(value: &Value, to: &mut Vec<u8>) {
    let mut line = |mark: char, text: &str| to.extend(format!("{mark}{text}\r\n").into_bytes());
    let mut parts: Vec<&Value> = Vec::new();
    match value {
        Value::Int(number) => line(':', &number.to_string()),
        Value::SimpleString(text) => line('+', &text.replace(['\r', '\n'], " ")),
        Value::Okay => line('+', "OK"),
        Value::Double(number) => line(',', &number.to_string()),
        Value::Boolean(truth) => line('#', if *truth { "t" } else { "f" }),
        Value::BigNumber(digits) => line('(', &String::from_utf8_lossy(digits)),
        Value::ServerError(error) => line('-', &format!("{} {}", error.code(), error.details().unwrap_or_default())),
        Value::VerbatimString { text, .. } => line('=', &format!("{}\r\ntxt:{text}", text.len() + 4)),
        Value::BulkString(bytes) => {
            line('$', &bytes.len().to_string());
            to.extend([bytes, &b"\r\n"[..]].concat());
        }
        Value::Array(values) | Value::Set(values) => {
            line(if matches!(value, Value::Set(_)) { '~' } else { '*' }, &values.len().to_string());
            parts.extend(values);
        }
        Value::Map(pairs) => {
            line('%', &pairs.len().to_string());
            parts.extend(pairs.iter().flat_map(|(key, value)| [key, value]));
        }
        Value::Attribute { data, attributes } => {
            line('|', &attributes.len().to_string());
            parts.extend(attributes.iter().flat_map(|(key, value)| [key, value]));
            parts.push(data);
        }
        Value::Push { data, .. } => {
            line('>', &(data.len() + 1).to_string());
            line('+', "message");
            parts.extend(data);
        }
        _ => line('_', ""),
    }
    parts.into_iter().for_each(|part| write(part, to));
}

/// What a server answers next to each command, and what it sends to whoever has just subscribed.
#[derive(Default)]
struct Play {
    answers: Vec<(&'static str, Value)>,
    pushes: Vec<Value>,
}

/// A server that answers by the play, and with nil after its end. Gives its address.
fn serve(play: Arc<Mutex<Play>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let (socket, play) = (socket.unwrap(), play.clone());
            socket.set_nodelay(true).unwrap();
            thread::spawn(move || converse(&socket, &play));
        }
    });
    address.to_string()
}

fn converse(mut socket: &TcpStream, play: &Mutex<Play>) {
    let mut parser = Parser::new();
    while let Ok(Value::Array(words)) = parser.parse_value(socket) {
        let word = |at: usize| match words.get(at) {
            Some(Value::BulkString(word)) => word.clone(),
            _ => Vec::new(),
        };
        let mut play = play.lock().unwrap();
        let mut bytes = Vec::new();
        match (word(0).as_slice(), word(1)) {
            (b"HELLO", _) => write(&hello(), &mut bytes),
            (word @ (b"SUBSCRIBE" | b"UNSUBSCRIBE"), channel) => {
                let word = String::from_utf8_lossy(word).to_lowercase();
                bytes.extend(format!(">3\r\n+{word}\r\n").into_bytes());
                [bulk(&channel), Value::Int(1)].iter().for_each(|part| write(part, &mut bytes));
                for payload in play.pushes.drain(..) {
                    write(&Value::Push { kind: PushKind::Message, data: vec![bulk(&channel), payload] }, &mut bytes);
                }
            }
            _ => {
                let next = play.answers.iter().position(|(command, _)| command.as_bytes() == word(0));
                let answer = next.map_or(Value::Nil, |next| play.answers.remove(next).1);
                write(&answer, &mut bytes);
                // What is pushed is no answer.
                if matches!(answer, Value::Push { .. }) {
                    write(&Value::Nil, &mut bytes);
                }
            }
        }
        if socket.write_all(&bytes).is_err() {
            return;
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Verb {
    List,
    /// From a cursor on, or from the beginning.
    Subscribe(bool),
    Probe,
    Services,
    Put(Intent),
    Renew,
    Verify,
    Remove,
}

/// What a server answers to the commands of a verb if all is well.
fn answers(verb: Verb) -> Vec<(&'static str, Value)> {
    let script = |answer: Vec<Value>| ("EVALSHA", Value::Array(answer));
    let look =
        script(vec![Value::Int(1700), Value::Int(0), Value::Int(1800), Value::Int(0), bulks(&["orders/providers/3"])]);
    let position = |head: &str| ("HMGET", bulks(&["e", head]));
    let records = bulks(&[FIELD, RECORD, "orders/providers/2", RECORD, "~head", "5-1/n"]);
    let page = ("HSCAN", Value::Array(vec![bulk("0"), records]));
    let news = [position("7-0/z"), ("XRANGE", range()), ("HMGET", bulks(&["7-0/z", RECORD]))];
    let all = [&[look.clone(), position("5-1/n"), page][..], &news].concat();
    match verb {
        Verb::List => all,
        Verb::Subscribe(false) => [&all[..], &[("XREVRANGE", range())]].concat(),
        Verb::Subscribe(true) => [&[look][..], &news].concat(),
        Verb::Probe => vec![position("6-0/m")],
        Verb::Services => vec![
            ("TIME", bulks(&["1700000000", "123456"])),
            ("ZRANGE", bulks(&["orders", "a%2Fb"])),
            ("HMGET", bulks(&["1700000000000", "0", "15000"])),
            ("HMGET", bulks(&["1", "0", "15000"])),
            look,
            ("ZCOUNT", Value::Int(2)),
            ("ZCOUNT", Value::Int(0)),
        ],
        Verb::Put(_) => vec![
            script(vec![bulk("6-0/m"), Value::Int(1), Value::Int(1), bulk("0123"), bulk(RECORD)]),
            ("EVALSHA", bulk("7-0/z")),
        ],
        Verb::Renew | Verb::Verify => vec![script(vec![Value::Int(1)])],
        Verb::Remove => vec![script(vec![Value::Int(1), Value::Int(0)])],
    }
}

async fn play(backend: &RedisBackend, verb: Verb) -> Result<()> {
    let keys: Vec<_> = ["1", "2"].map(|id| Key::provider(service(), id.parse().unwrap())).into();
    let record = |key: &Key| Record {
        key: key.clone(),
        owner: Owner::random(),
        epoch: 1,
        lifetime: Lifetime::Session,
        content: Content::Instance(Instance::new(key.service.clone(), key.id.clone()).into()),
    };
    let cursor = Position::new(Some("e".to_owned()), Some("5-1/n".to_owned())).cursor();
    match verb {
        Verb::List => {
            let records = backend.list(&service(), Directory::Providers).await?;
            assert!(records.iter().all(|record| record.key.service == service()));
        }
        Verb::Subscribe(resuming) => {
            let mut updates = backend.subscribe(&service(), resuming.then_some(cursor)).await?;
            while let Ok(Some(updates)) = timeout(Duration::from_millis(1), updates.next()).await {
                assert!(Position::parse(updates?.cursor.unwrap().as_str()).is_some());
            }
        }
        Verb::Probe => drop(backend.probe(&service(), &cursor).await?),
        Verb::Services => drop(backend.services().await?),
        Verb::Put(why) => {
            let mut outcomes = backend.put(&keys.iter().map(record).collect::<Vec<_>>(), why).await;
            assert_eq!(outcomes.len(), keys.len());
            // The other one is somebody else's, so that it is not restored.
            outcomes.swap_remove(0)?;
        }
        Verb::Renew => drop(backend.renew(&keys).await?),
        Verb::Verify => assert!(backend.verify(&keys).await?.iter().all(|key| keys.contains(key))),
        Verb::Remove => {
            let outcomes = backend.remove(&keys).await;
            assert_eq!(outcomes.len(), keys.len());
            outcomes.into_iter().collect::<Result<Vec<_>>>()?;
        }
    }
    Ok(())
}

const LIMIT: Duration = Duration::from_secs(60);

/// Every verb against a server whose answers are not what they should be. Each case has a backend of its own.
#[test]
fn a_verb_ends_whatever_the_server_answers() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let verbs = vec![
        Verb::List,
        Verb::Subscribe(false),
        Verb::Subscribe(true),
        Verb::Probe,
        Verb::Services,
        Verb::Put(Intent::Claim),
        Verb::Put(Intent::Restore),
        Verb::Renew,
        Verb::Verify,
        Verb::Remove,
    ];
    let message = (select(MESSAGES), edits(MESSAGE_PIECES));
    let message = message.prop_map(|(text, edits)| bulk(edited(text.as_bytes(), &edits)));
    let pushes = vec(prop_oneof![4 => message, 1 => value()], 0..4);
    let grafts = vec((any::<Index>(), graft()), 0..4);
    // Longer than any machine that runs this is busy with something else.
    let options = Options::default().request_timeout(LIMIT).connect_timeout(LIMIT);
    let scene = Arc::new(Mutex::new(Play::default()));
    let address = serve(scene.clone());
    let outcome = TestRunner::new(ProptestConfig { source_file: Some(file!()), ..at_least(1_000) }).run(
        &(select(verbs), grafts, pushes),
        |(verb, grafts, pushes)| {
            let mut answers = answers(verb);
            let as_it_should = grafts.is_empty() && pushes.is_empty();
            for (at, graft) in grafts {
                let at = at.index(answers.len());
                answers[at].1 = grafted(answers[at].1.clone(), &[graft]);
            }
            *scene.lock().unwrap() = Play { answers, pushes };
            runtime.block_on(async {
                let config = RedisConfig::new([address.as_str()]).options(options.clone());
                let backend = RedisBackend::new(config).unwrap();
                let outcome = timeout(2 * LIMIT, play(&backend, verb)).await.expect("it ends");
                assert!(outcome.is_ok() || !as_it_should, "{outcome:?}");
            });
            Ok(())
        },
    );
    outcome.unwrap();
}
