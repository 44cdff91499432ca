//! Probes for Kubernetes and load balancers. They look at atomics and at what is locked for moments only, so they answer at
//! once whatever the engine and the tokenizer are doing.
//!
//! * `/startupz`: the local load is over. What other pods do is no part of it: one pod that cannot be scheduled must not get all
//!   others restarted.
//! * `/readyz`, `/health`, `/ping`: this process serves; not while it loads, drains or has failed, and in a tensor-parallel group
//!   not while the group is not whole. Overload is not a reason: it passes, and taking the pod out would only move it.
//! * `/livez`: the step loop comes around. A restart is the cure only for what a restart can cure.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tandem_engine::{EngineState, GroupState};

use super::errors::json;
use super::group::GroupView;
use super::limits;
use super::state::AppState;
use crate::lifecycle::Phase;

#[derive(Debug, PartialEq, Serialize)]
struct Report {
    status: &'static str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    reasons: Vec<String>,
}

pub(super) async fn startup(State(state): State<Arc<AppState>>) -> Response {
    let has_loaded = state.group.as_ref().is_some_and(GroupView::is_loaded);
    match state.lifecycle.phase() {
        Phase::Loading if !has_loaded => answer("loading", vec!["the model is loading".into()]),
        Phase::Failed => answer("failed", failure(&state)),
        Phase::Loading | Phase::Ready | Phase::Draining => answer("started", Vec::new()),
    }
}

pub(super) async fn ready(State(state): State<Arc<AppState>>) -> Response {
    let engine = state.serving().map(|serving| serving.engine.state());
    match (state.lifecycle.phase(), engine) {
        (Phase::Failed, _) => answer("failed", failure(&state)),
        (_, Some(EngineState::Failed)) => answer("failed", vec!["the step loop has panicked".into()]),
        (Phase::Draining, _) => answer("draining", vec!["the server is shutting down".into()]),
        (Phase::Ready, Some(EngineState::Stopped)) => answer("failed", vec!["the engine has stopped".into()]),
        (phase, engine) => match &state.group {
            Some(group) => group_ready(&state, group),
            None if phase == Phase::Ready && engine.is_some() => answer("ready", Vec::new()),
            None => answer("loading", vec!["the model is loading".into()]),
        },
    }
}

/// All pods of a group are ready together or not at all.
fn group_ready(state: &AppState, group: &GroupView) -> Response {
    let report = group.report();
    let serves = match state.serving() {
        Some(serving) => serving.engine.is_accepting(),
        None => group.leads.is_none(),
    };
    if report.state == GroupState::Ready && serves {
        return answer("ready", Vec::new());
    }
    let reasons = match report.reasons.is_empty() {
        true => vec!["the group takes no new requests right now".into()],
        false => report.reasons,
    };
    let status = match report.state {
        // The ranks are there, the engine is not yet, or a rank is about to leave.
        GroupState::Ready => "joining",
        other => other.name(),
    };
    answer(status, reasons)
}

pub(super) async fn live(State(state): State<Arc<AppState>>) -> Response {
    let Some(serving) = state.serving() else {
        // Nothing ticks yet; how long a load may take is the startup probe's business.
        return answer("live", Vec::new());
    };
    let age = serving.engine.last_tick_age();
    match serving.engine.state() {
        EngineState::Failed => answer("failed", vec!["the step loop has panicked".into()]),
        EngineState::Running if age > limits::LIVENESS_TIMEOUT => {
            answer("stuck", vec![format!("the step loop has not come around for {} s", age.as_secs())])
        }
        // A stopped engine is on its way out with the process.
        EngineState::Running | EngineState::Stopped => answer("live", Vec::new()),
    }
}

fn failure(state: &AppState) -> Vec<String> {
    vec![state.lifecycle.reason().unwrap_or_else(|| "the model could not be loaded".into())]
}

/// 200 without reasons, 503 with them.
fn answer(status: &'static str, reasons: Vec<String>) -> Response {
    let code = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, json(&Report { status, reasons })).into_response()
}
