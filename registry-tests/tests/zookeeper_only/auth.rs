//! Users, what they may do, and what is refused.

use std::{error::Error as StdError, fmt::Debug};

use registry_core::{Error, ErrorKind, Options};
use registry_tests::{
    conformance::support::{Events, Observer, PATIENCE, all_registered, eventually, instance, states},
    servers::ZooKeeper,
};
use registry_zk::{ZooKeeperAcl, ZooKeeperAuth, ZooKeeperConfig};
use tokio::time::{Instant, sleep};
use zookeeper_client::{Acls, Client as Bare, CreateMode, Permission};

use crate::{
    ORDERS, PERSISTENT, SECOND, SLACK, Store, children, client, config, connect, log::heard, options, soon, unchecked,
};

const PASSWORD: &str = "pl4nted-s3cret";
const WRONG: &str = "pl4nted-and-wr0ng";
/// How many attempts there may be in [`WATCHED`] by someone who is refused: an attempt every six seconds, and some.
const ATTEMPTS: u64 = 4;
/// How long someone who is refused is watched.
const WATCHED: std::time::Duration = std::time::Duration::from_secs(3);

fn closed(store: &Store, options: Options) -> ZooKeeperConfig {
    store.config(options).acl(ZooKeeperAcl::CreatorAll)
}

/// Register, discover and watch are refused within a second or so, and nothing gives the password away.
async fn assert_refused(who: &str, config: ZooKeeperConfig) -> Error {
    let spelled = format!("{config:?}");
    let one = client(config);
    let events = Events::of(&one);
    let start = Instant::now();
    let (register, discover, watch) = tokio::join!(
        one.registry.register(instance("orders", "2")),
        one.registry.discover("orders"),
        one.registry.watch("orders"),
    );
    let took = start.elapsed();
    let errors = [register.unwrap_err(), discover.unwrap_err(), watch.unwrap_err()];
    println!("{who}, after {took:?}: {:?}", errors[0]);
    for error in &errors {
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{who}: {error:?}");
        assert_kept(&chain(error));
    }
    assert!(took < SECOND + SLACK, "{who}: {took:?}");
    assert!(one.registry.registrations().is_empty(), "what is refused is withdrawn");
    assert_kept(&[spelled, debug(&one), debug(&events)].concat());
    errors.into_iter().next().unwrap()
}

fn debug(value: &impl Debug) -> String {
    format!("{value:?} {value:#?}")
}

/// Everything that an error says.
fn chain(error: &Error) -> String {
    let mut said = format!("{error} {}", debug(error));
    let mut source = error.source();
    while let Some(error) = source {
        said.push_str(&format!(" {error} {error:?}"));
        source = error.source();
    }
    said
}

#[track_caller]
fn assert_kept(said: &str) {
    for secret in [PASSWORD, WRONG] {
        assert!(!said.contains(secret), "{secret} in {said}");
    }
}

/// What nobody else may read is read by whoever signs in as the same user, and by nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn what_belongs_to_its_creator_is_closed_to_others_at_once() {
    let store = Store::start(ZooKeeper::new()).await;
    let right = || client(closed(&store, options()).user("app", PASSWORD));
    let (provider, reader) = (right(), right());
    provider.registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    observer.until_ids(soon(), &["1"]).await;

    assert_refused("nobody", store.config(options())).await;
    assert_refused("another user", closed(&store, options()).user("other", PASSWORD)).await;
    assert_refused("a wrong password", closed(&store, options()).user("app", WRONG)).await;
    // It is the same user after the way to the server was lost, and after the server was.
    store.server.restart().await.unwrap();
    let discover = async || reader.registry.discover("payments").await.map(|seen| seen.len());
    eventually("it reads", PATIENCE, discover, Result::is_ok).await.unwrap();
    let register = async || provider.registry.register(instance("orders", "2")).await;
    eventually("it writes", PATIENCE, register, Result::is_ok).await.unwrap();
    observer.until_ids(PATIENCE, &["1", "2"]).await;
    // With an outage, other words are said.
    store.server.kill().await.unwrap();
    let error = right().registry.register(instance("orders", "3")).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    assert_kept(&[chain(&error), debug(&provider), debug(&reader)].concat());
    let heard = heard();
    assert!(heard.contains("opened a session"), "we do listen: {heard}");
    assert_kept(&heard);
}

/// Whose password the server knows is told by it, at once, and does not ask again and again.
#[tokio::test(flavor = "multi_thread")]
async fn a_user_whom_the_server_knows_needs_the_right_password() {
    let store = Store::start(ZooKeeper::new().sasl_user("app", PASSWORD).sasl_user("other", PASSWORD)).await;
    let sasl = |user: &str, password: &str| {
        closed(&store, options()).auth(ZooKeeperAuth::Sasl).user(user.to_owned(), password.to_owned())
    };
    let (provider, reader) = (client(sasl("app", PASSWORD)), client(sasl("app", PASSWORD)));
    provider.registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&reader, "orders").await;
    observer.until_ids(soon(), &["1"]).await;
    assert_refused("a wrong password", sasl("app", WRONG)).await;
    // With a password that nobody has: ZooKeeper's `SaslServerCallbackHandler` keeps the name of the user before, and
    // so takes a stranger who has that one's password.
    assert_refused("an unknown user", sasl("nobody", WRONG)).await;
    let open = sasl("nobody", WRONG).acl(ZooKeeperAcl::Open).prefix("open");
    assert_refused("an unknown user where everything is open", open).await;
    assert_refused("another user", sasl("other", PASSWORD)).await;
    assert_refused("nobody", store.config(options())).await;

    let proxy = store.proxy().await;
    let mut wrong = sasl("app", WRONG);
    wrong.endpoints = vec![proxy.addr().to_string()];
    let refused = client(wrong);
    for _ in 0..20 {
        let error = refused.registry.register(instance("orders", "2")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
    }
    sleep(WATCHED).await;
    let stats = proxy.stats();
    println!("{stats:?}");
    assert!(stats.accepted <= ATTEMPTS, "{stats:?}");
    assert_kept(&heard());
}

