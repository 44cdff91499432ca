//! `tandem bench --perplexity FILE`: how well a model predicts a text.
//!
//! The procedure is that of llama.cpp's `llama-perplexity`, so that figures of the same file and window compare: the text,
//! without its last line end and with special tokens as text, becomes tokens, with the BOS in front if the model wants
//! one. They are cut into windows of N tokens; what does not fill the last window is left out. Each window is scored by
//! itself, its first token replaced by the BOS if there is one, and only the tokens after its middle count (positions N/2 + 1
//! to N − 1), so that every counted token has at least N/2 + 1 before it. Perplexity is e to the mean of their negative
//! log-probabilities; its standard error is that of the mean, times the perplexity.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use tandem_engine::{EngineHandle, Event, Request, RequestStream, SamplingParams};

use super::super::Exit;
use super::super::numbers::grouped;
use super::super::startup::{self, Running};
use crate::config::{CommonConfig, ConfigError, PerplexityConfig};
use crate::text::{MAX_TEXT_BYTES, SpecialTokens, Tokenizer};

/// Windows in flight: one is computed while the next waits, so that no step is empty.
const WINDOWS_AT_ONCE: usize = 4;

/// Runs the command.
pub(super) fn perplexity(mut common: CommonConfig, wanted: &PerplexityConfig) -> Result<Report, Exit> {
    let refuse =
        |flag: &str, message: String| Exit::refused(ConfigError::new(common.origins.of(flag), message));
    let text = read_text(&wanted.file).map_err(|message| refuse("perplexity", message))?;
    let context = wanted.context;
    let longest = startup::inspect(&common, None, 0)?.info().max_position_embeddings;
    let longest = common.max_model_len.map_or(longest, |given| given.min(longest));
    if context > longest {
        return Err(refuse(
            "context",
            format!("{context} tokens are more than the model's context, {longest}"),
        ));
    }
    let prepared = startup::prepare(sized(&mut common, context), None, WINDOWS_AT_ONCE)?;
    let refuse = |message: String| Exit::refused(ConfigError::new(common.origins.of("perplexity"), message));
    let Some(tokenizer) = &prepared.tokenizer else {
        return Err(refuse("the model has no tokenizer".to_owned()));
    };
    let windows = windows(tokenizer, &text, context).map_err(refuse)?;

    let running = prepared.load(&common)?;
    let started = Instant::now();
    let losses = score(&running.engine, &windows);
    let elapsed = started.elapsed();
    running.engine.shutdown();
    Ok(Report::new(&running, wanted, &losses?, elapsed))
}

/// Sizes that nobody asked for are those of the windows.
fn sized(config: &mut CommonConfig, context: usize) -> &CommonConfig {
    config.max_model_len = Some(context);
    let windows = config.max_num_seqs.map_or(WINDOWS_AT_ONCE, |given| given.min(WINDOWS_AT_ONCE));
    config.max_num_seqs = Some(windows);
    config
}

/// The text of a file without its last line end.
fn read_text(path: &Path) -> Result<String, String> {
    let shown = path.display();
    let facts = std::fs::metadata(path).map_err(|e| format!("{shown} cannot be read: {e}"))?;
    if !facts.is_file() {
        return Err(format!("{shown} is not a file"));
    }
    if facts.len() > MAX_TEXT_BYTES as u64 {
        return Err(format!("{shown} has {} bytes, a text at most {MAX_TEXT_BYTES}", facts.len()));
    }
    let bytes = std::fs::read(path).map_err(|e| format!("{shown} cannot be read: {e}"))?;
    let mut text = String::from_utf8(bytes).map_err(|_| format!("{shown} is not UTF-8 text"))?;
    if text.ends_with('\n') {
        text.pop();
    }
    if text.is_empty() { Err(format!("{shown} is empty")) } else { Ok(text) }
}

/// The text's whole windows of `context` tokens, each with the model's BOS in the place of its first token.
fn windows(tokenizer: &Tokenizer, text: &str, context: usize) -> Result<Vec<Vec<u32>>, String> {
    let ids = tokenizer.encode(text, SpecialTokens::AsText).map_err(|e| e.to_string())?;
    let begin = tokenizer.prefix();
    let tokens = [begin, &ids].concat();
    if tokens.len() < 2 * context {
        let (has, needed) = (tokens.len(), 2 * context);
        return Err(format!(
            "the text has {has} tokens, two windows of {context} need {needed}; take a longer one or a smaller --context"
        ));
    }
    let mut windows: Vec<Vec<u32>> = tokens.chunks_exact(context).map(<[u32]>::to_vec).collect();
    for window in &mut windows {
        window.iter_mut().zip(begin).for_each(|(token, &bos)| *token = bos);
    }
    Ok(windows)
}

