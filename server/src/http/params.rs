//! The parameters that completions and chat completions share, read from a request body and checked.
//!
//! The result is plain data: sampling parameters for the engine plus what the answer must look like. Defaults come
//! from the model's generation config where it has them, as in vLLM, else OpenAI's. Every number is bounded here,
//! every token id is below the vocabulary; the engine checks its own part once more on submission.

use std::ops::Bound;

use serde_json::Value;
use serde_json::value::RawValue;
use tandem_engine::{GenerationConfig, SamplingParams};

use super::errors::ApiError;
use super::fields::{Fields, finite};
use super::limits;

/// What requests are checked against.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    /// Token ids are below this.
    pub(super) vocab_size: usize,
    /// Longest prompt and output together, in tokens.
    pub(super) max_model_len: usize,
    /// Whether text can be turned into tokens and back.
    pub(super) has_tokenizer: bool,
    /// Sampling defaults from the model's files.
    pub(super) generation: GenerationConfig,
}

impl Rules {
    /// The refusal of a prompt that alone is longer than the context. `at_least` may be a bound.
    pub(super) fn too_long(&self, param: &'static str, at_least: usize) -> ApiError {
        let context = self.max_model_len;
        let message = format!(
            "This model's maximum context length is {context} tokens. However, there are at least {at_least} tokens \
             in the {param}. Please reduce the length of the {param}."
        );
        ApiError::invalid(param, message)
    }
}

/// Which of the two routes a body belongs to: they differ in how log-probabilities are asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Route {
    Completions,
    Chat,
}

/// Parameters of a generation, whichever route asked for it.
#[derive(Clone, Debug)]
pub(super) struct Params {
    /// `None`: the served model.
    pub(super) model: Option<String>,
    /// `max_tokens` inside is meaningless until [`Params::resolve_max_tokens`] has run.
    pub(super) sampling: SamplingParams,
    /// As asked for.
    pub(super) max_tokens: Option<usize>,
    /// The name under which the client gave it.
    pub(super) max_tokens_param: &'static str,
    pub(super) stop: Vec<String>,
    pub(super) include_stop_in_output: bool,
    pub(super) skip_special_tokens: bool,
    pub(super) stream: Option<StreamParams>,
    pub(super) priority: i32,
    pub(super) cache_salt: Option<String>,
    pub(super) prompt_logprobs: Option<usize>,
    pub(super) return_token_ids: bool,
    pub(super) tokens_as_ids: bool,
    /// Keep only this many tokens of the end of the prompt.
    pub(super) truncate_prompt_tokens: Option<usize>,
}

/// Parameters of a streamed answer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct StreamParams {
    /// A last chunk with the usage of the whole request.
    pub(super) include_usage: bool,
    /// The usage so far on every chunk.
    pub(super) continuous_usage: bool,
}

/// Known to both dialects, without effect on what is generated here.
const WITHOUT_EFFECT: &[&str] = &[
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "request_id",
    "spaces_between_special_tokens",
    "length_penalty",
    "early_stopping",
];

/// What others offer and we do not (yet): ignoring these would change the meaning of the answer.
const NOT_SUPPORTED: &[&str] = &[
    "suffix",
    "prompt_embeds",
    "use_beam_search",
    "bad_words",
    "logits_processors",
    "structured_outputs",
    "structural_tag",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_whitespace_pattern",
    "guided_decoding_backend",
    "grammar",
    "json_schema",
    "regex",
    "ebnf",
];

