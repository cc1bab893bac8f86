//! Connections: accepted within a bound, given a time to say what they want, ended with grace.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tower_service::Service as _;

use crate::http::limits::Peer;
use crate::tasks::Tasks;

/// Connections at once; more wait to be accepted. Each costs a descriptor, and a stream one more.
const MAX_CONNECTIONS: usize = 8192;
/// For a request's head to arrive, and for a kept-alive connection to be used again.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// When the system has no descriptor left, the next try waits for one to come back.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves until the server is told to stop. Connections are tracked: a shutdown waits for them.
pub async fn serve(listener: TcpListener, router: Router, tasks: Tasks) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = tasks.stopping() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                let connection = serve_connection(stream, Peer(peer.ip()), router.clone(), tasks.clone());
                tasks.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, peer: Peer, router: Router, tasks: Tasks) {
    // An event of a stream goes out when it is written, not when a packet is full.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request: Request<Incoming>| {
        let mut router = router.clone();
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer);
            Ok::<_, Infallible>(match router.call(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            })
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    // How a connection ends is the client's affair; requests are logged where they are served.
    tokio::select! {
        _ = connection.as_mut() => return,
        () = tasks.stopping() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}
