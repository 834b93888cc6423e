//! A TCP proxy that misbehaves on demand: a client connects to it instead of to the server under test.
//!
//! Its own address never changes, whatever happens to the server behind it. Faults are modes; a mode holds for all
//! connections until the next one is set, and what a fault has held back flows on once it is over.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, sleep_until},
};

/// How much one connection reads at once, and how many such pieces each direction may hold back.
const PIECE: usize = 16 * 1024;
const PIECES: usize = 64;

/// What the proxy does to the bytes and the connections that reach it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Everything passes.
    #[default]
    Pass,
    /// Everything passes, this much later in each direction. Bandwidth is not limited.
    Delay(Duration),
    /// Live connections are reset when this mode is set, new ones as soon as they are accepted.
    Cut,
    /// Connections are accepted and stay open, and nothing goes through them: no byte, no end, no reset.
    BlackHole,
    /// New connections are reset as soon as they are accepted; live ones go on.
    Refuse,
}

/// What has gone through a [`FaultProxy`] since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Connections that were let in.
    pub accepted: u64,
    /// Connections that were reset on arrival, by [`Mode::Cut`] or [`Mode::Refuse`].
    pub refused: u64,
    /// Connections that are open now.
    pub live: u64,
    /// Bytes sent on to the server.
    pub to_server: u64,
    /// In how many pieces: about as many as requests, since a client sends each at once.
    pub requests: u64,
    /// Bytes sent on to clients.
    pub to_client: u64,
}

/// A proxy on an address of its own. Dropping it closes the port and every connection.
#[derive(Debug)]
pub struct FaultProxy {
    addr: SocketAddr,
    control: watch::Sender<Control>,
    stats: Arc<watch::Sender<Stats>>,
    acceptor: AbortHandle,
}

impl FaultProxy {
    /// Listens on a free port and passes everything to `upstream`, which need not be up.
    ///
    /// # Errors
    /// The port could not be opened.
    pub async fn start(upstream: SocketAddr) -> io::Result<Self> {
        Self::over(TcpListener::bind(("127.0.0.1", 0)).await?, upstream, None)
    }

    /// Listens on another address of this machine, at the port of `upstream`, and is that server for its clients: where
    /// the server's own address is in what it says, they read this one.
    ///
    /// For servers that tell their clients where to go on: Redis Cluster, Sentinel. The two addresses are spelled with
    /// the same number of characters. Linux has all of `127.0.0.0/8`; elsewhere an alias must be set up.
    ///
    /// # Errors
    /// The address is taken, or is not of this machine, or its length is another.
    pub async fn in_place_of(upstream: SocketAddr, host: Ipv4Addr) -> io::Result<Self> {
        let (from, to) = (upstream.ip().to_string().into_bytes(), host.to_string().into_bytes());
        if from.len() != to.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let translation = Translation { from, to, held: Vec::new() };
        Self::over(TcpListener::bind((host, upstream.port())).await?, upstream, Some(translation))
    }

    fn over(listener: TcpListener, upstream: SocketAddr, translation: Option<Translation>) -> io::Result<Self> {
        let addr = listener.local_addr()?;
        let (control, orders) =
            watch::channel(Control { upstream, mode: Mode::Pass, kills: 0, stranded: None, stranded_before: 0 });
        let stats = Arc::new(watch::Sender::new(Stats::default()));
        let acceptor = tokio::spawn(accept(listener, translation, orders, stats.clone())).abort_handle();
        Ok(Self { addr, control, stats, acceptor })
    }

    /// The address for clients.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The server that connections accepted from now on go to.
    pub fn upstream(&self) -> SocketAddr {
        self.control.borrow().upstream
    }

