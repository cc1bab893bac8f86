//! Background work that a shutdown waits for.

use std::future::Future;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Every task of the program is started here, so that none is cut off unnoticed.
#[derive(Clone, Default)]
pub struct Tasks {
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
        tokio::spawn(self.work.track_future(work))
    }

    /// Starts work that computes or waits for the disk, on a thread where that holds up nothing else.
    pub fn spawn_blocking(&self, work: impl FnOnce() + Send + 'static) {
        drop(self.work.spawn_blocking(work));
    }

    /// Starts a loop that ends when the server stops.
    #[expect(clippy::disallowed_methods, reason = "the one place that starts tasks")]
    pub fn spawn_service(&self, service: impl Future<Output = ()> + Send + 'static) {
        let stopping = self.stopping.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = stopping.cancelled() => {}
                () = service => {}
            }
        });
    }

    pub fn stop(&self) {
        self.stopping.cancel();
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }

    /// Resolves when the server begins to stop.
    pub async fn stopping(&self) {
        self.stopping.cancelled().await;
    }

    /// Resolves when work still under way must end now.
    pub async fn aborted(&self) {
        self.abort.cancelled().await;
    }

    pub fn abort(&self) {
        self.abort.cancel();
    }

    /// Resolves when all work has finished.
    pub async fn idle(&self) {
        self.work.close();
        self.work.wait().await;
    }
}
