//! The image of a store's servers: one of the user's, or one built from `images/` on first use.

use std::{fs::File, path::Path};

use testcontainers::core::client::docker_client_instance;
use tokio::process::Command;

use super::{Error, Result, Store, variable};

/// An image of Debian's package for this store, present in the engine.
pub(super) async fn built(store: &dyn Store) -> Result<String> {
    let image = format!("registry-tests/{}:bookworm", store.name());
    if !present(&image).await {
        build(store, &image).await?;
    }
    Ok(image)
}

/// The image that `REGISTRY_TEST_<STORE>_IMAGE` names, which is pulled when it is used, or ours.
pub(super) async fn chosen(store: &dyn Store) -> Result<String> {
    match variable(store.name(), "IMAGE") {
        Some(image) => Ok(image),
        None => built(store).await,
    }
}

/// Whether [`chosen`] is ours, of which we know what is in it.
pub(super) fn is_ours(store: &dyn Store) -> bool {
    variable(store.name(), "IMAGE").is_none()
}

async fn present(image: &str) -> bool {
    let Ok(docker) = docker_client_instance().await else { return false };
    docker.inspect_image(image).await.is_ok()
}

async fn build(store: &dyn Store, image: &str) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/build.sh");
    let locked = script.clone();
    let _only_one =
        tokio::task::spawn_blocking(move || lock(&locked)).await.map_err(Error::during("cannot lock"))??;
    if present(image).await {
        return Ok(());
    }
    let command = format!("{} {}", script.display(), store.name());
    let output = Command::new("sh").arg(&script).arg(store.name()).output().await.map_err(Error::during(&command))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(format!(
        "cannot build {image} ({command}); REGISTRY_TEST_SERVERS=processes does without it:\n{said}"
    )))
}

/// Many test processes may miss the image at the same time. Held until the file is dropped.
fn lock(script: &Path) -> Result<File> {
    let file = File::open(script).map_err(Error::during(script.display()))?;
    file.lock().map_err(Error::during(script.display()))?;
    Ok(file)
}
