//! A streamed answer: from bytes to what a benchmark wants of it. Reads no clock.

use std::time::Duration;

use serde_json::Value;

use super::client::Failure;
use crate::config::Endpoint;

/// The longest line that is collected; a server that sends a longer one sends no answer of ours.
const MAX_LINE_BYTES: usize = 4 << 20;

/// What one request got.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Completion {
    /// As the server counted, if it said.
    pub(super) prompt_tokens: Option<usize>,
    /// Of these, tokens that a cache held, if the server said.
    pub(super) cached_tokens: usize,
    /// As the server counted, else events that brought some.
    pub(super) output_tokens: usize,
    /// From the start to the first output.
    pub(super) ttft: Duration,
    /// From the first to the last output, over the tokens after the first.
    pub(super) tpot: Option<Duration>,
}

/// Reads an answer as it comes.
#[derive(Debug)]
pub(super) struct Answer {
    endpoint: Endpoint,
    /// The line that has begun.
    line: Vec<u8>,
    first: Option<Duration>,
    last: Duration,
    events: usize,
    finished: bool,
    done: bool,
    usage: Option<Usage>,
}

#[derive(Debug, Clone, Copy)]
struct Usage {
    prompt_tokens: Option<usize>,
    cached_tokens: usize,
    output_tokens: usize,
}

impl Answer {
    pub(super) fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            line: Vec::new(),
            first: None,
            last: Duration::ZERO,
            events: 0,
            finished: false,
            done: false,
            usage: None,
        }
    }

    /// Takes what came `at` this time after the start.
    ///
    /// # Errors
    /// What the server reported instead of going on, or that this is no event stream.
    pub(super) fn push(&mut self, bytes: &[u8], at: Duration) -> Result<(), Failure> {
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = std::mem::take(&mut self.line);
            self.read_line(line.strip_suffix(b"\r").unwrap_or(&line), at)?;
        }
        self.line.extend_from_slice(rest);
        match self.line.len() > MAX_LINE_BYTES {
            true => Err(Failure::Malformed("a line of the stream is too long".to_owned())),
            false => Ok(()),
        }
    }

    /// Whether everything has come.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    /// The sum of the answer to a request that asked for `asked` tokens.
    ///
    /// # Errors
    /// [`Failure::EarlyEnd`] if the stream was cut or has fewer tokens.
    pub(super) fn finish(self, asked: usize) -> Result<Completion, Failure> {
        let early = |why: String| Err(Failure::EarlyEnd(why));
        let Some(first) = self.first else { return early("the stream ended without output".to_owned()) };
        if !self.done || !self.finished {
            return early(format!("the stream was cut after {} events", self.events));
        }
        let output_tokens = self.usage.map_or(self.events, |usage| usage.output_tokens);
        // A chunk may hold several tokens, so only the server's own count can be held against it.
        if self.usage.is_some() && output_tokens < asked {
            return early(format!("{output_tokens} tokens came, {asked} were asked for"));
        }
        let gaps = u32::try_from(output_tokens).unwrap_or(u32::MAX).saturating_sub(1);
        Ok(Completion {
            prompt_tokens: self.usage.and_then(|usage| usage.prompt_tokens),
            cached_tokens: self.usage.map_or(0, |usage| usage.cached_tokens),
            output_tokens,
            ttft: first,
            tpot: (gaps > 0).then(|| (self.last - first) / gaps),
        })
    }

    fn read_line(&mut self, line: &[u8], at: Duration) -> Result<(), Failure> {
        let Some(data) = line.strip_prefix(b"data:") else { return Ok(()) };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let event: Value = serde_json::from_slice(data)
            .map_err(|e| Failure::Malformed(format!("an event of the stream is no JSON: {e}")))?;
        if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
            return Err(Failure::Reported(message(error)));
        }
        self.read_usage(&event);
        let choice = &event["choices"][0];
        let finished = choice["finish_reason"].is_string();
        self.finished |= finished;
        let brought = self.brought_output(choice);
        if brought || finished {
            self.first.get_or_insert(at);
            self.last = at;
        }
        self.events += usize::from(brought);
        Ok(())
    }

    /// Whether an event brought output. A completion's text may be empty, when a token is half a character or the model
    /// has no text; but the last event of some servers brings the reason only. A chat begins with the role alone.
    fn brought_output(&self, choice: &Value) -> bool {
        let has_text = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
        match self.endpoint {
            Endpoint::Completions => {
                has_text(&choice["text"]) || choice["text"].is_string() && choice["finish_reason"].is_null()
            }
            Endpoint::Chat => {
                let delta = &choice["delta"];
                ["content", "reasoning_content", "reasoning"].iter().any(|key| has_text(&delta[*key]))
            }
        }
    }

    fn read_usage(&mut self, event: &Value) {
        let usage = &event["usage"];
        let count = |value: &Value| value.as_u64().and_then(|count| usize::try_from(count).ok());
        if let Some(output_tokens) = count(&usage["completion_tokens"]) {
            self.usage = Some(Usage {
                prompt_tokens: count(&usage["prompt_tokens"]),
                cached_tokens: count(&usage["prompt_tokens_details"]["cached_tokens"]).unwrap_or(0),
                output_tokens,
            });
        }
    }
}

