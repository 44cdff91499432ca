//! From a path to everything that must be known before weights are loaded.

use crate::config::{GenerationConfig, ModelConfig};
use crate::error::{ModelError, printable, shown};
use crate::quantized_weights::QuantizedWeights;
use crate::tensor_table::{TensorSpec, check, required_tensors};
use crate::tokenizer_files::TokenizerFiles;
use crate::weights::WeightSource;
use crate::{dummy, fingerprint, gguf, hugging_face};
use std::path::{Path, PathBuf};
use tandem_kernels::DType;

/// A model whose headers, configuration and tokenizer metadata were checked; weights are mapped but not read.
pub struct ModelFiles {
    /// What the path calls the model: the folder's name, or the file's without its extension.
    pub name: String,
    /// What kind of files these are.
    pub source: ModelSource,
    /// Shape and constants.
    pub config: ModelConfig,
    /// Sampling defaults that the author recommends.
    pub generation: GenerationConfig,
    /// Where the tokenizer is.
    pub tokenizer: TokenizerFiles,
    /// Source of the chat template (Jinja), if the model has one.
    pub chat_template: Option<String>,
    /// Number and type of the weights.
    pub summary: WeightSummary,
    /// Same for the same model only: a digest of configuration, tokenizer, tensor table, sizes and sampled weights.
    pub fingerprint: [u8; 16],
    /// What messages call the model's file.
    file: String,
    weights: Box<dyn WeightSource>,
}

/// The kinds of model files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelSource {
    /// One GGUF file.
    Gguf,
    /// A Hugging Face folder with safetensors.
    Safetensors,
    /// A configuration with random weights.
    Dummy,
}

/// The weights that the forward pass uses, in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightSummary {
    /// Number of parameters; tied matrices count once.
    pub num_parameters: u64,
    /// Size of the weights as stored, in bytes.
    pub num_bytes: u64,
    /// Storage type of the largest number of parameters.
    pub dtype: DType,
}

/// Opens a model: a `.gguf` file, a folder with `config.json` and safetensors, or a folder with exactly one `.gguf`.
/// Reads headers and metadata only, and compares the tensor table with the configuration completely.
///
/// # Errors
/// The first reason to refuse the model, naming file, field and value.
pub fn open(path: &Path) -> Result<ModelFiles, ModelError> {
    match recognise(path)? {
        Recognised::Gguf(file) => assemble(path, ModelSource::Gguf, gguf::open(&file)?, &shown(&file)),
        Recognised::HuggingFace(folder) => {
            assemble(path, ModelSource::Safetensors, hugging_face::open(&folder)?, &shown(&folder))
        }
    }
}

/// How random weights are made.
#[derive(Debug, Clone, Copy)]
pub struct DummyOptions {
    /// Type of the matrices.
    pub dtype: DType,
    /// The same seed makes the same weights.
    pub seed: u64,
    /// How many threads make a tensor.
    pub threads: usize,
}

/// Opens a configuration (`config.json` or the folder that holds it) with random weights. A tokenizer beside the
/// configuration is used.
///
/// # Errors
/// As [`open`]; also a row length that is not a multiple of the type's block.
pub fn open_dummy(path: &Path, options: DummyOptions) -> Result<ModelFiles, ModelError> {
    let config_json = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let folder = config_json.parent().map(Path::to_owned).unwrap_or_default();
    let parts = hugging_face::open_config(&config_json, &folder, |config| {
        let weights = dummy::DummyWeights::new(&shown(&config_json), config, options)?;
        Ok(Box::new(weights) as Box<dyn WeightSource>)
    })?;
    assemble(path, ModelSource::Dummy, parts, &shown(&config_json))
}

impl ModelFiles {
    /// The weights, by canonical name; every tensor of [`crate::required_tensors`] is there in its exact shape.
    pub fn weights(&self) -> &dyn WeightSource {
        &*self.weights
    }

    /// The same model with its matrices (linear layers, embedding, LM head) rounded to the block format `dtype` whenever
    /// they are read, on `threads` threads. A matrix that has this type already stays as it is; if all have, this is the
    /// same model. Else it is another one, with another fingerprint.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if a matrix has another block type, or rows that are no whole number of blocks.
    ///
    /// # Panics
    /// If `dtype` is no block format.
    pub fn quantized(self, dtype: DType, threads: usize) -> Result<Self, ModelError> {
        assert!(dtype.is_quantized(), "{dtype} is no block format");
        let specs = required_tensors(&self.config);
        let weights = Box::new(QuantizedWeights::new(&self.file, self.weights, &specs, dtype, threads)?);
        let summary = summarise(&self.file, &specs, &*weights)?;
        let fingerprint = fingerprint::fingerprint(&self.config, &self.tokenizer, &specs, &*weights)?;
        Ok(Self { summary, fingerprint, weights, ..self })
    }
}

