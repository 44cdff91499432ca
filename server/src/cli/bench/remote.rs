//! The speed of a server over HTTP, whoever wrote it.
//!
//! For each concurrency c, c clients send requests one after another until all are done: prompts random and distinct,
//! temperature 0, end tokens ignored, answers streamed. Prompts are token ids where the server takes them (each prompt
//! then has exactly the length asked for), else words, whose number is fitted with the server's own count.
//!
//! Rates are tokens of complete answers over the time from the first request's start to the last one's end. TTFT counts
//! from before the connection is opened; TPOT is the rest of the time over the tokens after the first.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::super::Exit;
use super::client::{Client, Failure};
use super::prompts::Random;
use super::remote_report::{Report, Row};
use super::statistics::Summary;
use super::stream::Completion;
use crate::config::{BenchLoad, Endpoint, ServerTarget};

/// Vocabularies that are tried, as powers of two: the largest whose last id the server takes.
const VOCABULARY_BITS: std::ops::RangeInclusive<u32> = 5..=15;
/// Statuses by which servers say that they do not take a prompt; others say something of the request or of themselves.
const PROMPT_REFUSED: [u16; 3] = [400, 422, 500];
/// Prompts before the measurement are numbered from here on, so that they are none of the measured ones.
const FIRST_WARM_UP: u64 = 1 << 40;

/// Measures a server.
///
/// # Errors
/// If it does not say which models it has and nobody named one. Requests that fail are counted in the report.
pub(super) fn measure_server(target: ServerTarget, load: &BenchLoad) -> Result<Report, Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Exit::failed(format!("no runtime: {e}")))?;
    runtime.block_on(measure(Client::new(target), load))
}

async fn measure(client: Client, load: &BenchLoad) -> Result<Report, Exit> {
    let target = client.target().clone();
    let url = format!("http://{}{}", target.url.authority, target.url.prefix);
    let model = match target.model {
        Some(model) => model,
        None => client.first_model().await.map_err(|e| {
            Exit::failed(format!(
                "--url: {url}/v1/models: {e}; is it a server of this API? --model names a model"
            ))
        })?,
    };
    // Not the same on every run: a server's prefix cache would know the prompts of the run before.
    let seed = load.seed.unwrap_or_else(seed_of_now);
    let client = Arc::new(client);
    let prompts =
        choose_prompts(&client, &Requests { endpoint: target.endpoint, model: &model, seed }, load).await;
    let requests = Requests { endpoint: target.endpoint, model: &model, seed };
    let (mut results, mut first_failure) = (Vec::new(), None);
    let mut sent = 0;
    for &concurrency in &load.concurrency {
        tracing::info!(concurrency, "measuring");
        let num_requests = load.num_requests.unwrap_or((4 * concurrency).max(8));
        let bodies =
            (0..num_requests as u64).map(|i| requests.body(prompts, sent + i, load.output_tokens)).collect();
        sent += num_requests as u64;
        let (row, failure) = measure_one(&client, bodies, load, concurrency).await;
        results.push(row);
        first_failure = first_failure.or(failure);
    }
    Ok(Report {
        url,
        endpoint: target.endpoint.path(),
        model,
        prompts: prompts.name(),
        seed,
        results,
        first_failure: first_failure.map(|failure| failure.to_string()),
    })
}

fn seed_of_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// What prompts are made of.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Prompts {
    /// `length` ids below `vocab_size`.
    TokenIds { length: usize, vocab_size: u64 },
    /// As many words.
    Words(usize),
}

impl Prompts {
    fn name(self) -> &'static str {
        match self {
            Self::TokenIds { .. } => "token ids",
            Self::Words(_) => "words",
        }
    }
}

/// Writes requests.
struct Requests<'a> {
    endpoint: Endpoint,
    model: &'a str,
    seed: u64,
}

