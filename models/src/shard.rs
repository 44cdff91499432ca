//! Which part of a model a tensor-parallel rank owns.
//!
//! Query heads, KV heads, gated columns and vocabulary rows are split evenly, in order of ranks. Row-parallel layers add over
//! segments ([`crate::Llama`]); a size that divides their number gives the bits of one rank.

use std::ops::Range;

use tandem_kernels::cpu::MAX_SEGMENTS;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::weights::Tensor;

/// Values that are rounded together along the input of a linear layer: a rank owns whole groups.
const UNIT: usize = 32;
/// Vocabulary rows are split in such pieces: the rows of a packed panel.
const VOCAB_UNIT: usize = 16;

/// One rank's place in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    pub rank: usize,
    pub size: usize,
}

impl Shard {
    /// The whole model in one rank.
    pub const WHOLE: Self = Self { rank: 0, size: 1 };

    /// The configuration of this rank's share of a model that [`TensorParallel::plan`] took: its heads and its width of the MLP;
    /// all else is the whole model's.
    pub fn config(self, whole: &ModelConfig) -> ModelConfig {
        Share::new(whole, self).config(whole)
    }
}

impl Default for Shard {
    fn default() -> Self {
        Self::WHOLE
    }
}

/// How a model is split over `size` ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorParallel {
    pub size: usize,
    /// `G`: segments of the sums of row-parallel layers.
    pub segments: usize,
    /// Whether tokens and log-probabilities are the bits that one rank computes: the size divides `G`.
    pub exact: bool,
    /// Ranks that hold the same KV head.
    pub kv_replicas: usize,
}

impl TensorParallel {
    /// Checks that a model can be split over `size` ranks. `file` is what errors call the model's file.
    ///
    /// # Errors
    /// [`ModelError::Field`] that names the configuration's field that does not divide.
    pub fn plan(file: &str, config: &ModelConfig, size: usize) -> Result<Self, ModelError> {
        let refuse = |field: &str, value: usize, what: &str| {
            let fitting = Self::fitting_sizes(config);
            let reason = format!(
                "{value} cannot be split over {size} tensor-parallel ranks: {what}; sizes that fit are {fitting}"
            );
            Err(ModelError::field(file, field, reason))
        };
        let (heads, kv_heads) = (config.num_heads, config.num_kv_heads);
        if size == 0 || !heads.is_multiple_of(size) {
            return refuse("num_attention_heads", heads, "every rank takes as many heads");
        }
        if !kv_heads.is_multiple_of(size) && !size.is_multiple_of(kv_heads) {
            return refuse("num_key_value_heads", kv_heads, "ranks take whole KV heads, or share one evenly");
        }
        let whole = |width: usize| size == 1 || width.is_multiple_of(size * UNIT);
        if !whole(config.query_size()) {
            return refuse(
                "head_dim",
                config.head_dim,
                "the heads of a rank must have a multiple of 32 values",
            );
        }
        if !whole(config.intermediate_size) {
            return refuse(
                "intermediate_size",
                config.intermediate_size,
                "every rank takes a multiple of 32",
            );
        }
        if config.vocab_size.div_ceil(VOCAB_UNIT) < size {
            return refuse("vocab_size", config.vocab_size, "every rank takes at least 16 rows");
        }
        let segments = row_parallel_segments(config);
        let kv_replicas = (size / kv_heads).max(1);
        Ok(Self { size, segments, exact: segments.is_multiple_of(size), kv_replicas })
    }

    /// The sizes that `plan` takes, for people.
    fn fitting_sizes(config: &ModelConfig) -> String {
        let fits = |size: &usize| Self::plan_quietly(config, *size);
        let sizes: Vec<String> = (1..=config.num_heads).filter(fits).map(|size| size.to_string()).collect();
        sizes.join(", ")
    }

