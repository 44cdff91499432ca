//! A JSON request body, taken apart field by field.
//!
//! The top level is split into raw values first and each field is read on its own, so that a refusal always names
//! the field: `{"temperature": 1e999}` and even `{"temperature": NaN}`, which is no JSON at all, are errors *of
//! `temperature`*. Depth is checked on the bytes before anything is parsed. A field that is `null` counts as absent,
//! as in OpenAI's API. What nobody asked for is named in a debug log by [`Fields::finish`] and otherwise ignored.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds, RangeInclusive};

use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use super::errors::ApiError;
use super::limits;

/// The fields of a JSON object that nobody has read yet.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    values: BTreeMap<String, &'a RawValue>,
    /// Put before a field's name in messages, for example `stream_options.`.
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    /// Splits `body`, which must be one JSON object no deeper than the limit.
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        check_depth(body)?;
        let text =
            std::str::from_utf8(body).map_err(|_| ApiError::malformed("the body is not valid UTF-8"))?;
        match serde_json::from_str(text) {
            Ok(values) => Ok(Self { values, prefix: "" }),
            Err(error) if error.is_data() => Err(ApiError::malformed("the body must be a JSON object")),
            Err(error) => Err(ApiError::Invalid {
                param: offset_of(text, &error).and_then(|offset| top_level_key_before(body, offset)),
                message: format!(
                    "the body is not valid JSON (line {}, column {})",
                    error.line(),
                    error.column()
                ),
            }),
        }
    }

    /// The raw text of a field, `None` when it is absent or null.
    pub(super) fn raw(&mut self, name: &str) -> Option<&'a RawValue> {
        self.values.remove(name).filter(|raw| raw.get() != "null")
    }

    /// The JSON text of a field that is there and not null; the field stays unread.
    pub(super) fn peek(&self, name: &str) -> Option<&'a str> {
        self.values.get(name).map(|raw| raw.get()).filter(|text| *text != "null")
    }

    /// A nested object, whose fields are named `prefix` + name in messages.
    pub(super) fn object(
        &mut self,
        name: &'static str,
        prefix: &'static str,
    ) -> Result<Option<Fields<'a>>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        let values = serde_json::from_str(raw.get()).map_err(|_| self.wrong_type(name, "an object"))?;
        Ok(Some(Fields { values, prefix }))
    }

    /// A boolean.
    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "true or false")
    }

    /// A string.
    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        self.typed(name, "a string")
    }

    /// Any JSON value.
    pub(super) fn value(&mut self, name: &str) -> Result<Option<Value>, ApiError> {
        self.typed(name, "a JSON value")
    }

    /// A finite number inside `range`.
    pub(super) fn number(
        &mut self,
        name: &str,
        range: impl RangeBounds<f64>,
    ) -> Result<Option<f64>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        let number = finite(raw).ok_or_else(|| self.wrong_type(name, "a finite number"))?;
        if !range.contains(&number) {
            return Err(self.invalid(name, &format!("must be {}, got {number}", describe(&range))));
        }
        Ok(Some(number))
    }

    /// A number without a fraction inside `range`, which must lie within ±2^53.
    pub(super) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        let (low, high) = (range.start(), range.end());
        let number = whole(raw)
            .ok_or_else(|| self.wrong_type(name, &format!("a whole number from {low} to {high}")))?;
        if !range.contains(&number) {
            return Err(self.invalid(name, &format!("must be from {low} to {high}, got {number}")));
        }
        Ok(Some(number))
    }

    /// A list of at most `max_len` token ids below `vocab_size`.
    pub(super) fn token_ids(
        &mut self,
        name: &str,
        vocab_size: usize,
        max_len: usize,
    ) -> Result<Option<Vec<u32>>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        let ids: Vec<&RawValue> =
            serde_json::from_str(raw.get()).map_err(|_| self.wrong_type(name, "a list of token ids"))?;
        if ids.len() > max_len {
            return Err(self.invalid(name, &format!("must have at most {max_len} entries")));
        }
        ids.into_iter()
            .map(|id| token_id(id, &self.path(name), vocab_size))
            .collect::<Result<_, _>>()
            .map(Some)
    }

    /// Refuses each of `names` that is there, not null and not in one of the forms that ask for nothing
    /// (`false`, `""`, `[]`). An empty object is a schema that allows everything, so it asks for something.
    pub(super) fn refuse_unsupported(&mut self, names: &[&str]) -> Result<(), ApiError> {
        for name in names {
            let Some(raw) = self.raw(name) else { continue };
            let asks_for_nothing = matches!(raw.get(), "false" | "\"\"")
                || serde_json::from_str::<Vec<&RawValue>>(raw.get()).is_ok_and(|items| items.is_empty());
            if !asks_for_nothing {
                return Err(ApiError::unsupported(self.path(name)));
            }
        }
        Ok(())
    }

    /// Reads past fields that are known and have no effect here.
    pub(super) fn skip(&mut self, names: &[&str]) {
        for name in names {
            self.values.remove(*name);
        }
    }

    /// Names in a debug log what nobody has read. Names are the client's: they are bounded and quoted.
    pub(super) fn finish(self) {
        if !self.values.is_empty() {
            let ignored: Vec<String> =
                self.values.keys().take(16).map(|name| name.chars().take(64).collect()).collect();
            tracing::debug!(?ignored, "unknown fields in request body");
        }
    }

    /// The field's name as the client would find it.
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// A 400 that starts with the field's name.
    pub(super) fn invalid(&self, name: &str, message: &str) -> ApiError {
        let path = self.path(name);
        ApiError::invalid(path.as_str(), format!("`{path}` {message}"))
    }

    fn wrong_type(&self, name: &str, expected: &str) -> ApiError {
        self.invalid(name, &format!("must be {expected}"))
    }

    fn typed<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        let Some(raw) = self.raw(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|error| match is_not_unicode(&error) {
            true => self.invalid(name, NOT_UNICODE),
            false => self.wrong_type(name, expected),
        })
    }
}