    /// Sends connections accepted from now on to another server. Live ones stay where they are.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        self.control.send_modify(|control| control.upstream = upstream);
    }

    /// Changes the fault, for live connections and new ones. [`Mode::Pass`] heals.
    pub fn set_mode(&self, mode: Mode) {
        self.control.send_modify(|control| {
            control.mode = mode;
            control.kills += u64::from(mode == Mode::Cut);
        });
    }

    /// The fault in force.
    pub fn mode(&self) -> Mode {
        self.control.borrow().mode
    }

    /// Resets the connections that are live now, in any mode. Clients may connect again at once.
    pub fn kill_connections(&self) {
        self.control.send_modify(|control| control.kills += 1);
    }

    /// Makes one connection a half-open one, and leaves the others alone: whatever the mode, nothing goes through it any
    /// more, not even its end. Connections are counted as they are let in, from 0.
    pub fn strand(&self, connection: u64) {
        self.control.send_modify(|control| control.stranded = Some(connection));
    }

    /// The same for all connections that were let in so far. New ones go on.
    pub fn strand_all(&self) {
        let accepted = self.stats().accepted;
        self.control.send_modify(|control| control.stranded_before = accepted);
    }

    /// The counters at this moment.
    pub fn stats(&self) -> Stats {
        *self.stats.borrow()
    }

    /// Waits until the counters fulfil `condition`, and returns them.
    ///
    /// # Cancel safety
    /// Cancel safe: it changes nothing.
    pub async fn until(&self, condition: impl FnMut(&Stats) -> bool) -> Stats {
        let mut stats = self.stats.subscribe();
        *stats.wait_for(condition).await.expect("self holds the sender")
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        // The acceptor owns the connections' tasks, which end with it.
        self.acceptor.abort();
    }
}

#[derive(Clone, Copy, Debug)]
struct Control {
    upstream: SocketAddr,
    mode: Mode,
    /// Connections accepted under another number than this one are to be reset.
    kills: u64,
    /// The connection that was stranded last.
    stranded: Option<u64>,
    /// The first connection that is not stranded with all before it.
    stranded_before: u64,
}

type Orders = watch::Receiver<Control>;

/// Counts a connection as live for as long as it exists.
struct Live {
    stats: Arc<watch::Sender<Stats>>,
    /// How many were let in before it.
    index: u64,
}

impl Live {
    fn new(stats: &Arc<watch::Sender<Stats>>) -> Self {
        let index = stats.borrow().accepted;
        stats.send_modify(|stats| {
            stats.accepted += 1;
            stats.live += 1;
        });
        Self { stats: stats.clone(), index }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.stats.send_modify(|stats| stats.live -= 1);
    }
}

