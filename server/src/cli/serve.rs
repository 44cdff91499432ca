//! `tandem serve`.
//!
//! Order: catch signals; check model, configuration and tokenizer (a refusal is one line and exit code 2); open the
//! ports, so that probes answer "loading"; load on another thread; say that it is ready; wait for a signal.
//!
//! As a pod of a tensor-parallel group it also starts the pod's ranks. The leader's engine runs on all of them ([`startup`]); the
//! other pods follow ([`follow`]).
//!
//! Threads: this one runs all of HTTP and never blocks; the engine's step thread and its workers compute; long texts
//! are tokenized on the runtime's blocking threads. The process exits without joining what still loads or computes:
//! nothing there needs an orderly end.

use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_engine::{EngineHandle, EngineState, GroupStatus};
use tokio::sync::{oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::drain::{Cause, Draining, Signals};
use super::ranks::Ranks;
use super::startup::{self, Prepared, Running};
use super::{Exit, banner, follow, terminal};
use crate::config::{ConfigError, GroupConfig, LogFormat, ServeConfig};
use crate::http::{self, AppState, GpuGauges, GroupView, Serving};
use crate::lifecycle::{Lifecycle, Phase};

/// How often the step thread is looked after.
const WATCH_ENGINE: Duration = Duration::from_millis(500);

/// Serves until a signal.
pub(super) fn serve(config: ServeConfig, arguments: &[OsString], started: Instant) -> Result<(), Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Exit::failed(format!("no runtime: {e}")))?;
    let result = runtime.block_on(async {
        let mut signals = Signals::install().map_err(|e| Exit::failed(format!("no signal handlers: {e}")))?;
        run(config, arguments, started, &mut signals).await
    });
    // A load or a step that still runs must not hold up the exit.
    runtime.shutdown_background();
    result
}

