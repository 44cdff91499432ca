//! In which type KV is kept, and what a block of it takes, on a CPU and on a GPU.

use tandem_kernels::KvDType;
use tandem_kernels::cuda::launcher::KvType;
use tandem_models::{CudaLlama, Llama, ModelConfig};

/// The type of a KV cache, where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvLayout {
    Cpu(KvDType),
    Gpu(KvType),
}

impl KvLayout {
    /// The type's name for people and for ranks to compare.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu(dtype) => dtype.name(),
            Self::Gpu(KvType::Bf16) => "bf16",
            Self::Gpu(KvType::Fp8) => "fp8",
        }
    }

    /// Memory of one block in all layers.
    pub(super) fn bytes_per_block(self, config: &ModelConfig) -> u64 {
        match self {
            Self::Cpu(dtype) => Llama::kv_cache_config(config, 1, dtype).bytes_per_block() as u64,
            Self::Gpu(kv_type) => CudaLlama::bytes_per_block_of(config, kv_type) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::plan::tests::config;

    #[test]
    fn a_block_on_a_gpu_has_no_gaps() {
        // 2 layers × (K and V) × 2 KV heads × 16 slots × 16 dims.
        let values = 2 * 2 * 2 * 16 * 16;
        assert_eq!(KvLayout::Gpu(KvType::Bf16).bytes_per_block(&config()), 2 * values);
        assert_eq!(KvLayout::Gpu(KvType::Fp8).bytes_per_block(&config()), values);
        assert_eq!(KvLayout::Cpu(KvDType::Bf16).bytes_per_block(&config()), 2 * values);
    }
}
