//! JSON files of bounded size and depth, and fields of them with errors that name the file and the field.
//!
//! Depth is bounded by serde_json itself (128 levels), memory by the size limit of each kind of file.

use crate::error::{ModelError, printable, shown};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Reads a whole regular file of at most `max_bytes`.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> Result<Vec<u8>, ModelError> {
    // Before opening: to open a named pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(|source| ModelError::io(path, source))?.is_file() {
        return Err(ModelError::malformed(&shown(path), "not a regular file"));
    }
    let file = File::open(path).map_err(|source| ModelError::io(path, source))?;
    let mut bytes = Vec::new();
    // One byte past the limit tells "at the limit" from "above it", also for files that claim to be shorter.
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(|source| ModelError::io(path, source))?;
    if bytes.len() as u64 > max_bytes {
        return Err(ModelError::malformed(
            &shown(path),
            format!("larger than the limit of {max_bytes} bytes"),
        ));
    }
    Ok(bytes)
}

/// The object that a JSON file holds, with the name that errors show.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) file: String,
    /// Dotted path of this object inside the file, with a trailing dot; empty at the top.
    prefix: String,
    fields: Map<String, Value>,
}

impl Object {
    /// Reads a file that must hold one JSON object.
    pub(crate) fn read(path: &Path, max_bytes: u64) -> Result<Self, ModelError> {
        Self::parse(&shown(path), &read_bounded(path, max_bytes)?)
    }

    pub(crate) fn parse(file: &str, bytes: &[u8]) -> Result<Self, ModelError> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(fields)) => Ok(Self { file: file.to_owned(), prefix: String::new(), fields }),
            Ok(_) => Err(ModelError::malformed(file, "not a JSON object")),
            Err(error) => {
                Err(ModelError::malformed(file, format!("not valid JSON: {}", printable(&error.to_string()))))
            }
        }
    }

    /// The value of a field; a JSON null counts as absent.
    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// Whether the field is there at all, null or not.
    pub(crate) fn mentions(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.fields.iter()
    }

    /// The error that says what is wrong with a field.
    pub(crate) fn refuse(&self, field: &str, reason: impl Into<String>) -> ModelError {
        ModelError::field(&self.file, &format!("{}{field}", self.prefix), reason)
    }

    /// The error that says that a field asks for what is not supported.
    pub(crate) fn unsupported(&self, field: &str, value: &str) -> ModelError {
        ModelError::unsupported(&self.file, &format!("{}{field}", self.prefix), value)
    }

    pub(crate) fn size(&self, field: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        size.map(Some).ok_or_else(|| self.refuse(field, format!("{} is not a whole number", brief(value))))
    }

    pub(crate) fn required_size(&self, field: &str) -> Result<usize, ModelError> {
        self.size(field)?.ok_or_else(|| self.refuse(field, "is missing"))
    }

    /// A finite number as f32.
    pub(crate) fn number(&self, field: &str) -> Result<Option<f32>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let number = value.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.refuse(field, format!("{} is not a finite number", brief(value))))
    }

    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.refuse(field, format!("{} is not true or false", brief(value))))
    }

    pub(crate) fn text(&self, field: &str) -> Result<Option<&str>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.refuse(field, format!("{} is not a string", brief(value))))
    }

    pub(crate) fn object(&self, field: &str) -> Result<Option<Object>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let fields = value
            .as_object()
            .ok_or_else(|| self.refuse(field, format!("{} is not an object", brief(value))))?;
        let prefix = format!("{}{field}.", self.prefix);
        Ok(Some(Object { file: self.file.clone(), prefix, fields: fields.clone() }))
    }

    /// A token id, or a list of them.
    pub(crate) fn token_ids(&self, field: &str) -> Result<Option<Vec<u32>>, ModelError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let as_id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.refuse(field, format!("{} is not a token id", brief(value))))
        };
        let mut ids = Vec::new();
        match value {
            Value::Array(values) => {
                for value in values {
                    let id = as_id(value)?;
                    if !ids.contains(&id) {
                        ids.push(id);
                    }
                    // More would be refused by the configuration's own check; stop before the search turns slow.
                    if ids.len() > 1024 {
                        return Err(self.refuse(field, "too many token ids"));
                    }
                }
            }
            value => ids.push(as_id(value)?),
        }
        Ok(Some(ids))
    }
}

/// A value as messages show it.
fn brief(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".into(),
        Value::Array(_) => "a list".into(),
        value => printable(&value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> Object {
        Object::parse("config.json", text.as_bytes()).expect("an object")
    }

    #[test]
    fn fields_of_the_wrong_type_are_named() {
        let object = object(
            r#"{"a": -1, "b": 1.5, "c": "x", "d": {"e": true}, "f": null, "g": 1e300, "h": [1, 2, 1]}"#,
        );
        assert_eq!(object.size("a").unwrap_err().to_string(), "config.json: a: -1 is not a whole number");
        assert_eq!(object.size("b").unwrap_err().to_string(), "config.json: b: 1.5 is not a whole number");
        assert_eq!(
            object.number("g").unwrap_err().to_string(),
            "config.json: g: 1e+300 is not a finite number"
        );
        assert_eq!(object.flag("c").unwrap_err().to_string(), "config.json: c: \"x\" is not true or false");
        let inner = object.object("d").unwrap().unwrap();
        assert_eq!(inner.size("e").unwrap_err().to_string(), "config.json: d.e: true is not a whole number");
        assert_eq!(object.size("f").unwrap(), None);
        assert!(object.mentions("f") && !object.mentions("z"));
        assert_eq!(object.token_ids("h").unwrap(), Some(vec![1, 2]));
        assert_eq!(object.required_size("z").unwrap_err().to_string(), "config.json: z: is missing");
    }

    #[test]
    fn deep_huge_and_broken_files_are_refused() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
        assert!(Object::parse("f", deep.as_bytes()).unwrap_err().to_string().contains("not valid JSON"));
        assert!(Object::parse("f", b"[1]").unwrap_err().to_string().contains("not a JSON object"));
        assert!(Object::parse("f", b"{\"a\": 1e999}").is_err());
        assert!(Object::parse("f", b"{\"a\": \"\xff\"}").is_err());
        let path = std::env::temp_dir().join(format!("tandem-json-{}", std::process::id()));
        std::fs::write(&path, vec![b' '; 101]).unwrap();
        assert!(read_bounded(&path, 100).unwrap_err().to_string().contains("larger than the limit"));
        assert_eq!(read_bounded(&path, 101).unwrap().len(), 101);
        std::fs::remove_file(&path).unwrap();
    }
}
