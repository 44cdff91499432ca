//! What becomes of a group, and of the streams that run on it, when its processes are killed, stopped, hung or wrong. Every pod
//! is a real `tandem serve` with a rank of its own, every fault a real signal.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tandem_tests::pods::{
    Pods, Streamed, assert_same, insist, kill, rank_processes, requests, stream, stream_all, wait_for,
};
use tandem_tests::proxy::{Proxy, Weather};
use tandem_tests::server::Server;
use tandem_tests::{default_model, golden_path};

const TOKENS: usize = 40;

/// Runs of each fault: one, or as many as `TANDEM_SOAK` says.
fn runs() -> usize {
    std::env::var("TANDEM_SOAK").ok().and_then(|runs| runs.parse().ok()).unwrap_or(1)
}

/// One group at a time: their processes would take each other's cores, and deadlines are what these tests are about.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    // A test that failed has left nothing behind but its own failure.
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one process without a group answers.
fn expected() -> &'static [Streamed] {
    static EXPECTED: OnceLock<Vec<Streamed>> = OnceLock::new();
    EXPECTED.get_or_init(|| {
        let model = default_model();
        let alone = Server::start(&[model.to_str().expect("UTF-8"), "--max-model-len", "1024"]);
        let answers = stream_all(alone.port, &requests(TOKENS), 1, || ());
        assert!(answers.iter().all(|answer| answer.done && answer.logprobs.len() == TOKENS));
        answers
    })
}

fn group() -> Pods {
    Pods::start(&default_model(), 3, &[])
}

/// All streams end with the right answers although `fault` strikes in the middle; at least one was resumed.
fn survive(pods: &Pods, fault: impl FnOnce()) {
    let before = pods.leader().metric("llm_stream_resumes_total");
    answer_through(pods, fault);
    assert!(pods.leader().metric("llm_stream_resumes_total") > before, "streams were resumed");
}

/// All streams end with the right answers although `fault` strikes in the middle, whether they notice or not.
fn answer_through(pods: &Pods, fault: impl FnOnce()) {
    let answers = stream_all(pods.leader().port, &requests(TOKENS), 3, fault);
    assert_same(&answers, expected());
    let gap = answers.iter().map(|answer| answer.longest_gap).max().unwrap_or_default();
    println!("longest gap of a stream: {:.2} s", gap.as_secs_f64());
    assert_ledger(pods.leader());
}

/// `admitted = completed + errored + cancelled + in flight`, and nothing is in flight.
fn assert_ledger(leader: &Server) {
    wait_for("all requests have ended", || leader.metric("llm_requests_in_flight") == 0.0);
    let ended: f64 = ["completed", "errored", "cancelled"]
        .map(|what| leader.metric(&format!("llm_requests_{what}_total")))
        .iter()
        .sum();
    assert_eq!(leader.metric("llm_requests_admitted_total"), ended);
}

#[test]
fn streams_outlive_the_death_of_any_rank() {
    let _turn = turn();
    let pods = group();
    let mut ids: Vec<u32> = (0..3).flat_map(|pod| [pods.pod(pod).id(), pods.rank_of(pod)]).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 6, "a pod is a process and its rank another");
    assert_same(&stream_all(pods.leader().port, &requests(TOKENS), 1, || ()), expected());
    for _ in 0..runs() {
        for pod in [1, 0, 2] {
            let epoch = pods.leader().metric("llm_tp_group_epoch");
            let rank = pods.rank_of(pod);
            survive(&pods, || {
                let start = Instant::now();
                kill("KILL", rank);
                wait_for("the loss is seen", || {
                    pods.leader().metric("llm_tp_rank_up") < 3.0
                        || pods.leader().metric("llm_tp_group_epoch") > epoch
                });
                println!("the death of pod {pod}'s rank was seen after {} ms", start.elapsed().as_millis());
            });
            assert!(pods.leader().metric("llm_tp_group_epoch") > epoch);
            assert_ne!(pods.rank_of(pod), rank);
            pods.wait_until_ready();
        }
    }
}