async fn run(
    config: ServeConfig,
    arguments: &[OsString],
    started: Instant,
    signals: &mut Signals,
) -> Result<(), Exit> {
    let (common, group) = (config.common.clone(), config.group.clone());
    let queued = config.max_num_queued_reqs;
    let prepare = spawn("check", move || startup::prepare(&common, group.as_ref(), queued))?;
    let Some(prepared) = unless_signalled(prepare, signals).await? else { return Ok(()) };
    let config = Arc::new(named(config, &prepared));

    let api = bind(&config, "port", config.port)?;
    let metrics = config.metrics_port.map(|port| bind(&config, "metrics-port", port)).transpose()?;
    let (api_address, metrics_address) = (address(&api)?, metrics.as_ref().map(address).transpose()?);
    let lifecycle = Lifecycle::new();
    let pod = config.group.as_ref().map(|group| Pod::start(&config, group, arguments)).transpose()?;
    let view = pod.as_ref().map(Pod::view);
    let state = AppState::new(Arc::clone(&config), lifecycle.clone(), view);
    let (stop, stopped) = watch::channel(false);
    let metrics = metrics.map(listener).transpose()?;
    let http = tokio::spawn(http::serve(Arc::clone(&state), listener(api)?, metrics, stopped));
    tracing::info!(api = %api_address, model = %config.common.model.display(), "listening, loading the model");

    let (ranks, lead) = match pod {
        Some(Pod { ranks, lead: None, .. }) => {
            return follow::follow(&ranks, &lifecycle, config.shutdown_timeout, signals).await;
        }
        Some(Pod { ranks, lead: Some(lead), .. }) => (Some(ranks), Some(lead)),
        None => (None, None),
    };
    let (common, group) = (config.common.clone(), config.group.clone());
    let load = spawn("load", move || match (group, lead) {
        (Some(group), Some((listener, status, leader_http))) => {
            prepared.gather(&common, &group, listener, status, leader_http)
        }
        _ => prepared.load(&common),
    })?;
    let loaded = tokio::select! {
        loaded = unless_signalled(load, signals) => loaded,
        exit = refused(ranks.as_ref()) => Err(exit),
    };
    let running = match loaded {
        Ok(Some(running)) => running,
        Ok(None) => return Ok(()),
        Err(exit) => {
            lifecycle.set_with_reason(Phase::Failed, "the model could not be loaded");
            return Err(exit);
        }
    };
    let text = banner::text(&config, &running, api_address, metrics_address, started.elapsed());
    let (backend, kv_tokens) = (running.backend.clone(), running.plan.kv_tokens);
    let engine = running.engine.clone();
    tokio::spawn(engine.carry_wakes());
    state.install(serving(running));
    lifecycle.set(Phase::Ready);
    let warmed = state.serving().cloned();
    tokio::spawn(async move {
        if let Some(sandbox) = warmed.as_ref().and_then(|serving| serving.sandbox.as_ref()) {
            sandbox.warm_up().await;
        }
    });
    // Beside a log for programs it would be text among JSON; they get the same as fields.
    if config.common.log_format == LogFormat::Text {
        terminal::print(&text);
    }
    tracing::info!(
        seconds = started.elapsed().as_secs_f64(),
        api = %api_address,
        backend = backend.backend,
        isa = backend.isa,
        device = backend.device,
        ranks = backend.ranks,
        threads = backend.threads,
        kv_tokens,
        "ready"
    );

    let cause = tokio::select! {
        cause = signals.next() => Some(cause),
        () = engine_failure(&engine) => None,
        // Only of a rank that has never loaded, which cannot be once the group was whole; but a wait for ever it must not become.
        exit = refused(ranks.as_ref()) => return Err(exit),
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

/// This pod's part of a group.
struct Pod {
    ranks: Ranks,
    status: GroupStatus,
    /// Where ranks call, if this pod leads; and where clients find it.
    lead: Option<(TcpListener, GroupStatus, String)>,
}

impl Pod {
    /// Opens the port where ranks call, if this pod leads, and starts the pod's ranks.
    fn start(config: &ServeConfig, group: &GroupConfig, arguments: &[OsString]) -> Result<Self, Exit> {
        let status = GroupStatus::default();
        let mut lead = None;
        let mut port = None;
        if group.is_leader() {
            let ip = if group.is_local() { Ipv4Addr::LOCALHOST.into() } else { config.host };
            let listener = listen(config, "master-port", SocketAddr::new(ip, group.master_port))?;
            port = (group.master_port == 0).then(|| address(&listener).map(|at| at.port())).transpose()?;
            let host = &group.leader_host;
            let is_bare_v6 = host.contains(':') && !host.starts_with('[');
            let host = if is_bare_v6 { format!("[{host}]") } else { host.clone() };
            let leader_http = format!("{host}:{}", config.port);
            lead = Some((listener, status.clone(), leader_http));
        }
        let ranks = Ranks::start(arguments, group.gpus_per_pod, port)?;
        Ok(Self { ranks, status, lead })
    }

    fn view(&self) -> GroupView {
        let (ranks, restarts) = (self.ranks.clone(), self.ranks.clone());
        GroupView {
            leads: self.lead.as_ref().map(|_| self.status.clone()),
            local_ranks: Arc::new(move || ranks.reports()),
            restarts: Arc::new(move || restarts.restarts().iter().sum()),
        }
    }
}

/// Returns when a rank of this pod, if there are any, refuses the configuration.
async fn refused(ranks: Option<&Ranks>) -> Exit {
    match ranks {
        Some(ranks) => follow::refusal(ranks).await,
        None => std::future::pending().await,
    }
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
    listen(config, flag, SocketAddr::new(config.host, port))
}

fn listen(config: &ServeConfig, flag: &str, address: SocketAddr) -> Result<TcpListener, Exit> {
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
        tokenizer: running.tokenizer,
        sandbox: running.template.as_deref().map(super::sandbox::of),
        template: running.template,
        generation: running.generation,
        gpus: running.gpus.map(GpuGauges::new),
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
