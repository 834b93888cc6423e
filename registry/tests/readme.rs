//! What the README names exists: every test in its table of promises is a test, every option in its table an option.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use service_registry::Options;

#[test]
fn every_test_that_the_readme_names_exists() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let mut sources = String::new();
    for folder in [
        "registry",
        "registry-balance",
        "registry-core",
        "registry-etcd",
        "registry-redis",
        "registry-tests",
        "registry-tls",
        "registry-zk",
    ] {
        read_sources(&root().join(folder), &mut sources);
    }
    let table = readme.lines().filter(|line| line.starts_with("| ") && line.matches('|').count() == 5);
    let named: BTreeSet<&str> = table
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .filter(|name| name.matches('_').count() > 2 && !name.starts_with("service_registry_"))
        .collect();
    assert!(named.len() > 50, "the table of promises has {} tests", named.len());
    let missing: Vec<&&str> = named.iter().filter(|name| !sources.contains(&format!("fn {name}"))).collect();
    assert!(missing.is_empty(), "the README names what does not exist: {missing:#?}");
    for promise in 1..=13 {
        assert!(readme.contains(&format!("\n| {promise} | ")), "promise {promise} has no row");
    }
}

#[test]
fn every_failure_has_tests_on_every_store() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let tests = root().join("registry-tests");
    let sources = |folder: &str| {
        let mut sources = String::new();
        read_sources(&tests.join(folder), &mut sources);
        sources
    };
    let everywhere = sources("src");
    let own = ["etcd_only", "zookeeper_only", "redis_only"].map(|store| sources(&format!("tests/{store}")));
    for failure in 1..=34 {
        let start = format!("| F{failure} | ");
        let row =
            readme.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("F{failure} has no row"));
        let cells: Vec<_> = row.split(" | ").map(|cell| cell.trim_matches([' ', '|'])).collect();
        let [_, _, suite, stores @ ..] = &cells[..] else { panic!("{row}") };
        assert_eq!(stores.len(), 3, "{row}");
        for case in names(suite) {
            assert!(everywhere.contains(&format!("pub async fn {case}<H: ")), "{case} is no case of every store");
        }
        for (store, own) in stores.iter().zip(&own) {
            assert!(names(store).count() > 0 || (*store == "yes" && names(suite).count() > 0), "{row}");
            for test in names(store) {
                assert!(own.contains(&format!("async fn {test}()")), "{test} is no test of that store");
            }
        }
    }
}

fn names(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn every_option_is_in_the_readme() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for option in Options::NAMES {
        assert!(readme.contains(&format!("\n| `{option}` | ")), "{option} has no row");
    }
    let more: &[&[&str]] = &[
        &[],
        #[cfg(feature = "etcd")]
        service_registry::etcd::EtcdConfig::NAMES,
        #[cfg(feature = "zookeeper")]
        service_registry::zookeeper::ZooKeeperConfig::NAMES,
        #[cfg(feature = "redis")]
        service_registry::redis::RedisConfig::NAMES,
    ];
    let rows: Vec<_> = readme.lines().filter(|line| line.starts_with("| ")).collect();
    for option in more.iter().copied().flatten() {
        let named = |row: &&&str| row.split(" | ").nth(1).is_some_and(|cell| cell.contains(&format!("`{option}`")));
        assert!(rows.iter().any(|row| named(&row)), "{option} is in no row");
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read_sources(folder: &Path, sources: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_sources(&path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}
