//! How long contexts may be and how many KV blocks there are, from model, options and free memory.

use tandem_kernels::Activations;
use tandem_models::ModelConfig;

use super::{EngineOptions, KvLayout, LoadError};

/// Tokens per KV block; the kernels' layout is made for it.
const BLOCK_SIZE: usize = tandem_kernels::cpu::BLOCK_SIZE;
/// Without an option, the KV pool takes at most this and at most a quarter of the free memory.
const DEFAULT_KV_BYTES: u64 = 4 << 30;
const DEFAULT_KV_SHARE_OF_FREE: u64 = 4;

/// Sizes of the engine, checked against each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnginePlan {
    pub max_model_len: usize,
    pub num_blocks: usize,
    pub block_size: usize,
    /// Memory of the KV pool.
    pub kv_bytes: u64,
    /// Tokens that the KV pool holds.
    pub kv_tokens: usize,
    pub kv_layout: KvLayout,
    /// Arithmetic class that is asked for.
    pub activations: Activations,
    /// What was lowered and why, one sentence each.
    pub notes: Vec<String>,
}

/// KV blocks that a rank has room for: more than [`plan`] would take by itself, so that a rank that is started again, in a little
/// less free memory than its predecessor found, still has room for what the group has agreed on.
pub(super) fn capacity(
    config: &ModelConfig,
    kv_layout: KvLayout,
    options: &EngineOptions,
    free_bytes: u64,
) -> u64 {
    let block_bytes = kv_layout.bytes_per_block(config);
    let room = free_bytes / 10 * 9;
    options.kv_cache_memory_bytes.map_or(room, |given| given.min(free_bytes)) / block_bytes
}

/// Memory that KV may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    free_bytes: u64,
    /// What the pool takes unless an option says otherwise.
    default_kv_bytes: u64,
}

impl Room {
    /// On a machine that does other things, too.
    pub(super) fn of_machine(free_bytes: u64) -> Self {
        Self { free_bytes, default_kv_bytes: DEFAULT_KV_BYTES.min(free_bytes / DEFAULT_KV_SHARE_OF_FREE) }
    }

    /// On a device that is there for this process.
    pub(super) fn of_device(free_bytes: u64) -> Self {
        Self { free_bytes, default_kv_bytes: free_bytes }
    }
}

