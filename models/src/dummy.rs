//! Random weights of any configuration in any storage type, for benchmarks and for tests without a download.
//!
//! A tensor is a function of (seed, its name, its shape, its type) and is made when it is asked for, so a model never
//! lies in memory twice. Every 64-bit word of randomness has its own counter: no state, no order of calls, and any
//! number of threads.
//!
//! Scales keep activations sane at any depth: a matrix of `K` columns has a standard deviation of `1/√K`, so that
//! normalised inputs give outputs of about one; norm weights lie around 1, biases around 0. Values are draws from a
//! table of normal quantiles, which costs about a nanosecond each.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::model_files::DummyOptions;
use crate::parallel::fill_units;
use crate::tensor_table::required_tensors;
use crate::weights::{RandomMatrix, RowOrder, Tensor, TensorInfo, WeightSource};
use half::{bf16, f16};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::convert::Infallible;
use tandem_kernels::DType;

/// A source that makes its tensors up.
pub(crate) struct DummyWeights {
    file: String,
    seed: u64,
    threads: usize,
    tensors: BTreeMap<String, TensorInfo>,
    normal: Vec<f32>,
}

/// Entries of the table of normal quantiles; 16 KB of f32 stay in the first-level cache.
const QUANTILES: usize = 4096;

impl DummyWeights {
    /// Weights for `config`: matrices in the type of the options, vectors in the type a file of that kind has for them.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if a row is no whole number of blocks of the type.
    pub(crate) fn new(file: &str, config: &ModelConfig, options: DummyOptions) -> Result<Self, ModelError> {
        let DummyOptions { dtype, seed, threads } = options;
        let mut tensors = BTreeMap::new();
        for spec in required_tensors(config) {
            // Vectors are never quantised; GGUF files have them in F32.
            let is_matrix = spec.shape.len() > 1;
            let dtype = if is_matrix || dtype.block_len() == 1 { dtype } else { DType::F32 };
            let info = TensorInfo { dtype, shape: spec.shape, row_order: RowOrder::Natural };
            if info.num_bytes().and_then(|num_bytes| usize::try_from(num_bytes).ok()).is_none() {
                let reason =
                    format!("shape {:?} is no whole number of {} blocks per row", info.shape, dtype.name());
                return Err(ModelError::tensor(file, &spec.name, reason));
            }
            tensors.insert(spec.name, info);
        }
        Ok(Self { file: file.to_owned(), seed, threads, tensors, normal: normal_quantiles(QUANTILES) })
    }

    fn find(&self, name: &str) -> Result<&TensorInfo, ModelError> {
        self.tensors.get(name).ok_or_else(|| ModelError::tensor(&self.file, name, "is missing"))
    }

    /// Mean and standard deviation of a tensor's values.
    fn distribution(name: &str, info: &TensorInfo) -> (f32, f32) {
        let cols = info.shape.last().copied().unwrap_or(1);
        match info.shape.len() {
            1 if name.ends_with(".bias") => (0.0, 0.05),
            1 => (1.0, 0.1),
            _ => (0.0, 1.0 / (cols as f32).sqrt()),
        }
    }

    /// The values that those of a tensor are drawn from.
    fn table(&self, (mean, deviation): (f32, f32)) -> Vec<f32> {
        self.normal.iter().map(|quantile| mean + deviation * quantile).collect()
    }

    fn data(&self, name: &str, info: &TensorInfo) -> Vec<u8> {
        let random = Random { key: key(self.seed, name) };
        let num_elements: usize = info.shape.iter().product();
        let cols = info.shape.last().copied().unwrap_or(1);
        let (mean, deviation) = Self::distribution(name, info);
        let values = self.table((mean, deviation));
        let row_bytes = info.dtype.row_bytes(cols).expect("checked when the source was made");
        let mut data = vec![0; num_elements / cols * row_bytes];
        let threads = self.threads;
        match info.dtype {
            DType::F32 => plain(random, threads, &mut data, |idx| values[idx].to_le_bytes()),
            DType::F16 => plain(random, threads, &mut data, |idx| f16::from_f32(values[idx]).to_le_bytes()),
            DType::Bf16 => plain(random, threads, &mut data, |idx| bf16::from_f32(values[idx]).to_le_bytes()),
            DType::Q8_0 => q8_0(random, threads, &mut data, deviation),
            DType::Q4_0 => q4_0(random, threads, &mut data, deviation),
            DType::Q4_1 => q4_1(random, threads, &mut data, deviation),
        }
        data
    }
}