#[test]
fn a_stopped_rank_is_missed_and_comes_back() {
    let _turn = turn();
    let pods = group();
    for _ in 0..runs() {
        let rank = pods.rank_of(1);
        survive(&pods, || {
            kill("STOP", rank);
            let seen = wait_for("silence is noticed", || pods.pod(2).get("/readyz").status != 200);
            println!("silence was noticed after {} ms", seen.as_millis());
            assert!(seen < Duration::from_secs(6), "{seen:?}");
            thread::sleep(Duration::from_secs(10).saturating_sub(seen));
            kill("CONT", rank);
        });
        assert_eq!(pods.rank_of(1), rank, "the same process, with its weights, is back");
        pods.wait_until_ready();
    }
}

#[test]
fn a_pod_that_is_lost_is_replaced_by_its_ordinal() {
    let _turn = turn();
    for _ in 0..runs() {
        let mut pods = group();
        let port = pods.leader().port;
        let answers = thread::scope(|scope| {
            let streams = scope.spawn(move || stream_all(port, &requests(TOKENS), 1, || ()));
            wait_for("streams run", || pods.leader().metric("llm_requests_running") >= 1.0);
            pods.kill_pod(2);
            wait_for("the leader misses it", || {
                let report = pods.leader().get("/readyz");
                report.status == 503 && report.body.contains("ordinal 2")
            });
            let refused = stream(port, &requests(4)[0], |_| ());
            assert!(
                refused.error.is_some_and(|error| error["code"] == 503),
                "new requests are refused meanwhile"
            );
            pods.start_pod(2, &[]);
            streams.join().expect("the streams do not panic")
        });
        assert_same(&answers, expected());
        pods.wait_until_ready();
        assert_ledger(pods.leader());
    }
}

#[test]
fn a_lost_leader_ends_its_streams_openly_and_a_new_one_finds_its_ranks() {
    let _turn = turn();
    let mut pods = group();
    for _ in 0..runs() {
        let ranks: Vec<u32> = [1, 2].map(|pod| pods.rank_of(pod)).to_vec();
        let port = pods.leader().port;
        let cut = thread::scope(|scope| {
            let streams = scope.spawn(move || stream_all(port, &requests(200), 3, || ()));
            wait_for("streams run", || pods.leader().metric("llm_generation_tokens_total") >= 30.0);
            pods.kill_pod(0);
            streams.join().expect("the streams do not panic")
        });
        assert!(cut.iter().all(|answer| !answer.done), "no stream is marked complete that was not");
        wait_for("followers see it", || pods.pod(1).get("/readyz").status == 503);
        assert_eq!(pods.pod(1).get("/livez").status, 200);
        assert_eq!(pods.pod(1).get("/startupz").status, 200);
        pods.start_pod(0, &[]);
        pods.wait_until_ready();
        assert_eq!([1, 2].map(|pod| pods.rank_of(pod)).to_vec(), ranks, "followers kept process and weights");
        assert_same(&stream_all(pods.leader().port, &requests(TOKENS), 1, || ()), expected());
    }
}

#[test]
fn a_rank_that_hangs_in_a_step_is_replaced_although_its_heart_beats() {
    let _turn = turn();
    for _ in 0..runs() {
        let breaks = survive_in_step(("TANDEM_TEST_HANG_AT_STEP", "20"));
        assert!(breaks.contains("was not done in"), "{breaks}");
    }
}

#[test]
fn a_rank_whose_computing_thread_panics_ends_and_is_replaced() {
    let _turn = turn();
    for _ in 0..runs() {
        let breaks = survive_in_step(("TANDEM_TEST_PANIC_AT_STEP", "20"));
        assert!(breaks.contains("the group breaks"), "{breaks}");
        assert!(!breaks.contains("was not done in"), "its connections end, nobody waits for it: {breaks}");
    }
}

/// Streams outlive a fault that one rank of a group has in a step; what the leader said meanwhile.
fn survive_in_step((fault, step): (&str, &str)) -> String {
    let flag = std::env::temp_dir().join(format!("tandem-fault-{}", std::process::id()));
    let environment = [(fault, step), ("TANDEM_TEST_FAULT_ONCE", flag.to_str().expect("UTF-8"))];
    std::fs::write(&flag, "").expect("the folder for temporary files is writable");
    let pods = Pods::prepare(&default_model(), 3, &[], &environment).start_all();
    survive(&pods, || ());
    assert!(!flag.exists(), "a rank had the fault");
    pods.leader().output()
}

