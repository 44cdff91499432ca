//! `tandem run`: one answer in the terminal, or a chat that keeps its history.
//!
//! Answers go to standard output, everything else to standard error, so that a pipe gets the text alone. Ctrl-C ends
//! the answer (dropping its stream frees it in the engine); at the prompt it does nothing but start a new line.

use std::io::{self, BufRead, IsTerminal, Read};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tandem_engine::{Event, FinishReason, Request, SamplingParams};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::startup::{self, Running};
use super::{Exit, terminal};
use crate::config::RunConfig;
use crate::text::{ChatInput, ChatTemplate, Detokenizer, Sandbox, Tokenizer};

/// The longest line of a chat, in bytes.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Runs the command.
pub(super) fn run(mut config: RunConfig) -> Result<(), Exit> {
    // One person asks one thing at a time: the KV cache need not hold more.
    config.common.max_num_seqs = Some(config.common.max_num_seqs.map_or(4, |given| given.min(4)));
    let prepared = startup::prepare(&config.common, None, 16)?;
    let Some(tokenizer) = prepared.tokenizer.clone() else {
        return Err(Exit::refused("this model comes without a tokenizer, so there is no text to run on"));
    };
    let running = prepared.load(&config.common)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Exit::failed(format!("no runtime: {e}")))?;
    let result = runtime.block_on(async {
        let interrupt = signal(SignalKind::interrupt()).map_err(Exit::failed)?;
        let template = running.template.clone().filter(|_| !config.raw);
        let mut session = Session {
            config: &config,
            running: &running,
            tokenizer: &tokenizer,
            template: template.as_deref().map(|template| (template, super::sandbox::of(template))),
            interrupt,
            messages: Vec::new(),
        };
        session.reset();
        match &config.prompt {
            Some(prompt) => session.turn(prompt).await,
            None => session.chat().await,
        }
    });
    runtime.shutdown_background();
    running.engine.shutdown();
    result
}

struct Session<'a> {
    config: &'a RunConfig,
    running: &'a Running,
    tokenizer: &'a std::sync::Arc<Tokenizer>,
    /// And what renders it.
    template: Option<(&'a ChatTemplate, Sandbox)>,
    interrupt: Signal,
    /// The chat so far.
    messages: Vec<Value>,
}

/// How an answer went.
struct Answer {
    text: String,
    prompt_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    first_token: Option<Duration>,
    elapsed: Duration,
    ended: &'static str,
}

impl Session<'_> {
    /// Reads lines and answers each, until the input ends.
    async fn chat(&mut self) -> Result<(), Exit> {
        let interactive = io::stdin().is_terminal();
        if interactive {
            eprintln!(
                "chatting with {}; /reset forgets, /exit or Ctrl-D leaves, Ctrl-C stops an answer",
                self.running.info.name
            );
        }
        let mut lines = read_lines();
        loop {
            if interactive {
                eprint!("> ");
            }
            let line = tokio::select! {
                line = lines.recv() => line,
                _ = self.interrupt.recv() => {
                    eprintln!();
                    continue;
                }
            };
            let line = match line {
                None => break,
                Some(Ok(line)) => line,
                Some(Err(problem)) => {
                    eprintln!("{problem}");
                    continue;
                }
            };
            match line.trim() {
                "" => {}
                "/exit" | "/quit" => break,
                "/reset" => self.reset(),
                // A prompt that does not fit or is refused ends the turn, not the chat.
                text => match self.turn(text).await {
                    Err(exit) if interactive => eprintln!("{}", exit.problems.join("; ")),
                    result => result?,
                },
            }
        }
        if interactive {
            eprintln!();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.messages.clear();
        if let Some(system) = &self.config.system {
            self.messages.push(json!({ "role": "system", "content": system }));
        }
    }

    /// Answers one prompt; keeps it and the answer in the history if there is a template to render them with.
    async fn turn(&mut self, text: &str) -> Result<(), Exit> {
        let before = self.messages.len();
        self.messages.push(json!({ "role": "user", "content": text }));
        let answer = match self.prompt(text).await {
            Ok(prompt) => self.answer(prompt).await,
            Err(exit) => Err(exit),
        };
        match answer {
            Ok(answer) => {
                report(&answer);
                self.messages.push(json!({ "role": "assistant", "content": answer.text }));
                Ok(())
            }
            Err(exit) => {
                self.messages.truncate(before);
                Err(exit)
            }
        }
    }

    async fn prompt(&self, text: &str) -> Result<Vec<u32>, Exit> {
        let Some((template, sandbox)) = &self.template else {
            return self.tokenizer.encode_prompt(text, true).map_err(Exit::failed);
        };
        let messages = Value::Array(self.messages.clone());
        let chat = ChatInput { messages: &messages, add_generation_prompt: true, kwargs: None };
        let rendered = sandbox.render(template, &chat).await.map_err(Exit::failed)?;
        self.tokenizer.encode_chat(&rendered).map_err(Exit::failed)
    }

    /// Streams an answer to standard output.
    async fn answer(&mut self, prompt: Vec<u32>) -> Result<Answer, Exit> {
        let started = Instant::now();
        let mut answer = Answer {
            text: String::new(),
            prompt_tokens: prompt.len(),
            cached_tokens: 0,
            output_tokens: 0,
            first_token: None,
            elapsed: Duration::ZERO,
            ended: "interrupted",
        };
        let request = self.request(prompt, started)?;
        let mut stream = self.running.engine.submit(request).map_err(Exit::failed)?;
        let mut detokenizer = self.tokenizer.detokenizer(true);
        'answer: loop {
            let events = tokio::select! {
                events = stream.next() => events,
                _ = self.interrupt.recv() => break,
            };
            let Some(events) = events else { break };
            for event in events {
                match event {
                    Event::Started { cached_tokens, .. } => answer.cached_tokens = cached_tokens,
                    Event::Token { token, .. } => {
                        answer.output_tokens += 1;
                        answer.first_token.get_or_insert_with(|| started.elapsed());
                        show(&mut answer.text, &mut detokenizer, token);
                    }
                    Event::Finished { reason, .. } => {
                        answer.ended = match reason {
                            FinishReason::Stop(_) => "stop",
                            FinishReason::Length => "length",
                        };
                        break 'answer;
                    }
                    Event::Failed(failure) => return Err(Exit::failed(failure.message)),
                }
            }
        }
        let rest = detokenizer.finish();
        terminal::print_generated(&rest);
        answer.text.push_str(&rest);
        terminal::print("\n");
        answer.elapsed = started.elapsed();
        Ok(answer)
    }

    fn request(&self, prompt: Vec<u32>, arrival: Instant) -> Result<Request, Exit> {
        let (config, own) = (self.config, &self.running.generation);
        let room = self.running.plan.max_model_len.saturating_sub(prompt.len());
        if room == 0 {
            let (tokens, length) = (prompt.len(), self.running.plan.max_model_len);
            return Err(Exit::failed(format!(
                "the prompt has {tokens} tokens, the context holds {length}; /reset forgets"
            )));
        }
        let params = SamplingParams {
            max_tokens: config.max_tokens.unwrap_or(room).min(room),
            temperature: config.temperature.or(own.temperature).unwrap_or(1.0),
            top_p: config.top_p.or(own.top_p).unwrap_or(1.0),
            top_k: config.top_k.or(own.top_k).unwrap_or(0),
            min_p: config.min_p.or(own.min_p).unwrap_or(0.0),
            repetition_penalty: config.repetition_penalty.or(own.repetition_penalty).unwrap_or(1.0),
            seed: config.common.seed,
            ..SamplingParams::default()
        };
        let id = "run".to_owned();
        Ok(Request { id, prompt, params, priority: 0, cache_salt: None, prompt_logprobs: None, arrival })
    }
}

