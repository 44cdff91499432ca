//! A process's place in a tensor-parallel group, from flags and the environment that Kubernetes sets.
//!
//! Rank is `ordinal × gpus_per_pod + local rank`, size is `replicas × gpus_per_pod`. The ordinal comes from the explicit flags
//! (`--node-rank`), else from LeaderWorkerSet's variables, else from the pod's name. What is missing, malformed, out of range or
//! contradictory is refused with what was read where: nothing is guessed, least of all rank 0.

use std::path::Path;
use std::time::Duration;

use tandem_engine::GroupKey;

use super::error::{ConfigError, Origin};
use super::flags::GroupFlags;
use super::layers::{Environment, Origins};

/// Where ranks call the leader.
const MASTER_PORT: u16 = 7400;
/// Where the first local rank takes calls of its peers.
const RANK_PORT: u16 = 7401;
/// The most ranks of a group.
const MAX_RANKS: u64 = 1024;

/// Where this process stands in its group.
#[derive(Debug, Clone)]
pub struct GroupConfig {
    /// This pod's number, from 0; pod 0 leads.
    pub ordinal: usize,
    /// Pods of the group.
    pub replicas: usize,
    /// Ranks of each pod.
    pub gpus_per_pod: usize,
    /// Name or address of pod 0; names are looked up at every attempt.
    pub leader_host: String,
    /// Where ranks call there; 0 for any, if all ranks are local.
    pub master_port: u16,
    /// Name of every pod, where it is known.
    pub peers: Vec<String>,
    /// Where the first local rank takes calls of its peers, the next one port further; 0 for any.
    pub rank_port: u16,
    /// The secret that all processes of the group share.
    pub key: Option<GroupKey>,
    /// How long to wait for the first full group; for ever if absent.
    pub join_timeout: Option<Duration>,
    /// How long requests wait for a broken group.
    pub recovery_timeout: Duration,
    /// Which value came from where, one line each.
    pub sources: Vec<String>,
}

impl GroupConfig {
    /// Ranks of the group.
    pub fn size(&self) -> usize {
        self.replicas * self.gpus_per_pod
    }

    /// The number of a local rank in the group.
    pub fn rank(&self, local_rank: usize) -> usize {
        self.ordinal * self.gpus_per_pod + local_rank
    }

    /// Whether this process leads the group.
    pub fn is_leader(&self) -> bool {
        self.ordinal == 0
    }

    /// Whether the group cannot leave this machine.
    pub fn is_local(&self) -> bool {
        is_loopback(&self.leader_host)
    }
}

/// Ordinal and leader of a group of several pods.
struct Place {
    ordinal: u64,
    leader_host: String,
    peers: Vec<String>,
    rank_port: u16,
    source: String,
}

/// The group that flags and environment describe; `None` for a process by itself.
pub(super) fn group(
    flags: &GroupFlags,
    origins: &Origins,
    environment: &Environment,
) -> Result<Option<GroupConfig>, ConfigError> {
    let refuse = |flag: &str, message: String| Err(ConfigError::new(origins.of(flag), message));
    if flags.nnodes.is_none() {
        for (flag, given) in
            [("node-rank", flags.node_rank.is_some()), ("master-addr", flags.master_addr.is_some())]
        {
            if given {
                return refuse(flag, "needs --nnodes beside it".into());
            }
        }
    }
    let replicas = replicas(flags, origins, environment)?;
    let gpus_per_pod = match (flags.gpus_per_pod, flags.tensor_parallel_size) {
        (Some(gpus), _) => gpus,
        (None, Some(size)) if size.is_multiple_of(replicas) => size / replicas,
        (None, Some(size)) => {
            let message = format!("{size} ranks cannot be shared out evenly over {replicas} pods");
            return refuse("tensor-parallel-size", message);
        }
        (None, None) => 1,
    };
    let size = replicas * gpus_per_pod;
    if let Some(asked) = flags.tensor_parallel_size.filter(|&asked| asked != size) {
        let message = format!("{asked} is not replicas × gpus-per-pod, {replicas} × {gpus_per_pod} = {size}");
        return refuse("tensor-parallel-size", message);
    }
    if size > MAX_RANKS {
        return refuse("tensor-parallel-size", format!("{size} ranks are more than {MAX_RANKS}"));
    }
    if size == 1 {
        return Ok(None);
    }
    let place = place(flags, origins, environment, replicas)?;
    let key = match &flags.group_key_file {
        Some(path) => {
            let key = GroupKey::from_file(path);
            Some(key.map_err(|error| ConfigError::new(origins.of("group-key-file"), one_line(&error, path)))?)
        }
        None if is_loopback(&place.leader_host) => None,
        None => {
            let message =
                "is missing: a group over several pods needs a shared secret of at least 16 bytes in a file";
            return refuse("group-key-file", message.into());
        }
    };
    let any_port = if replicas == 1 { 0 } else { MASTER_PORT };
    let sources = vec![
        format!("{replicas} pods × {gpus_per_pod} ranks = {size}"),
        format!("ordinal {} from {}", place.ordinal, place.source),
        format!("leader {}", place.leader_host),
    ];
    Ok(Some(GroupConfig {
        ordinal: place.ordinal as usize,
        replicas: replicas as usize,
        gpus_per_pod: gpus_per_pod as usize,
        leader_host: place.leader_host,
        master_port: flags.master_port.unwrap_or(any_port),
        peers: place.peers,
        rank_port: flags.rank_port.unwrap_or(place.rank_port),
        key,
        join_timeout: flags.join_timeout.map(Duration::from_secs),
        recovery_timeout: Duration::from_secs(flags.recovery_timeout),
        sources,
    }))
}

