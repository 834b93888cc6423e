//! HTTP with reqwest: a [`Middleware`] that balances each request, and a [`Resolver`] that a plain client is given.
//!
//! | | [`Middleware`] | [`Resolver`] |
//! | --- | --- | --- |
//! | URL | `registry://orders/path` | `http://orders.SUFFIX/path` |
//! | client | of `reqwest-middleware` | of reqwest, as it is |
//! | an instance is chosen | for each request, by a [`Balancer`](crate::balance::Balancer) | for each connection, by weight |
//! | an instance fails | the request is made elsewhere, where that is safe; it is ejected | a dead one is passed over when connecting |
//! | an instance leaves | no request goes there any more | its connections are used until either side closes them |
//! | names | any | those that a host name can spell |
//!
//! Take the middleware where you can. A client keeps its connections and uses them again, so with the resolver most requests
//! stick to the instance that the first one found, and with HTTP/2 all of them; it is for code that takes nothing but a
//! reqwest client.
//!
//! ```
//! use reqwest_middleware::ClientBuilder;
//! use service_registry::{Instance, Registry, connect, reqwest::{Middleware, Resolver}};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
//! # let endpoint = format!("http://{}", listener.local_addr()?);
//! # tokio::spawn(async move {
//! #     use tokio::io::{AsyncReadExt, AsyncWriteExt};
//! #     while let Ok((mut stream, _)) = listener.accept().await {
//! #         let mut request = [0; 4096];
//! #         let _ = stream.read(&mut request).await;
//! #         let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
//! #     }
//! # });
//! let registry = connect("memory://doc-reqwest").await?;
//! registry.register(Instance::builder("orders", "1").endpoint(endpoint).build()?).await?;
//!
//! let client = ClientBuilder::new(reqwest::Client::new()).with(Middleware::new(registry.clone())).build();
//! client.get("registry://orders/open?limit=10").send().await?;
//!
//! let resolver = Resolver::new(registry, "registry.internal");
//! let client = reqwest::Client::builder().dns_resolver(resolver).build()?;
//! client.get("http://orders.registry.internal/open").send().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # TLS
//! For `https`, turn on one of reqwest's features, such as `rustls`; a private authority is given to the client, by
//! `tls_certs_merge`. With the middleware, the certificate must be for the host of the instance's endpoint: register names,
//! or have the addresses in it. With the resolver, it must be for the host in the URL, `orders.registry.internal`, at whatever
//! address. Where a handshake fails, nothing was sent: the middleware goes elsewhere, and the sources of the error say why.

mod check;
mod middleware;
mod resolver;

use registry_core::{Endpoint, Instance};

pub use self::{check::HttpCheck, middleware::Middleware, resolver::Resolver};

fn offered<'a>(instance: &'a Instance, schemes: &[&str]) -> Option<&'a Endpoint> {
    instance.endpoints.iter().find(|endpoint| schemes.contains(&endpoint.scheme()))
}
