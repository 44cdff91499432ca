//! Models in the layout of a Hugging Face repository: a folder of JSON files beside safetensors.

mod config;
mod fp8;
mod side_files;
mod weights;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::model_files::Parts;
use crate::weights::WeightSource;
use std::path::Path;

/// Whether the folder holds safetensors under one of the two names that are looked for.
pub(crate) fn has_safetensors(folder: &Path) -> bool {
    [weights::SINGLE, weights::INDEX].iter().any(|name| folder.join(name).is_file())
}

/// Reads a folder with `config.json` and safetensors.
pub(crate) fn open(folder: &Path) -> Result<Parts, ModelError> {
    open_config(&folder.join("config.json"), folder, |_| weights::open(folder))
}

/// Reads a configuration and the side files of `folder`; `weights` brings the rest.
pub(crate) fn open_config(
    config_json: &Path,
    folder: &Path,
    weights: impl FnOnce(&ModelConfig) -> Result<Box<dyn WeightSource>, ModelError>,
) -> Result<Parts, ModelError> {
    let (config, generation) = config::read(config_json, &folder.join("generation_config.json"))?;
    let side_files = side_files::read(folder)?;
    let weights = weights(&config)?;
    Ok(Parts {
        config,
        generation,
        tokenizer: side_files.tokenizer,
        chat_template: side_files.chat_template,
        weights,
    })
}