impl Params {
    /// Reads everything but the prompt.
    pub(super) fn read(fields: &mut Fields<'_>, route: Route, rules: &Rules) -> Result<Self, ApiError> {
        fields.refuse_unsupported(NOT_SUPPORTED)?;
        refuse_response_format(fields)?;
        fields.skip(WITHOUT_EFFECT);

        let n = fields.integer("n", 1..=limits::MAX_CHOICES)?.unwrap_or(1);
        if fields.integer("best_of", 1..=limits::MAX_CHOICES)?.is_some_and(|best_of| best_of != n) {
            return Err(
                fields.invalid("best_of", "must equal `n`: choosing the best of more is not supported yet")
            );
        }
        let (max_tokens_param, max_tokens) = read_max_tokens(fields, rules)?;
        let mut sampling = read_sampling(fields, rules)?;
        sampling.n = n as u32;
        sampling.logprobs = match route {
            Route::Completions => read_count(fields, "logprobs")?,
            Route::Chat => read_chat_logprobs(fields)?,
        };
        if let Some(max_tokens) = max_tokens
            && sampling.min_tokens > max_tokens
        {
            return Err(fields.invalid("min_tokens", &format!("must not be above `{max_tokens_param}`")));
        }

        let params = Self {
            model: fields.string("model")?,
            sampling,
            max_tokens,
            max_tokens_param,
            stop: read_stop(fields, rules)?,
            include_stop_in_output: fields.boolean("include_stop_str_in_output")?.unwrap_or(false),
            skip_special_tokens: fields.boolean("skip_special_tokens")?.unwrap_or(true),
            stream: read_stream(fields)?,
            priority: fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0)
                as i32,
            cache_salt: read_cache_salt(fields)?,
            prompt_logprobs: read_count(fields, "prompt_logprobs")?,
            // Without a tokenizer the ids are all there is to say.
            return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false) || !rules.has_tokenizer,
            tokens_as_ids: fields.boolean("return_tokens_as_token_ids")?.unwrap_or(false)
                || !rules.has_tokenizer,
            truncate_prompt_tokens: fields
                .integer("truncate_prompt_tokens", 1..=rules.max_model_len as i64)?
                .map(|len| len as usize),
        };
        if params.stream.is_some() && params.prompt_logprobs.is_some() {
            return Err(fields.invalid("prompt_logprobs", "is not available when `stream` is true"));
        }
        Ok(params)
    }

    /// Fixes how many tokens may be generated after a prompt of `prompt_len` tokens. `default` is used when the
    /// client said nothing, lowered to what the context leaves.
    ///
    /// Fails when prompt and output together exceed the context: that is known before queueing, so it is said then.
    pub(super) fn resolve_max_tokens(
        &self,
        prompt_len: usize,
        default: usize,
        prompt_param: &'static str,
        rules: &Rules,
    ) -> Result<usize, ApiError> {
        let context = rules.max_model_len;
        let asked = self.max_tokens.unwrap_or(if prompt_len < context { 0 } else { 1 });
        if prompt_len + asked > context {
            let param = if prompt_len >= context { prompt_param } else { self.max_tokens_param };
            let message = format!(
                "This model's maximum context length is {context} tokens. However, you requested {} tokens \
                 ({prompt_len} in the {prompt_param}, {asked} in the completion). Please reduce the length of the \
                 {prompt_param} or completion.",
                prompt_len + asked
            );
            return Err(ApiError::invalid(param, message));
        }
        let max_tokens = self.max_tokens.unwrap_or(default.min(context - prompt_len));
        if self.sampling.min_tokens > max_tokens {
            let message =
                format!("`min_tokens` must not be above the {max_tokens} tokens that may be generated");
            return Err(ApiError::invalid("min_tokens", message));
        }
        Ok(max_tokens)
    }
}

/// `max_completion_tokens` wins over `max_tokens`; both are checked. 0 is for the caller to judge.
fn read_max_tokens(
    fields: &mut Fields<'_>,
    rules: &Rules,
) -> Result<(&'static str, Option<usize>), ApiError> {
    let [old, new] = ["max_tokens", "max_completion_tokens"];
    let max_tokens = read_one_max_tokens(fields, old, rules)?;
    let max_completion_tokens = read_one_max_tokens(fields, new, rules)?;
    Ok(if max_completion_tokens.is_some() { (new, max_completion_tokens) } else { (old, max_tokens) })
}

fn read_one_max_tokens(
    fields: &mut Fields<'_>,
    name: &'static str,
    rules: &Rules,
) -> Result<Option<usize>, ApiError> {
    let Some(asked) = fields.integer(name, 0..=limits::MAX_EXACT_INTEGER)? else { return Ok(None) };
    let context = rules.max_model_len;
    if asked as u64 > context as u64 {
        let message = format!("is {asked}, but this model's maximum context length is {context} tokens");
        return Err(fields.invalid(name, &message));
    }
    Ok(Some(asked as usize))
}

