//! Servers in containers.

use std::{
    collections::HashMap,
    fmt,
    mem::ManuallyDrop,
    net::Ipv4Addr,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use testcontainers::{
    ContainerAsync, CopyTargetOptions, GenericImage, ImageExt, TestcontainersError,
    bollard::models::{HostConfig, Mount, MountType, PortBinding},
    core::client::docker_client_instance,
    runners::AsyncRunner,
};
use tokio::{
    sync::{Mutex, OnceCell},
    time::timeout,
};

use super::{Error, Machine, Result, STOP_WITHIN, Site, Store, image, on_path, owner, watchdog::Watchdog};

const DATA: &str = "/data";
const FILES: &str = "/files";

/// An engine that takes longer to say that it is there is not used.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Containers need an engine to run in, and the `docker` command to build images and to clean up.
pub(super) async fn engine_answers() -> Result<()> {
    const HINT: &str = "for test servers in containers, install and start Docker (Debian: apt-get install docker.io)";
    if on_path("docker").is_none() {
        return Err(Error::new(format!("there is no docker command: {HINT}")));
    }
    let ping = async { docker_client_instance().await.ok()?.ping().await.ok() };
    match timeout(ANSWER_WITHIN, ping).await {
        Ok(Some(_)) => Ok(()),
        _ => Err(Error::new(format!("no Docker engine answers: {HINT}"))),
    }
}

/// Removes the containers of the suite whose test process is gone. Those of live ones, and everybody else's, stay.
///
/// The first container that a process starts does this by itself.
///
/// # Errors
/// The engine could not be asked.
pub async fn sweep() -> Result<()> {
    let format = format!("{{{{.ID}}}}\t{{{{.Label \"{}\"}}}}\t{{{{.State}}}}", owner::LABEL);
    let filter = format!("label={}", owner::LABEL);
    let listed = docker(&["ps", "--all", "--no-trunc", "--filter", &filter, "--format", &format]).await?;
    let left_over = listed.lines().filter_map(|line| {
        let mut columns = line.split('\t');
        let (id, owner, state) = (columns.next()?, columns.next()?, columns.next()?);
        owner::is_gone(owner, matches!(state, "running" | "paused" | "restarting")).then_some(id)
    });
    for id in left_over {
        // Another process may be sweeping too.
        let _ = docker(&["rm", "--force", "--volumes", id]).await;
    }
    Ok(())
}

/// How often a container is asked to freeze.
const PAUSES: usize = 5;

/// How a server's ports are reached.
#[derive(Clone, Debug)]
enum Network {
    /// The container publishes them, at the same numbers.
    Own(Vec<u16>),
    /// The same, for others that have no network of their own.
    Anchor(Vec<u16>),
    /// They are those of another container, by its id, which publishes them.
    Of(String),
}

impl Network {
    fn apply(&self, config: &mut HostConfig) {
        config.publish_all_ports = None;
        match self {
            Self::Own(ports) | Self::Anchor(ports) => config.port_bindings = Some(published(ports)),
            Self::Of(id) => {
                config.port_bindings = None;
                config.network_mode = Some(format!("container:{id}"));
            }
        }
    }

    fn ports(&self) -> &[u16] {
        match self {
            Self::Own(ports) | Self::Anchor(ports) => ports,
            Self::Of(_) => &[],
        }
    }
}

/// On the loopback address only. A number left to the engine would change when the container is started again.
fn published(ports: &[u16]) -> HashMap<String, Option<Vec<PortBinding>>> {
    let host_ip = Some(Ipv4Addr::LOCALHOST.to_string());
    let binding = |port: &u16| PortBinding { host_ip: host_ip.clone(), host_port: Some(port.to_string()) };
    ports.iter().map(|port| (format!("{port}/tcp"), Some(vec![binding(port)]))).collect()
}

/// What a container is made from. Every container that is made anew starts without data.
#[derive(Clone, Debug)]
struct Recipe {
    image: String,
    command: Vec<String>,
    files: Vec<(String, String)>,
    network: Network,
    /// The user that it runs as, by number; root if none.
    user: Option<u32>,
}

impl Recipe {
    async fn run(&self) -> Result<Owned> {
        static SWEPT: OnceCell<()> = OnceCell::const_new();
        SWEPT.get_or_try_init(sweep).await?;

        let (name, tag) = match self.image.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, tag),
            _ => (self.image.as_str(), "latest"),
        };
        // Known before the container is, so that it is found if it is made and then does not start.
        let mark = format!("{:032x}", rand::random::<u128>());
        let network = self.network.clone();
        let mut request = GenericImage::new(name, tag)
            .with_cmd(&self.command)
            .with_labels([(owner::LABEL, owner::label()), (MARK, mark.clone())])
            .with_host_config_modifier(move |config| {
                network.apply(config);
                config.mounts = Some(vec![anonymous_volume()]);
            });
        if let Some(user) = self.user {
            request = request.with_user(user.to_string());
        }
        if matches!(self.network, Network::Anchor(_)) {
            request = request.with_cap_add("NET_ADMIN");
        }
        for port in self.network.ports() {
            request = request.with_mapped_port(*port, testcontainers::core::ContainerPort::Tcp(*port));
        }
        for (name, text) in &self.files {
            let path = Path::new(FILES).join(name);
            // Whoever it runs as may change them.
            let target = CopyTargetOptions::new(path.display().to_string()).with_mode(0o666);
            request = request.with_copy_to(target, text.clone().into_bytes());
        }
        match request.start().await {
            Ok(container) => Owned::new(container),
            Err(error) => {
                remove_marked(&mark).await;
                Err(Error::new(format!("cannot start a container of {}: {error}", self.image)))
            }
        }
    }
}

