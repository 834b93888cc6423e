use registry_tests::servers::{ZooKeeper, shared_zookeeper};
use zookeeper_client::{Acls, Client, Connector, CreateMode, CreateOptions, Error, SaslOptions};

use super::*;

in_both![
    ZooKeeper;
    cluster_elects_and_outlives_its_leader,
    server_takes_config_lines_and_properties,
    superuser_is_above_access_control,
    sasl_users_need_their_password;
    containers only: member_that_is_cut_off_loses_its_lead_and_finds_back,
];

const PERSISTENT: CreateOptions<'static> = CreateMode::Persistent.with_acls(Acls::anyone_all());

#[async_trait]
impl Kind for ZooKeeper {
    const SCHEMES: [&'static str; 2] = ["zk", "zks"];
    const QUESTION: &'static str = "srvr";
    const ANSWER: &'static str = "Mode: ";

    fn plain() -> Self {
        Self::new()
    }

    fn secure(server: &Identity) -> Self {
        Self::new().tls(server)
    }

    fn only_for_clients_of(self, ca: &str) -> Self {
        self.client_ca(ca)
    }

    fn broken() -> (Self, &'static str) {
        (Self::new().config("minSessionTimeout=70000"), "minSessionTimeout must not be larger than maxSessionTimeout")
    }

    async fn shared() -> servers::Result<Server> {
        shared_zookeeper().await
    }

    async fn put(addr: SocketAddr) -> io::Result<()> {
        let put = async |client: Client| client.create("/a", b"b", &PERSISTENT).await.map(drop);
        match with_client(addr, put).await? {
            Ok(()) | Err(Error::NodeExists) => Ok(()),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    async fn has_data(addr: SocketAddr) -> io::Result<bool> {
        let read = async |client: Client| {
            client.sync("/a").await?;
            client.check_stat("/a").await
        };
        with_client(addr, read).await?.map(|stat| stat.is_some()).map_err(io::Error::other)
    }
}

async fn with_client<T>(
    addr: SocketAddr,
    call: impl AsyncFnOnce(Client) -> Result<T, Error>,
) -> io::Result<Result<T, Error>> {
    let exchange = async { call(client(addr, Client::connector()).await?).await };
    // A Java machine that has just started is slow.
    Ok(timeout(Duration::from_secs(5), exchange).await?)
}

/// Waits for a server that is there and silent, and not for one that is not there.
async fn client(addr: SocketAddr, connector: Connector) -> Result<Client, Error> {
    let connector = connector.with_session_timeout(Duration::from_secs(30)).with_fail_eagerly();
    connector.with_connection_timeout(Duration::from_secs(20)).connect(&addr.to_string()).await
}

async fn member_that_is_cut_off_loses_its_lead_and_finds_back() {
    super::member_that_is_cut_off_loses_its_lead_and_finds_back::<ZooKeeper>().await;
}

async fn cluster_elects_and_outlives_its_leader(launcher: Launcher) {
    super::cluster_elects_and_outlives_its_leader::<ZooKeeper>(launcher).await;
}

async fn server_takes_config_lines_and_properties(launcher: Launcher) {
    let zookeeper = ZooKeeper::new().config("maxSessionTimeout=3000").property("jute.maxbuffer", "1000");
    let server = Server::start_in(launcher, zookeeper).await.unwrap();
    let client = client(server.addr(), Client::connector()).await.unwrap();
    assert_eq!(client.session_timeout(), Duration::from_secs(3));
    client.create("/small", &[0; 500], &PERSISTENT).await.unwrap();
    let refused = client.create("/big", &[0; 1500], &PERSISTENT).await.unwrap_err();
    assert_eq!(refused, Error::ConnectionLoss);
}

async fn superuser_is_above_access_control(launcher: Launcher) {
    let server = Server::start_in(launcher, ZooKeeper::new().superuser()).await.unwrap();
    let owner = client(server.addr(), Client::connector().with_auth("digest", b"app:secret")).await.unwrap();
    owner.create("/own", b"", &CreateMode::Persistent.with_acls(Acls::creator_all())).await.unwrap();
    let other = client(server.addr(), Client::connector().with_auth("digest", b"super:wrong")).await.unwrap();
    assert_eq!(other.get_data("/own").await.unwrap_err(), Error::NoAuth);
    let superuser = client(server.addr(), Client::connector().with_auth("digest", b"super:super")).await.unwrap();
    superuser.get_data("/own").await.unwrap();
}

async fn sasl_users_need_their_password(launcher: Launcher) {
    let zookeeper = ZooKeeper::new().sasl_user("app", "secret").sasl_user("other", "another");
    let server = Server::start_in(launcher, zookeeper).await.unwrap();
    let sasl = |user: &'static str, password: &'static str| {
        client(server.addr(), Client::connector().with_sasl(SaslOptions::digest_md5(user, password)))
    };
    let app = sasl("app", "secret").await.unwrap();
    app.create("/own", b"", &CreateMode::Persistent.with_acls(Acls::creator_all())).await.unwrap();
    let other = sasl("other", "another").await.unwrap();
    assert_eq!(other.get_data("/own").await.unwrap_err(), Error::NoAuth);
    assert_eq!(sasl("app", "wrong").await.unwrap_err(), Error::AuthFailed);
}
