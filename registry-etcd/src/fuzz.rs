//! Input that others control, at random: connection strings, cursors, keys, values, and what a watch tells.
//!
//! Most of it is valid input with a few edits, for noise alone does not get far into a parser. Nothing may panic, and
//! what is read comes back the same.
//!
//! `PROPTEST_CASES` raises the number of cases.

use std::{sync::Arc, time::Duration};

use etcd_client::{
    Error as ClientError, KeyValue, TxnResponse, WatchResponse,
    proto::{
        PbEvent, PbKeyValue, PbRangeResponse, PbResponseHeader, PbResponseOp, PbTxnOpResponse, PbTxnResponse,
        PbWatchResponse,
    },
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
};
use registry_core::{Location, NativeLayout, Place};
use tonic::{Code, Status};

use crate::{
    config::EtcdConfig,
    endpoints::Pool,
    error::Failure,
    space::Space,
    store::{complete, ttl_of},
    watch::{Followed, Position, Sorted, gets},
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
    vec((any::<Index>(), taken, put), 0..3)
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

fn joined(pieces: &'static [&'static str]) -> impl Strategy<Value = String> {
    vec(select(pieces), 0..12).prop_map(|pieces| pieces.concat())
}

const URL_PIECES: &[&str] = &[
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
    "ca=",
    "cert=/c",
    "key=/k",
    "server_name=",
    "ttl=",
    "ttl=9999999999y",
    "1s",
    "\u{85}",
    "ä",
];

proptest! {
    #![proptest_config(at_least(20_000))]

    #[test]
    fn a_connection_string_is_a_configuration_without_its_password_or_refused(
        scheme in select(&["etcd", "etcds", "zk"][..]),
        rest in select(&["h1", "h1:1,[2001:db8::1]/a/b?ttl=7s&reconcile=30s", "h?ca=/c&server_name=r"][..]),
        edits in edits(URL_PIECES),
        (before, after) in (joined(URL_PIECES), joined(URL_PIECES)),
    ) {
        let rest = String::from_utf8_lossy(&edited(rest, &edits)).into_owned();
        let hidden: String = before.bytes().map(|byte| format!("%{byte:02x}")).collect();
        for url in
            [format!("{scheme}://app:{before}hunter2{after}@{rest}"), format!("{scheme}://app:{hidden}hunter2@{rest}")]
        {
            let config = url.parse::<Location>().and_then(EtcdConfig::from_location);
            prop_assert!(!format!("{config:?}").contains("hunter2"), "{url:?}: {config:?}");
            if let Ok(config) = config {
                prop_assert_eq!(config.addresses().unwrap(), config.endpoints);
            }
        }
    }
}

const CURSORS: &[&str] = &["42:7:3", "42:18446744073709551615:3:41:-9:0:2f61ff", "42:7:0:9223372036854775807:0:40:2f"];

const CURSOR_PIECES: &[&str] = &[
    ":",
    "0",
    "1",
    "-1",
    "+1",
    "00",
    "42",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "18446744073709551615",
    "ff",
    "F",
    "g",
    "é",
    " ",
];

fn check_cursor(text: &str) {
    if let Ok(position) = text.parse::<Position>() {
        let spelled = position.to_string();
        assert!(spelled.len() <= text.len() + 10, "{text:?} became {spelled:?}");
        assert_eq!(spelled.parse(), Ok(position));
        // For the store, both would mean the present.
        assert!(!spelled.starts_with(['0', '-']), "{spelled}");
    }
}

proptest! {
    #![proptest_config(at_least(30_000))]

    #[test]
    fn a_cursor_is_a_position_or_refused(
        cursor in select(CURSORS),
        edits in edits(CURSOR_PIECES),
        parts in vec(select(CURSOR_PIECES), 0..8),
    ) {
        check_cursor(&String::from_utf8_lossy(&edited(cursor, &edits)));
        check_cursor(&parts.join(":"));
        check_cursor(&parts.concat());
    }
}

const KEYS: &[&str] = &[
    "/orders/providers/1",
    "/orders/providers/2",
    "/orders/overrides/1",
    "/orders/left/o",
    "/orders/consumers/1",
    "/a%2Fb/providers/%2E",
    "/orders",
];

const VALUES: &[&str] = &[
    "{\"v\":1,\"owner\":\"o\",\"epoch\":1}",
    "{\"v\":9,\"owner\":\"o\",\"epoch\":18446744073709551615,\"x\":[1]}",
    "{\"v\":1,\"left\":[\"1\",\"2\",\"\",\"a/b\"]}",
    "",
];

const PIECES: &[&str] = &[
    "/",
    "//",
    "%",
    "%2F",
    "%2f",
    "orders",
    "providers",
    "left",
    "overrides",
    "~",
    ".",
    "\0",
    "ä",
    "\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    "0",
    "null",
];

fn number() -> impl Strategy<Value = i64> {
    prop_oneof![3 => select(&[0, 1, 2, 3, 42, 43, -1, i64::MIN, i64::MAX, i64::MAX - 1][..]), 1 => any::<i64>()]
}

fn kv() -> impl Strategy<Value = PbKeyValue> {
    let with_edits = |texts| (select(texts), edits(PIECES)).prop_map(|(text, edits)| edited(text, &edits));
    let as_it_is = |texts| select(texts).prop_map(|text: &str| text.as_bytes().to_vec());
    let bytes = |texts| prop_oneof![2 => as_it_is(texts), 1 => with_edits(texts)];
    let numbers = (number(), number(), number(), number());
    (bytes(KEYS), bytes(VALUES), numbers).prop_map(|(key, value, (create_revision, mod_revision, version, lease))| {
        PbKeyValue { key, value, create_revision, mod_revision, version, lease }
    })
}

