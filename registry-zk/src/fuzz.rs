//! Input that others control, at random: connection strings, access control lists, cursors, and what nodes are called and
//! hold.
//!
//! Most of it is valid input with a few edits, for noise alone does not get far into a parser. Nothing may panic, and what
//! is read comes back the same.
//!
//! `PROPTEST_CASES` raises the number of cases.

use std::{collections::HashSet, sync::Arc};

use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
};
use registry_core::{Directory, Location, NativeLayout};
use zookeeper_client::{EventType, WatchedEvent};

use crate::{
    acl::ZooKeeperAcl,
    config::ZooKeeperConfig,
    cursor::Position,
    dial::version,
    space::{Node, Space},
    watch::{Dirty, MOST_LEFT},
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

fn edited_text(text: &str, edits: &[Edit]) -> String {
    String::from_utf8_lossy(&edited(text, edits)).into_owned()
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
    "-",
    "_",
    "..",
    "0",
    "65536",
    "ca=",
    "cert=/c",
    "key=/k",
    "server_name=x",
    "acl=",
    "auth=",
    "ttl=9999999999y",
    "1s",
    "\u{85}",
    "\u{e000}",
    "ä",
];

const ACL_PIECES: &[&str] = &[
    "open",
    "creator-all",
    "world:anyone:r",
    "sasl:app:cdrwa",
    "digest:a:b=:rw",
    "x509:CN=a,O=b:r",
    "x509:CN=a,O=b:",
    ":",
    "::",
    ",",
    ",,",
    "auth::a",
    "r",
    "cdrwa",
    "z",
    "ä",
    " ",
];

proptest! {
    #![proptest_config(at_least(20_000))]

    #[test]
    fn a_connection_string_is_a_configuration_without_its_password_or_refused(
        scheme in select(&["zk", "zks", "etcd"][..]),
        rest in select(&[
            "h1", "h1:1,[2001:db8::1]/a/b?ttl=7s", "h-1.x?auth=sasl&acl=creator-all", "h?ca=/c&cert=/d&key=/e",
        ][..]),
        edits in edits(URL_PIECES),
        (before, after) in (joined(URL_PIECES), joined(URL_PIECES)),
    ) {
        let rest = edited_text(rest, &edits);
        let hidden: String = before.bytes().map(|byte| format!("%{byte:02x}")).collect();
        for url in
            [format!("{scheme}://app:{before}hunter2{after}@{rest}"), format!("{scheme}://app:{hidden}hunter2@{rest}")]
        {
            let config = url.parse::<Location>().and_then(ZooKeeperConfig::from_location);
            prop_assert!(!format!("{config:?}").contains("hunter2"), "{url:?}: {config:?}");
            if let Ok(config) = config {
                prop_assert_eq!(config.addresses().unwrap(), config.endpoints);
            }
        }
    }

    #[test]
    fn an_access_control_list_is_read_or_refused(text in joined(ACL_PIECES)) {
        if let Ok(acl) = text.parse::<ZooKeeperAcl>() {
            prop_assert!(acl.to_list().is_ok());
            if let ZooKeeperAcl::Explicit(entries) = acl {
                prop_assert_eq!(entries.join(","), text);
            }
        }
    }
}

const CURSORS: &[&str] = &["0;;;", "12;3:1700:9;4:1700:12;", "9223372036854775807;0:0:-1;;-5:1701:12"];

const CURSOR_PIECES: &[&str] = &[
    ";",
    ":",
    "0",
    "-1",
    "+1",
    "00",
    "12",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "3:1700:9",
    "x",
    "é",
    " ",
];

proptest! {
    #![proptest_config(at_least(40_000))]

    #[test]
    fn a_cursor_is_a_position_or_refused(
        cursors in (select(CURSORS), select(CURSORS)),
        edits in (edits(CURSOR_PIECES), edits(CURSOR_PIECES)),
        pieces in joined(CURSOR_PIECES),
    ) {
        let texts = [edited_text(cursors.0, &edits.0), edited_text(cursors.1, &edits.1), pieces];
        let positions: Vec<Position> = texts.iter().filter_map(|text| text.parse().ok()).collect();
        for position in &positions {
            prop_assert_eq!(position.cursor().as_str().parse(), Ok(position.clone()));
            prop_assert!(!position.is_rewound(position) && !position.is_changed(position));
            for other in &positions {
                position.is_rewound(other);
                let later = position.clone().after(other);
                prop_assert_eq!(later.is_changed(other), position.is_changed(other));
            }
        }
    }
}

const PATHS: &[&str] = &[
    "/orders/providers/1",
    "/orders/overrides/1",
    "/orders/providers/~left~1",
    "/orders/consumers/a%2Fb",
    "/orders/providers",
    "/a/b/orders/providers/1",
    "/a/b/orders/providers/~left~1",
    "/a/b",
    "/zookeeper/quota",
];

const PATH_PIECES: &[&str] = &[
    "/",
    "//",
    "/a",
    "/a/b",
    "/a/b/",
    "~left~",
    "~",
    "%2F",
    "%2f",
    "%",
    "orders",
    "/orders",
    "/providers",
    "/providers/",
    "left",
    "1",
    ".",
    "..",
    "\0",
    "ä",
    "\u{1f600}",
];

const RECORDS: &[&str] = &[
    "{\"v\":1,\"owner\":\"o\",\"epoch\":1}",
    "{\"v\":9,\"owner\":\"o\",\"epoch\":18446744073709551615,\"status\":\"x\",\"y\":[1]}",
    "",
];

fn space(prefix: &str) -> Space {
    Space::new(prefix, Arc::new(NativeLayout))
}

fn path() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => select(PATHS).prop_map(str::to_owned),
        3 => (select(PATHS), edits(PATH_PIECES)).prop_map(|(path, edits)| edited_text(path, &edits)),
        1 => joined(PATH_PIECES),
    ]
}

