//! Users, roles, and tokens that end.

use std::{error::Error as StdError, fmt::Debug, time::Duration};

use etcd_client::{Client as Bare, ConnectOptions, Permission, RoleRevokePermissionOptions};
use registry_core::{Error, ErrorKind, Options, async_trait};
use registry_etcd::EtcdConfig;
use registry_tests::{
    conformance::support::{
        Events, Observer, PATIENCE, all_registered, eventually, in_time, instance, is_live, key, register_all, states,
    },
    harness::Client,
    servers::{Etcd, Site, Store as Spec},
};
use tokio::time::{Instant, sleep};

use crate::{SECOND, SLACK, Store, client, config, log::heard, options, soon, unchecked};

const ROOT: &str = "r00t-s3cret";
const PASSWORD: &str = "pl4nted-s3cret";
const WRONG: &str = "pl4nted-and-wr0ng";
/// How long a token lives unless it is used.
const TOKEN_TTL: u64 = 5;

/// An etcd that takes passwords fast.
fn fast() -> Etcd {
    Etcd::new().arg("--bcrypt-cost=4")
}

fn simple() -> Etcd {
    fast().arg(format!("--auth-token-ttl={TOKEN_TTL}"))
}

/// An etcd with signed tokens, which carry the revision of users and roles.
#[derive(Debug)]
struct Jwt(Etcd);

#[async_trait]
impl Spec for Jwt {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn package(&self) -> &'static str {
        self.0.package()
    }

    fn ports(&self) -> usize {
        self.0.ports()
    }

    fn command(&self, site: &Site) -> Vec<String> {
        let mut command = self.0.command(site);
        let key = format!("{}/jwt.key", site.files);
        command.push(format!("--auth-token=jwt,sign-method=HS256,priv-key={key},ttl={TOKEN_TTL}s"));
        command
    }

    fn files(&self, site: &Site) -> Vec<(String, String)> {
        let mut files = self.0.files(site);
        files.push(("jwt.key".to_owned(), "a key for tests, and for nothing else".to_owned()));
        files
    }

    fn url(&self, ports: &[u16]) -> String {
        self.0.url(ports)
    }

    async fn ready(&self, site: &Site) -> bool {
        self.0.ready(site).await
    }

    async fn leads(&self, site: &Site) -> bool {
        self.0.leads(site).await
    }
}

/// An etcd on which `app` may use the services, and `other` may not.
async fn secured(etcd: impl Spec) -> Store {
    let mut store = Store::start(etcd).await;
    let mut auth = store.bare.auth_client();
    auth.role_add("services").await.unwrap();
    grant(&store).await;
    for (user, password, role) in
        [("root", ROOT, Some("root")), ("app", PASSWORD, Some("services")), ("other", PASSWORD, None)]
    {
        auth.user_add(user, password, None).await.unwrap();
        if let Some(role) = role {
            auth.user_grant_role(user, role).await.unwrap();
        }
    }
    auth.auth_enable().await.unwrap();
    let options = ConnectOptions::new().with_user("root", ROOT).with_auto_token_refresh(true);
    store.bare = Bare::connect([store.server.addr().to_string()], Some(options)).await.unwrap();
    store
}

async fn grant(store: &Store) {
    let all = Permission::read_write("/services/").with_prefix();
    store.bare.auth_client().role_grant_permission("services", all).await.unwrap();
}

async fn revoke(store: &Store) {
    let all = RoleRevokePermissionOptions::new().with_prefix();
    store.bare.auth_client().role_revoke_permission("services", "/services/", Some(all)).await.unwrap();
}

fn app(store: &Store, options: Options) -> EtcdConfig {
    store.config(options).user("app", PASSWORD)
}

/// Register, discover and watch are refused within a second or so, and nothing gives the password away.
async fn assert_refused(who: &str, config: EtcdConfig) {
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

/// The store knows who we are, or does not, and refuses: every verb says so, and none gives the password away.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_and_a_missing_permission_are_refused_at_once() {
    let store = secured(fast()).await;
    let right = client(app(&store, options()));
    right.registry.register(instance("orders", "1")).await.unwrap();
    let observer = Observer::of(&right, "orders").await;
    observer.until_ids(soon(), &["1"]).await;

    let here = store.config(options());
    assert_refused("a wrong password", here.clone().user("app", WRONG)).await;
    assert_refused("an unknown user", here.clone().user("nobody", PASSWORD)).await;
    assert_refused("no user", here.clone()).await;
    assert_refused("a user without a role", here.clone().user("other", PASSWORD)).await;
    assert_refused("another prefix", app(&store, options()).prefix("elsewhere")).await;
    // With an outage, other words are said.
    store.server.kill().await.unwrap();
    let late = client(app(&store, options()));
    let error = late.registry.register(instance("orders", "3")).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
    assert_kept(&[chain(&error), debug(&late), debug(&right)].concat());
    let heard = heard();
    assert!(heard.contains("authentication failed"), "we do listen: {heard}");
    assert_kept(&heard);
}

