use std::io::Write;

use crate::config::{Command, Environment, GroupConfig, Parsed, Stop, parse};

fn parsed(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Option<GroupConfig>, String> {
    let environment: Environment =
        variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    let arguments = ["tandem", "serve", "model.gguf"].iter().chain(arguments).map(Into::into).collect();
    match parse(arguments, &environment) {
        Ok(Parsed { command: Command::Serve(config), .. }) => Ok(config.group),
        Err(Stop::Refused(error)) => Err(error.to_string()),
        other => panic!("{other:?}"),
    }
}

fn group(arguments: &[&str], variables: &[(&str, &str)]) -> GroupConfig {
    parsed(arguments, variables).unwrap_or_else(|error| panic!("{error}")).expect("a group")
}

fn refusal(arguments: &[&str], variables: &[(&str, &str)]) -> String {
    parsed(arguments, variables).expect_err("a refusal")
}

fn key_file() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"a secret of the whole group\n").unwrap();
    file
}

/// What the manifests set, for one pod, with `changes`; an empty value takes a variable away.
fn pod(key: &tempfile::NamedTempFile, changes: &[(&str, &str)]) -> Result<Option<GroupConfig>, String> {
    let key = key.path().to_str().unwrap().to_owned();
    let mut variables: Environment = [
        ("POD_NAME", "llama-3-70b-2"),
        ("POD_NAMESPACE", "models"),
        ("POD_INDEX", "2"),
        ("TANDEM_REPLICAS", "4"),
        ("TANDEM_GPUS_PER_POD", "2"),
        ("TANDEM_TENSOR_PARALLEL_SIZE", "8"),
        ("TANDEM_SERVICE_NAME", "llama-group"),
        ("TANDEM_GROUP_KEY_FILE", &key),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .collect();
    for &(name, value) in changes {
        variables.insert(name.to_owned(), value.to_owned());
    }
    let variables: Vec<(&str, &str)> =
        variables.iter().filter(|(_, v)| !v.is_empty()).map(|(n, v)| (n.as_str(), v.as_str())).collect();
    parsed(&[], &variables)
}

#[test]
fn a_process_by_itself_has_no_group_whatever_its_name() {
    for variables in [&[][..], &[("POD_NAME", "web-7")], &[("POD_INDEX", "x")], &[("HOSTNAME", "none")]] {
        assert!(matches!(parsed(&[], variables), Ok(None)), "{variables:?}");
    }
    assert!(matches!(parsed(&["--tensor-parallel-size", "1"], &[]), Ok(None)));
    assert!(matches!(parsed(&["--nnodes", "1"], &[]), Ok(None)));
}

#[test]
fn ranks_of_one_pod_need_nothing_else() {
    for arguments in
        [&["--tensor-parallel-size", "3"][..], &["--gpus-per-pod", "3"], &["--tp", "3", "--nnodes", "1"]]
    {
        let group = group(arguments, &[("HOSTNAME", "laptop")]);
        assert_eq!((group.ordinal, group.replicas, group.gpus_per_pod, group.size()), (0, 1, 3, 3));
        assert!(group.is_leader() && group.is_local() && group.key.is_none());
        assert_eq!((group.master_port, group.rank_port), (0, 0));
    }
}

#[test]
fn a_pod_of_a_stateful_set_knows_itself_and_its_leader() {
    let key = key_file();
    let group = pod(&key, &[]).unwrap().unwrap();
    assert_eq!((group.ordinal, group.replicas, group.gpus_per_pod, group.size()), (2, 4, 2, 8));
    assert_eq!((group.rank(0), group.rank(1)), (4, 5));
    assert_eq!(group.leader_host, "llama-3-70b-0.llama-group.models.svc.cluster.local");
    assert_eq!(group.peers[3], "llama-3-70b-3.llama-group.models.svc.cluster.local");
    assert_eq!((group.master_port, group.rank_port), (7400, 7401));
    assert!(!group.is_leader() && group.key.is_some() && group.join_timeout.is_none());
    assert_eq!(group.recovery_timeout.as_secs(), 300);
    // The label and the pod's own variable may be missing.
    let by_host =
        pod(&key, &[("POD_NAME", ""), ("HOSTNAME", "a-1-b-0"), ("POD_INDEX", "")]).unwrap().unwrap();
    assert_eq!(
        (by_host.ordinal, by_host.leader_host.as_str()),
        (0, "a-1-b-0.llama-group.models.svc.cluster.local")
    );
}

#[test]
fn every_contradiction_is_told_with_both_sides() {
    let key = key_file();
    type Case = (&'static [(&'static str, &'static str)], &'static [&'static str]);
    let cases: [Case; 15] = [
        (&[("POD_INDEX", "1")], &["POD_INDEX", "1 contradicts POD_NAME \"llama-3-70b-2\"", "ordinal 2"]),
        (&[("POD_INDEX", "two")], &["POD_INDEX", "\"two\" is no whole number"]),
        (&[("POD_NAME", "llama")], &["POD_NAME", "does not end in -<ordinal>"]),
        (&[("POD_NAME", "llama-02")], &["POD_NAME", "does not end in -<ordinal>"]),
        (&[("POD_NAME", "llama-")], &["POD_NAME", "does not end in -<ordinal>"]),
        (&[("POD_NAME", "-2")], &["POD_NAME", "does not end in -<ordinal>"]),
        (&[("POD_NAME", "llama-4"), ("POD_INDEX", "4")], &["ordinal 4", "4 replicas", "ordinals.start"]),
        (&[("POD_NAME", "")], &["POD_NAME", "is missing"]),
        (
            &[("TANDEM_REPLICAS", "3")],
            &["TENSOR_PARALLEL_SIZE", "8 is not replicas × gpus-per-pod, 3 × 2 = 6"],
        ),
        (&[("TANDEM_REPLICAS", "0")], &["TANDEM_REPLICAS", "0 is not in 1..=1024"]),
        (
            &[("TANDEM_GPUS_PER_POD", ""), ("TANDEM_TENSOR_PARALLEL_SIZE", "6")],
            &["6 ranks cannot be shared out evenly over 4 pods"],
        ),
        (&[("TANDEM_SERVICE_NAME", "")], &["--service-name", "headless Service"]),
        (&[("POD_NAMESPACE", "")], &["POD_NAMESPACE", "is missing"]),
        (&[("TANDEM_GROUP_KEY_FILE", "")], &["--group-key-file", "is missing"]),
        (&[("TANDEM_GROUP_KEY_FILE", "/nowhere")], &["TANDEM_GROUP_KEY_FILE", "/nowhere"]),
    ];
    for (changes, expected) in cases {
        let error = pod(&key, changes).expect_err("a refusal");
        for part in expected {
            assert!(error.contains(part), "{changes:?}: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn explicit_flags_say_everything_or_nothing() {
    let node =
        ["--tensor-parallel-size", "3", "--nnodes", "3", "--node-rank", "1", "--master-addr", "127.0.0.1"];
    // What the environment says of pods does not matter then.
    let found = group(&node, &[("POD_NAME", "web-0"), ("POD_INDEX", "0"), ("HOSTNAME", "x")]);
    assert_eq!((found.ordinal, found.replicas, found.gpus_per_pod), (1, 3, 1));
    assert_eq!((found.leader_host.as_str(), found.master_port, found.rank_port), ("127.0.0.1", 7400, 0));
    assert!(found.key.is_none() && !found.is_leader());
    let found = group(&[&node[..], &["--master-port", "7500", "--rank-port", "7600"]].concat(), &[]);
    assert_eq!((found.master_port, found.rank_port), (7500, 7600));

    assert!(refusal(&["--node-rank", "1"], &[]).contains("--node-rank: needs --nnodes"));
    assert!(refusal(&["--master-addr", "a"], &[]).contains("--master-addr: needs --nnodes"));
    assert!(refusal(&["--nnodes", "2"], &[]).contains("--node-rank: is missing"));
    assert!(
        refusal(&["--nnodes", "2", "--node-rank", "2", "--master-addr", "a"], &[])
            .contains("not below --nnodes 2")
    );
    assert!(refusal(&["--nnodes", "2", "--node-rank", "1"], &[]).contains("--master-addr: is missing"));
    assert!(
        refusal(&["--nnodes", "2", "--replicas", "3"], &[])
            .contains("--replicas: 3 contradicts --nnodes, which is 2")
    );
    assert!(
        refusal(&["--nnodes", "2", "--tp", "3"], &[])
            .contains("3 ranks cannot be shared out evenly over 2 pods")
    );
    let away = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "10.0.0.1"];
    assert!(refusal(&away, &[]).contains("--group-key-file: is missing"));
}

#[test]
fn leader_worker_set_gives_index_size_and_leader() {
    let key = key_file();
    let key = key.path().to_str().unwrap();
    let lws = |changes: &[(&str, &str)]| {
        let mut variables = vec![
            ("LWS_WORKER_INDEX", "1"),
            ("LWS_GROUP_SIZE", "2"),
            ("LWS_LEADER_ADDRESS", "vllm-0.vllm.default"),
            ("TANDEM_GROUP_KEY_FILE", key),
            ("POD_NAME", "vllm-0-1"),
        ];
        variables.retain(|(name, _)| changes.iter().all(|(changed, _)| changed != name));
        variables.extend(changes.iter().filter(|(_, value)| !value.is_empty()));
        parsed(&[], &variables)
    };
    let group = lws(&[]).unwrap().unwrap();
    assert_eq!((group.ordinal, group.replicas, group.leader_host.as_str()), (1, 2, "vllm-0.vllm.default"));
    assert!(lws(&[("LWS_WORKER_INDEX", "")]).unwrap_err().contains("LWS_WORKER_INDEX: is missing"));
    assert!(lws(&[("LWS_WORKER_INDEX", "2")]).unwrap_err().contains("outside of a group of 2"));
    assert!(lws(&[("LWS_GROUP_SIZE", "x")]).unwrap_err().contains("LWS_GROUP_SIZE"));
    assert!(lws(&[("LWS_LEADER_ADDRESS", "")]).unwrap_err().contains("LWS_LEADER_ADDRESS: is missing"));
    assert!(lws(&[("TANDEM_REPLICAS", "3")]).unwrap_err().contains("2 contradicts --replicas, which is 3"));
}

#[test]
fn a_rank_is_one_of_its_pod() {
    let rank = |arguments: &[&str]| {
        let arguments = ["tandem", "rank", "model.gguf"].iter().chain(arguments).map(Into::into).collect();
        parse(arguments, &Environment::new())
    };
    for (held, expected) in [(&[][..], None), (&["--held-blocks", "77"][..], Some(77))] {
        match rank(&[&["--tp", "2", "--local-rank", "1"][..], held].concat()) {
            Ok(Parsed { command: Command::Rank(config), .. }) => {
                assert_eq!((config.local_rank, config.group.size()), (1, 2));
                assert_eq!(config.held_blocks, expected);
            }
            other => panic!("{other:?}"),
        }
    }
    for bad in [&["--tp", "2", "--local-rank", "2"][..], &["--local-rank", "0"]] {
        assert!(matches!(rank(bad), Err(Stop::Refused(_))), "{bad:?}");
    }
}

/// Over all pods, every rank is somebody's, once.
#[test]
fn ranks_are_numbered_without_gap_or_repeat() {
    let key = key_file();
    for replicas in 2..7 {
        for gpus_per_pod in 1..5 {
            let mut ranks = Vec::new();
            for ordinal in 0..replicas {
                let (pods, gpus) = (replicas.to_string(), gpus_per_pod.to_string());
                let name = format!("a-{ordinal}");
                let changes = [
                    ("POD_NAME", name.as_str()),
                    ("POD_INDEX", ""),
                    ("TANDEM_REPLICAS", &pods),
                    ("TANDEM_GPUS_PER_POD", &gpus),
                    ("TANDEM_TENSOR_PARALLEL_SIZE", ""),
                ];
                let group = pod(&key, &changes).unwrap().unwrap();
                ranks.extend((0..group.gpus_per_pod).map(|local| group.rank(local)));
            }
            assert_eq!(ranks, (0..replicas * gpus_per_pod).collect::<Vec<_>>());
        }
    }
}