    fn plan_quietly(config: &ModelConfig, size: usize) -> bool {
        let kv_heads = config.num_kv_heads;
        let whole = |width: usize| size == 1 || width.is_multiple_of(size * UNIT);
        config.num_heads.is_multiple_of(size)
            && (kv_heads.is_multiple_of(size) || size.is_multiple_of(kv_heads))
            && whole(config.query_size())
            && whole(config.intermediate_size)
            && config.vocab_size.div_ceil(VOCAB_UNIT) >= size
    }
}

/// `G`: into how many segments the inputs of row-parallel layers are split, so that every tensor-parallel size that
/// divides `G` adds in the same order: `gcd(K, I / 32, H · D / 32)`, or 1 where these are not whole. Where that is more than
/// the kernels take, its largest divisor that they do.
pub(crate) fn row_parallel_segments(config: &ModelConfig) -> usize {
    let (intermediate, query) = (config.intermediate_size, config.query_size());
    if !intermediate.is_multiple_of(UNIT) || !query.is_multiple_of(UNIT) {
        return 1;
    }
    let common = gcd(config.num_kv_heads, gcd(intermediate / UNIT, query / UNIT));
    (1..=common.min(MAX_SEGMENTS)).rev().find(|&count| common.is_multiple_of(count)).unwrap_or(1)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// What one rank owns, in rows and columns of the whole model's tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    /// Rows of the query projection, columns of the output projection.
    pub(crate) queries: Range<usize>,
    /// Rows of the key and value projections.
    pub(crate) keys: Range<usize>,
    /// Rows of gate and up, columns of down.
    pub(crate) intermediate: Range<usize>,
    /// Rows of embedding and LM head.
    pub(crate) vocab: Range<usize>,
    /// Segments of its sums; 1 where the ranks' sums are not those of one rank.
    pub(crate) segments: usize,
}

impl Share {
    /// The share of a shard of a model that [`TensorParallel::plan`] took.
    pub(crate) fn new(config: &ModelConfig, shard: Shard) -> Self {
        let Shard { rank, size } = shard;
        let part = |width: usize| width * rank / size..width * (rank + 1) / size;
        let kv_heads = match config.num_kv_heads.is_multiple_of(size) {
            true => part(config.num_kv_heads),
            // Several ranks hold the one that their query heads belong to.
            false => {
                let head = rank * config.num_kv_heads / size;
                head..head + 1
            }
        };
        let segments = row_parallel_segments(config);
        Self {
            queries: part(config.query_size()),
            keys: kv_heads.start * config.head_dim..kv_heads.end * config.head_dim,
            intermediate: part(config.intermediate_size),
            vocab: vocab_rows(config.vocab_size, shard),
            segments: if segments.is_multiple_of(size) { segments / size } else { 1 },
        }
    }

    /// The configuration of a model that is this share alone: heads and widths are the rank's, the rest is the whole model's.
    pub(crate) fn config(&self, whole: &ModelConfig) -> ModelConfig {
        ModelConfig {
            num_heads: self.queries.len() / whole.head_dim,
            num_kv_heads: self.keys.len() / whole.head_dim,
            intermediate_size: self.intermediate.len(),
            ..whole.clone()
        }
    }
}

/// The vocabulary rows of a rank: whole panels, as even as these allow.
pub(crate) fn vocab_rows(vocab_size: usize, Shard { rank, size }: Shard) -> Range<usize> {
    let units = vocab_size.div_ceil(VOCAB_UNIT);
    let end = |rank: usize| (units * rank / size * VOCAB_UNIT).min(vocab_size);
    end(rank)..end(rank + 1)
}

/// Rows or columns of a weight, by the name of its tensor without its last part.
pub(crate) struct Slice<'a> {
    pub(crate) name: &'a str,
    /// All if absent.
    pub(crate) rows: Option<&'a Range<usize>>,
    pub(crate) cols: Option<&'a Range<usize>>,
}

impl<'a> Slice<'a> {
    pub(crate) const fn rows(name: &'a str, rows: &'a Range<usize>) -> Self {
        Self { name, rows: Some(rows), cols: None }
    }