/// A token that nobody uses ends after its ttl. Nobody notices.
async fn a_token_expires(etcd: impl Spec) {
    let store = secured(etcd).await;
    // Nothing that would use the tokens, for a while.
    let lazy = unchecked().ttl(60 * SECOND);
    let (provider, reader) = (client(app(&store, lazy.clone())), client(app(&store, lazy)));
    let observer = Observer::of(&reader, "orders").await;
    provider.registry.register(instance("orders", "1")).await.unwrap();
    observer.until_ids(soon(), &["1"]).await;

    // To ask whether it has ended would be to use it.
    sleep(Duration::from_secs(TOKEN_TTL + 2)).await;
    in_time("register", 2 * SECOND, provider.registry.register(instance("orders", "2"))).await.unwrap();
    let stale = store.counted("grpc_server_handled_total", r#"grpc_code="Unauthenticated""#).await;
    assert!(stale > 0, "the token has ended");
    observer.until_ids(soon(), &["1", "2"]).await;
    in_time("discover", 2 * SECOND, reader.registry.discover("payments")).await.unwrap();
    let payments = Observer::of(&reader, "payments").await;

    // A change of users or roles makes every signed token a stale one.
    store.bare.auth_client().user_add("another", PASSWORD, None).await.unwrap();
    register_all(&provider, vec![instance("orders", "3"), instance("payments", "1")]).await;
    observer.until_ids(soon(), &["1", "2", "3"]).await;
    payments.until_ids(soon(), &["1"]).await;
    assert_eq!(reader.registry.services().await.unwrap().len(), 2);
    assert_eq!(provider.registry.heartbeat().await.unwrap().renewed.len(), 4);
    observer.assert_always("live", is_live);
    payments.assert_always("live", is_live);
    assert!(all_registered(&states(&provider)));
    assert_kept(&heard());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_simple_token_that_expires_is_renewed_and_a_running_watch_goes_on() {
    a_token_expires(simple()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_token_that_expires_is_renewed_and_a_running_watch_goes_on() {
    a_token_expires(Jwt(fast())).await;
}

/// An operator takes a permission away and gives it back.
#[tokio::test(flavor = "multi_thread")]
async fn a_permission_that_is_revoked_and_granted_again_heals() {
    let store = secured(fast()).await;
    let (provider, reader) = (client(app(&store, unchecked())), client(app(&store, unchecked())));
    let observer = Observer::of(&reader, "orders").await;
    provider.registry.register(instance("orders", "1")).await.unwrap();
    observer.until_ids(soon(), &["1"]).await;

    revoke(&store).await;
    let denied = |error: Error| assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
    denied(provider.registry.register(instance("orders", "2")).await.unwrap_err());
    denied(provider.registry.services().await.unwrap_err());
    denied(reader.registry.discover("payments").await.unwrap_err());
    // What vanishes now cannot be put back.
    store.kv().delete("/services/orders/providers/1", None).await.unwrap();
    observer.until_ids(soon(), &[]).await;
    assert!(!provider.registry.heartbeat().await.is_ok_and(|heartbeat| heartbeat.failed.is_empty()));

    grant(&store).await;
    in_time("register", 2 * SECOND, provider.registry.register(instance("orders", "2"))).await.unwrap();
    let heartbeat = in_time("heartbeat", 2 * SECOND, provider.registry.heartbeat()).await.unwrap();
    println!("{heartbeat:?}");
    assert!(heartbeat.failed.is_empty() && heartbeat.reregistered == [key("orders", "1")], "{heartbeat:?}");
    observer.until_ids(soon(), &["1", "2"]).await;
    in_time("discover", 2 * SECOND, reader.registry.discover("invoices")).await.unwrap();
    assert!(all_registered(&states(&provider)));
}

/// An operator switches authentication off and on again, which ends every token.
#[tokio::test(flavor = "multi_thread")]
async fn authentication_may_be_switched_off_and_on_again() {
    let store = secured(fast()).await;
    let old = client(app(&store, options()));
    let observer = Observer::of(&old, "orders").await;
    let register = async |one: &Client, id: &str| {
        in_time("register", 2 * SECOND, one.registry.register(instance("orders", id))).await.unwrap();
        observer.until(id, soon(), |seen| seen.get(id).is_some()).await;
    };
    register(&old, "1").await;

    store.bare.auth_client().auth_disable().await.unwrap();
    register(&old, "2").await;
    // One that comes now cannot sign in, and need not.
    let new = client(app(&store, options()));
    register(&new, "3").await;
    let anybody = client(config([store.server.addr()], options()));
    register(&anybody, "4").await;

    super::bare(store.server.addr()).await.auth_client().auth_enable().await.unwrap();
    register(&old, "5").await;
    register(&new, "6").await;
    let error = anybody.registry.register(instance("orders", "7")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error:?}");
    for one in [&old, &new] {
        eventually("all are registered", PATIENCE, async || states(one), all_registered).await;
    }
    observer.assert_always("live", is_live);
    assert!(observer.changes().iter().all(|change| change.starts_with('+')), "{:?}", observer.changes());
}
