//! `tandem rank`: one rank of a group, a child of its pod's `serve`.
//!
//! It says how it is on standard output, a line of JSON for every change, and hears orders on standard input. The end of the
//! input is the end of the parent, and of this process at once: a rank without its parent would hold its place in the group
//! with nobody to restart it.

use std::io::{self, BufRead, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::mpsc::{Sender, channel};

use serde::{Deserialize, Serialize};
use tandem_engine::{RankEnd, RankOptions, RankOrder, RankReport};

use super::{Exit, REPLACE, startup};
use crate::config::{ConfigError, RankConfig};

/// The order to leave the group, as a line.
pub(super) const LEAVE: &str = "leave";

/// A [`RankReport`] on its way to the parent, as a line.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct ReportLine(#[serde(with = "ReportFields")] pub(super) RankReport);

#[derive(Serialize, Deserialize)]
#[serde(remote = "RankReport")]
struct ReportFields {
    loaded: bool,
    joined: bool,
    ready: bool,
    epoch: u64,
    num_blocks: u64,
    reasons: Vec<String>,
    leader_http: String,
    ranks_up: Vec<bool>,
    stale_messages: u64,
}

/// Computes until it is told to leave or its parent ends.
pub(super) fn rank(config: RankConfig) -> Result<(), Exit> {
    let RankConfig { serve, group, local_rank, held_blocks } = config;
    abort_on_panic();
    let (orders, inbox) = channel();
    std::thread::Builder::new()
        .name("tandem-parent".into())
        .spawn(move || follow_parent(&orders))
        .map_err(Exit::failed)?;
    let inspected = startup::inspect(&serve.common, Some(&group), local_rank)?;
    let options = startup::engine_options(&serve.common, serve.max_num_queued_reqs, &inspected);
    let port = if group.rank_port == 0 { 0 } else { group.rank_port.saturating_add(local_rank as u16) };
    let ip = if group.is_local() { Ipv4Addr::LOCALHOST.into() } else { serve.host };
    let address = SocketAddr::new(ip, port);
    let listener = TcpListener::bind(address).map_err(|error| {
        let message = format!("cannot listen on {address} for other ranks: {error}; give another");
        Exit::refused(ConfigError::new(serve.common.origins.of("rank-port"), message))
    })?;
    let place = RankOptions {
        rank: group.rank(local_rank),
        size: group.size(),
        local_ranks: group.gpus_per_pod,
        leader: (group.leader_host.clone(), group.master_port),
        listener,
        key: group.key.clone(),
        held_blocks,
    };
    let end = tandem_engine::run_rank(inspected, &options, place, inbox, say);
    match end.map_err(|error| startup::refusal(&serve.common, error))? {
        RankEnd::Left => Ok(()),
        RankEnd::Hung => {
            Err(Exit { code: REPLACE, problems: vec!["a step does not end; the rank is restarted".into()] })
        }
        RankEnd::Unfit(reason) => {
            Err(Exit { code: REPLACE, problems: vec![format!("{reason}; the rank is restarted")] })
        }
    }
}

/// A thread that panics ends the process: the others would go on saying that this rank lives, and its peers would wait for it.
fn abort_on_panic() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        hook(panic);
        std::process::abort();
    }));
}

/// Tells the parent. A parent that is gone is found out by [`follow_parent`].
fn say(report: &RankReport) {
    let mut line = serde_json::to_string(&ReportLine(report.clone())).expect("a report serialises");
    line.push('\n');
    let _ = io::stdout().write_all(line.as_bytes());
}

fn follow_parent(orders: &Sender<RankOrder>) {
    for line in io::stdin().lock().lines().map_while(Result::ok) {
        if line == LEAVE {
            // The rank has ended already if nobody listens.
            let _ = orders.send(RankOrder::Leave);
        }
    }
    // Whatever this process is in the middle of: nobody is left to whom it matters.
    std::process::exit(0);
}
