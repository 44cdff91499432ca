//! `GET /v1/models` and `GET /v1/models/{id}`: one card per served name.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::response::Response;
use serde::Serialize;

use super::errors::{ApiError, json};
use super::state::AppState;

#[derive(Serialize)]
struct List<'a> {
    object: &'static str,
    data: Vec<Card<'a>>,
}

#[derive(Serialize)]
struct Card<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: &'a str,
    parent: Option<&'a str>,
    /// Null until the model is loaded.
    max_model_len: Option<usize>,
    permission: [(); 0],
}

pub(super) async fn list(State(state): State<Arc<AppState>>) -> Response {
    let data = state.config.served_model_names.iter().map(|name| card(&state, name)).collect();
    json(&List { object: "list", data })
}

pub(super) async fn one(
    State(state): State<Arc<AppState>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    state.check_model(Some(&id))?;
    Ok(json(&card(&state, &id)))
}

fn card<'a>(state: &'a AppState, name: &'a str) -> Card<'a> {
    Card {
        id: name,
        object: "model",
        created: state.created_s,
        owned_by: "tandem",
        root: state.model_name(),
        parent: None,
        max_model_len: state.serving().map(|serving| serving.engine.config().max_model_len),
        permission: [],
    }
}
