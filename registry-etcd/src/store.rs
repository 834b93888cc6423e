//! The requests that we make, each bounded, repeatable and moved to another endpoint where that is needed.

use std::time::Duration;

use etcd_client::{
    Client, Error as ClientError, GetOptions, KeyValue, KvClient, LeaseTimeToLiveOptions, ResponseHeader, SortOrder,
    SortTarget, Txn, TxnResponse,
};

use crate::{
    endpoints::Pool,
    error::{Class, Failure},
    space::Range,
};

/// The largest answer that is taken. The client's own default of 4 MiB is less than a hundred large records.
pub(crate) const LARGEST_ANSWER: usize = 64 << 20;
/// The longest ttl that etcd grants, in seconds.
const LONGEST_TTL: i64 = 9_000_000_000;
/// How many keys are read at once.
const PAGE: i64 = 1000;
/// How often a list starts over because its revision was compacted between two pages.
const LISTS: u32 = 5;

/// All keys of a range at one revision, and what was made of them.
pub(crate) struct Listed<T> {
    pub(crate) revision: i64,
    pub(crate) cluster: u64,
    pub(crate) made: T,
}

impl Pool {
    /// A transaction, made anew for each attempt.
    pub(crate) async fn txn(&self, txn: impl Fn() -> Txn) -> Result<TxnResponse, Failure> {
        let answer = self
            .call(|client| {
                let (mut kv, txn) = (kv(client), txn());
                async move { kv.txn(txn).await }
            })
            .await?;
        complete(answer)
    }

    /// Some keys from `from` on; one page of what `options` describe.
    pub(crate) async fn get(
        &self,
        from: &[u8],
        options: GetOptions,
    ) -> Result<(ResponseHeader, Vec<KeyValue>, bool), Failure> {
        let mut answer = self
            .call(|client| {
                let (mut kv, from, options) = (kv(client), from.to_vec(), options.clone());
                async move { kv.get(from, Some(options)).await }
            })
            .await?;
        let header = answer.take_header().ok_or_else(headless)?;
        let kvs = answer.take_kvs();
        Ok((header, kvs, answer.more()))
    }

    /// A whole range, page by page, as it was at one revision. Each page is let go of before the next one is asked for:
    /// `take` makes of it what is needed.
    pub(crate) async fn list<T: Default>(
        &self,
        range: &Range,
        take: impl Fn(&mut T, KeyValue),
    ) -> Result<Listed<T>, Failure> {
        let mut page = PAGE;
        for _ in 1..LISTS {
            match self.pages(range, &mut page, &take).await {
                Err(failure) if failure.class() == Class::Compacted => {}
                other => return other,
            }
        }
        self.pages(range, &mut page, &take).await
    }

    async fn pages<T: Default>(
        &self,
        (from, to): &Range,
        page: &mut i64,
        take: &impl Fn(&mut T, KeyValue),
    ) -> Result<Listed<T>, Failure> {
        let mut from = from.clone();
        let mut all = Listed { revision: 0, cluster: 0, made: T::default() };
        loop {
            let options = GetOptions::new()
                .with_range(to.clone())
                .with_sort(SortTarget::Key, SortOrder::Ascend)
                .with_limit(*page)
                .with_revision(all.revision);
            let (header, kvs, more) = match self.get(&from, options).await {
                Err(failure) if failure.class() == Class::AnswerTooLarge && *page > 1 => {
                    *page = (*page / 8).max(1);
                    continue;
                }
                answer => answer?,
            };
            if all.revision == 0 {
                (all.revision, all.cluster) = (header.revision(), header.cluster_id());
            }
            let next = kvs.last().filter(|_| more).map(|last| just_after(last.key()));
            kvs.into_iter().for_each(|kv| take(&mut all.made, kv));
            match next {
                Some(next) => from = next,
                None => return Ok(all),
            }
        }
    }

    /// Grants a lease: its id and its ttl, which the store may have raised.
    pub(crate) async fn grant(&self, seconds: i64) -> Result<(i64, Duration), Failure> {
        let lease = self
            .call(|client| {
                let mut leases = client.lease_client();
                async move { leases.grant(seconds, None).await }
            })
            .await?;
        Ok((lease.id(), ttl_of(lease.ttl())))
    }

    /// Renews a lease: a stream is opened, asked once and dropped, so that the next one can go to another endpoint.
    pub(crate) async fn keep_alive(&self, lease: i64) -> Result<(), Failure> {
        self.call(|client| {
            let mut leases = client.lease_client();
            // The client itself waits for the first answer and tells a lease that is gone.
            async move { leases.keep_alive(lease).await.map(drop) }
        })
        .await
    }

    /// The keys that hang on a lease, or `None` if it is gone.
    pub(crate) async fn attached(&self, lease: i64) -> Result<Option<Vec<Vec<u8>>>, Failure> {
        let answer = self
            .call(|client| {
                let mut leases = client.lease_client();
                async move { leases.time_to_live(lease, Some(LeaseTimeToLiveOptions::new().with_keys())).await }
            })
            .await?;
        Ok((answer.ttl() > 0).then(|| answer.keys().to_vec()))
    }

    /// Gives a lease up, and everything on it.
    pub(crate) async fn revoke(&self, lease: i64) -> Result<(), Failure> {
        let revoked = self
            .call(|client| {
                let mut leases = client.lease_client();
                async move { leases.revoke(lease).await.map(drop) }
            })
            .await;
        match revoked {
            Err(failure) if failure.class() == Class::LeaseGone => Ok(()),
            other => other,
        }
    }

    /// Whether the store answers at all.
    pub(crate) async fn ping(&self) -> Result<(), Failure> {
        self.call(|client| {
            let mut maintenance = client.maintenance_client();
            async move { maintenance.status().await.map(drop) }
        })
        .await
    }
}

/// The client panics on the answer to a transaction that lacks one of its parts (0.21.1, `TxnResponse::op_responses`).
pub(crate) fn complete(answer: TxnResponse) -> Result<TxnResponse, Failure> {
    if answer.0.responses.iter().any(|part| part.response.is_none()) {
        return Err(Failure::Client(ClientError::Internal("an answer without one of its parts".to_owned())));
    }
    Ok(answer)
}

/// The ttl of a lease, within what a store grants: our clock cannot be set for any time.
pub(crate) fn ttl_of(seconds: i64) -> Duration {
    Duration::from_secs(seconds.clamp(1, LONGEST_TTL).unsigned_abs())
}

/// The first key after this one.
pub(crate) fn just_after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

/// An answer without its header cannot be placed in history.
pub(crate) fn headless() -> Failure {
    Failure::Client(ClientError::Internal("an answer without a header".to_owned()))
}

fn kv(client: &Client) -> KvClient {
    client.kv_client().max_decoding_message_size(LARGEST_ANSWER)
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::{PbResponseOp, PbTxnResponse};
    use tokio::time::Instant;

    use super::*;

    #[test]
    fn an_answer_without_one_of_its_parts_is_an_error() {
        let responses = vec![PbResponseOp { response: None }];
        assert!(complete(TxnResponse(PbTxnResponse { responses, ..Default::default() })).is_err());
        assert!(complete(TxnResponse(PbTxnResponse::default())).is_ok());
    }

    #[test]
    fn any_ttl_can_be_waited_for() {
        for (seconds, expected) in [(5, 5), (0, 1), (-7, 1), (i64::MAX, 9_000_000_000), (i64::MIN, 1)] {
            assert_eq!(ttl_of(seconds), Duration::from_secs(expected));
            assert!(Instant::now().checked_add(ttl_of(seconds)).is_some());
        }
    }
}