/// What is wrong with text that [`is_not_unicode`].
pub(super) const NOT_UNICODE: &str = "holds text that is not valid Unicode (half of a surrogate pair)";

/// Whether JSON that was split into fields cannot be read because of a `\u` escape that stands for no character. The
/// split has checked all else about strings.
pub(super) fn is_not_unicode(error: &serde_json::Error) -> bool {
    let text = error.to_string();
    error.is_syntax() && ["surrogate", "hex escape", "unicode code point"].iter().any(|it| text.contains(it))
}

/// Reads one token id; `path` names the field in the refusal.
pub(super) fn token_id(raw: &RawValue, path: &str, vocab_size: usize) -> Result<u32, ApiError> {
    let id = whole(raw).ok_or_else(|| ApiError::invalid(path, format!("`{path}` must hold token ids")))?;
    match u32::try_from(id) {
        Ok(id) if (id as usize) < vocab_size => Ok(id),
        _ => Err(ApiError::invalid(
            path,
            format!("`{path}` holds token id {id}, which is outside the vocabulary of {vocab_size} tokens"),
        )),
    }
}

/// A finite JSON number. `1e999` overflows and is none.
pub(super) fn finite(raw: &RawValue) -> Option<f64> {
    serde_json::from_str::<f64>(raw.get()).ok().filter(|number| number.is_finite())
}

/// A JSON number without a fraction that a double holds exactly; `16.0` is one, `9007199254740993` is not.
fn whole(raw: &RawValue) -> Option<i64> {
    let exact = |number: &i64| number.unsigned_abs() <= limits::MAX_EXACT_INTEGER.unsigned_abs();
    match serde_json::from_str::<i64>(raw.get()) {
        Ok(number) => Some(number).filter(exact),
        Err(_) => {
            let number = finite(raw).filter(|number| number.fract() == 0.0)?;
            // The cast saturates, so a huge double fails the check instead of wrapping.
            Some(number as i64).filter(exact)
        }
    }
}

