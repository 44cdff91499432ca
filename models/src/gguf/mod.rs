//! GGUF files, versions 2 and 3, little-endian, of the `llama` architecture.
//!
//! | step | file |
//! |---|---|
//! | bytes to metadata and tensor entries, borrowed from the file | `reader`, `value` |
//! | metadata to configuration and tokenizer | `config`, `tokenizer` |
//! | tensor entries to types, shapes, byte ranges and canonical names | `tensors`, `names` |
//!
//! The reader is safe, checked and bounded: it borrows instead of copying, compares every count with what the rest of
//! the file can hold before it takes memory, and takes at most a small multiple of the file's size.

mod config;
mod names;
mod reader;
mod tensors;
#[cfg(test)]
pub(crate) mod test_file;
mod tokenizer;
mod value;

pub use reader::{Gguf, TensorEntry};
pub use value::{Array, Value, ValueType};

use crate::config::{GenerationConfig, ModelConfig};
use crate::error::{ModelError, shown};
use crate::mmap::MappedFile;
use crate::model_files::Parts;
use crate::tokenizer_files::TokenizerFiles;
use crate::weights::{Tensor, TensorInfo, WeightSource, spread};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// What the metadata and the tensor table of a file say.
#[derive(Debug)]
pub struct Header {
    /// Shape and constants.
    pub config: ModelConfig,
    /// Sampling defaults that the author recommends.
    pub generation: GenerationConfig,
    /// The tokenizer, if the file has one.
    pub tokenizer: TokenizerFiles,
    /// Source of the chat template.
    pub chat_template: Option<String>,
    /// Type, shape and byte range in the file of each tensor, by canonical name.
    pub tensors: BTreeMap<String, (TensorInfo, Range<usize>)>,
}

impl Header {
    /// Reads a whole file's bytes; `file` is its name in errors. This is all of the reader that sees hostile bytes.
    ///
    /// # Errors
    /// The first reason to refuse the file.
    pub fn read(file: &str, bytes: &[u8]) -> Result<Self, ModelError> {
        let gguf = Gguf::parse(file, bytes)?;
        let config = config::read(&gguf)?;
        let tensors = tensors::resolve(&gguf, config.head_dim)?;
        let (tokenizer, chat_template) = tokenizer::read(&gguf, config.vocab_size)?;
        Ok(Self { config, generation: config::generation(&gguf)?, tokenizer, chat_template, tensors })
    }
}

/// Maps a file and reads its header.
pub(crate) fn open(path: &Path) -> Result<Parts, ModelError> {
    let map = MappedFile::open(path)?;
    let file = shown(path);
    let Header { config, generation, tokenizer, chat_template, tensors } = Header::read(&file, &map)?;
    let weights = Box::new(GgufWeights { file, map, tensors });
    Ok(Parts { config, generation, tokenizer, chat_template, weights })
}

#[derive(Debug)]
struct GgufWeights {
    file: String,
    map: MappedFile,
    tensors: BTreeMap<String, (TensorInfo, Range<usize>)>,
}

impl GgufWeights {
    fn find(&self, name: &str) -> Result<(&TensorInfo, &[u8]), ModelError> {
        let found = self.tensors.get(name).map(|(info, range)| (info, &self.map[range.clone()]));
        found.ok_or_else(|| ModelError::tensor(&self.file, name, "is missing"))
    }
}

impl WeightSource for GgufWeights {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        let (info, data) = self.find(name)?;
        Ok(Tensor {
            dtype: info.dtype,
            shape: info.shape.clone(),
            data: Cow::Borrowed(data),
            row_order: info.row_order,
        })
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn sample(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        self.find(name).map(|(_, data)| spread(data))
    }
}

#[cfg(test)]
mod tests;