/// Plans the KV pool.
pub(super) fn plan(
    config: &ModelConfig,
    activations: Activations,
    kv_layout: KvLayout,
    options: &EngineOptions,
    Room { free_bytes, default_kv_bytes }: Room,
) -> Result<EnginePlan, LoadError> {
    let refuse = |option, reason| Err(LoadError::Option { option, reason });
    if options.block_size != BLOCK_SIZE {
        return refuse(
            "block-size",
            format!("{} is not possible, KV blocks hold {BLOCK_SIZE} tokens", options.block_size),
        );
    }
    if options.max_num_seqs == 0 {
        return refuse("max-num-seqs", "must not be zero".into());
    }
    if options.max_num_batched_tokens < options.max_num_seqs {
        let (tokens, seqs) = (options.max_num_batched_tokens, options.max_num_seqs);
        return refuse(
            "max-num-batched-tokens",
            format!("{tokens} is below max-num-seqs, {seqs}: raise it or lower that"),
        );
    }
    let longest = config.max_position_embeddings;
    let wanted_len = options.max_model_len.unwrap_or(longest);
    if wanted_len == 0 || wanted_len > longest {
        return refuse(
            "max-model-len",
            format!("{wanted_len} is not between 1 and the model's own limit, {longest}"),
        );
    }

    let block_bytes = kv_layout.bytes_per_block(config);
    let blocks_per_sequence = wanted_len.div_ceil(BLOCK_SIZE);
    let most_useful = (blocks_per_sequence as u64).saturating_mul(options.max_num_seqs as u64);
    let budget = options.kv_cache_memory_bytes.unwrap_or(default_kv_bytes);
    let kv_bytes = budget.min(most_useful.saturating_mul(block_bytes));
    if kv_bytes > free_bytes {
        let reason = format!(
            "{kv_bytes} bytes would be used, {free_bytes} are free: lower it, max-num-seqs or max-model-len"
        );
        return refuse("kv-cache-memory-bytes", reason);
    }
    let num_blocks = (budget / block_bytes).min(most_useful).min(i32::MAX as u64) as usize;
    if num_blocks == 0 {
        let reason =
            format!("{budget} bytes hold no block; one block of {BLOCK_SIZE} tokens takes {block_bytes}");
        return refuse("kv-cache-memory-bytes", reason);
    }

    let mut notes = Vec::new();
    let kv_tokens = num_blocks * BLOCK_SIZE;
    let max_model_len = wanted_len.min(kv_tokens);
    if max_model_len < wanted_len {
        let needed = blocks_per_sequence as u64 * block_bytes;
        if options.max_model_len.is_some() {
            let reason = format!(
                "{wanted_len} tokens need {needed} bytes of KV cache, there are {budget}: \
                 raise kv-cache-memory-bytes or lower max-model-len to {max_model_len}"
            );
            return refuse("max-model-len", reason);
        }
        notes.push(format!(
            "max-model-len is lowered from {wanted_len} to {max_model_len}: the KV cache has {budget} bytes, {needed} are needed"
        ));
    }
    let kv_bytes = num_blocks as u64 * block_bytes;
    Ok(EnginePlan {
        max_model_len,
        num_blocks,
        block_size: BLOCK_SIZE,
        kv_bytes,
        kv_tokens,
        kv_layout,
        activations,
        notes,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use tandem_kernels::KvDType;
    use tandem_models::{RopeConfig, RopeScaling};

    const KV: KvLayout = KvLayout::Cpu(KvDType::Bf16);

    pub(in crate::load) fn config() -> ModelConfig {
        ModelConfig {
            hidden_size: 64,
            intermediate_size: 128,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            vocab_size: 100,
            max_position_embeddings: 1000,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta: 10000.0, rotary_dim: 16, scaling: RopeScaling::Default },
            attention_bias: false,
            attention_output_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
            eos_token_ids: vec![],
            bos_token_id: None,
            declared_dtype: None,
        }
    }

    /// 2 layers × 2 KV heads × (K and V) × 16 dims × 2 bytes × 16 slots.
    const BLOCK_BYTES: u64 = 2 * 2 * 2 * 16 * 2 * 16;

    fn plan_with(options: &EngineOptions, free_bytes: u64) -> Result<EnginePlan, LoadError> {
        plan(&config(), Activations::Bf16, KV, options, Room::of_machine(free_bytes))
    }

    #[test]
    fn a_large_machine_holds_every_sequence_at_full_length_and_no_more() {
        let plan = plan_with(&EngineOptions::default(), 64 << 30).unwrap();
        assert_eq!((plan.max_model_len, plan.num_blocks), (1000, 63 * 64));
        assert_eq!(plan.kv_bytes, 63 * 64 * BLOCK_BYTES);
        assert!(plan.notes.is_empty());
    }

    #[test]
    fn a_small_machine_lowers_the_length_and_says_so() {
        let plan = plan_with(&EngineOptions::default(), 4 * 10 * BLOCK_BYTES).unwrap();
        assert_eq!((plan.max_model_len, plan.num_blocks), (160, 10));
        assert_eq!(plan.notes.len(), 1);
    }

    #[test]
    fn a_length_that_was_asked_for_is_kept_or_refused() {
        let options = EngineOptions { max_model_len: Some(200), ..EngineOptions::default() };
        assert_eq!(plan_with(&options, 4 * 13 * BLOCK_BYTES).unwrap().max_model_len, 200);
        let error = plan_with(&options, 4 * 12 * BLOCK_BYTES).unwrap_err();
        assert!(matches!(error, LoadError::Option { option: "max-model-len", .. }), "{error}");
    }

    #[test]
    fn a_rank_has_room_for_more_than_it_would_plan() {
        let config = config();
        let room = |options: &EngineOptions, free| capacity(&config, KV, options, free);
        let options = EngineOptions::default();
        let planned = plan_with(&options, 400 * BLOCK_BYTES).unwrap().num_blocks as u64;
        assert_eq!((planned, room(&options, 400 * BLOCK_BYTES)), (100, 360));
        // Its successor finds less memory free and still fits.
        assert!(room(&options, 200 * BLOCK_BYTES) >= planned);
        let given = EngineOptions { kv_cache_memory_bytes: Some(50 * BLOCK_BYTES), ..options };
        assert_eq!(room(&given, 400 * BLOCK_BYTES), 50);
        assert_eq!(room(&given, 20 * BLOCK_BYTES), 20);
    }

    #[test]
    fn a_pool_beyond_the_free_memory_is_refused() {
        let free = 100 * BLOCK_BYTES;
        let with = |bytes| EngineOptions { kv_cache_memory_bytes: Some(bytes), ..EngineOptions::default() };
        assert_eq!(plan_with(&with(free), free).unwrap().num_blocks, 100);
        let error = plan_with(&with(free + BLOCK_BYTES), free).unwrap_err();
        assert!(matches!(error, LoadError::Option { option: "kv-cache-memory-bytes", .. }), "{error}");
        // What no sequence could use is not taken, so it need not be there.
        let few = EngineOptions { max_num_seqs: 1, max_num_batched_tokens: 1, ..with(1 << 50) };
        assert_eq!(plan_with(&few, 100 * BLOCK_BYTES).unwrap().num_blocks, 63);
    }

    #[test]
    fn impossible_options_are_refused_by_name() {
        let with = |edit: fn(&mut EngineOptions)| {
            let mut options = EngineOptions::default();
            edit(&mut options);
            match plan_with(&options, 1 << 30) {
                Err(LoadError::Option { option, .. }) => option,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(with(|o| o.block_size = 32), "block-size");
        assert_eq!(with(|o| o.max_num_seqs = 0), "max-num-seqs");
        assert_eq!(with(|o| o.max_num_batched_tokens = 63), "max-num-batched-tokens");
        assert_eq!(with(|o| o.max_model_len = Some(1001)), "max-model-len");
        assert_eq!(with(|o| o.max_model_len = Some(0)), "max-model-len");
        assert_eq!(with(|o| o.kv_cache_memory_bytes = Some(BLOCK_BYTES - 1)), "kv-cache-memory-bytes");
    }
}