fn describe(range: &impl RangeBounds<f64>) -> String {
    let low = match range.start_bound() {
        Bound::Included(low) => format!("at least {low}"),
        Bound::Excluded(low) => format!("above {low}"),
        Bound::Unbounded => String::new(),
    };
    let high = match range.end_bound() {
        Bound::Included(high) => format!("at most {high}"),
        Bound::Excluded(high) => format!("below {high}"),
        Bound::Unbounded => String::new(),
    };
    if low.is_empty() || high.is_empty() { format!("{low}{high}") } else { format!("{low} and {high}") }
}

/// Counts brackets outside strings. Runs before the parser, which is recursive.
fn check_depth(body: &[u8]) -> Result<(), ApiError> {
    let mut depth = 0usize;
    for (_, byte) in outside_strings(body) {
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > limits::MAX_JSON_DEPTH {
            let message = format!("the body is nested deeper than {} levels", limits::MAX_JSON_DEPTH);
            return Err(ApiError::malformed(message));
        }
    }
    Ok(())
}

/// Bytes that are not inside a string, with their offsets; a string is seen as its opening quote.
fn outside_strings(body: &[u8]) -> impl Iterator<Item = (usize, u8)> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let (start, byte) = (at, *body.get(at)?);
        at += 1;
        if byte == b'"' {
            at = string_end(body, at);
        }
        Some((start, byte))
    })
}

