//! From the list to a call that succeeds: nobody who calls notices that instances are replaced.

use std::{
    collections::BTreeSet,
    io,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};

use futures::future::{BoxFuture, join_all};
use registry_core::{Error, Instance, Result};
use service_registry::{
    Server,
    balance::{Balancer, Strategy},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::JoinSet,
};

use super::support::*;
use crate::harness::{Client, Harness};

/// Three instances are replaced in turn while they are called all the time: not one call fails, and nobody calls twice.
pub async fn a_rolling_restart_costs_no_call<H: Harness>() {
    let store = H::start().await;
    let caller = client(&store).await;
    let mut running = Vec::new();
    for id in 0..3 {
        running.push(Running::start(&store, id, "old").await);
    }
    let balancer = Balancer::new(caller.registry.watch("orders").await.unwrap(), Strategy::Random).unwrap();
    in_time("three take traffic", PATIENCE, balancer.ready(3)).await;
    let calls = Calls::begin(&balancer);

    for (id, old) in running.iter_mut().enumerate() {
        calls.reach(&format!("old-{id}")).await;
        old.stop().await;
        *old = Running::start(&store, id, "new").await;
        calls.reach(&format!("new-{id}")).await;
    }
    calls.end().await;
    for mut server in running {
        server.stop().await;
    }
}

/// A server that answers each connection with its name.
struct Running {
    /// A process of its own.
    client: Client,
    stop: Option<oneshot::Sender<()>>,
    server: tokio::task::JoinHandle<Result<()>>,
}

impl Running {
    async fn start<H: Harness>(store: &H, id: usize, generation: &str) -> Self {
        let client = client(store).await;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        // Not by its address: proxies between some stores and their clients translate that.
        let endpoint = format!("tcp://localhost:{}", listener.local_addr().unwrap().port());
        let instance = Instance::builder("orders", id.to_string()).endpoint(endpoint).build().unwrap();
        let (stop, stopped) = oneshot::channel();
        let server = Server::new(client.registry.clone(), instance).grace(soon::<H>()).until(async {
            _ = stopped.await;
        });
        let name = format!("{generation}-{id}");
        let server = tokio::spawn(server.run(move |stop| answer(listener, name, stop)));
        eventually("it is registered", PATIENCE, async || states(&client), all_registered).await;
        Self { client, stop: Some(stop), server }
    }

    async fn stop(&mut self) {
        drop(self.stop.take());
        in_time("it leaves", PATIENCE, &mut self.server).await.unwrap().unwrap();
        assert!(self.client.registry.registrations().is_empty());
        // Nothing is left to be taken out: a busy store may be late with the session.
        let _ = self.client.registry.destroy().await;
    }
}

/// Answers until it is told to stop, and then those that came before.
async fn answer(listener: TcpListener, name: String, mut stop: BoxFuture<'static, ()>) -> Result<(), Error> {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (mut socket, _) = accepted.unwrap();
                let name = name.clone();
                connections.spawn(async move { socket.write_all(name.as_bytes()).await });
            }
            () = &mut stop => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// Callers that never pause.
struct Calls {
    answered: Arc<Mutex<BTreeSet<String>>>,
    stop: watch::Sender<bool>,
    callers: Vec<tokio::task::JoinHandle<()>>,
}

impl Calls {
    fn begin(balancer: &Balancer) -> Self {
        let answered = Arc::new(Mutex::new(BTreeSet::new()));
        let stop = watch::Sender::new(false);
        let callers = (0..4)
            .map(|_| {
                let (balancer, answered, stop) = (balancer.clone(), answered.clone(), stop.subscribe());
                tokio::spawn(async move {
                    while !*stop.borrow() {
                        let pick = balancer.pick().unwrap();
                        let name = called(pick.endpoints()[0].port()).await;
                        let name = name.unwrap_or_else(|error| panic!("{} failed: {error}", pick.id()));
                        assert!(name.ends_with(pick.id().as_str()), "{} answered as {name:?}", pick.id());
                        answered.lock().unwrap().insert(name);
                        pick.success();
                    }
                })
            })
            .collect();
        Self { answered, stop, callers }
    }

    async fn reach(&self, name: &str) {
        let answered = async || self.answered.lock().unwrap().clone();
        eventually("it is called", PATIENCE, answered, |answered| answered.contains(name)).await;
    }

    /// Fails if a call failed.
    async fn end(self) {
        self.stop.send_replace(true);
        join_all(self.callers).await.into_iter().for_each(|caller| caller.unwrap());
    }
}

async fn called(port: u16) -> io::Result<String> {
    let mut name = String::new();
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?.read_to_string(&mut name).await?;
    if name.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(name) }
}
