//! Bytes of a GGUF file to metadata and tensor entries.
//!
//! ```text
//! "GGUF" version:u32 num_tensors:u64 num_metadata:u64
//! num_metadata × { key:string type:u32 value }
//! num_tensors  × { name:string num_dims:u32 dims:u64… type:u32 offset:u64 }
//! padding to a multiple of `general.alignment` (32), then the tensors' data; offsets count from here
//! ```

use super::value::{Array, Value, ValueType};
use crate::error::{ModelError, printable};
use std::collections::{BTreeMap, HashSet};

/// A parsed file. Everything borrows from its bytes.
#[derive(Debug)]
pub struct Gguf<'a> {
    pub(super) file: &'a str,
    pub(super) bytes: &'a [u8],
    /// 2 or 3.
    pub version: u32,
    /// Values by key.
    pub metadata: BTreeMap<&'a str, Value<'a>>,
    /// Tensors in the file's order; types and ranges are not checked yet.
    pub tensors: Vec<TensorEntry<'a>>,
    /// Power of two that every offset is a multiple of.
    pub alignment: u64,
    /// Where the tensors' data starts in the file.
    pub data_start: u64,
}

/// A row of the tensor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorEntry<'a> {
    /// The file's name of the tensor.
    pub name: &'a str,
    /// Sizes, innermost first; the first `num_dims` count.
    pub dims: [u64; MAX_DIMS],
    /// Number of dimensions, 1 to 4.
    pub num_dims: usize,
    /// ggml's number of the type.
    pub type_id: u32,
    /// Start of the data, counted from the data section.
    pub offset: u64,
}

const MAGIC: [u8; 4] = *b"GGUF";
const MAX_DIMS: usize = 4;
const MAX_KEY_BYTES: u64 = 65_535;
const MAX_TENSOR_NAME_BYTES: u64 = 256;
const MAX_METADATA: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 17;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Lists of lists of lists: no known key needs more than two levels.
const MAX_ARRAY_DEPTH: usize = 4;
/// Key of one byte, type, value of one byte.
const MIN_METADATA_BYTES: u64 = 8 + 1 + 4 + 1;
/// Name of one byte, number of dimensions, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

impl<'a> Gguf<'a> {
    /// Parses the metadata and the tensor table of a whole file's bytes; `file` is its name in errors.
    ///
    /// # Errors
    /// [`ModelError::Malformed`], [`ModelError::Field`] or [`ModelError::Tensor`] with the first thing that is wrong.
    pub fn parse(file: &'a str, bytes: &'a [u8]) -> Result<Self, ModelError> {
        let mut cursor = Cursor { file, bytes, at: 0 };
        let version = version(&mut cursor)?;
        let num_tensors = cursor.u64("the number of tensors")?;
        let num_metadata = cursor.u64("the number of metadata values")?;
        cursor.check_count(num_metadata, MAX_METADATA, MIN_METADATA_BYTES, "metadata values")?;
        cursor.check_count(num_tensors, MAX_TENSORS, MIN_TENSOR_BYTES, "tensors")?;

        let metadata = metadata(&mut cursor, num_metadata)?;
        let tensors = tensor_entries(&mut cursor, num_tensors)?;
        let alignment = alignment(file, &metadata)?;
        // An alignment of at most 2^20 can not overflow a position inside a file in memory.
        let data_start = (cursor.at as u64).next_multiple_of(alignment);
        Ok(Self { file, bytes, version, metadata, tensors, alignment, data_start })
    }
}

fn version(cursor: &mut Cursor<'_>) -> Result<u32, ModelError> {
    let magic: [u8; 4] = cursor.array("the magic number")?;
    if magic != MAGIC {
        return Err(cursor.refuse("not a GGUF file"));
    }
    match cursor.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        1 => Err(cursor.refuse("GGUF version 1 is not supported, convert the file again")),
        // Versions are small: zeros at the low end mean that the high end comes first.
        version if version & 0xffff == 0 && version != 0 => {
            Err(cursor.refuse("big-endian GGUF files are not supported"))
        }
        version => Err(cursor.refuse(format!("GGUF version {version} is not supported"))),
    }
}