/// A refusal of the moment, here of a model that is not there while its volume is mounted again, is none of the configuration.
#[test]
fn a_rank_that_cannot_be_started_again_at_once_is_tried_until_it_can() {
    let _turn = turn();
    let folder = tempfile::tempdir().expect("the folder for temporary files is writable");
    let model = folder.path().join("model.gguf");
    let mount = || std::os::unix::fs::symlink(default_model(), &model).expect("a link can be made");
    mount();
    let pods = Pods::start(&model, 3, &[]);
    for _ in 0..runs() {
        for pod in [0, 1] {
            let before = pods.pod(pod).metric("llm_rank_restarts_total");
            survive(&pods, || {
                std::fs::remove_file(&model).expect("it is there");
                kill("KILL", pods.rank_of(pod));
                wait_for("it was tried again", || {
                    pods.pod(pod).metric("llm_rank_restarts_total") >= before + 3.0
                });
                mount();
            });
            pods.wait_until_ready();
        }
    }
}

/// A network that parts, delays, loses one direction, or ends a connection for one side only: streams go on when it heals, under
/// exactly one live epoch.
#[test]
fn a_bad_network_delays_streams_and_changes_nothing() {
    let _turn = turn();
    let mut pods = Pods::prepare(&default_model(), 3, &[], &[]);
    let network = Proxy::start(pods.master_port());
    pods.start_pod(0, &[]);
    pods.start_pod(1, &["--master-port", &network.port.to_string()]);
    pods.start_pod(2, &[]);
    pods.wait_until_ready();
    for _ in 0..runs() {
        for weather in [Weather::Partition, Weather::Deaf, Weather::Mute, Weather::HalfOpen, Weather::Cut] {
            let epoch = pods.leader().metric("llm_tp_group_epoch");
            // Steps need no word of a rank that only computes: streams may be done before its silence is noticed.
            let check = if weather == Weather::Mute { answer_through } else { survive };
            check(&pods, || {
                network.set(weather);
                let seen = wait_for("it is noticed", || pods.leader().get("/readyz").status == 503);
                println!("{weather:?} was noticed after {} ms", seen.as_millis());
                assert!(seen < Duration::from_secs(6), "{seen:?}");
                thread::sleep(Duration::from_secs(2));
                network.set(Weather::Fine);
            });
            pods.wait_until_ready();
            let epochs: Vec<f64> = (0..3).map(|pod| pods.pod(pod).metric("llm_tp_group_epoch")).collect();
            assert!(epochs[0] > epoch && epochs.iter().all(|other| *other == epochs[0]), "{epochs:?}");
        }
        // Delay alone breaks nothing.
        let breaks = pods.leader().metric("llm_group_breaks_total");
        network.set(Weather::Slow);
        assert_same(&stream_all(pods.leader().port, &requests(4), 1, || ()), &short_answers());
        network.set(Weather::Fine);
        assert_eq!(pods.leader().metric("llm_group_breaks_total"), breaks);
    }
}

/// What a new process answers to short requests.
fn short_answers() -> Vec<Streamed> {
    let model = default_model();
    let alone = Server::start(&[model.to_str().expect("UTF-8"), "--max-model-len", "1024"]);
    stream_all(alone.port, &requests(4), 1, || ())
}

/// The group is stopped and started as a whole, again and again, under clients that ask again what was not answered.
#[test]
fn restarts_of_the_whole_group_lose_nothing() {
    let _turn = turn();
    let mut pods = group();
    for _ in 0..runs() {
        // The API's port changes with the process here: clients learn the new one, as they would of a Service.
        let port = pods.leader().port;
        let before = thread::scope(|scope| {
            let clients = scope.spawn(move || stream_all(port, &requests(TOKENS), 1, || ()));
            wait_for("streams run", || pods.leader().metric("llm_requests_running") >= 1.0);
            (0..3).for_each(|pod| pods.pod(pod).signal("TERM"));
            clients.join().expect("clients do not panic")
        });
        for pod in &mut pods.pods {
            assert!(pod.as_mut().expect("it runs").wait(Duration::from_secs(90)).success());
        }
        (0..3).for_each(|ordinal| pods.start_pod(ordinal, &[]));
        let port = pods.leader().port;
        for (index, (answer, body)) in before.into_iter().zip(requests(TOKENS)).enumerate() {
            let whole = answer.done && answer.error.is_none();
            let answer = if whole { answer } else { insist(port, &body) };
            assert_same(&[answer], &expected()[index..=index]);
        }
        assert_same(&[insist(port, &requests(TOKENS)[0])], &expected()[..1]);
    }
}