impl Requests<'_> {
    fn body(&self, prompts: Prompts, index: u64, output_tokens: usize) -> Bytes {
        let mut random = Random::of_prompt(self.seed, index);
        let prompt = match prompts {
            Prompts::TokenIds { length, vocab_size } => json!(random.token_ids(length, vocab_size)),
            Prompts::Words(length) => json!(random.words(length)),
        };
        self.body_of(prompt, output_tokens)
    }

    fn body_of(&self, prompt: Value, output_tokens: usize) -> Bytes {
        let mut body = json!({
            "model": self.model, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": true, "stream": true,
            "stream_options": { "include_usage": true },
        });
        match self.endpoint {
            Endpoint::Completions => body["prompt"] = prompt,
            Endpoint::Chat => body["messages"] = json!([{ "role": "user", "content": prompt }]),
        }
        body.to_string().into()
    }
}

/// Finds out which prompts the server takes, and warms it up with one. What else is wrong with the server shows in the
/// measurement.
async fn choose_prompts(client: &Client, requests: &Requests<'_>, load: &BenchLoad) -> Prompts {
    let length = load.prompt_tokens;
    if requests.endpoint == Endpoint::Completions {
        for bits in VOCABULARY_BITS.rev() {
            let body = requests.body_of(json!([(1u64 << bits) - 1]), 1);
            match client.complete(body, 1).await {
                Err(Failure::Status { status, .. }) if PROMPT_REFUSED.contains(&status) => {}
                _ => {
                    let prompts = Prompts::TokenIds { length, vocab_size: 1 << bits };
                    let _ = client.complete(requests.body(prompts, FIRST_WARM_UP, 2), 2).await;
                    return prompts;
                }
            }
        }
    }
    let mut counts = Vec::new();
    for (index, words) in [(FIRST_WARM_UP, length), (FIRST_WARM_UP + 1, length.div_ceil(2))] {
        let completion = client.complete(requests.body(Prompts::Words(words), index, 1), 1).await;
        let tokens = completion.ok().and_then(|completion| completion.prompt_tokens);
        counts.extend(tokens.map(|tokens| (words, tokens)));
    }
    Prompts::Words(num_words(length, &counts))
}

/// The number of words that makes `tokens` tokens, from (words, tokens) of two prompts; one for one if they tell nothing.
fn num_words(tokens: usize, counts: &[(usize, usize)]) -> usize {
    let &[(many_words, many_tokens), (few_words, few_tokens)] = counts else { return tokens };
    if many_words <= few_words || many_tokens <= few_tokens {
        return tokens;
    }
    let per_word = (many_tokens - few_tokens) as f64 / (many_words - few_words) as f64;
    // What every prompt has besides its words: the template of a chat, a token at the beginning.
    let besides = many_tokens as f64 - per_word * many_words as f64;
    (((tokens as f64 - besides) / per_word).round() as usize).max(1)
}

/// One concurrency, and the first request that failed.
async fn measure_one(
    client: &Arc<Client>,
    bodies: Vec<Bytes>,
    load: &BenchLoad,
    concurrency: usize,
) -> (Row, Option<Failure>) {
    let output_tokens = load.output_tokens;
    let bodies: Arc<[Bytes]> = bodies.into();
    let next = Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..concurrency.min(bodies.len()) {
        let (client, bodies, next) = (client.clone(), bodies.clone(), next.clone());
        clients.spawn(async move {
            let mut outcomes = Vec::new();
            while let Some(body) = bodies.get(next.fetch_add(1, Ordering::Relaxed)) {
                outcomes.push(client.complete(body.clone(), output_tokens).await);
            }
            outcomes
        });
    }
    let outcomes = clients.join_all().await.into_iter().flatten().collect();
    row(outcomes, load, concurrency, started.elapsed().as_secs_f64())
}

