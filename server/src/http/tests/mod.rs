//! The whole of HTTP over real sockets, with a toy for a model.

mod answers;
mod client;
mod connections;
mod metrics;
mod refusals;
mod toy;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::Value;
use tandem_engine::{EngineConfig, Snapshot};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::client::{Answer, Connection, get, post};
use self::toy::{Knobs, engine_config};
use super::state::{AppState, Timeouts};
use crate::lifecycle::{Lifecycle, Phase};

/// A server on free ports.
struct Server {
    state: Arc<AppState>,
    knobs: Arc<Knobs>,
    api: SocketAddr,
    metrics: SocketAddr,
    stop: watch::Sender<bool>,
    served: JoinHandle<std::io::Result<()>>,
}

/// How a test's server differs from the plain one.
struct Setup {
    keys: &'static [&'static str],
    flags: &'static [&'static str],
    engine: EngineConfig,
    with_text: bool,
    timeouts: Timeouts,
    max_connections: usize,
    loaded: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            keys: &[],
            flags: &[],
            engine: engine_config(),
            with_text: true,
            timeouts: Timeouts::default(),
            max_connections: 100,
            loaded: true,
        }
    }
}

impl Server {
    async fn start(setup: Setup) -> Self {
        let (config, lifecycle) = (toy::serve_config(setup.keys, setup.flags), Lifecycle::new());
        let state = AppState::with_limits(config, lifecycle, None, setup.timeouts, setup.max_connections);
        let (serving, knobs) = toy::serving(setup.engine, setup.with_text);
        if setup.loaded {
            state.install(serving);
            state.lifecycle.set(Phase::Ready);
        }
        let listen = || async { TcpListener::bind("127.0.0.1:0").await.unwrap() };
        let (api, metrics) = (listen().await, listen().await);
        let (api_address, metrics_address) = (api.local_addr().unwrap(), metrics.local_addr().unwrap());
        let (stop, stopped) = watch::channel(false);
        let served = tokio::spawn(super::serve(state.clone(), api, Some(metrics), stopped));
        Self { state, knobs, api: api_address, metrics: metrics_address, stop, served }
    }

    async fn plain() -> Self {
        Self::start(Setup::default()).await
    }

    async fn connect(&self) -> Connection {
        Connection::open(self.api).await
    }

    async fn request(&self, bytes: Vec<u8>) -> Answer {
        let mut connection = self.connect().await;
        connection.send(&bytes).await;
        connection.answer().await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.request(post(path, &body.to_string(), "")).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.request(get(path, "")).await
    }

    async fn complete(&self, body: Value) -> Answer {
        self.post("/v1/completions", body).await
    }

    fn snapshot(&self) -> Arc<Snapshot> {
        let snapshot = self.state.serving().unwrap().engine.snapshot();
        assert!(snapshot.is_balanced(), "{snapshot:?}");
        snapshot
    }

    /// Waits until the engine's counts satisfy `done`.
    async fn until(&self, what: &str, done: impl Fn(&Snapshot) -> bool) {
        let start = Instant::now();
        while !done(&self.snapshot()) {
            assert!(start.elapsed() < Duration::from_secs(5), "{what}: {:?}", self.snapshot());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn slow_down(&self, step_ms: u64) {
        self.knobs.step_ms.store(step_ms, Ordering::Relaxed);
    }
}

/// The text of a streamed completion's choice.
fn streamed_text(events: &[Value], index: u64) -> String {
    let choices = events.iter().flat_map(|event| event["choices"].as_array().unwrap());
    choices.filter(|choice| choice["index"] == index).filter_map(|choice| choice["text"].as_str()).collect()
}