/// Negative log-probabilities of the counted tokens of every window, in order.
fn score(engine: &EngineHandle, windows: &[Vec<u32>]) -> Result<Vec<f64>, Exit> {
    let mut waiting = windows.iter();
    let mut in_flight = VecDeque::new();
    let mut losses = Vec::new();
    loop {
        for window in waiting.by_ref().take(WINDOWS_AT_ONCE - in_flight.len()) {
            in_flight.push_back((window, engine.submit(request(window)).map_err(Exit::failed)?));
        }
        let Some((window, stream)) = in_flight.pop_front() else { return Ok(losses) };
        let logprobs = follow(stream)?;
        if logprobs.len() != window.len() {
            return Err(Exit::failed("a window ended before its tokens were scored"));
        }
        losses.extend(logprobs.iter().skip(window.len() / 2 + 1).map(|logprob| -f64::from(*logprob)));
        tracing::info!(scored = losses.len(), "window done");
    }
}

fn request(window: &[u32]) -> Request {
    Request {
        id: "perplexity".to_owned(),
        prompt: window.to_vec(),
        params: SamplingParams { max_tokens: 0, ..SamplingParams::default() },
        priority: 0,
        cache_salt: None,
        prompt_logprobs: Some(0),
        arrival: Instant::now(),
    }
}

/// Log-probability of every token of a prompt; 0 for the first, which nothing predicts.
fn follow(mut stream: RequestStream) -> Result<Vec<f32>, Exit> {
    let mut logprobs = Vec::new();
    while let Some(events) = stream.blocking_next() {
        for event in events {
            match event {
                Event::Started { prompt_logprobs, .. } => {
                    let scored = prompt_logprobs.unwrap_or_default();
                    logprobs = scored.iter().map(|entry| entry.as_ref().map_or(0.0, |e| e.logprob)).collect();
                }
                Event::Failed(failure) => return Err(Exit::failed(failure.message)),
                Event::Token { .. } | Event::Finished { .. } => {}
            }
        }
    }
    Ok(logprobs)
}

/// e to the mean of negative log-probabilities, and its standard error (0 for a single one).
fn perplexity_of(losses: &[f64]) -> (f64, f64) {
    let count = losses.len() as f64;
    let mean = losses.iter().sum::<f64>() / count;
    let variance = losses.iter().map(|loss| loss * loss).sum::<f64>() / count - mean * mean;
    let error = (variance.max(0.0) / (count - 1.0).max(1.0)).sqrt();
    (mean.exp(), error * mean.exp())
}

#[derive(Debug, Serialize)]
pub(super) struct Report {
    model: String,
    weights: String,
    backend: &'static str,
    isa: &'static str,
    threads: usize,
    activations: &'static str,
    kv_cache_dtype: &'static str,
    file: String,
    context: usize,
    windows: usize,
    /// Of all windows.
    tokens: usize,
    /// Those that count.
    scored_tokens: usize,
    perplexity: f64,
    standard_error: f64,
    tokens_per_second: f64,
}

impl Report {
    fn new(running: &Running, wanted: &PerplexityConfig, losses: &[f64], elapsed: Duration) -> Self {
        let windows = losses.len() / (wanted.context - wanted.context / 2 - 1);
        let tokens = windows * wanted.context;
        let (perplexity, standard_error) = perplexity_of(losses);
        Self {
            model: running.info.name.clone(),
            weights: running.info.weights.clone(),
            backend: running.backend.backend,
            isa: running.backend.isa,
            threads: running.backend.threads,
            activations: running.backend.activations.name(),
            kv_cache_dtype: running.plan.kv_layout.name(),
            file: wanted.file.display().to_string(),
            context: wanted.context,
            windows,
            tokens,
            scored_tokens: losses.len(),
            perplexity,
            standard_error,
            tokens_per_second: tokens as f64 / elapsed.as_secs_f64(),
        }
    }

    /// One JSON object and a newline.
    pub(super) fn json(&self) -> String {
        // Plain numbers and strings always have a JSON form.
        let json = serde_json::to_string_pretty(self).unwrap_or_default();
        format!("{json}\n")
    }

    pub(super) fn text(&self) -> String {
        format!(
            "{} {}, {} {}, {} threads, {} activations, {} KV\n\
             perplexity {:.4} ± {:.4}\n\
             {} tokens scored in {} windows of {}, {:.1} tokens/s\n",
            self.model,
            self.weights,
            self.backend,
            self.isa,
            self.threads,
            self.activations,
            self.kv_cache_dtype,
            self.perplexity,
            self.standard_error,
            grouped(self.scored_tokens as u64),
            grouped(self.windows as u64),
            self.context,
            self.tokens_per_second,
        )
    }
}

#[cfg(test)]
mod tests {
    use tandem_engine::{DType, EngineOptions, LoadFormat, ModelOptions};

    use super::*;
    use crate::text::GgufTokenizer;

