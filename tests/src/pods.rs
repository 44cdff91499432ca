//! Pods of one tensor-parallel group: real `tandem serve` processes on ports of their own, with everything that goes wrong.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{Server, free_port, post_request};

/// Generous: a loaded machine runs several tests and an unoptimised build.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// A group of pods with one rank each.
pub struct Pods {
    pub pods: Vec<Option<Server>>,
    master_port: u16,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    key: PathBuf,
}

impl Pods {
    /// Starts `size` pods of one rank each and waits until all are ready.
    pub fn start(model: &Path, size: usize, arguments: &[&str]) -> Self {
        let pods = Self::prepare(model, size, arguments, &[]);
        pods.start_all()
    }

    /// A group whose pods are started one by one.
    pub fn prepare(model: &Path, size: usize, arguments: &[&str], environment: &[(&str, &str)]) -> Self {
        let key = std::env::temp_dir().join(format!("tandem-key-{}-{}", std::process::id(), free_port()));
        std::fs::write(&key, "the secret of a test's group")
            .expect("the folder for temporary files is writable");
        let usual = ["--threads", "1", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64MiB"];
        let mut all = vec![model.display().to_string()];
        all.extend(usual.map(ToString::to_string));
        replace_flags(&mut all, arguments);
        let environment = environment.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        Self {
            pods: (0..size).map(|_| None).collect(),
            master_port: free_port(),
            arguments: all,
            environment,
            key,
        }
    }

    pub fn start_all(mut self) -> Self {
        (0..self.pods.len()).for_each(|ordinal| self.start_pod(ordinal, &[]));
        self.wait_until_ready();
        self
    }

    /// Starts one pod, as a StatefulSet would again; `arguments` win over those of the group.
    pub fn start_pod(&mut self, ordinal: usize, arguments: &[&str]) {
        self.pods[ordinal] = Some(self.spawn(ordinal, arguments));
    }

    /// A process that says that it is the pod of this ordinal.
    pub fn spawn(&self, ordinal: usize, arguments: &[&str]) -> Server {
        let place = [
            ("--tensor-parallel-size", self.pods.len().to_string()),
            ("--nnodes", self.pods.len().to_string()),
            ("--node-rank", ordinal.to_string()),
            ("--master-addr", "127.0.0.1".into()),
            ("--master-port", self.master_port.to_string()),
            ("--group-key-file", self.key.display().to_string()),
        ];
        let mut all: Vec<String> = self.arguments.clone();
        if arguments.contains(&"--model") {
            all.remove(0);
        }
        for (flag, value) in place {
            if !arguments.contains(&flag) {
                all.extend([flag.to_owned(), value]);
            }
        }
        replace_flags(&mut all, arguments);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        Server::spawn_with(&all, &self.environment)
    }

    /// Where ranks call the leader.
    pub fn master_port(&self) -> u16 {
        self.master_port
    }

    pub fn pod(&self, ordinal: usize) -> &Server {
        self.pods[ordinal].as_ref().expect("the pod runs")
    }

    pub fn leader(&self) -> &Server {
        self.pod(0)
    }

    /// Waits until every pod says that the group is ready.
    pub fn wait_until_ready(&self) {
        if !self.pods.iter().flatten().all(Server::becomes_ready) {
            let said: Vec<String> = self.pods.iter().flatten().map(Server::output).collect();
            panic!("a pod is not ready; they said:\n{}", said.join("\n--- next pod\n"));
        }
    }

    /// The process id of the rank in a pod.
    pub fn rank_of(&self, ordinal: usize) -> u32 {
        let mut ranks = rank_processes(self.pod(ordinal).id());
        assert_eq!(ranks.len(), 1, "one rank in a pod; it said:\n{}", self.pod(ordinal).output());
        ranks.remove(0)
    }

    /// Removes a pod at once, as the loss of a machine does: its processes are killed.
    pub fn kill_pod(&mut self, ordinal: usize) {
        let pod = self.pods[ordinal].take().expect("the pod runs");
        let ranks = rank_processes(pod.id());
        // The parent first: its rank must not be restarted.
        drop(pod);
        ranks.into_iter().for_each(|rank| kill("KILL", rank));
    }
}

/// Adds flags and their values in place of those of the same name.
pub fn replace_flags(all: &mut Vec<String>, new: &[&str]) {
    let mut is_value_of_old = false;
    all.retain(|argument| {
        let is_old = new.contains(&argument.as_str());
        let is_dropped = std::mem::replace(&mut is_value_of_old, is_old) || is_old;
        !is_dropped
    });
    all.extend(new.iter().map(ToString::to_string));
}

impl Drop for Pods {
    fn drop(&mut self) {
        // Pods first, so that nobody starts a rank again; ranks end with their parents.
        self.pods.clear();
        let _ = std::fs::remove_file(&self.key);
    }
}

/// The ranks that a pod's process started; what renders its chat templates is none.
pub fn rank_processes(pid: u32) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of_thread = |thread: std::fs::DirEntry| {
        let text = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
    };
    let is_rank = |pid: &u32| {
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        arguments.split(|byte| *byte == 0).nth(1) == Some(b"rank")
    };
    threads.flat_map(of_thread).filter(is_rank).collect()
}