fn row(
    outcomes: Vec<Result<Completion, Failure>>,
    load: &BenchLoad,
    concurrency: usize,
    wall_seconds: f64,
) -> (Row, Option<Failure>) {
    let num_requests = outcomes.len();
    let (mut completions, mut errors, mut first_failure) = (Vec::new(), BTreeMap::new(), None);
    for outcome in outcomes {
        match outcome {
            Ok(completion) => completions.push(completion),
            Err(failure) => {
                *errors.entry(failure.kind()).or_insert(0) += 1;
                first_failure.get_or_insert(failure);
            }
        }
    }
    let sum = |count: &dyn Fn(&Completion) -> usize| completions.iter().map(count).sum::<usize>();
    let total_prompt_tokens = sum(&|c| c.prompt_tokens.unwrap_or(load.prompt_tokens));
    let total_output_tokens = sum(&|c| c.output_tokens);
    let row = Row {
        concurrency,
        num_requests,
        num_errors: num_requests - completions.len(),
        errors,
        total_prompt_tokens,
        total_cached_tokens: sum(&|c| c.cached_tokens),
        total_output_tokens,
        wall_seconds,
        output_tokens_per_second: total_output_tokens as f64 / wall_seconds,
        prompt_tokens_per_second: total_prompt_tokens as f64 / wall_seconds,
        ttft_ms: Summary::of(completions.iter().map(|c| c.ttft).collect()),
        tpot_ms: Summary::of(completions.iter().filter_map(|c| c.tpot).collect()),
    };
    (row, first_failure)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn words_are_fitted_to_the_tokens_that_the_server_counts() {
        // Two tokens for each word and ten besides.
        assert_eq!(num_words(512, &[(512, 1034), (256, 522)]), 251);
        assert_eq!(num_words(512, &[(512, 512), (256, 256)]), 512);
        assert_eq!(num_words(5, &[(5, 105), (3, 103)]), 1, "the template alone is longer");
        assert_eq!(num_words(512, &[]), 512);
        assert_eq!(num_words(1, &[(1, 9), (1, 9)]), 1);
    }

    #[test]
    fn a_row_counts_what_was_complete() {
        let completion = |prompt_tokens, ms| {
            let (ttft, tpot) = (Duration::from_millis(ms), Some(Duration::from_millis(1)));
            Ok(Completion { prompt_tokens, cached_tokens: 3, output_tokens: 4, ttft, tpot })
        };
        let outcomes = vec![
            completion(Some(11), 10),
            Err(Failure::Timeout(Duration::from_secs(1))),
            completion(None, 30),
            Err(Failure::EarlyEnd("cut".to_owned())),
            Err(Failure::EarlyEnd("cut".to_owned())),
        ];
        let (prompt_tokens, output_tokens, concurrency) = (9, 4, vec![2]);
        let load = BenchLoad { prompt_tokens, output_tokens, concurrency, num_requests: None, seed: None };
        let (row, failure) = row(outcomes, &load, 2, 2.0);
        assert_eq!((row.num_requests, row.num_errors), (5, 3));
        assert_eq!(row.errors, BTreeMap::from([("timeout".to_owned(), 1), ("early_end".to_owned(), 2)]));
        assert_eq!((row.total_prompt_tokens, row.total_output_tokens, row.total_cached_tokens), (20, 8, 6));
        assert_eq!((row.output_tokens_per_second, row.prompt_tokens_per_second), (4.0, 10.0));
        assert_eq!((row.ttft_ms.mean, row.tpot_ms.p99), (20.0, 1.0));
        assert_eq!(failure, Some(Failure::Timeout(Duration::from_secs(1))));
    }

    #[test]
    fn requests_ask_for_all_tokens_and_their_count() {
        let requests = Requests { endpoint: Endpoint::Chat, model: "m", seed: 1 };
        let body: Value = serde_json::from_slice(&requests.body(Prompts::Words(3), 0, 7)).unwrap();
        assert_eq!((&body["max_tokens"], &body["ignore_eos"]), (&json!(7), &json!(true)));
        assert_eq!(body["stream_options"]["include_usage"], true);
        assert!(body["messages"][0]["content"].is_string() && body.get("prompt").is_none());
        let requests = Requests { endpoint: Endpoint::Completions, ..requests };
        let ids = Prompts::TokenIds { length: 4, vocab_size: 8 };
        let body: Value = serde_json::from_slice(&requests.body(ids, 0, 7)).unwrap();
        assert_eq!(body["prompt"].as_array().unwrap().len(), 4);
    }
}
