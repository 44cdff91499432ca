//! The body of `POST /v1/completions`.

use serde_json::value::RawValue;

use super::errors::ApiError;
use super::fields::{Fields, NOT_UNICODE, is_not_unicode, token_id};
use super::limits;
use super::params::{Params, Route, Rules};

/// One prompt as the client wrote it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    Text(String),
    /// Checked against the vocabulary, not empty.
    Tokens(Vec<u32>),
}

/// A checked completion request.
#[derive(Clone, Debug)]
pub(super) struct CompletionRequest {
    pub(super) params: Params,
    /// At least one.
    pub(super) prompts: Vec<Prompt>,
    pub(super) echo: bool,
    pub(super) add_special_tokens: bool,
}

impl CompletionRequest {
    pub(super) fn parse(body: &[u8], rules: &Rules) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let params = Params::read(&mut fields, Route::Completions, rules)?;
        let prompts = read_prompts(&mut fields, params.truncate_prompt_tokens.is_some(), rules)?;
        let echo = fields.boolean("echo")?.unwrap_or(false);
        if params.max_tokens == Some(0) && !echo {
            return Err(fields.invalid(params.max_tokens_param, "may be 0 only when `echo` is true"));
        }
        let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
        fields.finish();
        Ok(Self { params, prompts, echo, add_special_tokens })
    }
}

/// A text, a list of token ids, a list of texts or a list of lists of token ids.
fn read_prompts(fields: &mut Fields<'_>, truncates: bool, rules: &Rules) -> Result<Vec<Prompt>, ApiError> {
    let Some(raw) = fields.raw("prompt") else { return Err(fields.invalid("prompt", "is missing")) };
    let prompts = match raw.get().as_bytes().first() {
        Some(b'"') => vec![text_prompt(raw, rules)?],
        Some(b'[') => list_of_prompts(raw, truncates, rules)?,
        _ => return Err(wrong_type()),
    };
    if prompts.is_empty() {
        return Err(fields.invalid("prompt", "must not be empty"));
    }
    if prompts.len() > limits::MAX_PROMPTS {
        return Err(fields.invalid("prompt", &format!("must hold at most {} prompts", limits::MAX_PROMPTS)));
    }
    Ok(prompts)
}

fn list_of_prompts(raw: &RawValue, truncates: bool, rules: &Rules) -> Result<Vec<Prompt>, ApiError> {
    let items: Vec<&RawValue> = serde_json::from_str(raw.get()).map_err(|_| wrong_type())?;
    match items.first().and_then(|item| item.get().bytes().next()) {
        None => Ok(Vec::new()),
        Some(b'"') => items.into_iter().map(|item| text_prompt(item, rules)).collect(),
        Some(b'[') => items
            .into_iter()
            .map(|item| {
                token_prompt(serde_json::from_str(item.get()).map_err(|_| wrong_type())?, truncates, rules)
            })
            .collect(),
        Some(_) => Ok(vec![token_prompt(items, truncates, rules)?]),
    }
}

fn text_prompt(raw: &RawValue, rules: &Rules) -> Result<Prompt, ApiError> {
    let text: String = serde_json::from_str(raw.get()).map_err(|error| match is_not_unicode(&error) {
        true => ApiError::invalid("prompt", format!("`prompt` {NOT_UNICODE}")),
        false => wrong_type(),
    })?;
    if text.is_empty() {
        return Err(ApiError::invalid("prompt", "`prompt` must not be empty"));
    }
    if !rules.has_tokenizer {
        return Err(no_tokenizer("prompt"));
    }
    Ok(Prompt::Text(text))
}

fn token_prompt(ids: Vec<&RawValue>, truncates: bool, rules: &Rules) -> Result<Prompt, ApiError> {
    if ids.is_empty() {
        return Err(ApiError::invalid("prompt", "`prompt` must not be empty"));
    }
    // Known before a million of them are read.
    if ids.len() > rules.max_model_len && !truncates {
        return Err(rules.too_long("prompt", ids.len()));
    }
    ids.into_iter()
        .map(|id| token_id(id, "prompt", rules.vocab_size))
        .collect::<Result<_, _>>()
        .map(Prompt::Tokens)
}

/// Text for a model that was loaded without a tokenizer.
pub(super) fn no_tokenizer(param: &'static str) -> ApiError {
    ApiError::invalid(
        param,
        "this model has no tokenizer: send `prompt` as a list of token ids to /v1/completions",
    )
}

fn wrong_type() -> ApiError {
    ApiError::invalid(
        "prompt",
        "`prompt` must be a string, a list of strings, a list of token ids or a list of such lists",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::params::tests::rules;

    fn parse(body: &str) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::parse(body.as_bytes(), &rules())
    }

    #[test]
    fn prompts_come_in_four_forms() {
        let text = |text: &str| Prompt::Text(text.to_owned());
        let cases = [
            (r#""hi""#, vec![text("hi")]),
            (r#"["a","b"]"#, vec![text("a"), text("b")]),
            ("[1,2.0,99]", vec![Prompt::Tokens(vec![1, 2, 99])]),
            ("[[1],[2,3]]", vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]),
        ];
        for (prompt, expected) in cases {
            assert_eq!(parse(&format!(r#"{{"prompt":{prompt}}}"#)).unwrap().prompts, expected);
        }
    }

    #[test]
    fn bad_prompts_are_refused_by_name() {
        let many = format!("[{}]", vec!["[1]"; 129].join(","));
        let bad = [
            "null",
            "\"\"",
            "[]",
            "[[]]",
            "[\"\"]",
            "7",
            "{}",
            "true",
            "[1,\"a\"]",
            "[\"a\",1]",
            "[[1],\"a\"]",
            "[[1],2]",
            "[100]",
            "[-1]",
            "[1.5]",
            "[9007199254740993]",
            "[1e999]",
            "[[1],[100]]",
            "[[[1]]]",
            "[true]",
            "[null]",
            "\"\\ud800\"",
            many.as_str(),
        ];
        for prompt in bad {
            match parse(&format!(r#"{{"prompt":{prompt}}}"#)) {
                Err(ApiError::Invalid { param: Some(param), .. }) => assert_eq!(param, "prompt", "{prompt}"),
                other => panic!("{prompt}: {other:?}"),
            }
        }
        assert!(parse("{}").is_err());
        for prompt in [r#""a\ud800""#, r#"["a","\udc00b"]"#, r#""\ud800\u0041""#, r#""\ud800\n""#] {
            let error = parse(&format!(r#"{{"prompt":{prompt}}}"#)).unwrap_err();
            assert!(error.to_string().contains("not valid Unicode"), "{prompt}: {error}");
        }
    }

    #[test]
    fn nothing_to_generate_is_allowed_with_echo_only() {
        assert!(parse(r#"{"prompt":[1],"max_tokens":0}"#).is_err());
        let request = parse(r#"{"prompt":[1],"max_tokens":0,"echo":true,"logprobs":3}"#).unwrap();
        assert!(request.echo && request.params.max_tokens == Some(0));
    }

    #[test]
    fn text_needs_a_tokenizer() {
        let rules = Rules { has_tokenizer: false, ..rules() };
        assert!(CompletionRequest::parse(br#"{"prompt":"hi"}"#, &rules).is_err());
        assert!(CompletionRequest::parse(br#"{"prompt":[1]}"#, &rules).is_ok());
    }
}