/// A user who is refused is asked for again after a while: whoever mends it need not restart anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_to_know_the_user_is_used_without_a_restart_of_ours() {
    let (before, after) = tokio::join!(
        Store::start(ZooKeeper::new().sasl_user("app", WRONG)),
        Store::start(ZooKeeper::new().sasl_user("app", PASSWORD)),
    );
    let proxy = before.proxy().await;
    let sasl = config([proxy.addr()], options()).auth(ZooKeeperAuth::Sasl).user("app", PASSWORD);
    let one = client(sasl);
    let error = one.registry.register(instance("orders", "1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
    proxy.set_upstream(after.server.addr());
    let registered = async || one.registry.register(instance("orders", "1")).await;
    eventually("it is mended", 10 * SECOND, registered, Result::is_ok).await.unwrap();
    assert!(all_registered(&states(&one)));
}

/// The access control list that was asked for is what every node has, the root included.
#[tokio::test(flavor = "multi_thread")]
async fn every_node_that_is_made_has_the_list_that_was_asked_for() {
    const LIST: &str = "digest:app:cdrwa,world:anyone:r";
    let store = Store::start(ZooKeeper::new()).await;
    // The user by its name alone would be another: the identity of a digest is its hash.
    let bare =
        connect(store.server.addr(), Bare::connector().with_auth("digest", b"app:pl4nted-s3cret")).await.unwrap();
    let users = bare.list_auth_users().await.unwrap();
    let id = users.iter().find(|user| user.scheme() == "digest").unwrap().user().to_owned();
    assert_eq!(id, "app");
    bare.create("/identity", b"", &CreateMode::Persistent.with_acls(Acls::creator_all())).await.unwrap();
    let identity = bare.get_acl("/identity").await.unwrap().0[0].id().to_owned();
    let acl: ZooKeeperAcl = LIST.replace("digest:app", &format!("digest:{identity}")).parse().unwrap();

    let of_app = |prefix: &str| store.config(options()).user("app", PASSWORD).acl(acl.clone()).prefix(prefix);
    let provider = client(of_app("deep/down/services"));
    provider.registry.register(instance("orders", "1")).await.unwrap();
    let root = "/deep/down/services";
    let below = ["/deep", "/deep/down", root].map(str::to_owned);
    let inside = ["/orders", "/orders/providers", "/orders/providers/1"].map(|path| format!("{root}{path}"));
    for path in below.iter().chain(&inside) {
        let (list, stat) = bare.get_acl(path).await.unwrap();
        let spelled: Vec<_> = list.iter().map(|acl| (acl.scheme(), acl.id(), acl.permission())).collect();
        let expected = [("digest", identity.as_str(), Permission::ALL), ("world", "anyone", Permission::READ)];
        assert_eq!(spelled, expected, "{path}");
        assert_eq!(stat.ephemeral_owner != 0, path.ends_with("/1"), "{path}");
    }
    // Others may read, and nothing else.
    let other = client(store.config(options()).prefix("deep/down/services"));
    let observer = Observer::of(&other, "orders").await;
    observer.until_ids(soon(), &["1"]).await;
    let error = other.registry.register(instance("orders", "2")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
    provider.registry.register(instance("orders", "3")).await.unwrap();
    observer.until_ids(soon(), &["1", "3"]).await;
    assert!(provider.registry.unregister("orders", "3").await.unwrap());
    observer.until_ids(soon(), &["1"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_cannot_be_made_is_told_by_its_path() {
    let store = Store::start(ZooKeeper::new()).await;
    let bare = store.bare().await;
    bare.create("/locked", b"", &CreateMode::Persistent.with_acls(Acls::anyone_read())).await.unwrap();
    bare.create("/fleeting", b"", &CreateMode::Ephemeral.with_acls(Acls::anyone_all())).await.unwrap();
    bare.create("/open", b"", &PERSISTENT).await.unwrap();
    for (prefix, kind) in
        [("locked/services", ErrorKind::PermissionDenied), ("fleeting/services", ErrorKind::InvalidInput)]
    {
        let one = client(store.config(unchecked()).prefix(prefix));
        let error = one.registry.register(instance("orders", "1")).await.unwrap_err();
        let why = error.source().unwrap().to_string();
        println!("{error}: {why}");
        assert_eq!(error.kind(), kind, "{error:?}");
        assert!(why.contains(&format!("cannot make the root /{prefix}")), "{error}: {why}");
        assert!(one.registry.registrations().is_empty());
        // There is nothing to be seen, and that is no error.
        assert!(one.registry.discover("orders").await.unwrap().is_empty());
    }
    let one = client(store.config(unchecked()).prefix("open/services"));
    one.registry.register(instance("orders", "1")).await.unwrap();
    assert_eq!(children(&bare, &ORDERS.replace("/services", "/open/services")).await, ["1"]);
}