#[test]
fn strangers_are_refused_with_both_sides_named() {
    let _turn = turn();
    for _ in 0..runs() {
        let mut pods = group();
        let short = Duration::from_secs(60);
        let wrong_key = std::env::temp_dir().join(format!("tandem-other-key-{}", std::process::id()));
        std::fs::write(&wrong_key, "the secret of another group").expect("a file");
        pods.kill_pod(1);
        wait_for("the group is broken", || pods.leader().get("/readyz").status == 503);
        let cases: [(&[&str], &[&str]); 4] = [
            (&["--kv-cache-dtype", "f32"], &["kv-cache-dtype", "f32", "bf16"]),
            (&["--max-num-batched-tokens", "128"], &["max-num-batched-tokens", "128", "512"]),
            (&["--isa", "scalar"], &["isa", "scalar"]),
            (&["--group-key-file", wrong_key.to_str().expect("UTF-8")], &["key"]),
        ];
        for (arguments, expected) in cases {
            let stranger = pods.spawn(1, arguments);
            wait_for("both sides tell the reason", || {
                let (leader, own) = (pods.leader().get("/readyz").body, stranger.peek("/readyz"));
                expected.iter().all(|part| leader.contains(part) && own.contains(part))
            });
            assert_eq!(pods.leader().get("/readyz").status, 503);
        }
        assert!(pods.leader().metric("llm_group_refusals_total") >= 4.0, "a wrong key counts, too");
        // The right one still gets in, and a second one of the same ordinal does not.
        pods.start_pod(1, &[]);
        pods.wait_until_ready();
        let mut double = pods.spawn(1, &[]);
        wait_for("the double is told", || double.peek("/readyz").contains("is taken by"));
        assert_eq!(pods.leader().get("/readyz").status, 200, "the group does not notice");
        assert_same(&stream_all(pods.leader().port, &requests(TOKENS), 1, || ()), expected());
        double.signal("TERM");
        assert!(double.wait(short).success());
        let _ = std::fs::remove_file(wrong_key);
    }
}

#[test]
fn a_rank_of_another_model_or_size_is_refused() {
    let _turn = turn();
    for _ in 0..runs() {
        let model = golden_path("tiny-tp8");
        let other = golden_path("tiny-mha-f16");
        let pods = Pods::prepare(&model, 2, &["--max-model-len", "64"], &[]);
        let leader = pods.spawn(0, &[]);
        let cases: [(&[&str], &[&str]); 2] = [
            (
                &["--tensor-parallel-size", "4", "--nnodes", "4"],
                &["tensor-parallel-size", "has 4", "the leader 2"],
            ),
            (&["--model", other.to_str().expect("UTF-8")], &["model: "]),
        ];
        for (arguments, expected) in cases {
            let stranger = pods.spawn(1, arguments);
            wait_for("both sides tell the reason", || {
                let (leader, own) = (leader.peek("/readyz"), stranger.peek("/readyz"));
                expected.iter().all(|part| leader.contains(part) && own.contains(part))
            });
        }
        let _right = pods.spawn(1, &[]);
        assert!(leader.becomes_ready(), "{}", leader.output());
    }
}

#[test]
fn a_group_that_is_never_whole_says_who_is_missing() {
    let _turn = turn();
    for _ in 0..runs() {
        let pods = Pods::prepare(&default_model(), 3, &[], &[]);
        let mut leader = pods.spawn(0, &["--join-timeout", "20"]);
        let mut lonely = pods.spawn(1, &[]);
        wait_for("it tells who is missing", || {
            let report = leader.peek("/readyz");
            report.contains("ordinal 2") && !report.contains("ordinal 1")
        });
        assert_eq!(leader.get("/readyz").status, 503);
        wait_for("loads are over", || {
            [&leader, &lonely].iter().all(|pod| pod.peek("/startupz").contains("started"))
        });
        // There is nothing that it could hold up.
        lonely.signal("TERM");
        assert!(lonely.wait(Duration::from_secs(10)).success());
        wait_for("the leader knows", || leader.peek("/readyz").contains("ordinal 1 has left"));
        assert!(!leader.wait(Duration::from_secs(60)).success());
        assert!(leader.output().contains("ordinal 2 has not called"), "{}", leader.output());
    }
}