fn metadata<'a>(cursor: &mut Cursor<'a>, count: u64) -> Result<BTreeMap<&'a str, Value<'a>>, ModelError> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let key = cursor.string("a metadata key", MAX_KEY_BYTES)?;
        if key.is_empty() {
            return Err(cursor.refuse("a metadata key is empty"));
        }
        let value_type = cursor.value_type(key)?;
        let value = cursor.value(key, value_type)?;
        if metadata.insert(key, value).is_some() {
            return Err(ModelError::field(cursor.file, key, "is there twice"));
        }
    }
    Ok(metadata)
}

fn tensor_entries<'a>(cursor: &mut Cursor<'a>, count: u64) -> Result<Vec<TensorEntry<'a>>, ModelError> {
    let mut entries = Vec::with_capacity(count as usize); // bounded by `check_count`
    let mut names = HashSet::new();
    for _ in 0..count {
        let name = cursor.string("a tensor name", MAX_TENSOR_NAME_BYTES)?;
        let refuse = |reason: String| Err(ModelError::tensor(cursor.file, name, reason));
        if name.is_empty() {
            return refuse("the name is empty".into());
        }
        if !names.insert(name) {
            return refuse("is there twice".into());
        }
        let num_dims = cursor.u32("a number of dimensions")?;
        if num_dims == 0 || num_dims as usize > MAX_DIMS {
            return Err(ModelError::tensor(cursor.file, name, format!("{num_dims} dimensions")));
        }
        let mut dims = [1; MAX_DIMS];
        for dim in &mut dims[..num_dims as usize] {
            *dim = cursor.u64("a dimension")?;
            if *dim == 0 {
                return Err(ModelError::tensor(cursor.file, name, "a dimension is zero"));
            }
        }
        let type_id = cursor.u32("a tensor type")?;
        let offset = cursor.u64("a tensor offset")?;
        entries.push(TensorEntry { name, dims, num_dims: num_dims as usize, type_id, offset });
    }
    Ok(entries)
}

fn alignment(file: &str, metadata: &BTreeMap<&str, Value<'_>>) -> Result<u64, ModelError> {
    const KEY: &str = "general.alignment";
    match metadata.get(KEY) {
        None => Ok(32),
        Some(&Value::Unsigned(alignment)) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => {
            Ok(alignment)
        }
        Some(_) => {
            Err(ModelError::field(file, KEY, format!("is not a power of two of at most {MAX_ALIGNMENT}")))
        }
    }
}