fn header() -> impl Strategy<Value = Option<PbResponseHeader>> {
    let header = (number(), any::<u64>());
    let header =
        header.prop_map(|(revision, cluster_id)| PbResponseHeader { cluster_id, revision, ..Default::default() });
    proptest::option::weighted(0.9, header)
}

fn event() -> impl Strategy<Value = PbEvent> {
    let kind = select(&[0, 0, 0, 1, 1, 1, -1, 2, i32::MAX][..]);
    (kind, proptest::option::weighted(0.9, kv())).prop_map(|(kind, kv)| PbEvent { r#type: kind, kv, prev_kv: None })
}

fn told() -> impl Strategy<Value = WatchResponse> {
    (header(), -1..2i64, any::<bool>(), vec(event(), 0..3)).prop_map(|(header, watch_id, created, events)| {
        WatchResponse(PbWatchResponse { header, watch_id, created, events, ..Default::default() })
    })
}

fn answer() -> impl Strategy<Value = TxnResponse> {
    let range = (number(), vec(kv(), 0..2));
    let range = range.prop_map(|(count, kvs)| PbRangeResponse { kvs, count, ..Default::default() });
    let response = prop_oneof![
        4 => range.prop_map(|range| Some(PbTxnOpResponse::ResponseRange(range))),
        1 => Just(Some(PbTxnOpResponse::ResponsePut(Default::default()))),
        1 => Just(Some(PbTxnOpResponse::ResponseTxn(Default::default()))),
        1 => Just(None),
    ];
    let responses = vec(response.prop_map(|response| PbResponseOp { response }), 0..2);
    (header(), any::<bool>(), responses)
        .prop_map(|(header, succeeded, responses)| TxnResponse(PbTxnResponse { header, succeeded, responses }))
}

fn space() -> Space {
    Space::new("", Arc::new(NativeLayout))
}

thread_local! {
    /// Followed by nobody: there is no server, and nothing is asked.
    static FOLLOWED: Followed = {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        let (pool, _) = Pool::new(&EtcdConfig::new(["127.0.0.1:1"]), Duration::from_secs(10)).unwrap();
        Followed::new(pool, space(), "orders".parse().unwrap())
    };
}

proptest! {
    #![proptest_config(at_least(25_000))]

    #[test]
    fn what_a_watch_tells_becomes_updates(cursor in select(CURSORS), told in vec(told(), 1..3)) {
        let mut position: Position = cursor.parse().unwrap();
        // As a store counts them. Others are taken, but do not all come back.
        let sound = |kv: &KeyValue| kv.mod_revision() > 1 && !kv.key().is_empty();
        let mut all_sound = true;
        for told in told {
            all_sound &= told.events().iter().filter_map(|event| event.kv()).all(sound);
            let before = position.clone();
            match FOLLOWED.with(|followed| followed.updates(&mut position, &told)) {
                None => prop_assert_eq!(&position, &before),
                Some(updates) => {
                    prop_assert!(updates.updates.len() <= told.events().len());
                    let cursor = updates.cursor.unwrap();
                    let again = cursor.as_str().parse();
                    prop_assert!(!all_sound || again.as_ref() == Ok(&position), "{cursor:?} {position:?}");
                }
            }
            position.next_revision();
        }
    }

    #[test]
    fn keys_and_values_become_records_and_departures(kvs in vec(kv(), 0..3), answer in answer(), ttl in number()) {
        let kvs: Vec<_> = kvs.into_iter().map(KeyValue).collect();
        let (records, left) = {
            let mut sorted = Sorted::default();
            kvs.iter().for_each(|kv| sorted.take(&space(), kv));
            sorted.finish()
        };
        prop_assert!(records.len() <= kvs.len());
        prop_assert!(records.iter().all(|record| !left.contains(&record.key)));
        for kv in &kvs {
            match space().place(kv.key()) {
                Some(Place::Record(key)) => {
                    prop_assert_eq!(space().key(&key).into_bytes(), kv.key());
                    prop_assert_eq!(space().decode(&key, kv).ok(), space().read(&key, kv));
                }
                Some(Place::Mark(service, owner)) => {
                    prop_assert_eq!(space().mark(&service, &owner, &[]).0.into_bytes(), kv.key());
                    let named: usize = space().left(&service, kv.value()).map(|key| key.id.len()).sum();
                    prop_assert!(named <= kv.value().len());
                }
                _ => {}
            }
        }
        if let Ok(answer) = complete(answer) {
            prop_assert!(gets(answer.op_responses()).count() <= 3);
        }
        prop_assert!(tokio::time::Instant::now().checked_add(ttl_of(ttl)).is_some() && !ttl_of(ttl).is_zero());
    }

    #[test]
    fn an_error_of_a_server_has_a_class(
        code in (0..18i32).prop_map(Code::from),
        text in joined(&[
            "etcdserver: ", "permission denied", "authentication failed", "invalid auth token", "has been compacted",
            "too large", "larger than max", "space exceeded", "no leader", "invalid peer certificate",
            "UnknownIssuer", "ä", "\0",
        ]),
    ) {
        for error in [ClientError::GRpcStatus(Status::new(code, &text)), ClientError::WatchError(text.clone())] {
            let failure = Failure::Client(error);
            prop_assert!(failure.to_string().contains(&text));
            prop_assert!(failure.during("x").to_string().starts_with("etcd: x"));
        }
    }
}