fn read_sampling(fields: &mut Fields<'_>, rules: &Rules) -> Result<SamplingParams, ApiError> {
    let vocab = rules.vocab_size;
    let defaults = &rules.generation;
    let number = |value: Option<f64>, default: f32| value.map_or(default, |value| value as f32);

    let temperature = fields.number("temperature", 0.0..=100.0)?;
    let top_p = fields.number("top_p", (Bound::Excluded(0.0), Bound::Included(1.0)))?;
    let repetition = fields.number("repetition_penalty", (Bound::Excluded(0.0), Bound::Included(100.0)))?;
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?;
    let allowed_token_ids = fields.token_ids("allowed_token_ids", vocab, vocab)?;
    if allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
        return Err(fields.invalid("allowed_token_ids", "must not be empty"));
    }
    Ok(SamplingParams {
        temperature: number(temperature, defaults.temperature.unwrap_or(1.0)),
        top_p: number(top_p, defaults.top_p.unwrap_or(1.0)),
        // -1 and 0 both mean "all tokens".
        top_k: top_k.map_or(defaults.top_k.unwrap_or(0), |k| k.max(0) as u32),
        min_p: number(fields.number("min_p", 0.0..=1.0)?, defaults.min_p.unwrap_or(0.0)),
        repetition_penalty: number(repetition, defaults.repetition_penalty.unwrap_or(1.0)),
        presence_penalty: number(fields.number("presence_penalty", -2.0..=2.0)?, 0.0),
        frequency_penalty: number(fields.number("frequency_penalty", -2.0..=2.0)?, 0.0),
        logit_bias: read_logit_bias(fields, vocab)?,
        allowed_token_ids,
        banned_token_ids: fields.token_ids("banned_token_ids", vocab, vocab)?.unwrap_or_default(),
        stop_token_ids: fields
            .token_ids("stop_token_ids", vocab, limits::MAX_LOGIT_BIAS)?
            .unwrap_or_default(),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        min_tokens: fields.integer("min_tokens", 0..=rules.max_model_len as i64)?.unwrap_or(0) as usize,
        seed: fields.integer("seed", 0..=limits::MAX_EXACT_INTEGER)?.map(|seed| seed as u64),
        ..SamplingParams::default()
    })
}

/// An object from token ids, as strings, to numbers in −100..=100.
fn read_logit_bias(fields: &mut Fields<'_>, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let name = "logit_bias";
    let Some(raw) = fields.raw(name) else { return Ok(Vec::new()) };
    let entries: std::collections::BTreeMap<String, &RawValue> = serde_json::from_str(raw.get())
        .map_err(|_| fields.invalid(name, "must be an object from token ids to numbers"))?;
    if entries.len() > limits::MAX_LOGIT_BIAS {
        let message = format!("must have at most {} entries", limits::MAX_LOGIT_BIAS);
        return Err(fields.invalid(name, &message));
    }
    let mut bias = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        let id = key.parse::<u32>().ok().filter(|id| (*id as usize) < vocab_size).ok_or_else(|| {
            fields.invalid(
                name,
                &format!("must have token ids of the vocabulary (0 to {}) as keys", vocab_size - 1),
            )
        })?;
        let value = finite(value)
            .filter(|value| (-100.0..=100.0).contains(value))
            .ok_or_else(|| fields.invalid(name, "must have numbers from -100 to 100 as values"))?;
        bias.push((id, value as f32));
    }
    // "1" and "01" are two keys and one token; the engine gets each token once, in order.
    bias.sort_by_key(|(id, _)| *id);
    bias.dedup_by_key(|(id, _)| *id);
    Ok(bias)
}

/// A number of alternatives per token.
fn read_count(fields: &mut Fields<'_>, name: &'static str) -> Result<Option<usize>, ApiError> {
    Ok(fields.integer(name, 0..=limits::MAX_LOGPROBS)?.map(|count| count as usize))
}

/// Chat's two fields: a switch and a number that needs it.
fn read_chat_logprobs(fields: &mut Fields<'_>) -> Result<Option<usize>, ApiError> {
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = read_count(fields, "top_logprobs")?;
    if top.is_some_and(|top| top > 0) && !wanted {
        return Err(fields.invalid("top_logprobs", "needs `logprobs` to be true"));
    }
    Ok(wanted.then(|| top.unwrap_or(0)))
}