impl WeightSource for DummyWeights {
    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor<'_>, ModelError> {
        let info = self.find(name)?;
        let data = Cow::Owned(self.data(name, info));
        Ok(Tensor { dtype: info.dtype, shape: info.shape.clone(), data, row_order: info.row_order })
    }

    fn random(&self, name: &str) -> Option<RandomMatrix> {
        let info = self.tensors.get(name).filter(|info| info.dtype == DType::Bf16)?;
        let &[rows, cols] = &info.shape[..] else { return None };
        let table = self.table(Self::distribution(name, info)).into_iter().map(bf16::from_f32).collect();
        Some(RandomMatrix { rows, cols, key: key(self.seed, name), table })
    }

    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    /// The seed stands for the data, which follows from it.
    fn sample(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        self.find(name).map(|_| [&b"dummy"[..], &self.seed.to_le_bytes()].concat())
    }
}

/// SplitMix64 by counter.
#[derive(Clone, Copy)]
struct Random {
    key: u64,
}

impl Random {
    fn word(self, idx: u64) -> u64 {
        mix(self.key.wrapping_add(idx.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }
}

fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn key(seed: u64, name: &str) -> u64 {
    name.bytes().fold(mix(seed ^ 0x7461_6e64_656d), |key, byte| mix(key ^ u64::from(byte)).wrapping_add(1))
}

/// Fills `data` with units of `unit_bytes`, the last of which may be shorter: `fill(unit, bytes)`.
fn fill(threads: usize, unit_bytes: usize, data: &mut [u8], fill: impl Fn(u64, &mut [u8]) + Sync) {
    let filled = fill_units(threads, unit_bytes, data, |first, piece| {
        for (unit, bytes) in (first as u64..).zip(piece.chunks_mut(unit_bytes)) {
            fill(unit, bytes);
        }
        Ok::<(), Infallible>(())
    });
    let Ok(()) = filled;
}

/// Draws from a table of ready encodings, four to a word of randomness.
fn plain<const N: usize>(
    random: Random,
    threads: usize,
    data: &mut [u8],
    encoding: impl Fn(usize) -> [u8; N],
) {
    let table: Vec<[u8; N]> = (0..QUANTILES).map(encoding).collect();
    fill(threads, 4 * N, data, |unit, quad| {
        let word = random.word(unit);
        for (lane, value) in quad.chunks_exact_mut(N).enumerate() {
            value.copy_from_slice(&table[(word >> (16 * lane)) as usize % QUANTILES]);
        }
    });
}

/// `d` differs from block to block by up to a quarter, as it does in real files.
fn block_scale(word: u64, mean: f32) -> f32 {
    mean * (0.75 + (word >> 40) as f32 / (1u64 << 25) as f32)
}

/// f16 `d`, then 32 signed bytes of a normal distribution.
fn q8_0(random: Random, threads: usize, data: &mut [u8], deviation: f32) {
    const WORDS: u64 = 5;
    let quantiles = normal_quantiles(256);
    let widest = quantiles[255];
    let table: Vec<u8> =
        quantiles.iter().map(|q| ((q / widest * 127.0).round() as i8).cast_unsigned()).collect();
    fill(threads, 34, data, |idx, block| {
        let word = |word: u64| random.word(idx * WORDS + word);
        let d = block_scale(word(0), deviation * widest / 127.0);
        block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
        for (eight, values) in block[2..].chunks_exact_mut(8).enumerate() {
            let bytes = word(1 + eight as u64).to_le_bytes();
            values.iter_mut().zip(bytes).for_each(|(value, byte)| *value = table[usize::from(byte)]);
        }
    });
}

/// Standard deviation of a nibble that takes all 16 values equally often.
const NIBBLE_DEVIATION: f32 = 4.609_772;

/// f16 `d`, then 16 bytes of nibbles: `d · (q − 8)`. The sign of `d` is random, because nibbles have a mean of 7.5.
fn q4_0(random: Random, threads: usize, data: &mut [u8], deviation: f32) {
    const WORDS: u64 = 3;
    fill(threads, 18, data, |idx, block| {
        let word = |word: u64| random.word(idx * WORDS + word);
        let scale = block_scale(word(0), deviation / NIBBLE_DEVIATION);
        let d = if word(0) & 1 == 0 { scale } else { -scale };
        block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
        block[2..10].copy_from_slice(&word(1).to_le_bytes());
        block[10..].copy_from_slice(&word(2).to_le_bytes());
    });
}

/// f16 `d` and `m`, then 16 bytes of nibbles: `d · q + m`, with `m` that centres them.
fn q4_1(random: Random, threads: usize, data: &mut [u8], deviation: f32) {
    const WORDS: u64 = 3;
    fill(threads, 20, data, |idx, block| {
        let word = |word: u64| random.word(idx * WORDS + word);
        let d = block_scale(word(0), deviation / NIBBLE_DEVIATION);
        block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
        block[2..4].copy_from_slice(&f16::from_f32(-7.5 * d).to_le_bytes());
        block[4..12].copy_from_slice(&word(1).to_le_bytes());
        block[12..].copy_from_slice(&word(2).to_le_bytes());
    });
}

/// Midpoints of `num` equally likely slices of the standard normal distribution, ascending.
fn normal_quantiles(num: usize) -> Vec<f32> {
    (0..num).map(|slice| normal_quantile((slice as f64 + 0.5) / num as f64) as f32).collect()
}

/// Inverse of the normal distribution function by bisection: slow, exact enough, and run 4,096 times.
fn normal_quantile(probability: f64) -> f64 {
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if normal_distribution(middle) < probability { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// Marsaglia's series ½ + φ(x)·(x + x³/3 + x⁵/15 + …), Journal of Statistical Software 11(4), 2004.
fn normal_distribution(x: f64) -> f64 {
    let (mut sum, mut term, mut divisor) = (x, x, 1.0);
    while term.abs() > 1e-12 {
        divisor += 2.0;
        term *= x * x / divisor;
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rope::{RopeConfig, RopeScaling};

    const ALL: [DType; 6] = [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1];

    fn config() -> ModelConfig {
        ModelConfig {
            hidden_size: 256,
            intermediate_size: 512,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 64,
            vocab_size: 300,
            max_position_embeddings: 128,
            rms_norm_eps: 1e-5,
            rope: RopeConfig { theta: 1e4, rotary_dim: 64, scaling: RopeScaling::Default },
            attention_bias: true,
            attention_output_bias: false,
            mlp_bias: false,
            tie_word_embeddings: false,
            eos_token_ids: vec![2],
            bos_token_id: Some(1),
            declared_dtype: None,
        }
    }

    fn make(config: &ModelConfig, dtype: DType, seed: u64) -> Result<DummyWeights, ModelError> {
        DummyWeights::new("config.json", config, DummyOptions { dtype, seed, threads: 2 })
    }

    fn values(tensor: &Tensor<'_>) -> Vec<f32> {
        let matrix = tensor.matrix().unwrap();
        let mut values = vec![0.0; tensor.rows() * tensor.cols()];
        values
            .chunks_exact_mut(tensor.cols())
            .enumerate()
            .for_each(|(row, out)| matrix.dequantize_row(row, out));
        values
    }

    fn mean_and_deviation(values: &[f32]) -> (f64, f64) {
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        let variance =
            values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / values.len() as f64;
        (mean, variance.sqrt())
    }

    #[test]
    fn matrices_have_unit_gain_in_every_type() {
        for dtype in ALL {
            let weights = make(&config(), dtype, 7).unwrap();
            for (name, cols) in
                [("model.layers.1.mlp.down_proj.weight", 512.0f64), ("model.embed_tokens.weight", 256.0)]
            {
                let tensor = weights.tensor(name).unwrap();
                assert_eq!(tensor.dtype, dtype);
                let (mean, deviation) = mean_and_deviation(&values(&tensor));
                let expected = 1.0 / cols.sqrt();
                assert!(mean.abs() < expected * 0.02, "{dtype:?} {name}: mean {mean}");
                assert!(
                    (deviation / expected - 1.0).abs() < 0.05,
                    "{dtype:?} {name}: {deviation}, not {expected}"
                );
            }
        }
    }

    #[test]
    fn norms_lie_around_one_and_biases_around_zero() {
        for dtype in ALL {
            let weights = make(&config(), dtype, 7).unwrap();
            let norm = weights.tensor("model.norm.weight").unwrap().to_f32_vector().unwrap();
            assert!(norm.iter().all(|&value| (0.4..1.6).contains(&value)));
            let bias =
                weights.tensor("model.layers.0.self_attn.q_proj.bias").unwrap().to_f32_vector().unwrap();
            assert!(bias.iter().all(|value| value.abs() < 0.3) && bias.iter().any(|&value| value != 0.0));
        }
    }

    #[test]
    fn a_tensor_follows_from_seed_and_name() {
        let make = |seed| make(&config(), DType::Bf16, seed).unwrap();
        let data = |weights: &DummyWeights, name| weights.tensor(name).unwrap().data.into_owned();
        let (first, again, other) = (make(1), make(1), make(2));
        let (q, k) = ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight");
        assert_eq!(data(&first, q), data(&again, q));
        assert_ne!(data(&first, q), data(&other, q));
        assert_ne!(data(&first, q), data(&first, k));
        assert_ne!(first.sample(q).unwrap(), other.sample(q).unwrap());
    }

    /// Whoever draws a matrix by its description has the values that are handed out.
    #[test]
    fn a_matrix_is_what_its_description_says() {
        let weights = make(&config(), DType::Bf16, 3).unwrap();
        let name = "model.layers.1.self_attn.o_proj.weight";
        let RandomMatrix { rows, cols, key, table } = weights.random(name).unwrap();
        let tensor = weights.tensor(name).unwrap();
        assert_eq!((rows, cols), (tensor.rows(), tensor.cols()));
        let random = Random { key };
        let drawn = (0..(rows * cols) as u64).flat_map(|element| {
            let entry = random.word(element / 4) >> (16 * (element % 4));
            table[entry as usize % table.len()].to_le_bytes()
        });
        assert!(drawn.eq(tensor.data.iter().copied()));
        assert!(weights.random("model.norm.weight").is_none(), "a vector");
        assert!(make(&config(), DType::Q8_0, 3).unwrap().random(name).is_none());
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let name = "model.layers.0.mlp.up_proj.weight";
        for dtype in ALL {
            let data = |threads| {
                let options = DummyOptions { dtype, seed: 5, threads };
                let weights = DummyWeights::new("config.json", &config(), options).unwrap();
                weights.tensor(name).unwrap().data.into_owned()
            };
            let alone = data(1);
            assert!([2, 3, 16].into_iter().all(|threads| data(threads) == alone), "{dtype}");
        }
    }

    #[test]
    fn rows_that_are_no_whole_blocks_are_refused() {
        let odd = ModelConfig { intermediate_size: 500, ..config() };
        let error = make(&odd, DType::Q4_0, 1).err().unwrap().to_string();
        assert!(error.contains("down_proj") && error.contains("Q4_0 blocks"), "{error}");
        assert!(make(&odd, DType::F16, 1).is_ok());
    }

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        assert!((normal_quantile(0.975) - 1.959_964).abs() < 1e-5);
        assert!((normal_quantile(0.001) + 3.090_232).abs() < 1e-5);
        let (mean, deviation) = mean_and_deviation(&normal_quantiles(QUANTILES));
        assert!(mean.abs() < 1e-6 && (deviation - 1.0).abs() < 1e-3);
    }
}
