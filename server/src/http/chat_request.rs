//! The body of `POST /v1/chat/completions`.
//!
//! Messages go to the template as the client wrote them, once their shape is known to be harmless: a bounded number,
//! known roles (a template may build special tokens out of a role), text content only.

use serde_json::{Map, Value};

use super::completion_request::no_tokenizer;
use super::errors::ApiError;
use super::fields::Fields;
use super::limits;
use super::params::{Params, Route, Rules};

/// A checked chat request.
#[derive(Clone, Debug)]
pub(super) struct ChatRequest {
    pub(super) params: Params,
    pub(super) conversation: Conversation,
}

/// What a chat template renders.
#[derive(Clone, Debug)]
pub(super) struct Conversation {
    /// An array of message objects.
    pub(super) messages: Value,
    /// Bytes of JSON that messages and template variables came in: tells cheap from costly rendering.
    pub(super) num_bytes: usize,
    pub(super) add_generation_prompt: bool,
    pub(super) template_kwargs: Option<Map<String, Value>>,
}

/// Chat fields that ask for something that is not built.
const NOT_SUPPORTED: &[&str] = &[
    "tools",
    "functions",
    "audio",
    "echo",
    "web_search_options",
    "documents",
    "chat_template",
    "mm_processor_kwargs",
    "continue_final_message",
    "add_special_tokens",
];

/// Chat fields that change nothing without tools.
const WITHOUT_EFFECT: &[&str] =
    &["parallel_tool_calls", "reasoning_effort", "verbosity", "prediction", "include_reasoning"];

/// Roles that a message may have.
const ROLES: &[&str] = &["system", "developer", "user", "assistant"];

impl ChatRequest {
    pub(super) fn parse(body: &[u8], rules: &Rules) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let conversation = Conversation::read(&mut fields, rules)?;
        let params = Params::read(&mut fields, Route::Chat, rules)?;
        if params.max_tokens == Some(0) {
            return Err(fields.invalid(params.max_tokens_param, "must be at least 1"));
        }
        fields.skip(WITHOUT_EFFECT);
        fields.finish();
        Ok(Self { params, conversation })
    }
}

impl Conversation {
    /// Reads messages and what belongs to their template.
    pub(super) fn read(fields: &mut Fields<'_>, rules: &Rules) -> Result<Self, ApiError> {
        if !rules.has_tokenizer {
            return Err(no_tokenizer("messages"));
        }
        fields.refuse_unsupported(NOT_SUPPORTED)?;
        refuse_tool_choice(fields, "tool_choice")?;
        refuse_tool_choice(fields, "function_call")?;
        refuse_modalities(fields)?;
        let variable_bytes = fields.peek("chat_template_kwargs").map_or(0, str::len);
        let num_bytes = match fields.peek("messages") {
            Some(raw) => raw.len() + variable_bytes,
            None => return Err(fields.invalid("messages", "is missing")),
        };
        let messages = fields.value("messages")?.unwrap_or_default();
        check_messages(&messages)?;
        let template_kwargs = match fields.value("chat_template_kwargs")? {
            None => None,
            Some(Value::Object(kwargs)) => Some(kwargs),
            Some(_) => return Err(fields.invalid("chat_template_kwargs", "must be an object")),
        };
        let add_generation_prompt = fields.boolean("add_generation_prompt")?.unwrap_or(true);
        Ok(Self { messages, num_bytes, add_generation_prompt, template_kwargs })
    }
}

/// `none` and, since there are no tools, `auto` change nothing.
fn refuse_tool_choice(fields: &mut Fields<'_>, name: &'static str) -> Result<(), ApiError> {
    match fields.value(name)? {
        None => Ok(()),
        Some(Value::String(choice)) if choice == "none" || choice == "auto" => Ok(()),
        Some(Value::String(_) | Value::Object(_)) => Err(ApiError::unsupported(name)),
        Some(_) => Err(fields.invalid(name, "must be a string or an object")),
    }
}

fn refuse_modalities(fields: &mut Fields<'_>) -> Result<(), ApiError> {
    match fields.value("modalities")? {
        None => Ok(()),
        Some(Value::Array(items)) if items.iter().all(|item| item == "text") => Ok(()),
        Some(_) => Err(ApiError::unsupported("modalities")),
    }
}

fn check_messages(messages: &Value) -> Result<(), ApiError> {
    let Value::Array(messages) = messages else {
        return Err(ApiError::invalid("messages", "`messages` must be a list"));
    };
    if messages.is_empty() || messages.len() > limits::MAX_MESSAGES {
        let message = format!("`messages` must hold 1 to {} messages", limits::MAX_MESSAGES);
        return Err(ApiError::invalid("messages", message));
    }
    messages
        .iter()
        .enumerate()
        .try_for_each(|(idx, message)| check_message(message, &format!("messages[{idx}]")))
}

