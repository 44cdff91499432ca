//! `tandem serve`.
//!
//! Order: catch signals; check model, configuration and tokenizer (a refusal is one line and exit code 2); open the
//! ports, so that probes answer "loading"; load on another thread; say that it is ready; wait for a signal.
//!
//! Threads: this one runs all of HTTP and never blocks; the engine's step thread and its workers compute; long texts
//! are tokenized on the runtime's blocking threads. The process exits without joining what still loads or computes:
//! nothing there needs an orderly end.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_engine::{EngineHandle, EngineState};
use tokio::sync::{oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::drain::{Cause, Draining, Signals};
use super::startup::{self, Prepared, Running};
use super::{Exit, banner, terminal};
use crate::config::{ConfigError, ServeConfig};
use crate::http::{self, AppState, Serving};
use crate::lifecycle::{Lifecycle, Phase};

/// How often the step thread is looked after.
const WATCH_ENGINE: Duration = Duration::from_millis(500);

/// Serves until a signal.
pub(super) fn serve(config: ServeConfig, started: Instant) -> Result<(), Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Exit::failed(format!("no runtime: {e}")))?;
    let result = runtime.block_on(async {
        let mut signals = Signals::install().map_err(|e| Exit::failed(format!("no signal handlers: {e}")))?;
        run(config, started, &mut signals).await
    });
    // A load or a step that still runs must not hold up the exit.
    runtime.shutdown_background();
    result
}

async fn run(config: ServeConfig, started: Instant, signals: &mut Signals) -> Result<(), Exit> {
    let common = config.common.clone();
    let options = startup::engine_options(&common, config.max_num_queued_reqs);
    let prepare = spawn("check", move || startup::prepare(&common, options))?;
    let Some(prepared) = unless_signalled(prepare, signals).await? else { return Ok(()) };
    let config = Arc::new(named(config, &prepared));

    let api = bind(&config, "port", config.port)?;
    let metrics = config.metrics_port.map(|port| bind(&config, "metrics-port", port)).transpose()?;
    let (api_address, metrics_address) = (address(&api)?, metrics.as_ref().map(address).transpose()?);
    let lifecycle = Lifecycle::new();
    let state = AppState::new(Arc::clone(&config), lifecycle.clone());
    let (stop, stopped) = watch::channel(false);
    let metrics = metrics.map(listener).transpose()?;
    let http = tokio::spawn(http::serve(Arc::clone(&state), listener(api)?, metrics, stopped));
    tracing::info!(api = %api_address, model = %config.common.model.display(), "listening, loading the model");

    let common = config.common.clone();
    let load = spawn("load", move || prepared.load(&common))?;
    let running = match unless_signalled(load, signals).await {
        Ok(Some(running)) => running,
        Ok(None) => return Ok(()),
        Err(exit) => {
            lifecycle.set_with_reason(Phase::Failed, "the model could not be loaded");
            return Err(exit);
        }
    };
    let text = banner::text(&config, &running, api_address, metrics_address, started.elapsed());
    let engine = running.engine.clone();
    tokio::spawn(engine.carry_wakes());
    state.install(serving(running));
    lifecycle.set(Phase::Ready);
    terminal::print(&text);
    tracing::info!(seconds = started.elapsed().as_secs_f64(), "ready");

    let cause = tokio::select! {
        cause = signals.next() => Some(cause),
        () = engine_failure(&engine) => None,
    };
    let draining = Draining { lifecycle, engine, stop, http, limit: config.shutdown_timeout };
    match cause {
        Some(Cause::Interrupt) => tracing::info!("interrupted"),
        Some(Cause::Terminate) => draining.run(signals).await,
        None => {
            draining.fail(signals).await;
            return Err(Exit::failed("the engine stopped; see the log"));
        }
    }
    Ok(())
}

/// Runs work that cannot be interrupted on a thread of its own, not on the runtime's: exiting does not wait for it.
fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T, Exit> + Send + 'static,
) -> Result<oneshot::Receiver<Result<T, Exit>>, Exit> {
    let (sender, receiver) = oneshot::channel();
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // The receiver is gone if a signal came first.
        let _ = sender.send(work());
    });
    thread.map_err(|e| Exit::failed(format!("no thread: {e}")))?;
    Ok(receiver)
}

/// The work's result, or `None` if a signal came first.
async fn unless_signalled<T>(
    work: oneshot::Receiver<Result<T, Exit>>,
    signals: &mut Signals,
) -> Result<Option<T>, Exit> {
    tokio::select! {
        result = work => match result {
            Ok(result) => result.map(Some),
            Err(_) => Err(Exit::failed("start-up panicked; see above")),
        },
        cause = signals.next() => {
            tracing::info!(?cause, "stopped while starting");
            Ok(None)
        }
    }
}

/// The configuration with the model's own name where none was given.
fn named(mut config: ServeConfig, prepared: &Prepared) -> ServeConfig {
    if config.served_model_names.is_empty() {
        config.served_model_names.push(prepared.inspected.info().name.clone());
    }
    config
}

/// Opens a port before there is anything to serve on it.
pub(super) fn bind(config: &ServeConfig, flag: &str, port: u16) -> Result<TcpListener, Exit> {
    let address = SocketAddr::new(config.host, port);
    TcpListener::bind(address).map_err(|e| {
        let hint = match (e.kind(), flag) {
            (io::ErrorKind::AddrInUse, "metrics-port") => "; give another, or 0 for none",
            (io::ErrorKind::AddrInUse, _) => "; give another",
            _ => "",
        };
        Exit::refused(ConfigError::new(
            config.common.origins.of(flag),
            format!("cannot listen on {address}: {e}{hint}"),
        ))
    })
}

fn address(listener: &TcpListener) -> Result<SocketAddr, Exit> {
    listener.local_addr().map_err(Exit::failed)
}

fn listener(listener: TcpListener) -> Result<tokio::net::TcpListener, Exit> {
    listener.set_nonblocking(true).map_err(Exit::failed)?;
    tokio::net::TcpListener::from_std(listener).map_err(Exit::failed)
}

fn serving(running: Running) -> Serving {
    Serving {
        engine: running.engine,
        model: running.info,
        tokenizer: running.tokenizer,
        template: running.template,
        generation: running.generation,
    }
}

/// Returns when the step thread is gone without having been asked to go.
async fn engine_failure(engine: &EngineHandle) {
    let mut ticks = interval(WATCH_ENGINE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while engine.state() == EngineState::Running {
        ticks.tick().await;
    }
}
