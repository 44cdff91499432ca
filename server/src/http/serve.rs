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

use super::connection::Terms;
use super::state::{AppState, Timeouts};
use super::{connection, limits, router};

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
    let api = Port {
        listener: api,
        terms: terms(router::api(state.clone()), state.timeouts),
        full: Some(Full {
            max_connections: state.max_connections,
            terms: Terms {
                keep_alive: false,
                // Who asks for nothing makes room soon.
                ..terms(
                    router::overloaded(state.clone()),
                    Timeouts { idle: state.timeouts.header, ..state.timeouts },
                )
            },
        }),
    };
    let api = api.accept_all(stop.clone());
    let metrics = async {
        if let Some(listener) = metrics {
            let terms = terms(router::metrics_only(state.clone()), state.timeouts);
            Port { listener, terms, full: None }.accept_all(stop).await;
        }
    };
    tokio::join!(api, metrics);
    Ok(())
}

fn terms(router: Router, timeouts: Timeouts) -> Terms {
    Terms { router, timeouts, keep_alive: true }
}

/// A listener and what it offers.
struct Port {
    listener: TcpListener,
    terms: Terms,
    /// `None`: as many connections as come.
    full: Option<Full>,
}

/// What happens beyond a number of connections: some more are accepted on other terms, so that a probe still has its
/// answer and a client a typed refusal; the rest wait in the kernel.
struct Full {
    max_connections: usize,
    terms: Terms,
}

impl Port {
    async fn accept_all(self, mut stop: watch::Receiver<bool>) {
        let mut connections = JoinSet::new();
        let connection_stop = stop.clone();
        loop {
            tokio::select! {
                biased;
                () = stopped(&mut stop) => break,
                // Before accepting, so that the number of connections is that of the live ones.
                Some(ended) = connections.join_next() => note_end(ended),
                accepted = self.listener.accept(), if self.has_room(connections.len()) => match accepted {
                    Ok((stream, _)) => {
                        let terms = self.terms_for(connections.len()).clone();
                        connections.spawn(connection::serve(stream, terms, connection_stop.clone()));
                    }
                    Err(error) => rest_after(&error).await,
                },
            }
        }
        drop(self.listener);
        while let Some(ended) = connections.join_next().await {
            note_end(ended);
        }
    }

    fn has_room(&self, num_connections: usize) -> bool {
        self.full
            .as_ref()
            .is_none_or(|full| num_connections < full.max_connections + limits::SPARE_CONNECTIONS)
    }

    fn terms_for(&self, num_connections: usize) -> &Terms {
        match &self.full {
            Some(full) if num_connections >= full.max_connections => &full.terms,
            _ => &self.terms,
        }
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