#[test]
fn a_pod_that_is_told_to_stop_leaves_between_two_steps() {
    let _turn = turn();
    for _ in 0..runs() {
        let mut pods = group();
        // Idle: it goes at once.
        let mut leaving = pods.pods[2].take().expect("it runs");
        leaving.signal("TERM");
        assert!(leaving.wait(Duration::from_secs(20)).success());
        wait_for("the group waits for it", || pods.leader().get("/readyz").body.contains("ordinal 2"));
        pods.start_pod(2, &[]);
        pods.wait_until_ready();
        // Busy: what runs is finished first, and nothing fails, not even what goes through the pod that leaves.
        let answers = stream_all(pods.pod(1).port, &requests(TOKENS), 3, || pods.pod(1).signal("TERM"));
        assert_same(&answers, expected());
        let mut leaving = pods.pods[1].take().expect("it runs");
        assert!(leaving.wait(Duration::from_secs(60)).success());
        assert_ledger(pods.leader());
        pods.start_pod(1, &[]);
        pods.wait_until_ready();
        // All at once, as when a StatefulSet is deleted: the leader finishes what runs, the others stay for it.
        let answers = stream_all(pods.leader().port, &requests(TOKENS), 3, || {
            (0..3).for_each(|pod| pods.pod(pod).signal("TERM"));
        });
        assert_same(&answers, expected());
        for pod in &mut pods.pods {
            assert!(pod.as_mut().expect("it runs").wait(Duration::from_secs(60)).success());
        }
    }
}

#[test]
fn every_pod_answers_and_only_the_leader_counts() {
    let _turn = turn();
    let pods = group();
    let body = &requests(TOKENS)[3];
    for pod in 0..3 {
        let answer = stream(pods.pod(pod).port, body, |_| ());
        assert_same(&[answer], &expected()[3..4]);
        let models = pods.pod(pod).get("/v1/models").json();
        assert_eq!(models["data"][0]["object"], "model");
        assert_eq!(pods.pod(pod).metric("llm_tp_rank_up"), 3.0);
    }
    assert_eq!(pods.leader().metric("llm_requests_admitted_total"), 3.0);
    assert!(!pods.pod(1).get("/metrics").body.contains("llm_requests_admitted_total"));
    // A client of a follower that leaves is gone for the leader too.
    let long = json!({ "prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": true, "stream": true });
    let connection = pods.pod(2).open("/v1/completions", &long);
    wait_for("it runs", || pods.leader().metric("llm_requests_running") == 1.0);
    drop(connection);
    wait_for("it is cancelled", || pods.leader().metric("llm_requests_cancelled_total") == 1.0);
    // One hop, never two.
    let request = "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx-tandem-forwarded: 1\r\n\
                   content-length: 2\r\n\r\n{}";
    let refused = tandem_tests::server::exchange(pods.pod(1).port, request);
    assert_eq!(refused.status, 503);
}

#[test]
fn ranks_of_one_pod_are_children_that_end_with_it() {
    let _turn = turn();
    let model = default_model();
    // Memory as each process finds it: a rank that is started again finds less than the first one did.
    let mut pod =
        Server::start(&[model.to_str().expect("UTF-8"), "--tensor-parallel-size", "3", "--threads", "1"]);
    let ranks = rank_processes(pod.id());
    assert_eq!(ranks.len(), 3);
    assert_same(&stream_all(pod.port, &requests(TOKENS), 3, || kill("KILL", ranks[1])), expected());
    let ranks = rank_processes(pod.id());
    pod.signal("KILL");
    pod.wait(Duration::from_secs(10));
    wait_for("no rank is left", || {
        ranks.iter().all(|rank| !std::path::Path::new(&format!("/proc/{rank}/exe")).exists())
    });
}