fn check_message(message: &Value, path: &str) -> Result<(), ApiError> {
    let Value::Object(message) = message else {
        return Err(ApiError::invalid(path, format!("`{path}` must be an object")));
    };
    check_role(message, path)?;
    for name in ["tool_calls", "function_call", "audio"] {
        let asks_for_nothing = message.get(name).is_none_or(|value| match value {
            Value::Null => true,
            Value::Array(items) => items.is_empty(),
            _ => false,
        });
        if !asks_for_nothing {
            return Err(ApiError::unsupported(format!("{path}.{name}")));
        }
    }
    if message.get("name").is_some_and(|name| !name.is_string() && !name.is_null()) {
        return Err(ApiError::invalid(format!("{path}.name"), format!("`{path}.name` must be a string")));
    }
    check_content(message.get("content"), &format!("{path}.content"))
}

fn check_role(message: &Map<String, Value>, path: &str) -> Result<(), ApiError> {
    let path = format!("{path}.role");
    match message.get("role").and_then(Value::as_str) {
        Some(role) if ROLES.contains(&role) => Ok(()),
        Some("tool" | "function") => Err(ApiError::invalid(
            path.as_str(),
            format!("`{path}`: messages of tools are not supported yet"),
        )),
        _ => Err(ApiError::invalid(path.as_str(), format!("`{path}` must be one of {}", ROLES.join(", ")))),
    }
}