    #[test]
    fn perplexity_is_e_to_the_mean_loss() {
        // Losses 1, 2, 3: mean 2, variance of the sample 1, of its mean 1/3.
        let (perplexity, error) = perplexity_of(&[1.0, 2.0, 3.0]);
        let e2 = 2.0f64.exp();
        assert!((perplexity - e2).abs() < 1e-12 && (error - e2 * (1.0f64 / 3.0).sqrt()).abs() < 1e-12);
        // A model that gives every token a quarter.
        let (perplexity, error) = perplexity_of(&[4.0f64.ln(); 50]);
        assert!((perplexity - 4.0).abs() < 1e-12 && error < 1e-6);
        assert_eq!(perplexity_of(&[0.5]), (0.5f64.exp(), 0.0));
    }

    /// Letters and spaces, with a BOS.
    fn tokenizer() -> Tokenizer {
        let mut tokens = vec!["<s>".to_owned(), "Ġ".to_owned()];
        tokens.extend(('a'..='z').map(String::from));
        let mut token_types = vec![1; tokens.len()];
        token_types[0] = 3;
        Tokenizer::from_gguf(&GgufTokenizer {
            model: "gpt2".to_owned(),
            pre: "smollm".to_owned(),
            tokens,
            token_types,
            bos: Some(0),
            add_bos: true,
            ..GgufTokenizer::default()
        })
        .unwrap()
    }

    #[test]
    fn windows_are_whole_and_begin_with_the_bos() {
        let cut = |text: &str| windows(&tokenizer(), text, 4);
        let id = |c: u8| u32::from(c - b'a') + 2;
        let (a, b, c) = (id(b'a'), id(b'b'), id(b'c'));
        // BOS a b c | a b c a | b c: of the second window the first token gives way, of the third nothing is left.
        assert_eq!(cut("abcabcabc").unwrap(), [[0, a, b, c], [0, b, c, a]]);
        let refusal = cut("abcabc").unwrap_err();
        assert!(refusal.starts_with("the text has 7 tokens, two windows of 4 need 8"), "{refusal}");
        assert_eq!(cut("abcabca").unwrap().len(), 2);
    }

    /// Random weights; the windows are more than are in flight at once, and more than a step holds.
    #[test]
    fn the_engines_scores_give_what_a_plain_loop_makes_of_every_tokens_log_probability() {
        let folder = tempfile::tempdir().unwrap();
        let config = serde_json::json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300,
            "max_position_embeddings": 256, "tie_word_embeddings": true, "eos_token_id": 2,
        });
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let model = ModelOptions {
            path: folder.path().to_owned(),
            load_format: LoadFormat::Dummy,
            quantization: Some(DType::Q4_0),
            ..ModelOptions::default()
        };
        let start = |max_num_batched_tokens| {
            let options =
                EngineOptions { max_num_seqs: 8, max_num_batched_tokens, ..EngineOptions::default() };
            let loaded = tandem_engine::inspect(&model).unwrap().load(&options).unwrap();
            tandem_engine::spawn(loaded.executor, loaded.config)
        };
        for context in [4usize, 7, 40] {
            let token = |window: usize, at: usize| ((window * 131 + at * at * 17) % 300) as u32;
            let windows: Vec<Vec<u32>> =
                (0..11).map(|window| (0..context).map(|at| token(window, at)).collect()).collect();
            let engine = start(64);
            let losses = score(&engine, &windows).unwrap();
            assert!(engine.snapshot().max_step_sequences > 1);
            engine.shutdown();

            let alone = start(8);
            let (mut sum, mut count) = (0.0f64, 0u32);
            for window in &windows {
                let logprobs = follow(alone.submit(request(window)).unwrap()).unwrap();
                for (at, &logprob) in logprobs.iter().enumerate() {
                    if at > context / 2 {
                        sum -= f64::from(logprob);
                        count += 1;
                    }
                }
            }
            alone.shutdown();
            assert_eq!(losses.len() as u32, count);
            assert_eq!(count as usize, 11 * (context - context / 2 - 1));
            assert_eq!(perplexity_of(&losses).0, (sum / f64::from(count)).exp());
            assert!(losses.iter().all(|&loss| loss > 0.0));
        }
    }

    #[test]
    fn texts_that_are_none_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let with = |name: &str, contents: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, contents).unwrap();
            read_text(&path)
        };
        assert_eq!(with("text", "naïve\n\n".as_bytes()), Ok("naïve\n".to_owned()));
        assert!(with("empty", b"").unwrap_err().ends_with("empty is empty"));
        assert!(with("line end", b"\n").unwrap_err().ends_with("is empty"));
        assert!(with("latin", b"na\xefve").unwrap_err().ends_with("is not UTF-8 text"));
        assert!(with("long", &vec![b'a'; MAX_TEXT_BYTES + 1]).unwrap_err().contains("at most 4194304"));
        assert!(read_text(folder.path()).unwrap_err().ends_with("is not a file"));
        assert!(read_text(&folder.path().join("none")).unwrap_err().contains("cannot be read"));
    }
}