fn show(text: &mut String, detokenizer: &mut Detokenizer, token: u32) {
    let new = detokenizer.push(token);
    terminal::print_generated(&new);
    text.push_str(&new);
}

fn report(answer: &Answer) {
    let first = answer.first_token.unwrap_or(answer.elapsed);
    let rest = (answer.elapsed - first).as_secs_f64();
    let speed = match answer.output_tokens {
        0 | 1 => String::new(),
        n => format!(", {:.1} tokens/s", (n - 1) as f64 / rest.max(1e-9)),
    };
    eprintln!(
        "[{} prompt tokens ({} cached), first token after {:.0} ms, {} tokens{speed}, {}]",
        answer.prompt_tokens,
        answer.cached_tokens,
        first.as_secs_f64() * 1e3,
        answer.output_tokens,
        answer.ended,
    );
}

/// Lines of standard input. They are read on a thread of their own, since reading a terminal cannot be given up; it
/// ends with the process.
fn read_lines() -> mpsc::Receiver<Result<String, String>> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut input = io::stdin().lock();
        loop {
            let line = match read_line(&mut input) {
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(error) => {
                    let _ = sender.blocking_send(Err(format!("the input cannot be read: {error}")));
                    break;
                }
            };
            if sender.blocking_send(line.map_err(str::to_owned)).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The next line, or why it is none that can be answered; `None` at the end.
fn read_line(input: &mut impl BufRead) -> io::Result<Option<Result<String, &'static str>>> {
    let mut bytes = Vec::new();
    if input.by_ref().take(MAX_LINE_BYTES as u64 + 1).read_until(b'\n', &mut bytes)? == 0 {
        return Ok(None);
    }
    if bytes.last() != Some(&b'\n') && bytes.len() > MAX_LINE_BYTES {
        input.skip_until(b'\n')?;
        return Ok(Some(Err("a line has at most 1 MiB")));
    }
    Ok(Some(String::from_utf8(bytes).map_err(|_| "the line is not valid UTF-8; write it again")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_line_does_not_end_the_chat() {
        let mut input = b"hi\nb\xffd\n".to_vec();
        input.extend(vec![b'x'; MAX_LINE_BYTES + 5]);
        input.extend(b"\n\nlast");
        let mut input = input.as_slice();
        let mut next = || read_line(&mut input).unwrap();
        assert_eq!(next(), Some(Ok("hi\n".to_owned())));
        assert!(next().unwrap().unwrap_err().contains("UTF-8"));
        assert!(next().unwrap().unwrap_err().contains("1 MiB"));
        assert_eq!(next(), Some(Ok("\n".to_owned())));
        assert_eq!(next(), Some(Ok("last".to_owned())));
        assert_eq!(next(), None);
    }
}