/// What a reader of one kind of files found.
pub(crate) struct Parts {
    pub config: ModelConfig,
    pub generation: GenerationConfig,
    pub tokenizer: TokenizerFiles,
    pub chat_template: Option<String>,
    pub weights: Box<dyn WeightSource>,
}

enum Recognised {
    Gguf(PathBuf),
    HuggingFace(PathBuf),
}

/// Whether this is what a hub calls a model (`owner/name`) rather than a file.
fn looks_like_repository(path: &Path) -> bool {
    let parts = path.components().count();
    parts == 2
        && path.is_relative()
        && path.extension().is_none_or(|ending| ending != "gguf")
        && !path.exists()
}

fn recognise(path: &Path) -> Result<Recognised, ModelError> {
    let metadata = std::fs::metadata(path).map_err(|source| match looks_like_repository(path) {
        true => {
            ModelError::malformed(&shown(path), "no such file or folder; nothing is downloaded from a hub")
        }
        false => ModelError::io(path, source),
    })?;
    if !metadata.is_dir() {
        // A GGUF file is known by its magic number, not by its name: caches store files under hashes.
        return Ok(Recognised::Gguf(path.to_owned()));
    }
    if path.join("config.json").is_file() && hugging_face::has_safetensors(path) {
        return Ok(Recognised::HuggingFace(path.to_owned()));
    }
    let refuse = |reason: String| Err(ModelError::malformed(&shown(path), reason));
    match &gguf_files(path)?[..] {
        [file] => Ok(Recognised::Gguf(file.clone())),
        [] if path.join("config.json").is_file() => refuse(
            "config.json is there, but neither model.safetensors nor model.safetensors.index.json".into(),
        ),
        [] => refuse("neither a config.json with safetensors nor a .gguf file in this folder".into()),
        several => {
            let names: Vec<String> = several
                .iter()
                .filter_map(|file| file.file_name())
                .map(|name| printable(&name.to_string_lossy()))
                .collect();
            refuse(format!(
                "{} .gguf files in this folder, name one of them: {}",
                several.len(),
                names.join(", ")
            ))
        }
    }
}

fn gguf_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|source| ModelError::io(folder, source))? {
        let path = entry.map_err(|source| ModelError::io(folder, source))?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file()
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn assemble(path: &Path, source: ModelSource, parts: Parts, file: &str) -> Result<ModelFiles, ModelError> {
    let Parts { config, generation, tokenizer, chat_template, weights } = parts;
    let specs = check(file, &config, &*weights)?;
    let summary = summarise(file, &specs, &*weights)?;
    let fingerprint = fingerprint::fingerprint(&config, &tokenizer, &specs, &*weights)?;
    let name = name_of(path);
    Ok(ModelFiles {
        name,
        source,
        config,
        generation,
        tokenizer,
        chat_template,
        summary,
        fingerprint,
        file: file.to_owned(),
        weights,
    })
}

fn summarise(
    file: &str,
    specs: &[TensorSpec],
    weights: &dyn WeightSource,
) -> Result<WeightSummary, ModelError> {
    let (mut num_parameters, mut num_bytes) = (0u64, 0u64);
    let mut per_dtype: Vec<(DType, u64)> = Vec::new();
    for spec in specs {
        let Some(info) = weights.info(&spec.name) else { continue };
        let sizes = info.num_elements().zip(info.num_bytes());
        let (elements, bytes) =
            sizes.ok_or_else(|| ModelError::tensor(file, &spec.name, "its size overflows"))?;
        num_parameters = num_parameters.saturating_add(elements);
        num_bytes = num_bytes.saturating_add(bytes);
        match per_dtype.iter_mut().find(|(dtype, _)| *dtype == info.dtype) {
            Some((_, sum)) => *sum = sum.saturating_add(elements),
            None => per_dtype.push((info.dtype, elements)),
        }
    }
    let dominant = per_dtype.into_iter().max_by_key(|&(_, elements)| elements);
    let (dtype, _) = dominant.ok_or_else(|| ModelError::malformed(file, "no weights"))?;
    Ok(WeightSummary { num_parameters, num_bytes, dtype })
}

fn name_of(path: &Path) -> String {
    // `.` and `..` have no name of their own; what they stand for has.
    let resolved = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut named = if path.file_name().is_some() { path } else { &resolved };
    if named.file_name().is_some_and(|name| name == "config.json") {
        named = resolved.parent().unwrap_or(named);
    }
    let name = if named.is_dir() { named.file_name() } else { named.file_stem() };
    name.map_or_else(|| "model".to_owned(), |name| printable(&name.to_string_lossy()))
}

#[cfg(test)]
#[path = "model_files_tests.rs"]
mod tests;
