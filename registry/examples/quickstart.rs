//! The life of a service in a few seconds, on the embedded memory backend: a provider, a consumer that follows it, an
//! update, a crash, and a departure in good order.
//!
//! ```text
//! cargo run -q --example quickstart
//! ```

use std::time::Duration;

use futures::StreamExt;
use service_registry::{Change, Instance, Result, connect, shutdown};

/// Any store would do: `etcd://127.0.0.1:2379/shop?ttl=15s`.
const URL: &str = "memory://quickstart?ttl=1s";

#[tokio::main]
async fn main() -> Result<()> {
    // A consumer follows the service before there is any instance of it.
    let consumer = connect(URL).await?;
    let watcher = consumer.watch("orders").await?;
    let handle = watcher.handle();
    let mut changes = watcher.changes();

    println!("two providers register");
    let first = connect(URL).await?;
    let second = connect(URL).await?;
    first.register(Instance::builder("orders", "first").endpoint("http://10.0.0.1:8080").build()?).await?;
    second.register(Instance::builder("orders", "second").endpoint("http://10.0.0.2:8080").build()?).await?;
    show(&mut changes, 2).await;

    println!("the first one changes its weight");
    first.register(Instance::builder("orders", "first").endpoint("http://10.0.0.1:8080").weight(50).build()?).await?;
    show(&mut changes, 1).await;

    println!("the second one crashes: nobody says goodbye, so its record expires after the ttl of 1 s");
    drop(second);
    show(&mut changes, 1).await;

    println!(
        "the first one leaves in good order: it drains, waits until readers have stopped sending, and deregisters"
    );
    // Read meanwhile: a consumer that looks only afterwards sees the latest state, and just one change.
    let drain = shutdown::drain(&*first, Duration::from_millis(300), std::future::pending());
    let (drained, ()) = tokio::join!(drain, show(&mut changes, 2));
    drained?;

    let orders = handle.current();
    println!("at the end: {} instances, {}", orders.len(), orders.freshness());
    drop(orders);
    consumer.destroy().await
}

async fn show(changes: &mut (impl StreamExt<Item = Change> + Unpin), count: usize) {
    for change in changes.take(count).collect::<Vec<_>>().await {
        match change {
            Change::Insert { after } => println!("  + {} at {}", after.id, after.endpoints[0]),
            Change::Update { before, after } => println!(
                "  ~ {} weight {} -> {}, {} -> {}",
                after.id, before.weight, after.weight, before.status, after.status
            ),
            Change::Remove { before } => println!("  - {}", before.id),
        }
    }
}
