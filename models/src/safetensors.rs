//! The safetensors format: a length (u64, little-endian), that many bytes of JSON, then the tensors' bytes.
//!
//! [`SafetensorsFile`] reads any tensor type the format knows; which of them the network can use is decided where a
//! weight source is made. Checked: the header's length, each tensor's shape against its byte range, ranges that tile
//! the data without hole or overlap. Nothing is assumed about alignment: data is bytes.

use crate::error::{ModelError, shown};
use crate::json::Object;
use crate::mmap::MappedFile;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// The longest header, in bytes; real ones have about 100 bytes per tensor.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// More dimensions than any weight has.
const MAX_DIMS: usize = 8;

/// One mapped safetensors file with its checked tensor table.
#[derive(Debug)]
pub struct SafetensorsFile {
    file: String,
    map: MappedFile,
    tensors: BTreeMap<String, Entry>,
}

/// A tensor of a safetensors file.
#[derive(Debug, Clone, Copy)]
pub struct StoredTensor<'a> {
    /// The format's name of the type: `F32`, `BF16`, `I64`, ….
    pub dtype: &'a str,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: &'a [usize],
    /// Little-endian values, at any alignment.
    pub data: &'a [u8],
}

impl SafetensorsFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// [`ModelError::Io`], [`ModelError::Malformed`] or [`ModelError::Tensor`].
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let map = MappedFile::open(path)?;
        let file = shown(path);
        let tensors = parse(&file, &map)?;
        Ok(Self { file, map, tensors })
    }

    /// The file, as messages show it.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor by name.
    pub fn get(&self, name: &str) -> Option<StoredTensor<'_>> {
        let entry = self.tensors.get(name)?;
        Some(StoredTensor { dtype: &entry.dtype, shape: &entry.shape, data: &self.map[entry.range.clone()] })
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    /// Where the data lies in the file.
    range: Range<usize>,
}

fn parse(file: &str, bytes: &[u8]) -> Result<BTreeMap<String, Entry>, ModelError> {
    let refuse = |reason: String| Err(ModelError::malformed(file, reason));
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return refuse("shorter than a safetensors header".into());
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES {
        return refuse(format!("header of {header_bytes} bytes, the limit is {MAX_HEADER_BYTES}"));
    }
    let Some((header, data)) = rest.split_at_checked(header_bytes as usize) else {
        return refuse(format!("header of {header_bytes} bytes in a file of {}", bytes.len()));
    };
    let data_start = 8 + header.len();

    let mut tensors = BTreeMap::new();
    for (name, value) in Object::parse(file, header)?.iter() {
        if name == "__metadata__" {
            continue;
        }
        let entry = entry(value, data_start).map_err(|reason| ModelError::tensor(file, name, reason))?;
        tensors.insert(name.clone(), entry);
    }
    check_tiling(file, &tensors, data_start, data.len())?;
    Ok(tensors)
}

fn entry(value: &Value, data_start: usize) -> Result<Entry, String> {
    let dtype = value.get("dtype").and_then(Value::as_str).ok_or("dtype is missing")?;
    let bits = bits_of(dtype).ok_or_else(|| format!("type {} is unknown", crate::error::printable(dtype)))?;
    let shape = value.get("shape").and_then(Value::as_array).ok_or("shape is missing")?;
    if shape.len() > MAX_DIMS {
        return Err(format!("{} dimensions", shape.len()));
    }
    let as_size = |value: &Value| value.as_u64().and_then(|size| usize::try_from(size).ok());
    let shape: Option<Vec<usize>> = shape.iter().map(as_size).collect();
    let shape = shape.ok_or("shape is not a list of sizes")?;
    let offsets = value.get("data_offsets").and_then(Value::as_array).ok_or("data_offsets is missing")?;
    let [begin, end] = &offsets[..] else { return Err("data_offsets is not a pair".into()) };
    let (begin, end) = as_size(begin).zip(as_size(end)).ok_or("data_offsets is not a pair of offsets")?;

    let total_bits = shape.iter().try_fold(bits, |product, &size| product.checked_mul(size));
    let num_bytes = total_bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8);
    if begin > end || num_bytes != Some(end - begin) {
        return Err(format!("shape {shape:?} of {dtype} does not fill bytes {begin} to {end}"));
    }
    let start = data_start.checked_add(begin).ok_or("its offset overflows")?;
    let stop = data_start.checked_add(end).ok_or("its offset overflows")?;
    Ok(Entry { dtype: dtype.to_owned(), shape, range: start..stop })
}

