//! Serving with axum: see [`Server::axum`].
//!
//! ```no_run
//! use axum::{Router, routing::get};
//! use service_registry::{Instance, Server, connect};
//! use tokio::net::TcpListener;
//!
//! # async fn example() -> service_registry::Result<()> {
//! let registry = connect("etcd://h1:2379,h2:2379/shop").await?;
//! let app = Router::new().route("/orders", get(async || "none yet"));
//! let listener = TcpListener::bind("10.0.0.5:0").await.expect("the address is ours");
//! let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
//! let instance = Instance::builder("orders", "7f3a").endpoint(endpoint).build()?;
//! Server::new(registry, instance).axum(listener, app).await // until SIGTERM, and then in good order
//! # }
//! ```

use std::fmt;

use ::axum::{Router, serve::Listener};

use crate::{Result, Server};

impl Server {
    /// Serves an application over HTTP, as [`run`](Self::run) does. For TLS, give it a listener whose connections are
    /// encrypted, and register an endpoint with the scheme `https`.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub async fn axum<L: Listener<Addr: fmt::Debug>>(self, listener: L, app: Router) -> Result<()> {
        self.run(|stop| ::axum::serve(listener, app).with_graceful_shutdown(stop).into_future()).await
    }
}
