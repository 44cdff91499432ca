//! The tokenizer's files and the chat template of a Hugging Face folder, as plain data.

use crate::error::ModelError;
use crate::json::{Object, read_bounded};
use crate::tokenizer_files::{HuggingFaceTokenizer, TokenizerFiles};
use serde_json::Value;
use std::path::Path;

/// `tokenizer_config.json` lists every added token; the largest known ones have a few megabytes.
const MAX_TOKENIZER_CONFIG_BYTES: u64 = 32 << 20;
/// The longest chat template, in bytes; real ones have up to 20 KB.
pub(crate) const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

#[derive(Debug)]
pub(crate) struct SideFiles {
    pub tokenizer: TokenizerFiles,
    pub chat_template: Option<String>,
}

/// Reads what is there; all of these files may be missing.
pub(crate) fn read(folder: &Path) -> Result<SideFiles, ModelError> {
    let config_json = folder.join("tokenizer_config.json");
    let config =
        config_json.is_file().then(|| Object::read(&config_json, MAX_TOKENIZER_CONFIG_BYTES)).transpose()?;
    let tokenizer_json = folder.join("tokenizer.json");
    let tokenizer = if tokenizer_json.is_file() {
        let special = |field| config.as_ref().and_then(|config| token_text(config, field));
        let flag = |field| config.as_ref().map_or(Ok(None), |config| config.flag(field));
        TokenizerFiles::HuggingFace(HuggingFaceTokenizer {
            bos_token: special("bos_token"),
            eos_token: special("eos_token"),
            unk_token: special("unk_token"),
            pad_token: special("pad_token"),
            add_bos_token: flag("add_bos_token")?,
            add_eos_token: flag("add_eos_token")?,
            tokenizer_json,
        })
    } else {
        TokenizerFiles::None
    };
    Ok(SideFiles { tokenizer, chat_template: chat_template(folder, config.as_ref())? })
}

/// A token is a string, or an object with its text as `content`.
fn token_text(config: &Object, field: &str) -> Option<String> {
    let value = config.get(field)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// `chat_template.jinja` wins over the older places, as in transformers.
fn chat_template(folder: &Path, config: Option<&Object>) -> Result<Option<String>, ModelError> {
    let jinja = folder.join("chat_template.jinja");
    if jinja.is_file() {
        let bytes = read_bounded(&jinja, MAX_TEMPLATE_BYTES)?;
        let text = String::from_utf8(bytes)
            .map_err(|_| ModelError::malformed(&crate::error::shown(&jinja), "not UTF-8"))?;
        return Ok(Some(text));
    }
    let Some((config, template)) = config.and_then(|config| Some((config, config.get("chat_template")?)))
    else {
        return Ok(None);
    };
    let text = match template {
        Value::String(text) => Some(text.as_str()),
        // Several templates by name: `default` is for plain chats.
        Value::Array(named) => {
            let of_name = |name: &str| {
                named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))
            };
            of_name("default").and_then(|entry| entry.get("template")?.as_str())
        }
        _ => None,
    };
    let text =
        text.ok_or_else(|| config.refuse("chat_template", "neither a string nor a list with a default"))?;
    if text.len() as u64 > MAX_TEMPLATE_BYTES {
        return Err(
            config.refuse("chat_template", format!("larger than the limit of {MAX_TEMPLATE_BYTES} bytes"))
        );
    }
    Ok(Some(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_folder::TestFolder;

    #[test]
    fn an_empty_folder_has_neither_tokenizer_nor_template() {
        let folder = TestFolder::new();
        let found = read(folder.path()).unwrap();
        assert_eq!((found.tokenizer, found.chat_template), (TokenizerFiles::None, None));
    }

    #[test]
    fn templates_are_found_in_their_three_places() {
        let folder = TestFolder::new();
        folder.write("tokenizer_config.json", r#"{"chat_template": "old"}"#);
        assert_eq!(read(folder.path()).unwrap().chat_template.as_deref(), Some("old"));
        let named = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        folder.write("tokenizer_config.json", named);
        assert_eq!(read(folder.path()).unwrap().chat_template.as_deref(), Some("d"));
        folder.write("chat_template.jinja", "new");
        assert_eq!(read(folder.path()).unwrap().chat_template.as_deref(), Some("new"));
        folder.write("chat_template.jinja", vec![b'x'; MAX_TEMPLATE_BYTES as usize + 1]);
        assert!(read(folder.path()).unwrap_err().to_string().contains("larger than the limit"));
        folder.write("chat_template.jinja", [0xff]);
        assert!(read(folder.path()).unwrap_err().to_string().contains("not UTF-8"));
    }

    #[test]
    fn special_tokens_are_strings_or_objects() {
        let folder = TestFolder::new();
        folder.write("tokenizer.json", "{}");
        let config = r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null, "add_bos_token": true}"#;
        folder.write("tokenizer_config.json", config);
        let TokenizerFiles::HuggingFace(found) = read(folder.path()).unwrap().tokenizer else {
            panic!("no tokenizer")
        };
        assert_eq!(found.tokenizer_json, folder.path().join("tokenizer.json"));
        assert_eq!((found.bos_token.as_deref(), found.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
        assert_eq!((found.pad_token, found.add_bos_token, found.add_eos_token), (None, Some(true), None));
        folder.write("tokenizer_config.json", r#"{"add_bos_token": 1}"#);
        assert!(
            read(folder.path()).unwrap_err().to_string().contains("add_bos_token: 1 is not true or false")
        );
    }
}
