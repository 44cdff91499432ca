//! What the network computes: configuration, weight files, RoPE, and (beside these) the forward pass.
//!
//! The file-reading half of the crate turns a path into [`ModelFiles`]: a validated [`ModelConfig`], the
//! tokenizer's data as it lies in the files, and a [`WeightSource`] that hands out tensors by their Hugging Face
//! names, whatever the file calls them. Everything read here is hostile until checked: sizes are `u64` with checked
//! arithmetic, counts are compared with what the file can hold before memory is taken, and the tensor table is
//! compared with the configuration completely before anything is loaded.
//!
//! Shape letters: `T` tokens, `H` query heads, `K` KV heads, `D` head dim, `E` hidden size, `I` intermediate size,
//! `V` vocabulary, `L` layers.

mod batch;
mod config;
mod cuda_llama;
mod dummy;
mod error;
mod fingerprint;
pub mod gguf;
mod hugging_face;
mod json;
mod llama;
mod mmap;
mod model_files;
mod parallel;
mod quantize;
mod quantized_weights;
mod rope;
pub mod safetensors;
mod shard;
mod tensor_table;
#[cfg(test)]
mod test_folder;
mod tokenizer_files;
mod weights;

pub use batch::ForwardBatch;
pub use config::{GenerationConfig, ModelConfig};
pub use cuda_llama::{CudaLlama, CudaLlamaOptions, CudaLoadError, Others, TunedSkinny};
pub use error::ModelError;
pub use llama::{Llama, LlamaOptions, LoadedBytes};
pub use mmap::MappedFile;
pub use model_files::{DummyOptions, ModelFiles, ModelSource, WeightSummary, open, open_dummy};
pub use rope::{RopeConfig, RopeScaling};
pub use shard::{Shard, TensorParallel};
pub use tensor_table::{TensorSpec, required_tensors};
pub use tokenizer_files::{GgufTokenizer, HuggingFaceTokenizer, TokenizerFiles};
pub use weights::{Fp8Matrix, Fp8Scales, RandomMatrix, RowOrder, Tensor, TensorInfo, WeightSource};
