//! Operators' overrides: written straight to the store, owned by nobody, and kept by nothing.

use std::iter;

use super::{Shared, keep::one_each, metrics};
use crate::{
    Backend, Content, Directory, Error, InstanceId, Intent, Key, Lifetime, Override, Record, Result, ServiceName,
};

/// The key of the override of an instance.
pub(super) fn key(service: &str, id: &str) -> Result<Key> {
    Ok(of(&ServiceName::parse(service)?, InstanceId::parse(id)?))
}

pub(super) fn of(service: &ServiceName, id: InstanceId) -> Key {
    Key { service: service.clone(), directory: Directory::Overrides, id }
}

impl<B: Backend> Shared<B> {
    pub(super) async fn set_override(&self, key: Key, set: Override) -> Result<()> {
        self.check_open()?;
        if set.is_empty() {
            let Key { service, id, .. } = &key;
            let message = format!("the override of {service}/{id} sets nothing: expected a status, a weight or both");
            return Err(Error::invalid(message));
        }
        let doing = format!("set {key}");
        let record = Record {
            key,
            owner: self.backend.owner().clone(),
            epoch: 0,
            lifetime: Lifetime::Persistent,
            content: Content::Override(set),
        };
        let write = async {
            let _one_at_a_time = self.overriding.lock().await;
            one_each(self.backend.put(&[record], Intent::Claim).await, 1).into_iter().collect::<Result<Vec<_>>>()
        };
        self.in_time("put", &doing, self.options.request_timeout, write).await.map(drop)
    }

    pub(super) async fn overrides(&self, service: &ServiceName) -> Result<Vec<(InstanceId, Override)>> {
        self.check_open()?;
        let list = self.backend.list(service, Directory::Overrides);
        let records = self.in_time("list", "list the overrides", self.options.request_timeout, list).await?;
        let mut overrides: Vec<_> = records
            .into_iter()
            .filter_map(|record| match record.content {
                Content::Override(set) => Some((record.key.id, set)),
                Content::Instance(_) => None,
            })
            .collect();
        overrides.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(overrides)
    }

    pub(super) async fn clear_override(&self, key: Key) -> Result<bool> {
        self.check_open()?;
        let cleared = self.clear_overrides(&[key]).await;
        cleared.into_iter().try_fold(false, |any, one| Ok(any | one?))
    }

    /// Clears overrides, whoever set them: one outcome for each, in order.
    pub(super) async fn clear_overrides(&self, keys: &[Key]) -> Vec<Result<bool>> {
        let write = async {
            let _one_at_a_time = self.overriding.lock().await;
            Ok(self.backend.remove(keys).await)
        };
        match self.in_time("remove", "clear overrides", self.options.request_timeout, write).await {
            Ok(outcomes) => {
                let outcomes = one_each(outcomes, keys.len());
                metrics::called_with_batch(self.backend.name(), "remove", &outcomes);
                outcomes
            }
            Err(error) => iter::repeat_n(Err(error), keys.len()).collect(),
        }
    }
}