    pub(crate) const fn cols(name: &'a str, cols: &'a Range<usize>) -> Self {
        Self { name, rows: None, cols: Some(cols) }
    }

    pub(crate) fn rows_of(&self, tensor: &Tensor<'_>) -> Range<usize> {
        self.rows.cloned().unwrap_or(0..tensor.rows())
    }

    pub(crate) fn cols_of(&self, tensor: &Tensor<'_>) -> Range<usize> {
        self.cols.cloned().unwrap_or(0..tensor.cols())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rope::{RopeConfig, RopeScaling};

    fn config(num_heads: usize, num_kv_heads: usize, intermediate_size: usize) -> ModelConfig {
        ModelConfig {
            hidden_size: 256,
            intermediate_size,
            num_layers: 1,
            num_heads,
            num_kv_heads,
            head_dim: 64,
            vocab_size: 1000,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta: 10000.0, rotary_dim: 64, scaling: RopeScaling::Default },
            attention_bias: false,
            attention_output_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
            eos_token_ids: vec![],
            bos_token_id: None,
            declared_dtype: None,
        }
    }

    fn refusal(config: &ModelConfig, size: usize) -> String {
        TensorParallel::plan("m", config, size).unwrap_err().to_string()
    }

    #[test]
    fn sizes_that_divide_the_segments_are_exact_and_others_say_so() {
        let plan = TensorParallel::plan("m", &config(9, 3, 1536), 3).unwrap();
        assert_eq!(plan, TensorParallel { size: 3, segments: 3, exact: true, kv_replicas: 1 });
        let wide = config(32, 8, 14336);
        for size in [1, 2, 4, 8] {
            assert!(TensorParallel::plan("m", &wide, size).unwrap().exact, "{size}");
        }
        let beyond = TensorParallel::plan("m", &wide, 16).unwrap();
        assert_eq!((beyond.exact, beyond.kv_replicas), (false, 2));
    }

    #[test]
    fn what_does_not_divide_is_refused_by_its_field() {
        let message = refusal(&config(9, 3, 1536), 2);
        assert!(message.contains("num_attention_heads") && message.contains("fit are 1, 3"), "{message}");
        assert!(refusal(&config(9, 3, 1536), 9).contains("intermediate_size"));
        assert!(refusal(&config(12, 6, 1536), 4).contains("num_key_value_heads"));
        assert!(refusal(&config(12, 6, 1536), 0).contains("num_attention_heads"));
        let few = ModelConfig { vocab_size: 40, ..config(32, 8, 14336) };
        assert!(refusal(&few, 4).contains("vocab_size"));
    }

    #[test]
    fn shares_add_up_to_the_whole() {
        for (config, size) in [(config(9, 3, 1536), 3), (config(32, 8, 14336), 8), (config(12, 6, 384), 6)] {
            let shares: Vec<Share> =
                (0..size).map(|rank| Share::new(&config, Shard { rank, size })).collect();
            let covers = |range: fn(&Share) -> Range<usize>, whole: usize| {
                let mut at = 0;
                for share in &shares {
                    assert_eq!(range(share).start, at);
                    at = range(share).end;
                }
                assert_eq!(at, whole);
            };
            covers(|share| share.queries.clone(), config.query_size());
            covers(|share| share.keys.clone(), config.kv_size());
            covers(|share| share.intermediate.clone(), config.intermediate_size);
            covers(|share| share.vocab.clone(), config.vocab_size);
            assert_eq!(
                shares.iter().map(|share| share.segments).sum::<usize>(),
                row_parallel_segments(&config)
            );
        }
    }

    #[test]
    fn ranks_beyond_the_kv_heads_hold_the_one_of_their_queries() {
        let config = config(8, 2, 1024);
        let keys = |rank| Share::new(&config, Shard { rank, size: 4 }).keys;
        assert_eq!([0, 1, 2, 3].map(keys), [0..64, 0..64, 64..128, 64..128]);
        assert_eq!(Share::new(&config, Shard { rank: 3, size: 4 }).segments, 1);
    }
}