/// A position in the file. Every read is checked against what is left.
struct Cursor<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn refuse(&self, reason: impl Into<String>) -> ModelError {
        ModelError::malformed(self.file, reason)
    }

    fn remaining(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, num_bytes: u64, what: &str) -> Result<&'a [u8], ModelError> {
        if num_bytes > self.remaining() {
            return Err(self.refuse(format!("the file ends inside {what}, at byte {}", self.at)));
        }
        let start = self.at;
        self.at += num_bytes as usize;
        Ok(&self.bytes[start..self.at])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ModelError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ModelError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, ModelError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &str, max_bytes: u64) -> Result<&'a str, ModelError> {
        let length = self.u64(what)?;
        if length > max_bytes {
            return Err(self.refuse(format!("{what} has {length} bytes, the limit is {max_bytes}")));
        }
        let bytes = self.take(length, what)?;
        std::str::from_utf8(bytes)
            .map_err(|_| self.refuse(format!("{what} is not UTF-8, at byte {}", self.at)))
    }

    /// Refuses a count that the rest of the file can not hold, before anyone takes memory for it.
    fn check_count(&self, count: u64, max: u64, min_bytes: u64, what: &str) -> Result<(), ModelError> {
        if count > max {
            return Err(self.refuse(format!("{count} {what}, the limit is {max}")));
        }
        match count.checked_mul(min_bytes) {
            Some(num_bytes) if num_bytes <= self.remaining() => Ok(()),
            _ => Err(self.refuse(format!(
                "{count} {what} do not fit the rest of the file, {} bytes",
                self.remaining()
            ))),
        }
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, ModelError> {
        let number = self.u32("a value type")?;
        ValueType::from_number(number)
            .ok_or_else(|| ModelError::field(self.file, key, format!("value type {number} is unknown")))
    }

    fn value(&mut self, key: &str, value_type: ValueType) -> Result<Value<'a>, ModelError> {
        const WHAT: &str = "a metadata value";
        Ok(match value_type {
            ValueType::U8 => Value::Unsigned(u8::from_le_bytes(self.array(WHAT)?).into()),
            ValueType::U16 => Value::Unsigned(u16::from_le_bytes(self.array(WHAT)?).into()),
            ValueType::U32 => Value::Unsigned(self.u32(WHAT)?.into()),
            ValueType::U64 => Value::Unsigned(self.u64(WHAT)?),
            ValueType::I8 => Value::Signed(i8::from_le_bytes(self.array(WHAT)?).into()),
            ValueType::I16 => Value::Signed(i16::from_le_bytes(self.array(WHAT)?).into()),
            ValueType::I32 => Value::Signed(i32::from_le_bytes(self.array(WHAT)?).into()),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(self.array(WHAT)?)),
            ValueType::F32 => Value::Float(f32::from_le_bytes(self.array(WHAT)?).into()),
            ValueType::F64 => Value::Float(f64::from_le_bytes(self.array(WHAT)?)),
            ValueType::Bool => match self.array(WHAT)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [byte] => {
                    return Err(ModelError::field(
                        self.file,
                        key,
                        format!("{byte} is neither true nor false"),
                    ));
                }
            },
            ValueType::String => Value::String(self.value_string(key)?),
            ValueType::Array => Value::Array(self.list(key, MAX_ARRAY_DEPTH)?),
        })
    }

    fn value_string(&mut self, key: &str) -> Result<&'a str, ModelError> {
        // The file itself is the limit: nothing is copied.
        self.string(&format!("the value of {}", printable(key)), u64::MAX)
    }

    /// A list: its elements are checked here once and stay where they are.
    fn list(&mut self, key: &str, depth: usize) -> Result<Array<'a>, ModelError> {
        let element = self.value_type(key)?;
        let len = self.u64("a list")?;
        self.check_count(len, u64::MAX, element.min_bytes(), "list elements").map_err(|_| {
            ModelError::field(self.file, key, format!("{len} elements do not fit the rest of the file"))
        })?;
        let start = self.at;
        match element {
            ValueType::Array if depth == 1 => {
                return Err(ModelError::field(
                    self.file,
                    key,
                    format!("lists in more than {MAX_ARRAY_DEPTH} levels"),
                ));
            }
            ValueType::Array => {
                for _ in 0..len {
                    self.list(key, depth - 1)?;
                }
            }
            ValueType::String => {
                for _ in 0..len {
                    self.list_string(key)?;
                }
            }
            ValueType::Bool => {
                let flags = self.take(len, "a list")?;
                if flags.iter().any(|&flag| flag > 1) {
                    return Err(ModelError::field(self.file, key, "an element is neither true nor false"));
                }
            }
            number => {
                self.take(len * number.min_bytes(), "a list")?; // can not overflow: `check_count`
            }
        }
        Ok(Array { element, len: len as usize, bytes: &self.bytes[start..self.at] })
    }

    /// As `value_string`, without making the error's text for each of a hundred thousand tokens.
    fn list_string(&mut self, key: &str) -> Result<(), ModelError> {
        let length = self.u64("a list of strings")?;
        let bytes = self.take(length, "a list of strings")?;
        match std::str::from_utf8(bytes) {
            Ok(_) => Ok(()),
            Err(_) => {
                Err(ModelError::field(self.file, key, format!("a string is not UTF-8, at byte {}", self.at)))
            }
        }
    }
}