async fn accept(
    listener: TcpListener,
    translation: Option<Translation>,
    orders: Orders,
    stats: Arc<watch::Sender<Stats>>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    let Control { mode, kills, .. } = *orders.borrow();
                    if matches!(mode, Mode::Cut | Mode::Refuse) {
                        stats.send_modify(|stats| stats.refused += 1);
                        reset(&client);
                    } else {
                        connections.spawn(serve(client, translation.clone(), kills, orders.clone(), Live::new(&stats)));
                    }
                }
                // Out of file descriptors, most likely: do not spin until some are free.
                Err(_) => sleep(Duration::from_millis(10)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection's whole life. It ends in a reset if the client's, the server's or the proxy's end was one.
async fn serve(mut client: TcpStream, translation: Option<Translation>, kills: u64, orders: Orders, live: Live) {
    let (mut killed, mut stranded) = (orders.clone(), orders.clone());
    let mut server = None;
    let stranded = async {
        let is_stranded =
            |control: &Control| control.stranded == Some(live.index) || live.index < control.stranded_before;
        let _ = stranded.wait_for(is_stranded).await;
    };
    let end = tokio::select! {
        biased;
        _ = killed.wait_for(|control| control.kills != kills) => Err(io::ErrorKind::ConnectionReset.into()),
        end = unless(stranded, relay(&mut client, &mut server, translation, orders, &live)) => end,
    };
    if end.is_err() {
        reset(&client);
        server.iter().for_each(reset);
    }
    // Counted as live until its sockets are closed.
    drop((client, server));
    drop(live);
}

/// What `work` gives, and nothing ever if `stop` comes first.
async fn unless<T>(stop: impl Future<Output = ()>, work: impl Future<Output = T>) -> T {
    tokio::select! {
        done = work => done,
        () = stop => std::future::pending().await,
    }
}

/// Makes the closing of a socket a reset.
fn reset(socket: &TcpStream) {
    // It fails only on a socket that the peer has already reset.
    let _ = socket.set_zero_linger();
}

async fn relay(
    client: &mut TcpStream,
    server: &mut Option<TcpStream>,
    translation: Option<Translation>,
    mut orders: Orders,
    live: &Live,
) -> io::Result<()> {
    while orders.borrow_and_update().mode == Mode::BlackHole {
        changed(&mut orders).await;
    }
    let upstream = orders.borrow().upstream;
    let server = server.insert(TcpStream::connect(upstream).await?);
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;

    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let count_up = |bytes| {
        live.stats.send_modify(|stats| {
            stats.to_server += bytes;
            stats.requests += 1;
        });
    };
    let count_down = |bytes| live.stats.send_modify(|stats| stats.to_client += bytes);
    let up = pump(from_client, None, to_server, orders.clone(), count_up);
    let down = pump(from_server, translation, to_client, orders, count_down);
    tokio::try_join!(up, down).map(drop)
}

/// Carries one direction to its end. Arrival and departure are apart, so that a delay holds back no later bytes.
async fn pump(
    from: ReadHalf<'_>,
    translation: Option<Translation>,
    to: WriteHalf<'_>,
    orders: Orders,
    count: impl Fn(u64),
) -> io::Result<()> {
    let (sender, receiver) = mpsc::channel(PIECES);
    tokio::try_join!(collect(from, translation, sender), deliver(receiver, to, orders, count)).map(drop)
}

/// What arrived, and when: bytes, the end (no bytes), or a reset.
type Arrival = (Instant, io::Result<Vec<u8>>);

async fn collect(
    mut from: ReadHalf<'_>,
    mut translation: Option<Translation>,
    sender: mpsc::Sender<Arrival>,
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = from.read(&mut buffer).await;
        let ended = !matches!(read, Ok(1..));
        let mut read = read.map(|bytes| buffer[..bytes].to_vec());
        if let (Some(translation), Ok(piece)) = (&mut translation, &mut read) {
            translation.apply(piece);
            if piece.is_empty() && !ended {
                continue;
            }
        }
        if sender.send((Instant::now(), read)).await.is_err() || ended {
            return Ok(());
        }
    }
}

/// Replaces one text by another that is as long, in what arrives in pieces.
#[derive(Clone, Debug)]
struct Translation {
    from: Vec<u8>,
    to: Vec<u8>,
    /// The end of what has arrived, where it may be the beginning of `from`. A protocol whose messages end with the end
    /// of a line always goes on after it; what a connection ends with in the middle of a message is lost.
    held: Vec<u8>,
}

impl Translation {
    fn apply(&mut self, piece: &mut Vec<u8>) {
        let (length, arrived) = (self.from.len(), piece.split_off(0));
        piece.append(&mut self.held);
        piece.extend(arrived);
        let mut done = 0;
        while let Some(at) = piece[done..].windows(length).position(|text| text == self.from) {
            done += at + length;
            piece[done - length..done].copy_from_slice(&self.to);
        }
        let untouched = piece.len() - done;
        let begun =
            (1..length.min(untouched + 1)).rev().find(|begun| self.from.starts_with(&piece[piece.len() - begun..]));
        self.held = piece.split_off(piece.len() - begun.unwrap_or(0));
    }
}

async fn deliver(
    mut arrivals: mpsc::Receiver<Arrival>,
    mut to: WriteHalf<'_>,
    mut orders: Orders,
    count: impl Fn(u64),
) -> io::Result<()> {
    while let Some((arrived, piece)) = arrivals.recv().await {
        allowed(&mut orders, arrived).await;
        let piece = piece?;
        if piece.is_empty() {
            return to.shutdown().await;
        }
        // Counted first: who has read the answer finds it counted.
        count(piece.len() as u64);
        to.write_all(&piece).await?;
    }
    Ok(())
}