fn read_stop(fields: &mut Fields<'_>, rules: &Rules) -> Result<Vec<String>, ApiError> {
    let Some(raw) = fields.raw("stop") else { return Ok(Vec::new()) };
    let stop = if raw.get().starts_with('"') {
        serde_json::from_str(raw.get()).map(|stop: String| vec![stop])
    } else {
        serde_json::from_str(raw.get())
    };
    let stop: Vec<String> =
        stop.map_err(|_| fields.invalid("stop", "must be a string or a list of strings"))?;
    if stop.len() > limits::MAX_STOP_STRINGS {
        let message = format!("must have at most {} strings", limits::MAX_STOP_STRINGS);
        return Err(fields.invalid("stop", &message));
    }
    if stop.iter().any(|stop| stop.is_empty() || stop.len() > limits::MAX_STOP_BYTES) {
        let message = format!("must hold strings of 1 to {} bytes", limits::MAX_STOP_BYTES);
        return Err(fields.invalid("stop", &message));
    }
    if !stop.is_empty() && !rules.has_tokenizer {
        return Err(
            fields.invalid("stop", "needs a tokenizer, and this model has none: use `stop_token_ids`")
        );
    }
    Ok(stop)
}

fn read_stream(fields: &mut Fields<'_>) -> Result<Option<StreamParams>, ApiError> {
    let stream = fields.boolean("stream")?.unwrap_or(false);
    let options = fields.object("stream_options", "stream_options.")?;
    let Some(mut options) = options else { return Ok(stream.then(StreamParams::default)) };
    let params = StreamParams {
        include_usage: options.boolean("include_usage")?.unwrap_or(false),
        continuous_usage: options.boolean("continuous_usage_stats")?.unwrap_or(false),
    };
    options.finish();
    if !stream {
        return Err(fields.invalid("stream_options", "needs `stream` to be true"));
    }
    Ok(Some(params))
}

fn read_cache_salt(fields: &mut Fields<'_>) -> Result<Option<String>, ApiError> {
    let salt = fields.string("cache_salt")?;
    if salt.as_ref().is_some_and(|salt| salt.is_empty() || salt.len() > limits::MAX_CACHE_SALT_BYTES) {
        let message = format!("must have 1 to {} bytes", limits::MAX_CACHE_SALT_BYTES);
        return Err(fields.invalid("cache_salt", &message));
    }
    Ok(salt)
}

