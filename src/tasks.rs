//! Background work that a shutdown waits for.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Every task of the program is started here, so that none is cut off unnoticed. Cheap to clone.
#[derive(Clone, Default)]
pub struct Tasks(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// Work that must finish: requests being settled, payments being credited.
    work: TaskTracker,
    /// Said once, when work still under way has to end now.
    abort: CancellationToken,
    /// Said once, when the server stops taking requests.
    stopping: CancellationToken,
}

impl Tasks {
    /// Starts work that a shutdown waits for.
    #[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
    pub fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        tokio::spawn(self.0.work.track_future(work))
    }

    /// Starts work that computes or waits for the disk, on a thread where that holds up nothing else.
    pub fn spawn_blocking(&self, work: impl FnOnce() + Send + 'static) {
        drop(self.0.work.spawn_blocking(work));
    }

    /// Work that must finish and that somebody waits for. It runs where it is waited for, which hands nothing
    /// over and wakes nobody; should they stop waiting, it goes on in a task of its own.
    pub fn see_through<F>(&self, work: F) -> SeenThrough<F>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        SeenThrough { work: Some(Box::pin(work)), tasks: self.clone(), _tracked: self.0.work.token() }
    }

    /// Starts a loop that ends when the server stops.
    #[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
    pub fn spawn_service(&self, service: impl Future<Output = ()> + Send + 'static) {
        let stopping = self.0.stopping.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stopping.cancelled() => {}
                () = service => {}
            }
        });
    }

    pub fn stop(&self) {
        self.0.stopping.cancel();
    }

    pub fn is_stopping(&self) -> bool {
        self.0.stopping.is_cancelled()
    }

    /// Resolves when the server begins to stop.
    pub async fn stopping(&self) {
        self.0.stopping.cancelled().await;
    }

    /// Resolves when work still under way must end now.
    pub async fn aborted(&self) {
        self.0.abort.cancelled().await;
    }

    pub fn abort(&self) {
        self.0.abort.cancel();
    }

    /// Resolves when all work has finished.
    pub async fn idle(&self) {
        self.0.work.close();
        self.0.work.wait().await;
    }
}

/// See [`Tasks::see_through`].
pub struct SeenThrough<F>
where
    F: Future<Output: Send> + Send + 'static,
{
    /// `None` when it has finished, and while it is being polled: what has panicked is not polled again.
    work: Option<Pin<Box<F>>>,
    tasks: Tasks,
    _tracked: TaskTrackerToken,
}

impl<F> Future for SeenThrough<F>
where
    F: Future<Output: Send> + Send + 'static,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let Some(mut work) = self.work.take() else { return Poll::Pending };
        let polled = work.as_mut().poll(context);
        if polled.is_pending() {
            self.work = Some(work);
        }
        polled
    }
}

impl<F> Drop for SeenThrough<F>
where
    F: Future<Output: Send> + Send + 'static,
{
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            self.tasks.spawn(work);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt as _;
    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_done_all_the_same() {
        let (tasks, go, done) = (Tasks::default(), Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
        let work = |number: usize| {
            let (go, done) = (Arc::clone(&go), Arc::clone(&done));
            tasks.see_through(async move {
                go.notified().await;
                done.fetch_add(number, Ordering::SeqCst);
                number
            })
        };
        // One that is waited for, one that is given up half way, and one that was never begun.
        let mut given_up = work(10);
        assert!((&mut given_up).now_or_never().is_none());
        drop(given_up);
        drop(work(100));
        let waited_for = work(1);
        let idle = tasks.idle();
        let (number, ()) = tokio::join!(waited_for, async {
            while done.load(Ordering::SeqCst) < 111 {
                go.notify_one();
                tokio::task::yield_now().await;
            }
        });
        assert_eq!(number, 1);
        idle.await;
        assert_eq!(done.load(Ordering::SeqCst), 111);
    }

    #[tokio::test]
    async fn what_has_panicked_is_not_begun_again() {
        let (tasks, begun) = (Tasks::default(), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&begun);
        let mut panics = Box::pin(tasks.see_through(async move {
            count.fetch_add(1, Ordering::SeqCst);
            panic!("as it is meant to");
        }));
        let polled = std::panic::AssertUnwindSafe(&mut panics).catch_unwind().await;
        assert!(polled.is_err());
        drop(panics);
        tasks.idle().await;
        assert_eq!(begun.load(Ordering::SeqCst), 1);
    }
}