/// A different value for each container.
const MARK: &str = "registry-tests.mark";

async fn remove_marked(mark: &str) {
    let filter = format!("label={MARK}={mark}");
    if let Ok(ids) = docker(&["ps", "--all", "--quiet", "--no-trunc", "--filter", &filter]).await {
        for id in ids.lines() {
            let _ = docker(&["rm", "--force", "--volumes", id]).await;
        }
    }
}

/// Faster than the container's own layers. Unlike a tmpfs, it is still there when the container is started again.
fn anonymous_volume() -> Mount {
    Mount { target: Some(DATA.to_owned()), typ: Some(MountType::VOLUME), ..Mount::default() }
}

/// A container that is removed when this is dropped.
struct Owned {
    /// Its own destructor must not run: it panics outside a runtime.
    container: ManuallyDrop<ContainerAsync<GenericImage>>,
    /// Dropped last, once there is nothing left to watch.
    _watchdog: Watchdog,
}

impl Owned {
    fn new(container: ContainerAsync<GenericImage>) -> Result<Self> {
        let watchdog = Watchdog::new(&format!("docker rm --force --volumes {}", container.id()))?;
        Ok(Self { container: ManuallyDrop::new(container), _watchdog: watchdog })
    }

    fn id(&self) -> &str {
        self.container.id()
    }
}

impl fmt::Debug for Owned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Owned").field(&self.id()).finish()
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let mut command = Command::new("docker");
        command.args(["rm", "--force", "--volumes", self.id()]).stdin(Stdio::null());
        match command.output() {
            Ok(output) if output.status.success() => {}
            other => tracing::warn!(container = self.id(), ?other, "a test container could not be removed"),
        }
    }
}

/// One server in a container. Its data is in an anonymous volume, which lives as long as the container.
#[derive(Debug)]
pub(super) struct Container {
    recipe: Recipe,
    /// The container, and arguments to add to its command when it is made anew.
    made: Mutex<(Option<Owned>, Vec<String>)>,
}

impl Container {
    /// A server that publishes its own ports, or uses those of a pod.
    pub(super) async fn new(
        store: &dyn Store,
        members: Arc<[Vec<u16>]>,
        index: usize,
        pod: Option<&Pod>,
    ) -> Result<(Self, Site)> {
        let listen = Ipv4Addr::UNSPECIFIED;
        let site = Site { listen, data: DATA.to_owned(), files: FILES.to_owned(), members, index };
        let network = match pod {
            Some(pod) => Network::Of(pod.anchor.id().to_owned()),
            None => Network::Own(site.ports().to_vec()),
        };
        let image = image::chosen(store).await?;
        let user = pod.filter(|pod| pod.has_users).map(|_| user_of(index));
        let recipe = Recipe { image, command: store.command(&site), files: store.files(&site), network, user };
        Ok((Self { recipe, made: Mutex::default() }, site))
    }

    /// Does something to the container, which has been made.
    async fn with<T>(
        &self,
        doing: &str,
        action: impl AsyncFnOnce(&ContainerAsync<GenericImage>) -> std::result::Result<T, TestcontainersError>,
    ) -> Result<T> {
        let made = self.made.lock().await;
        let owned =
            made.0.as_ref().ok_or_else(|| Error::new(format!("cannot {doing} a container that was never started")))?;
        action(&owned.container).await.map_err(Error::during(format_args!("cannot {doing} container {}", owned.id())))
    }
}

#[async_trait]
impl Machine for Container {
    async fn up(&self) -> Result<()> {
        let mut made = self.made.lock().await;
        match &*made {
            (Some(owned), _) => {
                owned.container.start().await.map_err(Error::during("cannot start a container again"))?
            }
            (None, more) => {
                let command = [&self.recipe.command[..], more].concat();
                made.0 = Some(Recipe { command, ..self.recipe.clone() }.run().await?);
            }
        }
        Ok(())
    }

