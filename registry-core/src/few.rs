//! A few futures at once, without a wake-up that nobody needs.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use futures::future::poll_fn;

/// A few futures that run together; each is polled whenever one of them is woken.
///
/// For backends, which have a handful of requests in flight and mostly one. `FuturesUnordered`, which is made for many,
/// wakes its own task again whenever all that it has are pending (`poll_next` of futures-util 0.3), and a task that is woken
/// while it runs is handed to another thread: some 50 µs, for each request.
///
/// # Examples
/// ```
/// use registry_core::Few;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let squares = Few::at_most(4, (0..10).map(async |n| n * n).collect()).await;
/// assert_eq!(squares.iter().sum::<u32>(), 285);
/// # }
/// ```
#[derive(Debug)]
pub struct Few<F>(Vec<F>);

impl<F> Default for Few<F> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<F: Future + Unpin> Few<F> {
    /// Adds one.
    pub fn push(&mut self, future: F) {
        self.0.push(future);
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Drops all of them.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// What the next one that ends gives; `None` if there is none.
    ///
    /// # Cancel safety
    /// Safe: an outcome is taken when it is given.
    pub async fn next(&mut self) -> Option<F::Output> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<F::Output>> {
        for index in 0..self.0.len() {
            if let Poll::Ready(output) = Pin::new(&mut self.0[index]).poll(cx) {
                drop(self.0.swap_remove(index));
                return Poll::Ready(Some(output));
            }
        }
        if self.0.is_empty() { Poll::Ready(None) } else { Poll::Pending }
    }
}

impl<F: Future> Few<Pin<Box<F>>> {
    /// Runs all of `work` to its end, so many at once. The outcomes come as they end.
    pub async fn at_most(most: usize, work: Vec<F>) -> Vec<F::Output> {
        let mut done = Vec::with_capacity(work.len());
        let (mut work, mut running) = (work.into_iter(), Self::default());
        loop {
            while running.0.len() < most.max(1) {
                let Some(next) = work.next() else { break };
                running.push(Box::pin(next));
            }
            match running.next().await {
                Some(output) => done.push(output),
                None => return done,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::Cell,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        task::{Wake, Waker},
    };

    use futures::FutureExt;
    use tokio::sync::oneshot;

    use super::*;

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn nobody_is_woken_before_one_of_them_is() {
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(wakes.clone());
        let mut cx = Context::from_waker(&waker);
        let (sender, receiver) = oneshot::channel();
        let mut few = Few::default();
        few.push(receiver.boxed());
        few.push(std::future::pending().boxed());
        assert!(few.poll_next(&mut cx).is_pending());
        assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
        sender.send(7).unwrap();
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
        assert_eq!(few.poll_next(&mut cx), Poll::Ready(Some(Ok(7))));
        few.clear();
        assert_eq!(few.poll_next(&mut cx), Poll::Ready(None));
    }

    #[tokio::test]
    async fn no_more_run_at_once_than_may() {
        let (running, most) = (Cell::new(0), Cell::new(0));
        let work = (0..10).map(async |n| {
            running.set(running.get() + 1);
            most.set(running.get().max(most.get()));
            tokio::task::yield_now().await;
            running.set(running.get() - 1);
            n
        });
        let mut done = Few::at_most(3, work.collect()).await;
        done.sort_unstable();
        assert_eq!((done, most.get()), ((0..10).collect(), 3));
    }
}