/// The offset past the closing quote of a string whose content starts at `at`.
fn string_end(body: &[u8], mut at: usize) -> usize {
    while let Some(byte) = body.get(at) {
        match byte {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    body.len()
}

/// The last key of the outermost object that starts before `offset`: where a syntax error most likely belongs.
fn top_level_key_before(body: &[u8], offset: usize) -> Option<String> {
    let (mut depth, mut expects_key, mut key) = (0usize, false, None);
    for (start, byte) in outside_strings(body).take_while(|(start, _)| *start < offset) {
        match byte {
            b'{' | b'[' => {
                depth += 1;
                expects_key = depth == 1 && byte == b'{';
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' => expects_key = depth == 1,
            b'"' if expects_key => {
                key = Some(start..string_end(body, start + 1));
                expects_key = false;
            }
            _ => {}
        }
    }
    // Only plain short names can be parameters; anything else is not worth repeating.
    let key: String = serde_json::from_slice(&body[key?]).ok()?;
    (key.len() <= 64).then_some(key)
}

fn offset_of(text: &str, error: &serde_json::Error) -> Option<usize> {
    let line_start: usize = text.split_inclusive('\n').take(error.line().checked_sub(1)?).map(str::len).sum();
    Some(line_start + error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(error: ApiError) -> Option<String> {
        assert_eq!(error.status(), 400);
        match error {
            ApiError::Invalid { param, .. } => param,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bad_numbers_name_their_field() {
        for bad in ["1e999", "-1", "9007199254740993", "\"1\"", "true", "[1]", "1.5", "1e400", "{}"] {
            let body = format!(r#"{{"a":1,"x":{bad}}}"#);
            let mut fields = Fields::parse(body.as_bytes()).unwrap();
            let error = fields.integer("x", 0..=limits::MAX_EXACT_INTEGER).unwrap_err();
            assert_eq!(param(error).as_deref(), Some("x"), "{bad}");
        }
        for (bad, good) in [("1e999", "1e2"), ("-0.1", "0"), ("\"1\"", "1"), ("[]", "0.5"), ("101", "99.5")] {
            let body = format!(r#"{{"bad":{bad},"good":{good}}}"#);
            let mut fields = Fields::parse(body.as_bytes()).unwrap();
            assert_eq!(
                param(fields.number("bad", 0.0..=100.0).unwrap_err()).as_deref(),
                Some("bad"),
                "{bad}"
            );
            assert!(fields.number("good", 0.0..=100.0).unwrap().is_some());
        }
    }

    #[test]
    fn whole_numbers_may_be_written_as_doubles() {
        let mut fields = Fields::parse(br#"{"a":16.0,"b":1e3,"c":null,"d":9007199254740992}"#).unwrap();
        assert_eq!(fields.integer("a", 0..=100).unwrap(), Some(16));
        assert_eq!(fields.integer("b", 0..=1000).unwrap(), Some(1000));
        assert_eq!(fields.integer("c", 0..=1).unwrap(), None);
        assert_eq!(fields.integer("d", 0..=1 << 53).unwrap(), Some(1 << 53));
        assert_eq!(fields.integer("absent", 0..=1).unwrap(), None);
    }

    #[test]
    fn syntax_errors_name_the_field_they_stand_in() {
        let cases: [(&str, Option<&str>); 8] = [
            (r#"{"a":1,"temperature":NaN}"#, Some("temperature")),
            (r#"{"a":{"b":1},"top_p": Infinity}"#, Some("top_p")),
            ("{\"a\": 1,\n \"b\": [1, 2\n, tru]}", Some("b")),
            (r#"{"a":"\ud800"#, Some("a")),
            ("", None),
            ("[1,2]", None),
            ("nonsense", None),
            ("{} trailing", None),
        ];
        for (body, expected) in cases {
            let error = Fields::parse(body.as_bytes()).unwrap_err();
            assert_eq!(param(error).as_deref(), expected, "{body}");
        }
        assert!(Fields::parse(b"{\"a\":\"\xff\"}").is_err());
    }

    #[test]
    fn odd_strings_are_refused_or_kept_but_never_panic() {
        let mut fields = Fields::parse(br#"{"a":"\ud800","b":"x\u0000y","c":"\ud83d\ude00"}"#).unwrap();
        assert_eq!(param(fields.string("a").unwrap_err()).as_deref(), Some("a"));
        assert_eq!(fields.string("b").unwrap().unwrap(), "x\0y");
        assert_eq!(fields.string("c").unwrap().unwrap(), "\u{1f600}");
    }

    #[test]
    fn depth_is_bounded_before_parsing() {
        let nested = |depth: usize| format!("{{\"a\":{}{}}}", "[".repeat(depth), "]".repeat(depth));
        assert!(Fields::parse(nested(limits::MAX_JSON_DEPTH - 1).as_bytes()).is_ok());
        assert!(Fields::parse(nested(limits::MAX_JSON_DEPTH).as_bytes()).is_err());
        assert!(Fields::parse("[".repeat(1_000_000).as_bytes()).is_err());
        // Brackets inside strings do not count, escaped quotes do not end them.
        let quoted = format!(r#"{{"a":"{}\"{}"}}"#, "[".repeat(100), "{".repeat(100));
        assert!(Fields::parse(quoted.as_bytes()).is_ok());
    }

    #[test]
    fn token_ids_are_checked_against_the_vocabulary() {
        let mut fields =
            Fields::parse(br#"{"ok":[0,9],"high":[10],"neg":[-1],"frac":[1.5],"long":[1,2,3]}"#).unwrap();
        assert_eq!(fields.token_ids("ok", 10, 2).unwrap(), Some(vec![0, 9]));
        for name in ["high", "neg", "frac", "long"] {
            assert_eq!(param(fields.token_ids(name, 10, 2).unwrap_err()).as_deref(), Some(name));
        }
    }

    #[test]
    fn unsupported_fields_pass_when_they_ask_for_nothing() {
        let mut fields =
            Fields::parse(br#"{"a":null,"b":[],"c":{},"d":"","e":false,"f":"x","g":{"a":1}}"#).unwrap();
        fields.refuse_unsupported(&["a", "b", "d", "e", "absent"]).unwrap();
        for name in ["c", "f", "g"] {
            assert_eq!(param(fields.refuse_unsupported(&[name]).unwrap_err()).as_deref(), Some(name));
        }
    }

    #[test]
    fn nested_objects_are_named_by_their_path() {
        let mut fields = Fields::parse(br#"{"stream_options":{"include_usage":3},"bad":[]}"#).unwrap();
        let mut options = fields.object("stream_options", "stream_options.").unwrap().unwrap();
        let error = options.boolean("include_usage").unwrap_err();
        assert_eq!(param(error).as_deref(), Some("stream_options.include_usage"));
        assert_eq!(param(fields.object("bad", "bad.").unwrap_err()).as_deref(), Some("bad"));
    }
}