/// The format's types and their widths in bits.
fn bits_of(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// Ranges, in order, must meet end to end and fill the data exactly: a hole could hide anything, an overlap makes two
/// tensors of the same bytes.
fn check_tiling(
    file: &str,
    tensors: &BTreeMap<String, Entry>,
    data_start: usize,
    data_len: usize,
) -> Result<(), ModelError> {
    let mut ordered: Vec<(&String, &Range<usize>)> =
        tensors.iter().map(|(name, entry)| (name, &entry.range)).collect();
    ordered.sort_by_key(|(_, range)| (range.start, range.end));
    let mut at = data_start;
    for (name, range) in ordered {
        if range.start != at {
            let what =
                if range.start < at { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(ModelError::tensor(file, name, what));
        }
        at = range.end;
    }
    if at != data_start + data_len {
        let reason = format!("tensors fill {} bytes of data, the file has {data_len}", at - data_start);
        return Err(ModelError::malformed(file, reason));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Bytes of a safetensors file with this header and data.
    pub(crate) fn file_bytes(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    fn refusal(header: &str, data: &[u8]) -> String {
        parse("f", &file_bytes(header, data)).unwrap_err().to_string()
    }

    #[test]
    fn reads_names_types_shapes_and_ranges() {
        let header = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"I64","shape":[1],"data_offsets":[4,12]},"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}} "#;
        let bytes = file_bytes(header, &[0; 12]);
        let tensors = parse("f", &bytes).unwrap();
        let start = 8 + header.len();
        assert_eq!(tensors["a"], Entry { dtype: "BF16".into(), shape: vec![2, 1], range: start..start + 4 });
        assert_eq!(tensors["b"].range, start + 4..start + 12);
    }

    #[test]
    fn holes_overlaps_and_wrong_sizes_are_refused() {
        let one =
            |offsets: &str| format!(r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":{offsets}}}}}"#);
        assert!(parse("f", &file_bytes(&one("[0,8]"), &[0; 8])).is_ok());
        assert_eq!(refusal(&one("[4,12]"), &[0; 12]), "f: tensor a: leaves a hole before it");
        assert_eq!(refusal(&one("[0,8]"), &[0; 9]), "f: tensors fill 8 bytes of data, the file has 9");
        assert_eq!(refusal(&one("[0,8]"), &[0; 7]), "f: tensors fill 8 bytes of data, the file has 7");
        assert!(refusal(&one("[0,7]"), &[0; 7]).contains("does not fill"));
        assert!(refusal(&one("[8,0]"), &[0; 8]).contains("does not fill"));
        assert!(refusal(&one("[-1,7]"), &[0; 8]).contains("not a pair of offsets"));
        assert!(refusal(&one("[0,8,9]"), &[0; 8]).contains("not a pair"));
        let two = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
        assert_eq!(refusal(two, &[0; 6]), "f: tensor b: overlaps the tensor before it");
    }

    #[test]
    fn hostile_numbers_are_refused() {
        let shaped =
            |shape: &str| format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}}}"#);
        for shape in [
            "[4611686018427387904, 2]",
            "[18446744073709551615]",
            "[1e3]",
            "[-2]",
            "[1,1,1,1,1,1,1,1,2]",
            "2",
        ] {
            assert!(parse("f", &file_bytes(&shaped(shape), &[0; 8])).is_err(), "{shape}");
        }
        let far =
            r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[18446744073709551615,18446744073709551615]}}"#;
        assert!(parse("f", &file_bytes(far, &[])).is_err());
        assert!(
            refusal(r#"{"a":{"dtype":"F99","shape":[],"data_offsets":[0,0]}}"#, &[])
                .contains("type F99 is unknown")
        );
        assert!(parse("f", &[0; 7]).is_err());
        assert!(parse("f", &u64::MAX.to_le_bytes()).unwrap_err().to_string().contains("the limit is"));
        assert!(parse("f", &100u64.to_le_bytes()).unwrap_err().to_string().contains("in a file of 8"));
        assert!(refusal("[]", &[]).contains("not a JSON object"));
    }

    #[test]
    fn mutations_never_panic() {
        let header = r#"{"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"F16","shape":[2],"data_offsets":[8,12]}}"#;
        let good = file_bytes(header, &[0; 12]);
        let mut num_refused = 0;
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bytes = good.clone();
                bytes[at] ^= 1 << bit;
                num_refused += usize::from(parse("f", &bytes).is_err());
            }
            assert!(parse("f", &good[..at]).is_err(), "cut at {at}");
        }
        assert!(num_refused > good.len());
    }
}
