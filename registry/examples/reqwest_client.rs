//! Two HTTP servers that register themselves, and clients of reqwest that find them, in one process.
//!
//! ```text
//! cargo run -q --features axum,reqwest --example reqwest_client
//! ```

use std::{error::Error, sync::Arc, time::Duration};

use axum::Router;
use reqwest_middleware::ClientBuilder;
use service_registry::{
    Instance, Registry, Server, connect,
    reqwest::{Middleware, Resolver},
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let registry = connect("memory://example-reqwest").await?;
    let (stop, first) = serve(registry.clone(), "first").await?;
    let (_keep, _second) = serve(registry.clone(), "second").await?;
    let mut watcher = registry.watch("orders").await?;
    while watcher.current().len() < 2 {
        watcher.next().await;
    }

    println!("the resolver, with a client as it is: it keeps to the connection that it has");
    let resolver = Resolver::new(registry.clone(), "registry.internal");
    let plain = reqwest::Client::builder().dns_resolver(resolver).build()?;
    for _ in 0..3 {
        println!("  {}", plain.get("http://orders.registry.internal/").send().await?.text().await?);
    }

    println!("the middleware: each request is balanced");
    let client = ClientBuilder::new(reqwest::Client::new()).with(Middleware::new(registry.clone())).build();
    for _ in 0..6 {
        println!("  {}", client.get("registry://orders/").send().await?.text().await?);
    }

    println!("the first one is told to stop; no request fails");
    stop.send(()).ok();
    while !first.is_finished() {
        println!("  {}", client.get("registry://orders/").send().await?.text().await?);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(registry.destroy().await?)
}

type Running = (oneshot::Sender<()>, JoinHandle<service_registry::Result<()>>);

async fn serve(registry: Arc<dyn Registry>, id: &'static str) -> Result<Running, Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let instance = Instance::builder("orders", id).endpoint(format!("http://{}", listener.local_addr()?)).build()?;
    let app = Router::new().fallback(async move || format!("{id} answers"));
    let (stop, stopped) = oneshot::channel::<()>();
    let server = Server::new(registry, instance).grace(Duration::from_millis(300)).until(async { _ = stopped.await });
    Ok((stop, tokio::spawn(server.axum(listener, app))))
}
