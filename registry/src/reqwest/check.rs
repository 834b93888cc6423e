use async_trait::async_trait;
use registry_core::{
    Error, ErrorKind, Result,
    health::{Check, Failure},
};
use reqwest::{Client, IntoUrl, Url};

/// Whether a `GET` is answered with a status of success: a check for a [gate](crate::health::gate).
///
/// # Examples
/// ```no_run
/// use service_registry::{Instance, connect, health, reqwest::HttpCheck};
///
/// # async fn example() -> service_registry::Result<()> {
/// let registry = connect("etcd://h1:2379/shop").await?;
/// let instance = Instance::builder("orders", "7f3a").endpoint("http://10.0.0.5:8080").build()?;
/// let check = HttpCheck::new("http://127.0.0.1:8080/health")?;
/// let gate = health::gate(registry, instance, check, health::Config::default()).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct HttpCheck {
    client: Client,
    url: Url,
}

impl HttpCheck {
    /// A check of this URL with a client of its own, which follows redirections. The gate limits how long it takes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a malformed URL, [`ErrorKind::Unsupported`] if no client can be made.
    pub fn new(url: impl IntoUrl) -> Result<Self> {
        let url = url.into_url().map_err(|error| Error::invalid("invalid URL of a check").with_source(error))?;
        let client = Client::builder().build().map_err(|error| {
            Error::new(ErrorKind::Unsupported, "cannot make the client of a check").with_source(error)
        })?;
        Ok(Self { client, url })
    }

    /// Uses another client: one that trusts a private authority, or sends a token.
    #[must_use]
    pub fn client(self, client: Client) -> Self {
        Self { client, ..self }
    }
}

#[async_trait]
impl Check for HttpCheck {
    async fn check(&self) -> Result<(), Failure> {
        let status = self.client.get(self.url.clone()).send().await?.status();
        if status.is_success() { Ok(()) } else { Err(format!("{} answered {status}", self.url).into()) }
    }
}
