use registry_tests::servers::{Redis, shared_redis};

use super::*;

in_both![
    Redis;
    server_keeps_its_data_only_if_it_shall,
    server_takes_configuration_and_users,
    sentinels_make_the_replica_a_primary,
    cluster_outlives_a_primary;
    containers only: primary_that_is_cut_off_takes_writes_until_it_finds_back, node_that_is_cut_off_is_replaced,
];

#[async_trait]
impl Kind for Redis {
    const SCHEMES: [&'static str; 2] = ["redis", "rediss"];
    const QUESTION: &'static str = "PING\r\nQUIT\r\n";
    const ANSWER: &'static str = "+PONG";

    fn plain() -> Self {
        Self::new().durable()
    }

    fn secure(server: &Identity) -> Self {
        Self::new().tls(server)
    }

    fn only_for_clients_of(self, ca: &str) -> Self {
        self.client_ca(ca)
    }

    fn broken() -> (Self, &'static str) {
        (Self::new().line("no-such-directive 1"), "no-such-directive")
    }

    async fn shared() -> servers::Result<Server> {
        shared_redis().await
    }

    async fn put(addr: SocketAddr) -> io::Result<()> {
        let answer = timeout(Duration::from_secs(1), ask(addr, "SET a b")).await??;
        if answer == "+OK" { Ok(()) } else { Err(io::Error::other(answer)) }
    }

    async fn has_data(addr: SocketAddr) -> io::Result<bool> {
        match timeout(Duration::from_secs(1), ask(addr, "EXISTS a")).await??.as_str() {
            ":1" => Ok(true),
            ":0" => Ok(false),
            other => Err(io::Error::other(other)),
        }
    }
}

/// What a server answers to these commands, a line each.
async fn ask(addr: SocketAddr, commands: &str) -> io::Result<String> {
    let question = async {
        let mut socket = TcpStream::connect(addr).await?;
        socket.write_all(format!("{commands}\r\nECHO end-of-it\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"end-of-it\r\n") && !refuses(&answer) {
            if socket.read_buf(&mut answer).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
        }
        Ok(answer)
    };
    let answer = timeout(Duration::from_secs(6), question).await??;
    let answer = String::from_utf8_lossy(&answer).replace("\r\n", "\n");
    Ok(answer.replace("$9\nend-of-it\n", "").trim_end().to_owned())
}

/// Who may not ask may not have an echo either, and Sentinels have none.
fn refuses(answer: &[u8]) -> bool {
    let answer = String::from_utf8_lossy(answer);
    let last = answer.trim_end().rsplit("\r\n").next().unwrap_or_default();
    answer.ends_with("\r\n") && (last.starts_with("-NOAUTH") || last.contains("unknown command 'ECHO'"))
}

/// A Sentinel that was held up for two seconds by a busy machine trusts itself with nothing for thirty.
async fn after_all<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let wait = async {
        while !condition().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(120), wait).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

async fn server_keeps_its_data_only_if_it_shall(launcher: Launcher) {
    for (redis, keeps) in [(Redis::new(), false), (Redis::new().durable(), true)] {
        let server = Server::start_in(launcher, redis).await.unwrap();
        let addr = server.addr();
        assert_eq!(server.url(), format!("redis://{addr}"));
        for key in 0..200 {
            assert_eq!(ask(addr, &format!("SET {key} b")).await.unwrap(), "+OK");
        }
        server.kill().await.unwrap();
        assert_silent::<Redis>(addr).await;
        server.restart().await.unwrap();
        assert_eq!(ask(addr, "DBSIZE").await.unwrap(), if keeps { ":200" } else { ":0" });
        server.restart().await.unwrap();
        assert_eq!(ask(addr, "DBSIZE").await.unwrap(), if keeps { ":200" } else { ":0" });
        server.wipe().await.unwrap();
        assert_eq!(ask(addr, "DBSIZE").await.unwrap(), ":0");
        drop(server);
        assert_silent::<Redis>(addr).await;
    }
}

async fn server_takes_configuration_and_users(launcher: Launcher) {
    let redis = Redis::new()
        .line("maxmemory 1mb")
        .line("maxmemory-policy noeviction")
        .user("user default off")
        .user("user app on >secret ~services* +@all");
    let server = Server::start_in(launcher, redis).await.unwrap();
    let addr = server.addr();
    assert!(ask(addr, "GET a").await.unwrap().starts_with("-NOAUTH"));
    let as_app = async |command: &str| ask(addr, &format!("AUTH app secret\r\n{command}")).await.unwrap();
    assert!(ask(addr, "AUTH app wrong").await.unwrap().starts_with("-WRONGPASS"));
    assert!(as_app("GET other").await.contains("-NOPERM"));
    assert!(as_app("SETRANGE services 2000000 x\r\nSET services x").await.contains("-OOM"));
    server.restart().await.unwrap();
}

async fn sentinels_make_the_replica_a_primary(launcher: Launcher) {
    let cluster = Cluster::start_in(launcher, Redis::sentinel().durable(), Redis::sentinel().size()).await.unwrap();
    let [old, new, s1, s2, s3] = cluster.members() else { panic!("five members") };
    let sentinels = format!("{},{},{}", s1.addr(), s2.addr(), s3.addr());
    assert_eq!(cluster.url(), format!("redis+sentinel://{sentinels}?master=registry"));
    assert_eq!(cluster.leader().await.unwrap(), 0);
    assert_eq!(ask(old.addr(), "SET a b\r\nWAIT 1 5000").await.unwrap(), "+OK\n:1");
    assert!(ask(new.addr(), "SET a b").await.unwrap().starts_with("-READONLY"));

    old.kill().await.unwrap();
    assert_eq!(cluster.leader().await.unwrap(), 1);
    for sentinel in [s1, s2, s3] {
        let named = async || ask(sentinel.addr(), "SENTINEL GET-MASTER-ADDR-BY-NAME registry").await.unwrap();
        let port = new.addr().port().to_string();
        after_all("a Sentinel names the new primary", async || named().await.contains(&port)).await;
    }
    assert_eq!(ask(new.addr(), "EXISTS a\r\nSET c d").await.unwrap(), ":1\n+OK");

    // It knows nothing of its successor, and takes writes until a Sentinel tells it.
    old.restart().await.unwrap();
    assert!(ask(old.addr(), "INFO replication").await.unwrap().contains("role:master"));
    assert_eq!(ask(old.addr(), "SET lost x").await.unwrap(), "+OK");
    // Whoever becomes a replica closes its clients' connections.
    let is_replica =
        async || ask(old.addr(), "INFO replication").await.is_ok_and(|info| info.contains("master_link_status:up"));
    after_all("the old primary is a replica", is_replica).await;
    assert_eq!(ask(new.addr(), "EXISTS lost c").await.unwrap(), ":1");

    // Who is whose replica outlives everything but a wipe.
    cluster.restart().await.unwrap();
    assert_eq!(cluster.leader().await.unwrap(), 1);
    assert_eq!(ask(new.addr(), "EXISTS a c").await.unwrap(), ":2");
    cluster.wipe().await.unwrap();
    assert_eq!(cluster.leader().await.unwrap(), 0);
    assert_eq!(ask(old.addr(), "DBSIZE").await.unwrap(), ":0");
}

async fn primary_that_is_cut_off_takes_writes_until_it_finds_back() {
    let cluster = Cluster::start_in(Launcher::Containers, Redis::sentinel(), Redis::sentinel().size()).await.unwrap();
    let [old, new] = [cluster.members()[0].addr(), cluster.members()[1].addr()];
    cluster.isolate(0).await.unwrap();
    after_all("the replica takes over", async || cluster.leader().await.unwrap() == 1).await;
    assert_eq!(ask(old, "SET lost x").await.unwrap(), "+OK");
    assert_eq!(ask(new, "SET kept x").await.unwrap(), "+OK");
    cluster.rejoin().await.unwrap();
    let synced = async || ask(old, "EXISTS lost kept\r\nEXISTS kept").await.is_ok_and(|found| found == ":1\n:1");
    after_all("the old primary has what the new one has", synced).await;
}

async fn node_that_is_cut_off_is_replaced() {
    let cluster = Cluster::start_in(Launcher::Containers, Redis::cluster(), Redis::cluster().size()).await.unwrap();
    let [old, new] = [cluster.members()[0].addr(), cluster.members()[3].addr()];
    cluster.isolate(0).await.unwrap();
    after_all("its replica takes over", async || ask(new, "SET b y").await.is_ok_and(|said| said == "+OK")).await;
    assert!(ask(old, "GET b").await.unwrap().starts_with("-CLUSTERDOWN"));
    cluster.rejoin().await.unwrap();
    let knows = async || ask(old, "GET b").await.unwrap().starts_with(&format!("-MOVED 3300 {new}"));
    after_all("it knows", knows).await;
}

async fn cluster_outlives_a_primary(launcher: Launcher) {
    let cluster = Cluster::start_in(launcher, Redis::cluster().durable(), Redis::cluster().size()).await.unwrap();
    let addrs: Vec<_> = cluster.members().iter().map(Server::addr).collect();
    let all: Vec<_> = addrs.iter().map(SocketAddr::to_string).collect();
    assert_eq!(cluster.url(), format!("redis+cluster://{}", all.join(",")));
    // `b` is of slot 3300 and `a` of slot 15495: the first third and the last one.
    assert_eq!(ask(addrs[0], "SET b x\r\nWAIT 1 5000").await.unwrap(), "+OK\n:1");
    assert_eq!(ask(addrs[0], "SET a x").await.unwrap(), format!("-MOVED 15495 {}", addrs[2]));

    cluster.members()[0].kill().await.unwrap();
    let takes_over = async || ask(addrs[3], "SET b y").await.is_ok_and(|answer| answer == "+OK");
    after_all("its replica takes over", takes_over).await;
    cluster.members()[0].restart().await.unwrap();
    assert!(ask(addrs[0], "SET b z").await.unwrap().starts_with(&format!("-MOVED 3300 {}", addrs[3])));

    cluster.restart().await.unwrap();
    let moved_or_there = async |addr| ask(addr, "GET b").await.unwrap();
    let answers = [moved_or_there(addrs[0]).await, moved_or_there(addrs[3]).await];
    assert!(answers.contains(&"$1\ny".to_owned()), "{answers:?}");
    for member in [1, 5] {
        // First a primary or its replica, then a replica in any case.
        cluster.wipe_member(member).await.unwrap();
        let info = ask(addrs[member], "INFO replication").await.unwrap();
        assert!(info.contains("role:slave"), "{info}");
    }
    cluster.wipe().await.unwrap();
    assert_eq!(ask(addrs[0], "EXISTS b").await.unwrap(), ":0");
    drop(cluster);
    for addr in addrs {
        assert_silent::<Redis>(addr).await;
    }
}
