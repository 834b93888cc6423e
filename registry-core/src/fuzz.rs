//! Input that others control, at random: connection strings, names, and the bytes of records.
//!
//! Most of it is valid input with a few edits, for noise alone does not get far into a parser. Nothing may panic; what is
//! read is not much larger than what it was read from, and comes back the same.
//!
//! `PROPTEST_CASES` raises the number of cases.

use proptest::{collection::vec, prelude::*, sample::Index, sample::select};
use secrecy::ExposeSecret;
use serde_json::{Map, Value};

use crate::{
    Content, Directory, ErrorKind, InstanceId, Key, Layout, Location, MAX_RECORD_BYTES, NativeLayout, Options, Owner,
    Place, ServiceName, decode_segment, encode_segment, memory::MemoryConfig,
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

fn edited(text: &str, edits: &[Edit]) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    for (at, taken, put) in edits {
        let from = at.index(bytes.len() + 1);
        let to = (from + taken).min(bytes.len());
        bytes.splice(from..to, put.iter().copied());
    }
    bytes
}

fn edited_text(text: &str, edits: &[Edit]) -> String {
    String::from_utf8_lossy(&edited(text, edits)).into_owned()
}

/// Any text, control characters included, which `any::<String>()` leaves out.
fn noise() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..12).prop_map(String::from_iter)
}

fn joined(pieces: &'static [&'static str]) -> impl Strategy<Value = String> {
    vec(select(pieces), 0..12).prop_map(|pieces| pieces.concat())
}

const URLS: &[&str] = &[
    "memory://name?ttl=10s",
    "etcd://app:p%40ss@h1:2379,[2001:db8::1]:2380/a/b?ttl=15s&reconcile=30s",
    "zks://u:p@h1,h2:2281/services?acl=sasl:app:cdrwa,world:anyone:r&auth=sasl",
    "redis+sentinel://:pw@[fe80::1%25eth0],10.0.0.1:26379/p?master=m&sentinel_password=s&poll=1s",
    "rediss+cluster://h1/%2Fa%20b?protect_for=1h%2030m&auth_token=t&protect_threshold=0.5&register_rate=7",
];

const URL_PIECES: &[&str] = &[
    "etcd",
    "memory",
    "://",
    "@",
    ":",
    "/",
    "//",
    "?",
    "&",
    "=",
    "#",
    "%",
    "%2F",
    "%2E",
    "%00",
    "%ff",
    "%40",
    ",",
    "[",
    "]",
    "[::1]",
    "[::1%a]",
    "[1.2.3.4]",
    ".",
    "..",
    "h1",
    "0",
    "65535",
    "65536",
    "+80",
    "ttl",
    "ttl=",
    "1s",
    "password",
    "token=",
    "idle_timeout=",
    "99999999999999999999y",
    "* * * * * *",
    "***",
    "+",
    " ",
    "\n",
    "\u{85}",
    "ä",
    "\u{0}",
];

/// Everything that may be shown of a connection string.
fn shown(url: &str) -> String {
    let error = |error: crate::Error| format!("{error} {error:?} {:?}", std::error::Error::source(&error));
    let location = match Location::parse(url) {
        Ok(location) => location,
        Err(parsing) => return error(parsing),
    };
    let mut rest = location.clone();
    let options = Options::take_from(&mut rest).map(|options| format!("{options:?}")).unwrap_or_else(error);
    let finished = rest.finish(Options::NAMES).map(|()| String::new()).unwrap_or_else(error);
    let memory =
        MemoryConfig::from_location(location.clone()).map(|config| format!("{config:?}")).unwrap_or_else(error);
    format!("{location} {location:?} {:?} {options} {finished} {memory}", location.password())
}

fn check_url(url: &str) {
    let Ok(location) = Location::parse(url) else {
        let error = Location::parse(url).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        return;
    };
    shown(url);
    let text = location.to_string();
    let again = Location::parse(&text).unwrap_or_else(|error| panic!("{url:?} became {text:?}: {error}"));
    assert_eq!(again.to_string(), text);
    assert_eq!(format!("{location:?}"), format!("Location(\"{text}\")"));
    assert_eq!((again.scheme(), again.user(), again.prefix()), (location.scheme(), location.user(), location.prefix()));
    assert_eq!(again.hosts(), location.hosts());
    assert_eq!(again.password().map(|p| p.expose_secret()), location.password().map(|_| "***"));
    let parts = location.scheme().len() + location.user().map_or(0, str::len) + location.prefix().len();
    let parts = parts + location.hosts().iter().map(|host| host.name.len()).sum::<usize>();
    assert!(parts + location.password().map_or(0, |p| p.expose_secret().len()) <= url.len());
}