/// Waits until the mode lets pass what arrived at this time.
async fn allowed(orders: &mut Orders, arrived: Instant) {
    loop {
        let mode = orders.borrow_and_update().mode;
        match mode {
            Mode::BlackHole => changed(orders).await,
            Mode::Delay(by) => tokio::select! {
                () = sleep_until(arrived + by) => return,
                () = changed(orders) => {}
            },
            Mode::Pass | Mode::Cut | Mode::Refuse => return,
        }
    }
}

async fn changed(orders: &mut Orders) {
    if orders.changed().await.is_err() {
        // The proxy is gone, and this task with it in a moment.
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(5);
    const NOT_YET: Duration = Duration::from_millis(100);

    /// A server that answers every byte with itself; `shift` is added, to tell servers apart.
    async fn echo(shift: u8) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    while let Ok(byte) = socket.read_u8().await {
                        if socket.write_u8(byte + shift).await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        addr
    }

    async fn proxy() -> FaultProxy {
        FaultProxy::start(echo(0).await).await.unwrap()
    }

    async fn client(proxy: &FaultProxy) -> TcpStream {
        TcpStream::connect(proxy.addr()).await.unwrap()
    }

    async fn answer(socket: &mut TcpStream) -> io::Result<u8> {
        timeout(SOON, socket.read_u8()).await.expect("an answer or an error, not silence")
    }

    async fn ask(socket: &mut TcpStream, byte: u8) -> io::Result<u8> {
        socket.write_u8(byte).await?;
        answer(socket).await
    }

    #[track_caller]
    fn assert_reset(result: io::Result<u8>) {
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn passes_and_counts() {
        let proxy = proxy().await;
        let mut first = client(&proxy).await;
        assert_eq!(ask(&mut first, 1).await.unwrap(), 1);
        assert_eq!(ask(&mut first, 2).await.unwrap(), 2);
        let mut second = client(&proxy).await;
        assert_eq!(ask(&mut second, 3).await.unwrap(), 3);
        assert_eq!(proxy.stats(), Stats { accepted: 2, live: 2, to_server: 3, requests: 3, to_client: 3, refused: 0 });
        drop(first);
        proxy.until(|stats| stats.live == 1).await;
    }

    #[tokio::test]
    async fn many_bytes_arrive_whole_and_in_order() {
        let proxy = proxy().await;
        let sent: Vec<u8> = (0..4_000_000_u32).map(|i| (i % 251) as u8).collect();
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        proxy.set_upstream(upstream.local_addr().unwrap());
        let mut socket = client(&proxy).await;
        let (mut server, _) = upstream.accept().await.unwrap();
        let mut received = Vec::new();
        let write = async {
            socket.write_all(&sent).await.unwrap();
            socket.shutdown().await.unwrap();
        };
        let (_, read) = tokio::join!(write, server.read_to_end(&mut received));
        read.unwrap();
        assert!(received == sent);
        assert_eq!(proxy.stats().to_server, sent.len() as u64);
    }

    #[tokio::test]
    async fn one_side_may_end_before_the_other() {
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = FaultProxy::start(upstream.local_addr().unwrap()).await.unwrap();
        let mut socket = client(&proxy).await;
        let (mut server, _) = upstream.accept().await.unwrap();
        socket.shutdown().await.unwrap();
        assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        server.write_u8(7).await.unwrap();
        assert_eq!(answer(&mut socket).await.unwrap(), 7);
        drop(server);
        assert_eq!(answer(&mut socket).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        proxy.until(|stats| stats.live == 0).await;
    }

    #[tokio::test]
    async fn delays_each_way_without_slowing_what_follows() {
        let proxy = proxy().await;
        let mut socket = client(&proxy).await;
        ask(&mut socket, 0).await.unwrap();
        proxy.set_mode(Mode::Delay(Duration::from_millis(50)));
        let start = Instant::now();
        for byte in 0..10 {
            // Apart enough to be pieces of their own.
            socket.write_u8(byte).await.unwrap();
            sleep(Duration::from_millis(2)).await;
        }
        for byte in 0..10 {
            assert_eq!(answer(&mut socket).await.unwrap(), byte);
        }
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(100), "{took:?}");
        assert!(took < Duration::from_millis(900), "one after the other it would be 1 s: {took:?}");
    }

    #[tokio::test]
    async fn cut_resets_what_lives_and_what_comes_until_healed() {
        let proxy = proxy().await;
        let mut socket = client(&proxy).await;
        ask(&mut socket, 1).await.unwrap();
        proxy.set_mode(Mode::Cut);
        assert_reset(answer(&mut socket).await);
        assert_reset(answer(&mut client(&proxy).await).await);
        assert_eq!(proxy.until(|stats| stats.live == 0).await.refused, 1);
        proxy.set_mode(Mode::Pass);
        assert_eq!(ask(&mut client(&proxy).await, 2).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn refuse_spares_what_lives() {
        let proxy = proxy().await;
        let mut socket = client(&proxy).await;
        ask(&mut socket, 1).await.unwrap();
        proxy.set_mode(Mode::Refuse);
        assert_reset(answer(&mut client(&proxy).await).await);
        assert_eq!(ask(&mut socket, 2).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn black_hole_holds_everything_back_until_healed() {
        let proxy = proxy().await;
        let mut before = client(&proxy).await;
        ask(&mut before, 1).await.unwrap();
        proxy.set_mode(Mode::BlackHole);
        let mut during = client(&proxy).await;
        proxy.until(|stats| stats.live == 2).await;
        before.write_u8(2).await.unwrap();
        during.write_u8(3).await.unwrap();
        assert!(timeout(NOT_YET, before.read_u8()).await.is_err());
        assert!(timeout(NOT_YET, during.read_u8()).await.is_err());
        assert_eq!(proxy.stats().to_server, 1);
        proxy.set_mode(Mode::Pass);
        assert_eq!(answer(&mut before).await.unwrap(), 2);
        assert_eq!(answer(&mut during).await.unwrap(), 3);
    }

    #[tokio::test]
    async fn black_hole_hides_that_a_side_is_gone() {
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = FaultProxy::start(upstream.local_addr().unwrap()).await.unwrap();
        let mut socket = client(&proxy).await;
        let (server, _) = upstream.accept().await.unwrap();
        proxy.set_mode(Mode::BlackHole);
        drop(server);
        assert!(timeout(NOT_YET, socket.read_u8()).await.is_err());
        proxy.set_mode(Mode::Pass);
        assert_eq!(answer(&mut socket).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn killed_connections_may_come_back_at_once() {
        let proxy = proxy().await;
        let mut socket = client(&proxy).await;
        ask(&mut socket, 1).await.unwrap();
        proxy.kill_connections();
        assert_reset(answer(&mut socket).await);
        assert_eq!(ask(&mut client(&proxy).await, 2).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn kill_reaches_into_a_black_hole() {
        let proxy = proxy().await;
        proxy.set_mode(Mode::BlackHole);
        let mut socket = client(&proxy).await;
        proxy.until(|stats| stats.live == 1).await;
        proxy.kill_connections();
        assert_reset(answer(&mut socket).await);
    }

    #[tokio::test]
    async fn a_stranded_connection_is_silent_until_it_is_killed_and_others_are_not() {
        let proxy = proxy().await;
        let (mut first, mut second) = (client(&proxy).await, client(&proxy).await);
        ask(&mut first, 1).await.unwrap();
        ask(&mut second, 1).await.unwrap();
        proxy.strand(1);
        proxy.set_mode(Mode::Delay(Duration::ZERO));
        second.write_u8(2).await.unwrap();
        assert!(timeout(NOT_YET, second.read_u8()).await.is_err());
        assert_eq!(ask(&mut first, 2).await.unwrap(), 2);
        assert_eq!(ask(&mut client(&proxy).await, 3).await.unwrap(), 3);
        proxy.strand_all();
        first.write_u8(4).await.unwrap();
        assert!(timeout(NOT_YET, first.read_u8()).await.is_err());
        assert_eq!(ask(&mut client(&proxy).await, 5).await.unwrap(), 5);
        proxy.kill_connections();
        assert_reset(answer(&mut second).await);
    }

    #[tokio::test]
    async fn the_server_behind_may_change_and_may_be_down() {
        let proxy = proxy().await;
        let mut old = client(&proxy).await;
        ask(&mut old, 1).await.unwrap();
        proxy.set_upstream(echo(100).await);
        assert_eq!(ask(&mut client(&proxy).await, 1).await.unwrap(), 101);
        assert_eq!(ask(&mut old, 1).await.unwrap(), 1);
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        proxy.set_upstream(closed);
        assert_reset(answer(&mut client(&proxy).await).await);
    }

    #[tokio::test]
    async fn in_place_of_a_server_its_clients_read_another_address() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = server.local_addr().unwrap();
        let proxy = FaultProxy::in_place_of(addr, Ipv4Addr::new(127, 5, 6, 7)).await.unwrap();
        assert_eq!(proxy.addr(), (Ipv4Addr::new(127, 5, 6, 7), addr.port()).into());
        let mut socket = client(&proxy).await;
        let (mut server, _) = server.accept().await.unwrap();
        socket.write_all(b"from 127.0.0.1").await.unwrap();
        server.read_exact(&mut [0; 14]).await.unwrap();
        server.write_all(b"go to 127.0.0.1:1, then to 127.0").await.unwrap();
        // Apart enough to be pieces of their own.
        sleep(Duration::from_millis(20)).await;
        server.write_all(b".0.1:2\r\n").await.unwrap();
        let mut said = [0; 40];
        timeout(SOON, socket.read_exact(&mut said)).await.unwrap().unwrap();
        assert_eq!(said, *b"go to 127.5.6.7:1, then to 127.5.6.7:2\r\n");

        let taken = FaultProxy::in_place_of(addr, Ipv4Addr::new(127, 5, 6, 7)).await.unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        let longer = FaultProxy::in_place_of(addr, Ipv4Addr::new(127, 0, 0, 10)).await.unwrap_err();
        assert_eq!(longer.kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn translation_does_not_depend_on_where_pieces_end() {
        let (from, to) = (b"127.0.0.1".to_vec(), b"127.1.2.3".to_vec());
        let text = b"127.0.0.1 1127.0.0.127.0.0.1\r\n12712127.0.0.1:5 127.0.0.2 127.0\n";
        let expected = b"127.1.2.3 1127.1.2.327.0.0.1\r\n12712127.1.2.3:5 127.0.0.2 127.0\n";
        for size in 1..text.len() {
            let mut translation = Translation { from: from.clone(), to: to.clone(), held: Vec::new() };
            let mut translated = Vec::new();
            for piece in text.chunks(size) {
                let mut piece = piece.to_vec();
                translation.apply(&mut piece);
                translated.extend(piece);
            }
            assert!(translated == expected, "{size}: {}", String::from_utf8_lossy(&translated));
        }
    }

    #[tokio::test]
    async fn dropped_proxy_ends_port_and_connections() {
        let proxy = proxy().await;
        let addr = proxy.addr();
        let mut socket = client(&proxy).await;
        ask(&mut socket, 1).await.unwrap();
        drop(proxy);
        answer(&mut socket).await.unwrap_err();
        // The connection may end a moment before the port.
        timeout(SOON, async { while TcpStream::connect(addr).await.is_ok() {} }).await.unwrap();
    }
}