/// The error without the path, which the flag's user knows, unless it is about another one.
fn one_line(error: &impl std::fmt::Display, path: &Path) -> String {
    let text = error.to_string();
    let shown = path.display().to_string();
    if text.contains(&shown) { text } else { format!("{shown}: {text}") }
}

fn replicas(flags: &GroupFlags, origins: &Origins, environment: &Environment) -> Result<u64, ConfigError> {
    let of_lws = environment.get("LWS_GROUP_SIZE");
    let of_lws = of_lws.map(|text| number("LWS_GROUP_SIZE", text, 1)).transpose()?;
    let given = [
        ("--nnodes", "nnodes", flags.nnodes),
        ("--replicas", "replicas", flags.replicas),
        ("LWS_GROUP_SIZE", "", of_lws.filter(|_| flags.nnodes.is_none())),
    ];
    let mut given = given.into_iter().filter_map(|(name, flag, value)| Some((name, flag, value?)));
    let Some((first, _, value)) = given.next() else { return Ok(1) };
    match given.find(|(_, _, other)| *other != value) {
        None => Ok(value),
        Some((name, flag, other)) => {
            let origin = if flag.is_empty() { Origin::Environment(name.into()) } else { origins.of(flag) };
            Err(ConfigError::new(origin, format!("{other} contradicts {first}, which is {value}")))
        }
    }
}

fn place(
    flags: &GroupFlags,
    origins: &Origins,
    environment: &Environment,
    replicas: u64,
) -> Result<Place, ConfigError> {
    let loopback = |ordinal, source: &str| Place {
        ordinal,
        leader_host: "127.0.0.1".into(),
        peers: Vec::new(),
        rank_port: 0,
        source: source.into(),
    };
    if let Some(nnodes) = flags.nnodes {
        return explicit(flags, origins, nnodes);
    }
    if replicas == 1 {
        return Ok(loopback(0, "a single pod"));
    }
    if environment.keys().any(|name| name.starts_with("LWS_")) {
        return leader_worker_set(environment, replicas);
    }
    stateful_set(flags, origins, environment, replicas)
}

fn explicit(flags: &GroupFlags, origins: &Origins, nnodes: u64) -> Result<Place, ConfigError> {
    let refuse = |flag: &str, message: String| Err(ConfigError::new(origins.of(flag), message));
    let Some(ordinal) = flags.node_rank.or((nnodes == 1).then_some(0)) else {
        return refuse("node-rank", format!("is missing: with --nnodes {nnodes}, which of them is this?"));
    };
    if ordinal >= nnodes {
        return refuse("node-rank", format!("{ordinal} is not below --nnodes {nnodes}"));
    }
    let Some(leader_host) = flags.master_addr.clone().or((nnodes == 1).then(|| "127.0.0.1".to_owned()))
    else {
        return refuse("master-addr", "is missing: where is the node of --node-rank 0?".into());
    };
    if leader_host.trim().is_empty() || leader_host.contains(char::is_whitespace) {
        return refuse("master-addr", format!("{leader_host:?} is no host"));
    }
    Ok(Place { ordinal, leader_host, peers: Vec::new(), rank_port: 0, source: "--node-rank".into() })
}