proptest! {
    #![proptest_config(at_least(30_000))]

    #[test]
    fn a_path_is_a_record_a_mark_or_none_of_ours(
        prefix in select(&["", "a/b", "/a/b/", "~left~", "ä"][..]),
        path in path(),
        bytes in (select(RECORDS), edits(&["{", "}", "\"", ",", ":", "[", "0", "null"])),
    ) {
        let space = space(prefix);
        prop_assert!(space.parents(&path).iter().all(|parent| path.starts_with(parent)));
        prop_assert!(space.roots().last().is_none_or(|root| *root == space.root()));
        match space.node(&path) {
            Node::Record(key) => {
                prop_assert_eq!(space.key(&key), path.as_str());
                prop_assert_eq!(space.node(&space.mark(&path)), Node::Mark(path.clone()));
                let bytes = edited(bytes.0, &bytes.1);
                prop_assert_eq!(space.decode(&key, &bytes).ok(), space.read(&key, &bytes));
            }
            Node::Mark(record) => prop_assert_eq!(space.mark(&record), path.as_str()),
            Node::Other => {}
        }
        if let Some(service) = space.service(&path) {
            let providers = format!("/{path}/providers");
            prop_assert!(space.directory(&service, Directory::Providers).ends_with(&providers));
        }
    }

    #[test]
    fn any_events_are_taken_note_of(
        events in vec((0..4usize, path()), 0..5),
        prefix in select(&["", "a/b"][..]),
    ) {
        use EventType::{NodeChildrenChanged, NodeCreated, NodeDataChanged, NodeDeleted};
        let (space, mut dirty, mut left) = (space(prefix), Dirty::default(), HashSet::new());
        for (kind, path) in &events {
            let kind = [NodeCreated, NodeDeleted, NodeDataChanged, NodeChildrenChanged][*kind];
            dirty.note(WatchedEvent::new(kind, path.as_str()), &space, &mut left);
            prop_assert!(left.len() <= MOST_LEFT.min(events.len()));
            if let Node::Record(key) = space.node(path) {
                prop_assert!(!dirty.has_left(&key) || kind == NodeDeleted);
            }
        }
    }

    #[test]
    fn a_server_says_its_version_or_nothing(
        edits in edits(&["\n", "Zookeeper version: ", "-", ",", "3.8.4", "\0", "ä"]),
    ) {
        let answer = edited_text("Zookeeper version: 3.8.4-9316c2a7a97e1666, built on 01/01/2024\nMode: y", &edits);
        prop_assert!(version(&answer).is_none_or(|version| !version.is_empty() && answer.contains(&version)));
    }
}