/// OpenAI's API lets an assistant's content be absent beside tool calls only; templates fail without.
fn check_content(content: Option<&Value>, path: &str) -> Result<(), ApiError> {
    let parts = match content {
        Some(Value::String(_)) => return Ok(()),
        Some(Value::Array(parts)) if !parts.is_empty() => parts,
        _ => {
            let message = format!("`{path}` must be a string or a list of text parts");
            return Err(ApiError::invalid(path, message));
        }
    };
    parts.iter().enumerate().try_for_each(|(idx, part)| {
        let path = format!("{path}[{idx}]");
        match part.get("type").and_then(Value::as_str) {
            Some("text") if part.get("text").is_some_and(Value::is_string) => Ok(()),
            Some("text") => Err(ApiError::invalid(path.as_str(), format!("`{path}.text` must be a string"))),
            Some(_) => Err(ApiError::invalid(
                path.as_str(),
                format!("`{path}`: parts other than text are not supported yet"),
            )),
            None => Err(ApiError::invalid(path.as_str(), format!("`{path}` must be a text part"))),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::completion_request::CompletionRequest;
    use crate::http::params::tests::rules;
    use proptest::prelude::*;

    const HELLO: &str = r#""messages":[{"role":"user","content":"hi"}]"#;

    fn parse(body: &str) -> Result<ChatRequest, ApiError> {
        ChatRequest::parse(body.as_bytes(), &rules())
    }

    #[test]
    fn good_chats() {
        let with_hello = |rest: &str| format!("{{{HELLO}{rest}}}");
        let good = [
            with_hello(""),
            with_hello(r#","tools":[],"tool_choice":"none","functions":null,"response_format":{"type":"text"}"#),
            with_hello(r#","tool_choice":"auto","modalities":["text"],"parallel_tool_calls":true"#),
            with_hello(r#","chat_template_kwargs":{"enable_thinking":false},"add_generation_prompt":false"#),
            with_hello(r#","continue_final_message":false,"logprobs":true,"max_completion_tokens":7"#),
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]}"#.into(),
            r#"{"messages":[{"role":"system","content":"s"},{"role":"assistant","content":""},{"role":"user","content":""}]}"#.into(),
            r#"{"messages":[{"role":"user","content":"hi","name":"n"},{"role":"assistant","content":"a","tool_calls":[]}]}"#.into(),
        ];
        for body in good {
            parse(&body).unwrap_or_else(|error| panic!("{body}: {error}"));
        }
    }

    #[test]
    fn bad_chats_name_their_field() {
        let with_hello = |rest: &str| format!("{{{HELLO},{rest}}}");
        let message = |message: &str| format!(r#"{{"messages":[{message}]}}"#);
        let many = vec![r#"{"role":"user","content":"x"}"#; 1025].join(",");
        let bad = [
            ("{}".into(), "messages"),
            (r#"{"messages":[]}"#.into(), "messages"),
            (r#"{"messages":{}}"#.into(), "messages"),
            (message("7"), "messages[0]"),
            (message(&many), "messages"),
            (message(r#"{"content":"x"}"#), "messages[0].role"),
            (message(r#"{"role":"root","content":"x"}"#), "messages[0].role"),
            (message(r#"{"role":7,"content":"x"}"#), "messages[0].role"),
            (message(r#"{"role":"tool","content":"x"}"#), "messages[0].role"),
            (message(r#"{"role":"user"}"#), "messages[0].content"),
            (message(r#"{"role":"user","content":null}"#), "messages[0].content"),
            (message(r#"{"role":"assistant","refusal":"no"}"#), "messages[0].content"),
            (message(r#"{"role":"assistant","content":null}"#), "messages[0].content"),
            (message(r#"{"role":"user","content":[]}"#), "messages[0].content"),
            (message(r#"{"role":"user","content":7}"#), "messages[0].content"),
            (
                message(r#"{"role":"user","content":[{"type":"image_url","image_url":{}}]}"#),
                "messages[0].content[0]",
            ),
            (message(r#"{"role":"user","content":[{"type":"text"}]}"#), "messages[0].content[0]"),
            (message(r#"{"role":"user","content":["x"]}"#), "messages[0].content[0]"),
            (message(r#"{"role":"assistant","tool_calls":[{}]}"#), "messages[0].tool_calls"),
            (with_hello(r#""tools":[{"type":"function"}]"#), "tools"),
            (with_hello(r#""tool_choice":"required""#), "tool_choice"),
            (with_hello(r#""tool_choice":{"type":"function"}"#), "tool_choice"),
            (with_hello(r#""functions":[{}]"#), "functions"),
            (with_hello(r#""modalities":["text","audio"]"#), "modalities"),
            (with_hello(r#""chat_template":"{{ x }}""#), "chat_template"),
            (with_hello(r#""continue_final_message":true"#), "continue_final_message"),
            (with_hello(r#""chat_template_kwargs":[1]"#), "chat_template_kwargs"),
            (with_hello(r#""max_tokens":0"#), "max_tokens"),
            (with_hello(r#""max_completion_tokens":0"#), "max_completion_tokens"),
            (with_hello(r#""response_format":{"type":"json_schema"}"#), "response_format"),
            (with_hello(r#""echo":true"#), "echo"),
        ];
        for (body, param) in bad {
            match parse(&body) {
                Err(ApiError::Invalid { param: Some(found), .. }) => assert_eq!(found, param, "{body}"),
                other => panic!("{body}: {other:?}"),
            }
        }
    }

    #[test]
    fn text_that_is_not_unicode_is_called_so() {
        let error = parse(r#"{"messages":[{"role":"user","content":"\ud800"}]}"#).unwrap_err();
        assert!(error.to_string().starts_with("`messages` holds text that is not valid Unicode"), "{error}");
    }

    proptest! {
        /// A body with any few bytes of it replaced is taken or refused as a 400, never a panic or a hang.
        #[test]
        fn damaged_bodies_are_taken_or_refused(
            start in 0usize..400,
            len in 0usize..12,
            damage in prop_oneof![
                "[\\x00-\\x7f]{0,12}".prop_map(String::into_bytes),
                prop::collection::vec(any::<u8>(), 0..12),
                Just(b"1e999".to_vec()), Just(b"9007199254740993".to_vec()), Just(b"[[[[".to_vec()),
                Just(b"\"\\ud800\"".to_vec()), Just(b"null".to_vec()), Just(b"-0.0".to_vec()),
            ],
        ) {
            let chat = format!(
                r#"{{{HELLO},"n":2,"stop":["a"],"logit_bias":{{"5":1.5}},"stream":true,"stream_options":{{"include_usage":true}},"top_p":0.5,"seed":7,"stop_token_ids":[1,2],"chat_template_kwargs":{{"a":[1]}},"tool_choice":"none"}}"#
            );
            let completion = r#"{"prompt":[[1,2],[3]],"max_tokens":5,"echo":true,"logprobs":3,"temperature":0.7,"allowed_token_ids":[4],"response_format":{"type":"text"},"cache_salt":"s"}"#;
            for body in [chat.as_str(), completion] {
                let mut bytes = body.as_bytes().to_vec();
                let start = start.min(bytes.len());
                let end = (start + len).min(bytes.len());
                bytes.splice(start..end, damage.iter().copied());
                let parsed = [
                    ChatRequest::parse(&bytes, &rules()).map(|request| request.params),
                    CompletionRequest::parse(&bytes, &rules()).map(|request| request.params),
                ];
                for params in parsed {
                    match params {
                        Ok(params) => prop_assert!(params.sampling.validate(rules().vocab_size, &[]).is_ok(), "{params:?}"),
                        Err(error) => prop_assert_eq!(error.status(), 400),
                    }
                }
            }
        }
    }

    #[test]
    fn chat_needs_a_tokenizer() {
        let rules = Rules { has_tokenizer: false, ..rules() };
        assert!(ChatRequest::parse(format!("{{{HELLO}}}").as_bytes(), &rules).is_err());
    }
}