    async fn stop(&self) -> Result<()> {
        let seconds = STOP_WITHIN.as_secs() as i32;
        self.with("stop", async |container| container.stop_with_timeout(Some(seconds)).await).await
    }

    async fn kill(&self) -> Result<()> {
        let id = self.with("kill", async |container| Ok(container.id().to_owned())).await?;
        if self.ended().await {
            return Ok(());
        }
        docker(&["kill", &id]).await?;
        docker(&["wait", &id]).await.map(drop)
    }

    /// On a busy machine the kernel may not get hold of every thread in the time that the engine gives it, and nothing is
    /// frozen then: "unable to freeze".
    async fn freeze(&self) -> Result<()> {
        let mut attempts = 1;
        loop {
            match self.with("pause", async |container| container.pause().await).await {
                Err(error) if attempts < PAUSES && error.0.contains("unable to freeze") => attempts += 1,
                outcome => return outcome,
            }
        }
    }

    async fn thaw(&self) -> Result<()> {
        self.with("unpause", async |container| container.unpause().await).await
    }

    async fn erase(&self, more: Vec<String>) -> Result<()> {
        // The next one is another container, with another volume.
        *self.made.lock().await = (None, more);
        Ok(())
    }

    async fn ended(&self) -> bool {
        !self.with("inspect", async |container| container.is_running().await).await.unwrap_or(false)
    }

    async fn pid(&self) -> Result<u32> {
        let id = self.with("inspect", async |container| Ok(container.id().to_owned())).await?;
        let pid = docker(&["inspect", "--format", "{{.State.Pid}}", &id]).await?;
        pid.trim().parse().map_err(Error::during("the number of a container's process"))
    }

    async fn log(&self) -> String {
        let Ok(id) = self.with("inspect", async |container| Ok(container.id().to_owned())).await else {
            return String::new();
        };
        let logs = tokio::process::Command::new("docker").args(["logs", "--tail", "20", &id]).output().await;
        logs.map(|logs| String::from_utf8_lossy(&[logs.stdout, logs.stderr].concat()).into_owned()).unwrap_or_default()
    }
}

/// A network that the members of a cluster share, so that an address is the same for them and for clients outside.
///
/// It is that of a container which does nothing but publish the members' ports.
#[derive(Debug)]
pub(super) struct Pod {
    anchor: Owned,
    /// Whether each member runs as a user of its own: an image that is not ours may not be arranged for that.
    has_users: bool,
}

/// Whom a member runs as.
fn user_of(index: usize) -> u32 {
    20_000 + index as u32
}

impl Pod {
    pub(super) async fn start(store: &dyn Store, ports: Vec<u16>) -> Result<Self> {
        // An image of the user's may have nothing in it but the server.
        let image = image::built(store).await?;
        let command = vec!["sleep".to_owned(), "infinity".to_owned()];
        let recipe = Recipe { image, command, files: Vec::new(), network: Network::Anchor(ports), user: None };
        Ok(Self { anchor: recipe.run().await?, has_users: image::is_ours(store) })
    }

    /// Lets nothing through between a member and the others, until [`rejoin`](Self::rejoin). They speak over the
    /// loopback device, clients do not.
    pub(super) async fn isolate(&self, index: usize) -> Result<()> {
        if !self.has_users {
            return Err(Error::new("a member can be cut off from the others only in the image that is built here"));
        }
        // What it sends is dropped, and with it the whole connection is marked: what comes back is dropped by that.
        let user = user_of(index);
        let mine = format!("OUTPUT -o lo -m owner --uid-owner {user}");
        self.rule(&format!("-t mangle -A {mine} -j CONNMARK --set-mark {user}")).await?;
        self.rule(&format!("-A {mine} -j DROP")).await?;
        self.rule(&format!("-A INPUT -i lo -m connmark --mark {user} -j DROP")).await
    }

    /// Ends all isolation.
    pub(super) async fn rejoin(&self) -> Result<()> {
        for rules in ["-F", "-t mangle -F"] {
            self.rule(rules).await?;
        }
        Ok(())
    }

    async fn rule(&self, rule: &str) -> Result<()> {
        let mut command = vec!["exec", self.anchor.id(), "iptables"];
        command.extend(rule.split(' '));
        docker(&command).await.map(drop)
    }
}

/// Runs the `docker` command and returns what it prints.
async fn docker(args: &[&str]) -> Result<String> {
    let command = format!("docker {}", args.join(" "));
    let output = tokio::process::Command::new("docker").args(args).stdin(Stdio::null()).output().await;
    let output = output.map_err(Error::during(&command))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(Error::new(format!("{command}: {}", String::from_utf8_lossy(&output.stderr).trim())))
    }
}