/// Only plain text is made; `{"type": "text"}` says just that.
fn refuse_response_format(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    match fields.value("response_format")? {
        None => Ok(()),
        Some(Value::Object(format)) if format.get("type").is_some_and(|kind| kind == "text") => Ok(()),
        Some(Value::Object(format)) if format.get("type").is_some_and(Value::is_string) => {
            Err(ApiError::unsupported("response_format"))
        }
        Some(_) => Err(fields.invalid("response_format", "must be an object with a `type`")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A model of 100 tokens and a context of 64, with a tokenizer and no opinion about sampling.
    pub(crate) fn rules() -> Rules {
        Rules {
            vocab_size: 100,
            max_model_len: 64,
            has_tokenizer: true,
            generation: GenerationConfig::default(),
        }
    }

    fn read(body: &str, route: Route) -> Result<Params, ApiError> {
        Params::read(&mut Fields::parse(body.as_bytes())?, route, &rules())
    }

    fn refused_param(body: &str, route: Route) -> String {
        match read(body, route) {
            Err(ApiError::Invalid { param: Some(param), .. }) => param,
            other => panic!("{body}: {other:?}"),
        }
    }

    #[test]
    fn good_bodies() {
        let good = [
            r#"{}"#,
            r#"{"temperature":0,"top_k":-1,"top_p":1,"min_p":0.5,"seed":0,"n":8,"best_of":8}"#,
            r#"{"stop":"x","stop_token_ids":[99],"include_stop_str_in_output":true}"#,
            r#"{"stop":["a","b","c","d"],"ignore_eos":true,"min_tokens":3,"max_tokens":3}"#,
            r#"{"stop":[],"logit_bias":{"0":-100,"99":100},"allowed_token_ids":[1],"banned_token_ids":[2]}"#,
            r#"{"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":false}}"#,
            r#"{"response_format":{"type":"text"},"suffix":null,"guided_json":null,"unknown":[{}]}"#,
            r#"{"user":"u","priority":-5,"cache_salt":"s","presence_penalty":-2,"frequency_penalty":2}"#,
            r#"{"max_tokens":64,"prompt_logprobs":0,"truncate_prompt_tokens":5}"#,
        ];
        for body in good {
            read(body, Route::Completions).unwrap_or_else(|error| panic!("{body}: {error}"));
        }
    }

    #[test]
    fn bad_bodies_name_their_field() {
        let long_stop = format!(r#"{{"stop":"{}"}}"#, "x".repeat(65));
        let many_bias: Vec<String> = (0..1025).map(|id| format!(r#""{id}":1"#)).collect();
        let many_bias = format!(r#"{{"logit_bias":{{{}}}}}"#, many_bias.join(","));
        let bad = [
            (r#"{"temperature":1e999}"#, "temperature"),
            (r#"{"temperature":-0.1}"#, "temperature"),
            (r#"{"temperature":"hot"}"#, "temperature"),
            (r#"{"top_p":0}"#, "top_p"),
            (r#"{"top_p":1.1}"#, "top_p"),
            (r#"{"top_k":-2}"#, "top_k"),
            (r#"{"top_k":1.5}"#, "top_k"),
            (r#"{"min_p":2}"#, "min_p"),
            (r#"{"repetition_penalty":0}"#, "repetition_penalty"),
            (r#"{"presence_penalty":2.1}"#, "presence_penalty"),
            (r#"{"frequency_penalty":-3}"#, "frequency_penalty"),
            (r#"{"n":0}"#, "n"),
            (r#"{"n":9}"#, "n"),
            (r#"{"n":2,"best_of":3}"#, "best_of"),
            (r#"{"seed":-1}"#, "seed"),
            (r#"{"seed":9007199254740993}"#, "seed"),
            (r#"{"max_tokens":-1}"#, "max_tokens"),
            (r#"{"max_tokens":65}"#, "max_tokens"),
            (r#"{"max_tokens":9007199254740993}"#, "max_tokens"),
            (r#"{"max_tokens":5,"max_completion_tokens":1000}"#, "max_completion_tokens"),
            (r#"{"max_tokens":5,"min_tokens":6}"#, "min_tokens"),
            (r#"{"logprobs":21}"#, "logprobs"),
            (r#"{"logprobs":true}"#, "logprobs"),
            (r#"{"prompt_logprobs":-1}"#, "prompt_logprobs"),
            (r#"{"stop":["a","b","c","d","e"]}"#, "stop"),
            (r#"{"stop":[""]}"#, "stop"),
            (r#"{"stop":[1]}"#, "stop"),
            (long_stop.as_str(), "stop"),
            (r#"{"stop_token_ids":[100]}"#, "stop_token_ids"),
            (r#"{"allowed_token_ids":[]}"#, "allowed_token_ids"),
            (r#"{"allowed_token_ids":[-1]}"#, "allowed_token_ids"),
            (r#"{"banned_token_ids":["1"]}"#, "banned_token_ids"),
            (r#"{"logit_bias":{"100":1}}"#, "logit_bias"),
            (r#"{"logit_bias":{"x":1}}"#, "logit_bias"),
            (r#"{"logit_bias":{"1":101}}"#, "logit_bias"),
            (r#"{"logit_bias":{"1":1e999}}"#, "logit_bias"),
            (r#"{"logit_bias":[]}"#, "logit_bias"),
            (many_bias.as_str(), "logit_bias"),
            (r#"{"stream":1}"#, "stream"),
            (r#"{"stream_options":{"include_usage":true}}"#, "stream_options"),
            (r#"{"stream":true,"stream_options":{"include_usage":1}}"#, "stream_options.include_usage"),
            (r#"{"stream":true,"prompt_logprobs":1}"#, "prompt_logprobs"),
            (r#"{"cache_salt":""}"#, "cache_salt"),
            (r#"{"priority":2147483648}"#, "priority"),
            (r#"{"response_format":{"type":"json_object"}}"#, "response_format"),
            (r#"{"response_format":"text"}"#, "response_format"),
            (r#"{"suffix":"end"}"#, "suffix"),
            (r#"{"guided_json":{"type":"object"}}"#, "guided_json"),
            (r#"{"structured_outputs":{"regex":"a"}}"#, "structured_outputs"),
            (r#"{"prompt_embeds":"AAAA"}"#, "prompt_embeds"),
            (r#"{"use_beam_search":true}"#, "use_beam_search"),
            (r#"{"bad_words":["x"]}"#, "bad_words"),
            (r#"{"model":7}"#, "model"),
            (r#"{"ignore_eos":"yes"}"#, "ignore_eos"),
            (r#"{"truncate_prompt_tokens":0}"#, "truncate_prompt_tokens"),
        ];
        for (body, param) in bad {
            assert_eq!(refused_param(body, Route::Completions), param, "{body}");
        }
    }

    #[test]
    fn chat_asks_for_logprobs_in_two_fields() {
        assert_eq!(read(r#"{"logprobs":true}"#, Route::Chat).unwrap().sampling.logprobs, Some(0));
        assert_eq!(
            read(r#"{"logprobs":true,"top_logprobs":20}"#, Route::Chat).unwrap().sampling.logprobs,
            Some(20)
        );
        assert_eq!(
            read(r#"{"logprobs":false,"top_logprobs":0}"#, Route::Chat).unwrap().sampling.logprobs,
            None
        );
        assert_eq!(refused_param(r#"{"top_logprobs":2}"#, Route::Chat), "top_logprobs");
        assert_eq!(refused_param(r#"{"logprobs":true,"top_logprobs":21}"#, Route::Chat), "top_logprobs");
        assert_eq!(refused_param(r#"{"logprobs":2}"#, Route::Chat), "logprobs");
    }

    #[test]
    fn defaults_come_from_the_model_then_from_openai() {
        let mut rules = rules();
        rules.generation.temperature = Some(0.6);
        rules.generation.top_k = Some(40);
        let read = |body: &str| {
            Params::read(&mut Fields::parse(body.as_bytes()).unwrap(), Route::Chat, &rules).unwrap().sampling
        };
        let plain = read("{}");
        assert_eq!((plain.temperature, plain.top_k, plain.top_p), (0.6, 40, 1.0));
        let asked = read(r#"{"temperature":0,"top_k":0,"top_p":0.5}"#);
        assert_eq!((asked.temperature, asked.top_k, asked.top_p), (0.0, 0, 0.5));
    }

    #[test]
    fn prompt_and_output_must_fit_the_context() {
        let rules = rules();
        let resolve = |body: &str, prompt_len, default| {
            read(body, Route::Chat).unwrap().resolve_max_tokens(prompt_len, default, "messages", &rules)
        };
        assert_eq!(resolve("{}", 10, 16).unwrap(), 16);
        assert_eq!(resolve("{}", 60, 16).unwrap(), 4);
        assert_eq!(resolve("{}", 10, usize::MAX).unwrap(), 54);
        assert_eq!(resolve(r#"{"max_tokens":3,"max_completion_tokens":54}"#, 10, 16).unwrap(), 54);
        for (body, prompt_len, param) in [
            ("{}", 64, "messages"),
            ("{}", 500, "messages"),
            (r#"{"max_tokens":55}"#, 10, "max_tokens"),
            (r#"{"max_completion_tokens":55}"#, 10, "max_completion_tokens"),
            (r#"{"min_tokens":50}"#, 10, "min_tokens"),
        ] {
            match resolve(body, prompt_len, 16).unwrap_err() {
                ApiError::Invalid { param: Some(found), .. } => assert_eq!(found, param, "{body}"),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn without_a_tokenizer_ids_are_returned_and_text_is_refused() {
        let rules = Rules { has_tokenizer: false, ..rules() };
        let read = |body: &str| {
            Params::read(&mut Fields::parse(body.as_bytes()).unwrap(), Route::Completions, &rules)
        };
        assert!(read("{}").unwrap().return_token_ids);
        assert!(read(r#"{"stop":["x"]}"#).is_err());
    }
}