/// Sends a signal; the process may be gone.
pub fn kill(signal: &str, pid: u32) {
    let done = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status();
    done.expect("kill runs");
}

/// Waits until something holds.
pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
    start.elapsed()
}

/// Requests that together use what a step can do: greedy and sampled, short and long, with log-probabilities.
pub fn requests(tokens: usize) -> Vec<Value> {
    let prompt =
        |salt: usize, len: usize| (0..len).map(|at| 100 + (salt * 37 + at * 11) % 5000).collect::<Vec<_>>();
    (0..8)
        .map(|index| {
            let mut body = json!({
                "prompt": prompt(if index % 2 == 0 { 7 } else { index }, 10 + 20 * index),
                "max_tokens": tokens, "ignore_eos": true, "stream": true, "temperature": 0, "logprobs": 1,
                "return_token_ids": true,
            });
            if index % 3 == 0 {
                body["temperature"] = json!(0.9);
                body["seed"] = json!(index);
                body["repetition_penalty"] = json!(1.1);
            }
            body
        })
        .collect()
}

/// One streamed answer as it was seen: text and log-probabilities in order, and how it ended.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Streamed {
    pub text: String,
    /// As printed: equal text is equal bits.
    pub logprobs: Vec<String>,
    /// Where they were asked for.
    pub token_ids: Vec<u64>,
    pub finish: Option<String>,
    pub error: Option<Value>,
    /// `[DONE]` came.
    pub done: bool,
    /// The longest time between two events.
    pub longest_gap: Duration,
}

/// Reads a streamed completion to its end; `seen` is called after every event.
pub fn stream(port: u16, body: &Value, mut seen: impl FnMut(&Streamed)) -> Streamed {
    let mut answer = Streamed::default();
    let Ok(mut connection) = std::net::TcpStream::connect(("127.0.0.1", port)) else { return answer };
    connection.set_read_timeout(Some(DEADLINE)).expect("a timeout can be set");
    if connection.write_all(post_request("/v1/completions", &body.to_string()).as_bytes()).is_err() {
        return answer;
    }
    let mut last = Instant::now();
    for line in BufReader::new(connection).lines().map_while(Result::ok) {
        let Some(event) = line.strip_prefix("data: ") else {
            if let Ok(refusal) = serde_json::from_str::<Value>(&line)
                && refusal["error"].is_object()
            {
                answer.error = Some(refusal["error"].clone());
            }
            continue;
        };
        answer.longest_gap = answer.longest_gap.max(last.elapsed());
        last = Instant::now();
        if event == "[DONE]" {
            answer.done = true;
            continue;
        }
        let event: Value = serde_json::from_str(event).expect("events are JSON");
        if event["error"].is_object() {
            answer.error = Some(event["error"].clone());
        }
        if let Some(choice) = event["choices"].get(0) {
            answer.text += choice["text"].as_str().unwrap_or_default();
            if let Some(list) = choice["logprobs"]["token_logprobs"].as_array() {
                answer.logprobs.extend(list.iter().map(ToString::to_string));
            }
            if let Some(list) = choice["token_ids"].as_array() {
                answer.token_ids.extend(list.iter().filter_map(Value::as_u64));
            }
            if let Some(reason) = choice["finish_reason"].as_str() {
                answer.finish = Some(reason.to_owned());
            }
        }
        seen(&answer);
    }
    answer
}

/// All requests at once; `meanwhile` is called when each of the streams has brought `after` tokens.
pub fn stream_all(port: u16, bodies: &[Value], after: usize, meanwhile: impl FnOnce()) -> Vec<Streamed> {
    let (told, heard) = std::sync::mpsc::channel();
    thread::scope(|scope| {
        let streams: Vec<_> = bodies
            .iter()
            .map(|body| {
                let told = told.clone();
                scope.spawn(move || {
                    let mut has_told = false;
                    let answer = stream(port, body, |answer| {
                        if !has_told && answer.logprobs.len() >= after {
                            has_told = true;
                            // The test may have given up.
                            let _ = told.send(());
                        }
                    });
                    if !has_told {
                        let _ = told.send(());
                    }
                    answer
                })
            })
            .collect();
        for _ in bodies {
            heard.recv_timeout(DEADLINE).expect("every stream begins");
        }
        meanwhile();
        streams.into_iter().map(|stream| stream.join().expect("a stream does not panic")).collect()
    })
}

/// Asks again until there is a whole answer, as a client does that retries what may be retried.
pub fn insist(port: u16, body: &Value) -> Streamed {
    let start = Instant::now();
    loop {
        let answer = stream(port, body, |_| ());
        if answer.done && answer.error.is_none() {
            return answer;
        }
        assert!(start.elapsed() < 2 * DEADLINE, "no answer: {answer:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Every stream ended as it should, with the very answer that was expected.
pub fn assert_same(found: &[Streamed], expected: &[Streamed]) {
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.error, None, "request {index}");
        assert!(found.done, "request {index} has no end: {found:?}");
        assert_eq!((&found.text, &found.finish), (&expected.text, &expected.finish), "request {index}");
        assert_eq!(found.logprobs, expected.logprobs, "request {index}");
    }
}
