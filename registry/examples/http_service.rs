//! An HTTP service and its caller in one process: three servers are replaced in turn while they are called, and not one
//! call fails.
//!
//! ```text
//! cargo run --features axum,tower --example http_service
//! ```

use std::{sync::Arc, time::Duration};

use axum::{Router, routing::get};
use http::Request;
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use service_registry::{
    Instance, Registry, Result, Server,
    balance::{Balancer, Outlier, Retry, Strategy},
    connect,
    tower::{Admission, Balance, RefuseLayer, judge_idempotent, to_instance},
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tower::{Service, ServiceExt};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let registry = connect("memory://http-service").await?;
    let mut servers = Vec::new();
    for id in ["a", "b", "c"] {
        servers.push((id, start(registry.clone(), id).await?));
    }

    // The caller: fifteen lines with everything on.
    let orders = Balancer::builder(registry.watch("orders").await?)
        .strategy(Strategy::PowerOfTwo)
        .outlier(Outlier::default())
        .build()?;
    orders.ready(3).await;
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let mut client = Balance::new(client.map_request(to_instance), orders, Retry::default(), judge_idempotent);

    let (mut calls, mut replaced) = (0, Vec::new());
    for (id, (stop, server)) in servers {
        let _ = stop.send(());
        while !server.is_finished() {
            let answer = client.ready().await?.call(Request::get("/orders").body(Empty::new())?).await?;
            assert!(answer.status().is_success(), "{answer:?}");
            calls += 1;
        }
        server.await??;
        replaced.push(start(registry.clone(), id).await?);
        println!("{id} was replaced; {calls} calls so far, none failed");
    }
    registry.destroy().await?;
    Ok(())
}

/// The service: registered once it is bound, drained and deregistered before it stops.
async fn start(
    registry: Arc<dyn Registry>,
    id: &str,
) -> Result<(oneshot::Sender<()>, JoinHandle<Result<()>>), std::io::Error> {
    let admission = Admission::new(["orders"]);
    let app =
        Router::new().route("/orders", get(async || "none yet")).layer(RefuseLayer::new(admission.clone(), "orders"));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let instance = Instance::builder("orders", id).endpoint(endpoint).build().map_err(std::io::Error::other)?;
    let (stop, stopped) = oneshot::channel(); // SIGTERM, if it is not told otherwise
    let server = Server::new(registry, instance).admission(admission).grace(Duration::from_millis(300));
    let server = server.until(async { _ = stopped.await }).axum(listener, app);
    Ok((stop, tokio::spawn(server)))
}