proptest! {
    #![proptest_config(at_least(40_000))]

    #[test]
    fn a_connection_string_with_edits_is_read_or_refused(url in select(URLS), edits in edits(URL_PIECES)) {
        check_url(&edited_text(url, &edits));
    }

    #[test]
    fn a_connection_string_of_pieces_is_read_or_refused(url in joined(URL_PIECES), noise in noise()) {
        check_url(&url);
        check_url(&format!("etcd://{url}"));
        check_url(&format!("{noise}{url}"));
        check_url(&format!("etcd://{noise}"));
    }

}

proptest! {
    #![proptest_config(at_least(12_000))]

    /// What stands between the first `:` after the scheme and the only `@` is a password, or it is all refused.
    #[test]
    fn a_password_never_shows_whatever_is_around_it(
        scheme in edits(URL_PIECES),
        user in edits(URL_PIECES),
        (before, after) in (joined(URL_PIECES), joined(URL_PIECES)),
        rest in edits(URL_PIECES),
    ) {
        let (scheme, user) = (edited_text("etcd", &scheme), edited_text("user", &user));
        let rest = edited_text("h1:2379,[::1]/a/b?ttl=1s&x=y", &rest);
        let url = format!("{scheme}://{user}:{before}hunter2{after}@{rest}");
        let shown = shown(&url);
        prop_assert!(!shown.contains("hunter2"), "{url:?}: {shown}");
    }

    #[test]
    fn the_value_of_a_secret_option_never_shows(
        url in select(URLS),
        (before, after) in (noise(), noise()),
        word in select(&["password", "secret", "token", "Password", "SECRET", "%74oken"][..]),
        value in joined(&["a", "%20", "+", "=", "/", ":", "*", "ä", "%40", "?"]),
    ) {
        let encoded = |text: &str| text.bytes().map(|byte| format!("%{byte:02x}")).collect::<String>();
        let name = format!("{}{word}{}", encoded(&before), encoded(&after));
        let shown = shown(&format!("{url}&{name}={value}hunter2{value}"));
        prop_assert!(!shown.contains("hunter2"), "{shown}");
    }
}

/// What is easily taken for something else.
const NAME_PIECES: &[&str] = &[
    "a",
    "A",
    ".",
    "..",
    "/",
    "%",
    "%2F",
    "%2f",
    "2F",
    "%2E",
    "%252F",
    "~",
    "~left~",
    "-",
    "_",
    " ",
    "+",
    "\0",
    "\u{7f}",
    "\u{85}",
    "ä",
    "a\u{308}",
    "\u{1f600}",
    "\u{fffd}",
    "%FF",
    "%C3",
    "%A4",
    "left",
    "providers",
];

fn check_name(name: &str) -> String {
    let segment = encode_segment(name);
    assert_eq!(decode_segment(&segment).as_deref(), Some(name));
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.%".contains(&byte);
    assert!(segment.bytes().all(plain) && !matches!(&*segment, "." | ".."), "{segment:?}");
    assert!(segment.len() <= 3 * name.len());
    segment.into_owned()
}

fn check_segment(segment: &str) {
    if let Some(name) = decode_segment(segment) {
        assert_eq!(encode_segment(&name), segment);
        assert!(name.len() <= segment.len());
    }
}

fn check_path(path: &str) {
    match NativeLayout.place(path) {
        Some(Place::Record(key)) => assert_eq!(NativeLayout.path(&key), path),
        Some(Place::Mark(service, owner)) => assert_eq!(NativeLayout.mark(&service, &owner), path),
        None => {}
    }
}