fn leader_worker_set(environment: &Environment, replicas: u64) -> Result<Place, ConfigError> {
    let missing = |name: &str| {
        let message = "is missing: LeaderWorkerSet sets it beside the other LWS_ variables";
        ConfigError::new(Origin::Environment(name.into()), message)
    };
    let index = environment.get("LWS_WORKER_INDEX").ok_or_else(|| missing("LWS_WORKER_INDEX"))?;
    let ordinal = number("LWS_WORKER_INDEX", index, 0)?;
    if ordinal >= replicas {
        let message = format!("{ordinal} is outside of a group of {replicas} pods");
        return Err(ConfigError::new(Origin::Environment("LWS_WORKER_INDEX".into()), message));
    }
    let leader_host = environment.get("LWS_LEADER_ADDRESS").ok_or_else(|| missing("LWS_LEADER_ADDRESS"))?;
    Ok(Place {
        ordinal,
        leader_host: leader_host.clone(),
        peers: Vec::new(),
        rank_port: RANK_PORT,
        source: "LWS_WORKER_INDEX".into(),
    })
}

fn stateful_set(
    flags: &GroupFlags,
    origins: &Origins,
    environment: &Environment,
    replicas: u64,
) -> Result<Place, ConfigError> {
    let names = ["POD_NAME", "HOSTNAME"];
    let Some((source, name)) = names.iter().find_map(|name| Some((*name, environment.get(*name)?))) else {
        let message =
            "is missing: set it from metadata.name, or give --nnodes, --node-rank and --master-addr";
        return Err(ConfigError::new(Origin::Environment("POD_NAME".into()), message));
    };
    let refuse = |message: String| Err(ConfigError::new(Origin::Environment(source.into()), message));
    let Some((set, ordinal)) = split_pod_name(name) else {
        return refuse(format!(
            "{name:?} does not end in -<ordinal> as the pods of a StatefulSet do; set POD_NAME from metadata.name"
        ));
    };
    if ordinal >= replicas {
        return refuse(format!(
            "{name:?} is ordinal {ordinal}, outside of {replicas} replicas; ordinals must start at 0 \
             (spec.ordinals.start is not supported), and --replicas must be the StatefulSet's"
        ));
    }
    if let Some(text) = environment.get("POD_INDEX") {
        let index = number("POD_INDEX", text, 0)?;
        if index != ordinal {
            let message = format!("{index} contradicts {source} {name:?}, which is ordinal {ordinal}");
            return Err(ConfigError::new(Origin::Environment("POD_INDEX".into()), message));
        }
    }
    let Some(service) = &flags.service_name else {
        let message = "is missing: the name of the headless Service, through which pods find each other";
        return Err(ConfigError::new(origins.of("service-name"), message));
    };
    let Some(namespace) = flags.namespace.as_ref().or_else(|| environment.get("POD_NAMESPACE")) else {
        let message = "is missing: set it from metadata.namespace, or give --namespace";
        return Err(ConfigError::new(Origin::Environment("POD_NAMESPACE".into()), message));
    };
    let host = |ordinal| format!("{set}-{ordinal}.{service}.{namespace}.svc.{}", flags.cluster_domain);
    Ok(Place {
        ordinal,
        leader_host: host(0),
        peers: (0..replicas).map(host).collect(),
        rank_port: RANK_PORT,
        source: format!("{source} {name}"),
    })
}

/// The StatefulSet's name and the ordinal of a pod's name: the digits after its last dash, without leading zeros.
fn split_pod_name(name: &str) -> Option<(&str, u64)> {
    let (set, digits) = name.rsplit_once('-')?;
    let is_number =
        digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if set.is_empty() || !is_number { None } else { Some((set, digits.parse().ok()?)) }
}

fn number(variable: &str, text: &str, low: u64) -> Result<u64, ConfigError> {
    let parsed = text.parse::<u64>().ok().filter(|number| (low..=MAX_RANKS).contains(number));
    parsed.ok_or_else(|| {
        let message = format!("{text:?} is no whole number from {low} to {MAX_RANKS}");
        ConfigError::new(Origin::Environment(variable.into()), message)
    })
}

/// Whether a host's name or address cannot be outside of this machine.
fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    host.eq_ignore_ascii_case("localhost")
        || address.is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
#[path = "identity_tests.rs"]
mod tests;