/// The message of an error in OpenAI's form, or whatever stands there.
pub(super) fn message(error: &Value) -> String {
    let text = error["message"].as_str().or(error.as_str());
    text.map_or_else(|| error.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn read(endpoint: Endpoint, pieces: &[(&str, u64)], asked: usize) -> Result<Completion, Failure> {
        let mut answer = Answer::new(endpoint);
        for &(piece, at) in pieces {
            answer.push(piece.as_bytes(), ms(at))?;
        }
        answer.finish(asked)
    }

    const TOKEN: &str = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n";
    const LAST: &str = "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}\r\n\r\n";
    const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":5,\
                         \"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    #[test]
    fn tokens_are_those_of_usage_else_of_events() {
        let all = [(TOKEN, 10), (": keep-alive\n\n", 15), (TOKEN, 30), (LAST, 50), (USAGE, 51), (DONE, 52)];
        let completion = read(Endpoint::Completions, &all, 5).unwrap();
        let expected = Completion {
            prompt_tokens: Some(7),
            cached_tokens: 2,
            output_tokens: 5,
            ttft: ms(10),
            tpot: Some(ms(10)),
        };
        assert_eq!(completion, expected);
        let without =
            read(Endpoint::Completions, &[(TOKEN, 10), (TOKEN, 30), (LAST, 30), (DONE, 31)], 2).unwrap();
        assert_eq!((without.prompt_tokens, without.output_tokens, without.tpot), (None, 2, Some(ms(20))));
    }

    #[test]
    fn events_may_be_cut_anywhere() {
        let whole = format!("{TOKEN}{TOKEN}{LAST}{USAGE}{DONE}");
        for cut in 1..whole.len() {
            let (head, tail) = whole.split_at(cut);
            let completion = read(Endpoint::Completions, &[(head, 1), (tail, 1)], 5).unwrap();
            assert_eq!((completion.output_tokens, completion.prompt_tokens), (5, Some(7)), "{cut}");
        }
    }

    #[test]
    fn a_chat_begins_with_its_text() {
        let event =
            |delta: &str| format!("data: {{\"choices\":[{{\"delta\":{delta},\"finish_reason\":null}}]}}\n\n");
        let (role, text) = (event("{\"role\":\"assistant\",\"content\":\"\"}"), event("{\"content\":\"a\"}"));
        let end = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"length\"}]}\n\n";
        let completion =
            read(Endpoint::Chat, &[(&role, 1), (&text, 10), (&text, 20), (end, 20), (DONE, 20)], 2).unwrap();
        assert_eq!((completion.ttft, completion.output_tokens), (ms(10), 2));
    }

    #[test]
    fn an_answer_that_lacks_something_ends_early() {
        let cases: [&[(&str, u64)]; 5] = [
            &[],
            &[(TOKEN, 1), (TOKEN, 2)],
            &[(TOKEN, 1), (LAST, 2), (USAGE, 2)],
            &[(TOKEN, 1), (DONE, 2)],
            &[(TOKEN, 1), (LAST, 2), (USAGE, 2), (DONE, 2)],
        ];
        for case in cases {
            assert!(matches!(read(Endpoint::Completions, case, 6), Err(Failure::EarlyEnd(_))), "{case:?}");
        }
    }

    #[test]
    fn what_the_server_reports_is_passed_on() {
        let error = "data: {\"error\":{\"message\":\"no memory\"}}\n\n";
        let failure = read(Endpoint::Completions, &[(TOKEN, 1), (error, 2)], 6).unwrap_err();
        assert!(matches!(failure, Failure::Reported(message) if message == "no memory"));
        assert!(matches!(read(Endpoint::Completions, &[("data: {\n", 1)], 1), Err(Failure::Malformed(_))));
    }
}