proptest! {
    #![proptest_config(at_least(35_000))]

    #[test]
    fn every_text_comes_back_from_its_segment(noise in noise(), joined in joined(NAME_PIECES)) {
        check_name(&noise);
        check_name(&joined);
        check_segment(&noise);
        check_segment(&joined);
    }

    #[test]
    fn no_two_names_share_a_segment(
        a in vec(select(NAME_PIECES), 0..3),
        b in vec(select(NAME_PIECES), 0..3),
    ) {
        let (a, b) = (a.concat(), b.concat());
        prop_assert_eq!(a == b, check_name(&a) == check_name(&b));
    }

    #[test]
    fn a_path_names_one_place(
        (service, id) in (joined(NAME_PIECES), joined(NAME_PIECES)),
        directory in select(&["providers", "consumers", "overrides", "left", "", "Left"][..]),
        edits in edits(NAME_PIECES),
    ) {
        let path = format!("{}/{directory}/{}", encode_segment(&service), encode_segment(&id));
        check_path(&path);
        check_path(&edited_text(&path, &edits));
        check_path(&format!("{service}/{directory}/{id}"));
        let owner = Owner::parse(&id);
        if let (Ok(service), Ok(id), Ok(owner)) = (ServiceName::parse(&service), InstanceId::parse(&id), owner) {
            let expected = match directory {
                "providers" => Some(Place::Record(Key { service, directory: Directory::Providers, id })),
                "consumers" => Some(Place::Record(Key { service, directory: Directory::Consumers, id })),
                "overrides" => Some(Place::Record(Key { service, directory: Directory::Overrides, id })),
                "left" => Some(Place::Mark(service, owner)),
                _ => None,
            };
            prop_assert_eq!(NativeLayout.place(&path), expected);
        }
    }
}

const RECORDS: &[&str] = &[
    r#"{"v":1,"owner":"0f","epoch":3,"endpoints":["http://h:80","grpc://[::1]:50051"],"version":"1.2","zone":"a",
        "weight":100,"status":"up","metadata":{"a":"b","c":""},"registered_at":1700000000000}"#,
    r#"{"v":1,"owner":"o","epoch":18446744073709551615,"shard":{"n":7,"f":[0.1,-1e-7,true,null,"x\u0000\ud83d\ude00"]}}"#,
    r#"{"v":9,"owner":"o","epoch":0,"status":"hibernating","weight":"lots","zone":7,"endpoints":[{"uri":"x"}]}"#,
    r#"{"v":1,"owner":"o","epoch":2,"status":"draining","weight":0}"#,
    r#"{"v":1,"left":["a","b/c","~left~"]}"#,
];

const JSON_PIECES: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    "\\u0000",
    "\\ud800",
    "null",
    "true",
    "0",
    "-1",
    "1e15",
    "1e400",
    "-0.0",
    "0.1e-7",
    "1e-400",
    "2.2250738585072014e-308",
    "9007199254740993",
    "18446744073709551616",
    "123456789012345678901234567890",
    "\"v\":2,",
    "\"v\":1,",
    "\"owner\":\"o\",",
    "\"epoch\":1,",
    "\"x\":[[[[[[[[",
    "\"x\":{\"x\":{\"x\":",
    "\"metadata\":{",
    "\"status\":\"up\",",
    "\"status\":null,",
    "\"\":0,",
    "\"up\"",
    "[1,\"o\",2]",
    "\u{feff}",
    "\u{2028}",
    "\u{0}",
    " ",
    "1700000000000",
];

/// What a field may have: what belongs there, or not.
const JSON_VALUES: &[&str] = &[
    "0",
    "1",
    "9",
    "-1",
    "100",
    "4294967295",
    "4294967296",
    "18446744073709551615",
    "18446744073709551616",
    "1.5",
    "1e3",
    "1e15",
    "-0.0",
    "0.30000000000000004",
    "5e-324",
    "1.7976931348623157e308",
    "null",
    "true",
    "\"\"",
    "\"o\"",
    "\"up\"",
    "\"down\"",
    "\"lots\"",
    "[]",
    "[\"http://h:80\"]",
    "[\"http://h:080\"]",
    "[\"http://h\"]",
    "[0,[1,[2,[]]]]",
    "{}",
    "{\"a\":\"b\"}",
    "{\"\":\"\"}",
    "{\"up\":null}",
    "{\"a\":{\"b\":[1.25,{}]}}",
    "\"a\\nb\"",
    "\"\\u00e4\\ud83d\\ude00\"",
];

fn fields() -> impl Strategy<Value = Vec<(&'static str, String)>> {
    let names = &[
        "v",
        "owner",
        "epoch",
        "endpoints",
        "version",
        "zone",
        "weight",
        "status",
        "metadata",
        "registered_at",
        "left",
        "shard",
        "",
        "V",
        "a\\nb",
    ][..];
    let value = prop_oneof![
        6 => select(JSON_VALUES).prop_map(str::to_owned),
        1 => any::<f64>().prop_filter("JSON has none", |number| number.is_finite()).prop_map(|number| number.to_string()),
    ];
    vec((select(names), value), 0..6)
}

