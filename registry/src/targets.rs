//! Where instances are called over HTTP, and what changes about it.

use std::{collections::BTreeMap, sync::Arc};

use futures::{Stream, StreamExt, stream};
use http::Uri;
use registry_core::{Endpoint, Instance, InstanceId, Watcher};
use tower::discover::Change;

/// Where an instance takes HTTP, gRPC included: its first endpoint for that.
pub(crate) fn target(instance: &Instance) -> Option<Uri> {
    instance.endpoints.iter().find_map(|endpoint| match endpoint.scheme() {
        "grpc" | "http" => uri("http", endpoint),
        "grpcs" | "https" => uri("https", endpoint),
        _ => None,
    })
}

/// An endpoint by another scheme.
pub(crate) fn uri(scheme: &str, endpoint: &Endpoint) -> Option<Uri> {
    Uri::builder().scheme(scheme).authority(endpoint.authority()).path_and_query("/").build().ok()
}

/// Who takes traffic now, and who does not any more. One whose record changes is told of again unless both are the `same`.
pub(crate) fn changes(
    watcher: Watcher,
    same: impl Fn(&Instance, &Instance) -> bool + Send,
) -> impl Stream<Item = Change<InstanceId, Arc<Instance>>> + Send + Unpin {
    let mut known: BTreeMap<InstanceId, Arc<Instance>> = BTreeMap::new();
    watcher.snapshots().flat_map(move |snapshot| {
        let current: BTreeMap<_, _> = snapshot.available().map(|one| (one.id.clone(), one.clone())).collect();
        let new = current.iter().filter(|(id, one)| !known.get(*id).is_some_and(|before| same(before, one)));
        let new = new.map(|(id, one)| Change::Insert(id.clone(), one.clone()));
        let gone = known.keys().filter(|id| !current.contains_key(*id)).cloned().map(Change::Remove);
        let changes: Vec<_> = new.chain(gone).collect();
        known = current;
        stream::iter(changes)
    })
}
