//! The accept loops.
//!
//! Order of shutdown: `stop` turns true, the listeners close, idle connections close, busy ones finish their request;
//! then [`serve`] returns. It waits as long as that takes, and dropping its future cuts what is left: the deadline is
//! the caller's.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::state::{AppState, Timeouts};
use super::{connection, router};

/// Serves the API on one listener and metrics and probes on the other, until `stop` turns true and all requests have
/// been answered.
///
/// # Errors
/// None today: failures of single connections are theirs, and a listener that cannot accept (no file descriptors) tries
/// again.
pub async fn serve(
    state: Arc<AppState>,
    api: TcpListener,
    metrics: Option<TcpListener>,
    stop: watch::Receiver<bool>,
) -> io::Result<()> {
    let timeouts = state.timeouts;
    let api = accept_all(api, router::api(state.clone()), timeouts, stop.clone());
    let metrics = async {
        if let Some(listener) = metrics {
            accept_all(listener, router::metrics_only(state), timeouts, stop).await;
        }
    };
    tokio::join!(api, metrics);
    Ok(())
}

async fn accept_all(
    listener: TcpListener,
    router: Router,
    timeouts: Timeouts,
    mut stop: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let connection_stop = stop.clone();
    loop {
        tokio::select! {
            biased;
            () = stopped(&mut stop) => break,
            Some(ended) = connections.join_next() => note_end(ended),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection::serve(stream, router.clone(), timeouts, connection_stop.clone()));
                }
                Err(error) => rest_after(&error).await,
            },
        }
    }
    drop(listener);
    while let Some(ended) = connections.join_next().await {
        note_end(ended);
    }
}

/// Waits for the word to stop. A sender that is gone means the same: the process is ending.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

fn note_end(ended: Result<Result<(), hyper::Error>, tokio::task::JoinError>) {
    match ended {
        Ok(Ok(())) => {}
        // Clients break off and send nonsense all the time.
        Ok(Err(error)) => tracing::debug!(%error, "connection ended"),
        Err(error) => tracing::error!(%error, "connection task failed"),
    }
}

/// A connection that died before it was accepted is nothing; a lack of descriptors or memory passes only if we wait.
async fn rest_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::warn!(%error, "cannot accept connections");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
