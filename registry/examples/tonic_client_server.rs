//! Two gRPC servers that register themselves, and a client that finds them, in one process. They offer gRPC's own health
//! service, so that nothing must be generated.
//!
//! ```text
//! cargo run -q --features tonic --example tonic_client_server
//! ```

use std::{error::Error, sync::Arc, time::Duration};

use service_registry::{
    Instance, Registry, Server,
    balance::{Balancer, Outlier, Retry, Strategy},
    connect,
    tonic::{Channels, channel, judge},
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tonic::{Request, service::interceptor::InterceptedService, transport::Server as Grpc};
use tonic_health::{pb::HealthCheckRequest, pb::health_client::HealthClient, server::health_reporter};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let registry = connect("memory://example-tonic").await?;
    let (stop, first) = serve(registry.clone(), "first").await?;
    let (_keep, _second) = serve(registry.clone(), "second").await?;
    println!("a channel that follows the service, as any client takes it:");
    let mut client = HealthClient::new(channel(registry.watch("orders").await?));
    for _ in 0..3 {
        client.check(HealthCheckRequest::default()).await?;
    }
    println!("a channel for each call, balanced, with retries:");
    let watcher = registry.watch("orders").await?;
    let balancer = Balancer::builder(watcher).strategy(Strategy::RoundRobin).outlier(Outlier::default()).build()?;
    balancer.ready(2).await;
    let (orders, retry) = (Channels::new(balancer), Retry::default());
    let check = async |channel| HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    let call = async || orders.call(&retry, judge, check).await;
    for _ in 0..4 {
        call().await?;
    }

    println!("the first one is told to stop; no call fails:");
    stop.send(()).ok();
    while !first.is_finished() {
        call().await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(registry.destroy().await?)
}

type Running = (oneshot::Sender<()>, JoinHandle<service_registry::Result<()>>);

async fn serve(registry: Arc<dyn Registry>, id: &'static str) -> Result<Running, Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let instance = Instance::builder("orders", id).endpoint(format!("grpc://{}", listener.local_addr()?)).build()?;
    let said = move |request: Request<()>| Ok(request).inspect(|_| println!("  {id} is called"));
    let router = Grpc::builder().add_service(InterceptedService::new(health_reporter().1, said));
    let (stop, stopped) = oneshot::channel::<()>();
    let server = Server::new(registry, instance).grace(Duration::from_millis(300)).until(async { _ = stopped.await });
    Ok((stop, tokio::spawn(server.tonic(listener, router))))
}