fn check_bytes(bytes: &[u8]) {
    for directory in [Directory::Providers, Directory::Overrides] {
        let key = Key { service: "orders".parse().unwrap(), directory, id: "7f3a".parse().unwrap() };
        let record = match NativeLayout.decode(&key, &[("", bytes)]) {
            Ok(record) => record,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Malformed);
                let text = error.to_string();
                assert!(text.len() <= 1000, "{} bytes of error are logged for {}", text.len(), bytes.len());
                continue;
            }
        };
        // The most that one grows by: defaults are spelled, and `1e15` becomes `1000000000000000.0`.
        let most = 5 * bytes.len() + 200;
        let entry = match NativeLayout.encode(&record) {
            Ok(mut entries) => entries.remove(0),
            Err(error) => {
                assert!(most > MAX_RECORD_BYTES, "{error}");
                continue;
            }
        };
        assert!(entry.bytes.len() <= most, "{} of {}", entry.bytes.len(), bytes.len());
        assert_eq!(NativeLayout.decode(&key, &[(&entry.path, &entry.bytes)]).unwrap(), record);
        if let Content::Instance(instance) = &record.content
            && let Some(unknown) = &instance.unknown
        {
            let before: Map<String, Value> = serde_json::from_slice(bytes).unwrap();
            let after: Map<String, Value> = serde_json::from_slice(&entry.bytes).unwrap();
            assert!(unknown.keys().all(|name| before[name] == after[name]), "{before:?} became {after:?}");
        }
    }
    let left = NativeLayout.decode_mark(bytes);
    assert!(left.iter().map(|id| id.len()).sum::<usize>() <= bytes.len());
    assert_eq!(NativeLayout.decode_mark(&NativeLayout.encode_mark(&left)), left);
}

proptest! {
    #![proptest_config(at_least(25_000))]

    #[test]
    fn a_record_with_edits_is_read_or_refused(record in select(RECORDS), edits in edits(JSON_PIECES)) {
        check_bytes(&edited(record, &edits));
    }

    #[test]
    fn a_record_that_is_spliced_from_two_is_read_or_refused(
        (head, tail) in (select(RECORDS), select(RECORDS)),
        (end, start) in (any::<Index>(), any::<Index>()),
    ) {
        let (head, tail) = (head.as_bytes(), tail.as_bytes());
        check_bytes(&[&head[..end.index(head.len())], &tail[start.index(tail.len())..]].concat());
    }

    #[test]
    fn a_record_of_any_fields_is_read_or_refused(fields in fields(), whole in any::<bool>()) {
        let mut json: Vec<_> = fields.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
        if whole {
            json.splice(0..0, ["\"v\":1", "\"owner\":\"o\"", "\"epoch\":2"].map(str::to_owned));
        }
        check_bytes(format!("{{{}}}", json.join(",")).as_bytes());
    }

    #[test]
    fn noise_is_no_record(bytes in vec(any::<u8>(), 0..40), pieces in joined(JSON_PIECES)) {
        check_bytes(&bytes);
        check_bytes(pieces.as_bytes());
        check_bytes(format!("{{{pieces}}}").as_bytes());
    }
}

/// As large as a record may be, and deeper than a stack is.
#[test]
fn a_record_that_is_deep_or_wide_is_read_or_refused() {
    const START: &str = "{\"v\":1,\"owner\":\"o\",\"epoch\":2";
    for (field, repeated, end) in [
        (",\"x\":", "[", ""),
        (",\"x\":", "{\"a\":", ""),
        (",\"metadata\":", "{\"a\":", ""),
        (",\"endpoints\":", "[", ""),
        (",\"x\":[0", ",0", "]}"),
        (",\"x\":[[]", ",[]", "]}"),
        (",\"x\":[{\"\":0}", ",{\"\":0}", "]}"),
        (",\"x\":", "9", "}"),
        (",\"x\":0.", "9", "}"),
        (",\"x\":1e", "9", "}"),
        (",\"weight\":", "9", "}"),
        (",\"weight\":\"", "9", "\"}"),
        (",\"weight\":\"", "\u{200b}", "\"}"),
        (",\"status\":\"", "x", "\"}"),
        (",\"status\":\"", "\\u0001", "\"}"),
        (",\"endpoints\":[\"", "x", "\"]}"),
        (",\"endpoints\":[\"http://", "\u{200b}", ":80\"]}"),
        (",\"", "x", "\":0}"),
        (",\"weight\":0", ",\"weight\":0", "}"),
        ("", ",\"x\":0", "}"),
    ] {
        for room in [400, MAX_RECORD_BYTES, MAX_RECORD_BYTES + 400] {
            let times = (room - START.len() - field.len() - end.len()) / repeated.len();
            check_bytes(format!("{START}{field}{}{end}", repeated.repeat(times)).as_bytes());
        }
    }
}
