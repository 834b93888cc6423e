//! Calls that are made again elsewhere.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use std::sync::{Arc, Mutex};

use registry_balance::{Balancer, Retry, Strategy, Verdict};
use registry_core::{ErrorKind, Instance, Managed, Registry};

async fn balancer(name: &str, instances: usize) -> Balancer {
    let registry = Managed::memory(&format!("memory://retry-{name}?ttl=1h")).unwrap();
    for id in 0..instances {
        registry.register(Instance::builder("orders", id.to_string()).build().unwrap()).await.unwrap();
    }
    let balancer = Balancer::new(registry.watch("orders").await.unwrap(), Strategy::Random).unwrap();
    assert_eq!(balancer.len(), instances);
    balancer
}

/// The instances that one call was made at, and its answer.
async fn called(retry: &Retry, balancer: &Balancer, verdict: impl Fn(usize) -> Verdict) -> (Vec<String>, usize) {
    let tried = Arc::new(Mutex::new(Vec::new()));
    let call = retry.call(
        balancer,
        |attempt| verdict(*attempt),
        |instance: Arc<Instance>| {
            let mut tried = tried.lock().unwrap();
            tried.push(instance.id.to_string());
            std::future::ready(tried.len())
        },
    );
    let answer = call.await.unwrap();
    let tried = tried.lock().unwrap().clone();
    (tried, answer)
}

#[tokio::test]
async fn no_instance_is_tried_twice_in_one_call() {
    let balancer = balancer("twice", 4).await;
    let retry = Retry::default().attempts(10).budget(1000, 100.0);
    for verdict in [Verdict::Retry, Verdict::Refused] {
        for _ in 0..50 {
            let (mut tried, answer) = called(&retry, &balancer, |_| verdict).await;
            assert_eq!(answer, 4, "the last answer is given");
            tried.sort();
            assert_eq!(tried, ["0", "1", "2", "3"]);
        }
    }
}

#[tokio::test]
async fn what_went_well_or_must_not_be_repeated_is_not() {
    let balancer = balancer("once", 4).await;
    let retry = Retry::default();
    for verdict in [Verdict::Success, Verdict::Failure] {
        assert_eq!(called(&retry, &balancer, |_| verdict).await.1, 1);
    }
    let second = |attempt| if attempt == 1 { Verdict::Refused } else { Verdict::Success };
    assert_eq!(called(&retry, &balancer, second).await.1, 2);
    assert_eq!(called(&retry.clone().attempts(0), &balancer, second).await.1, 1);
}

#[tokio::test]
async fn retries_end_with_their_budget() {
    let balancer = balancer("budget", 3).await;
    let retry = Retry::default().budget(0, 0.1);
    let mut attempts = 0;
    for _ in 0..1000 {
        attempts += called(&retry, &balancer, |_| Verdict::Retry).await.0.len();
    }
    assert!((1050..=1150).contains(&attempts), "{attempts}");
}

#[tokio::test]
async fn nobody_to_call_is_an_error() {
    let balancer = balancer("nobody", 0).await;
    let retry = Retry::default();
    let call = retry.call(&balancer, |()| Verdict::Success, async |_| panic!("there is nobody"));
    assert_eq!(call.await.unwrap_err().kind(), ErrorKind::Unavailable);
}
