//! From tensors by name to weights on the device.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use half::bf16;
use tandem_kernels::cuda::{
    Cuda, CudaError, DeviceBuffer, Gemm, GemmOptions, GemmShape, GemmTypes, Runner, Uploader, launcher,
};
use tandem_kernels::{DType, Matrix};

use super::skinny::Skinny;
use super::step::StepArrays;
use super::weight::{BlockKind, Format, Scratch, Weight};
use super::{CudaLlama, CudaLlamaOptions, JoinedLogits, Layer, PARTIAL_BYTES, Workspace};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::shard::{Shard, Share, Slice, TensorParallel, vocab_rows};
use crate::weights::{Fp8Matrix, RandomMatrix, RowOrder, Tensor, WeightSource};

/// What a thread must have to do to be worth starting.
const THREAD_VALUES: usize = 256 << 10;

/// Why a model cannot be loaded on a GPU.
#[derive(Debug, thiserror::Error)]
pub enum CudaLoadError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl CudaLlama {
    /// Loads a model's weights, those of the options' shard, and takes the working memory of one step; memory for KV comes later
    /// ([`CudaLlama::allocate_kv`]).
    ///
    /// `name` is what errors call the model's file. Each tensor is read once and may be dropped by the source after.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if a tensor is missing or unfit, [`ModelError::Field`] if the model has a shape for which there are
    /// no kernels or cannot be split so; [`CudaError`]: memory above all.
    pub fn load(
        runner: Runner,
        name: &str,
        config: ModelConfig,
        weights: &dyn WeightSource,
        options: CudaLlamaOptions,
    ) -> Result<Self, CudaLoadError> {
        TensorParallel::plan(name, &config, options.shard.size)?;
        check_shape(name, &config)?;
        let share = Share::new(&config, options.shard);
        let gemm = Gemm::new(runner.cuda(), GemmOptions::default())?;
        let uploader = RefCell::new(Uploader::new(runner.cuda())?);
        let loader = Loader {
            runner: &runner,
            cuda: runner.cuda(),
            name,
            weights,
            fp8: options.fp8_weights,
            multiplies_fp8: options.fp8_weights && multiplies_fp8(&gemm, &share, &config)?,
            uploader,
            rank: options.shard.rank,
        };
        // The embedding's rows are read one by one, and the LM head is often the same matrix: both are bf16.
        let vocab = |tensor: &str| loader.bf16(&[Slice::rows(tensor, &share.vocab)]);
        let embedding = vocab("model.embed_tokens")?;
        let lm_head = (!config.tie_word_embeddings).then(|| vocab("lm_head")).transpose()?;
        let layers: Vec<Layer> =
            (0..config.num_layers).map(|index| loader.layer(index, &share)).collect::<Result<_, _>>()?;
        let norm = loader.vector("model.norm.weight")?;
        let rope = rope_tables(&runner, &config, options.max_model_len)?;
        let config = share.config(&config);
        let work = Workspace::new(runner.cuda(), &config, options)?;
        let scratch =
            Scratch::new(runner.cuda(), layers.iter().flat_map(Layer::weights), options.max_tokens)?;
        let skinny = Skinny::new(runner.cuda(), layers.iter().flat_map(Layer::weights))?;
        Ok(Self {
            config,
            options,
            share,
            runner,
            gemm,
            embedding,
            layers,
            norm,
            lm_head,
            rope,
            work,
            scratch,
            skinny,
            kv: None,
            drawn_tokens: None,
            graphs: HashMap::new(),
        })
    }
}

/// Refuses what the kernels have no code for.
fn check_shape(name: &str, config: &ModelConfig) -> Result<(), ModelError> {
    let refuse = |field: &str, reason: String| Err(ModelError::field(name, field, reason));
    if ![64, 128].contains(&config.head_dim) {
        return refuse(
            "head_dim",
            format!("{} is not 64 or 128, which is what GPU kernels take", config.head_dim),
        );
    }
    if config.rope.rotary_dim != config.head_dim {
        return refuse("partial_rotary_factor", "GPU kernels turn whole heads".into());
    }
    for (field, value) in
        [("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)]
    {
        if !value.is_multiple_of(64) {
            return refuse(field, format!("{value} is no multiple of 64, which GPU kernels need"));
        }
    }
    Ok(())
}

struct Loader<'a> {
    runner: &'a Runner,
    cuda: &'a Cuda,
    name: &'a str,
    weights: &'a dyn WeightSource,
    /// Whether layers are rounded to e4m3, and whether the library multiplies that.
    fp8: bool,
    multiplies_fp8: bool,
    uploader: RefCell<Uploader>,
    rank: usize,
}

impl Loader<'_> {
    fn layer(&self, index: usize, share: &Share) -> Result<Layer, CudaLoadError> {
        let in_layer = |part: &str| format!("model.layers.{index}.{part}");
        let column_parallel = |parts: &[(&str, &Range<usize>)]| {
            let names: Vec<String> = parts.iter().map(|(part, _)| in_layer(part)).collect();
            let parts: Vec<Slice<'_>> =
                names.iter().zip(parts).map(|(name, (_, rows))| Slice::rows(name, rows)).collect();
            self.linear(&parts)
        };
        let row_parallel = |part: &str, cols: &Range<usize>| {
            let mut weight = self.linear(&[Slice::cols(&in_layer(part), cols)])?;
            // The ranks' results are summed: one of them has the bias.
            weight.bias = weight.bias.filter(|_| self.rank == 0);
            Ok::<_, CudaLoadError>(weight)
        };
        let Share { queries, keys, intermediate, .. } = share;
        let qkv = [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)];
        let gate_up = [("mlp.gate_proj", intermediate), ("mlp.up_proj", intermediate)];
        Ok(Layer {
            attention_norm: self.vector(&in_layer("input_layernorm.weight"))?,
            qkv: column_parallel(&qkv)?,
            attention_output: row_parallel("self_attn.o_proj", queries)?,
            mlp_norm: self.vector(&in_layer("post_attention_layernorm.weight"))?,
            gate_up: column_parallel(&gate_up)?,
            down: row_parallel("mlp.down_proj", intermediate)?,
        })
    }

    /// One linear layer from the tensors `{name}.weight` and, where they exist, `{name}.bias`, one below the other; in blocks where
    /// the file has all of them in one type of blocks.
    fn linear(&self, parts: &[Slice<'_>]) -> Result<Weight, CudaLoadError> {
        let in_fp8 = parts.iter().map(|part| self.weights.fp8(&format!("{}.weight", part.name)));
        if let Some(matrices) = in_fp8.collect::<Option<Vec<_>>>() {
            return self.fp8_matrices(parts, &matrices);
        }
        if let Some(matrices) = self.random_matrices(parts) {
            let mut weight = self.drawn(parts, &matrices)?;
            if self.fp8 {
                weight.format = self.to_fp8(&weight)?;
            }
            return Ok(weight);
        }
        let tensors = self.tensors(parts)?;
        let kinds = tensors.iter().map(|tensor| block_kind(tensor.dtype));
        let kind = kinds.reduce(|a, b| if a == b { a } else { None }).flatten();
        let cols = parts[0].cols_of(&tensors[0]);
        match kind.filter(|_| cols.start.is_multiple_of(BLOCK) && cols.end.is_multiple_of(BLOCK)) {
            Some(kind) if !self.fp8 => self.blocks(parts, &tensors, kind),
            _ => {
                let mut weight = self.bf16(parts)?;
                if self.fp8 {
                    weight.format = self.to_fp8(&weight)?;
                }
                Ok(weight)
            }
        }
    }

    fn tensors(&self, parts: &[Slice<'_>]) -> Result<Vec<Tensor<'_>>, ModelError> {
        parts.iter().map(|part| self.weights.tensor(&format!("{}.weight", part.name))).collect()
    }

    fn matrix<'t>(&self, part: &Slice<'_>, tensor: &'t Tensor<'_>) -> Result<Matrix<'t>, ModelError> {
        tensor.matrix().map_err(|error| ModelError::tensor(self.name, part.name, error.to_string()))
    }

    /// What the parts are drawn by, if that is what all of them are.
    fn random_matrices(&self, parts: &[Slice<'_>]) -> Option<Vec<RandomMatrix>> {
        let matrices: Vec<RandomMatrix> = parts
            .iter()
            .map(|part| self.weights.random(&format!("{}.weight", part.name)))
            .collect::<Option<_>>()?;
        // What the kernel takes.
        let is_even = |(part, matrix): (&Slice<'_>, &RandomMatrix)| {
            part.cols.map_or(matrix.cols, Range::len).is_multiple_of(8)
                && matrix.table.len() == launcher::DRAW_TABLE
        };
        parts.iter().zip(&matrices).all(is_even).then_some(matrices)
    }

    /// A layer in bf16 that is drawn on the device.
    fn drawn(&self, parts: &[Slice<'_>], matrices: &[RandomMatrix]) -> Result<Weight, CudaLoadError> {
        let rows_of =
            |(part, matrix): (&Slice<'_>, &RandomMatrix)| part.rows.cloned().unwrap_or(0..matrix.rows);
        let rows: Vec<Range<usize>> = parts.iter().zip(matrices).map(rows_of).collect();
        let cols = parts[0].cols.cloned().unwrap_or(0..matrices[0].cols);
        let out_features = rows.iter().map(Range::len).sum();
        let data = self.cuda.alloc(2 * out_features * cols.len())?;
        let table = self.cuda.alloc(2 * launcher::DRAW_TABLE)?;
        let mut at = super::address(&data);
        for (matrix, rows) in matrices.iter().zip(&rows) {
            self.uploader.borrow_mut().write(table.as_slice(), &matrix.table)?;
            let (key, table, num_columns) = (matrix.key, super::address(&table), matrix.cols);
            let of = launcher::RandomMatrix { key, table, num_columns };
            self.runner.launch(&launcher::draw_weights(at, of, rows.clone(), cols.clone()))?;
            at += (2 * rows.len() * cols.len()) as u64;
        }
        // Weights are read by launches that wait for none.
        self.cuda.synchronize()?;
        let bias = self.biases(parts, |index| rows[index].clone())?;
        Ok(Weight { format: Format::Bf16(data), bias, out_features, in_features: cols.len() })
    }

    /// A layer in bf16, whatever the file has.
    fn bf16(&self, parts: &[Slice<'_>]) -> Result<Weight, CudaLoadError> {
        if let Some(matrices) = self.random_matrices(parts) {
            return self.drawn(parts, &matrices);
        }
        let tensors = self.tensors(parts)?;
        let cols = parts[0].cols_of(&tensors[0]);
        let rows: Vec<Range<usize>> = parts.iter().zip(&tensors).map(|(part, of)| part.rows_of(of)).collect();
        let out_features = rows.iter().map(Range::len).sum();
        let data = self.cuda.alloc(2 * out_features * cols.len())?;
        let mut at = 0;
        for ((part, tensor), rows) in parts.iter().zip(&tensors).zip(&rows) {
            let matrix = self.matrix(part, tensor)?;
            self.copy(&data, at, &matrix, tensor.row_order, rows.clone(), &cols)?;
            at += rows.len() * cols.len();
        }
        let bias = self.biases(parts, |index| rows[index].clone())?;
        Ok(Weight { format: Format::Bf16(data), bias, out_features, in_features: cols.len() })
    }

    /// A layer that is in e4m3 already.
    fn fp8_matrices(&self, parts: &[Slice<'_>], matrices: &[Fp8Matrix<'_>]) -> Result<Weight, CudaLoadError> {
        let ranges_of = |(part, matrix): (&Slice<'_>, &Fp8Matrix<'_>)| {
            let num_rows = matrix.codes.len() / matrix.cols.max(1);
            let (rows, cols) = (part.rows.cloned(), part.cols.cloned());
            (rows.unwrap_or(0..num_rows), cols.unwrap_or(0..matrix.cols))
        };
        let ranges: Vec<_> = parts.iter().zip(matrices).map(ranges_of).collect();
        let cols = ranges[0].1.clone();
        let out_features: usize = ranges.iter().map(|(rows, _)| rows.len()).sum();
        let values = self.cuda.alloc(out_features * cols.len())?;
        let mut scales = Vec::with_capacity(out_features);
        for ((part, matrix), (rows, part_cols)) in parts.iter().zip(matrices).zip(&ranges) {
            if *part_cols != cols {
                let reason = format!("has {} columns and its neighbour {}", part_cols.len(), cols.len());
                return Err(ModelError::tensor(self.name, part.name, reason).into());
            }
            let to = values.slice::<u8>(scales.len() * cols.len(), rows.len() * cols.len());
            let mut has_nan = false;
            self.uploader.borrow_mut().fill(to, cols.len(), |first, codes| {
                for (row, codes) in
                    (rows.start + first / cols.len()..).zip(codes.chunks_exact_mut(cols.len()))
                {
                    codes.copy_from_slice(&matrix.codes[row * matrix.cols..][cols.clone()]);
                    // Kernels read these codes as ±480.
                    has_nan |= codes.iter().fold(false, |found, code| found | (code & 0x7f == 0x7f));
                }
            })?;
            if has_nan {
                return Err(ModelError::tensor(self.name, part.name, "holds NaN").into());
            }
            scales.extend(rows.clone().map(|row| matrix.scales.of_row(row)));
        }
        let on_device = self.cuda.alloc(4 * scales.len())?;
        self.uploader.borrow_mut().write(on_device.as_slice(), &scales)?;
        // Inputs are rounded only where that is asked for.
        let is_multiplied = self.fp8 && self.multiplies_fp8;
        let format = Format::Fp8 { values, scales: on_device, is_multiplied };
        let bias = self.biases(parts, |index| ranges[index].0.clone())?;
        Ok(Weight { format, bias, out_features, in_features: cols.len() })
    }

    /// A layer in a type of blocks, these taken apart.
    fn blocks(
        &self,
        parts: &[Slice<'_>],
        tensors: &[Tensor<'_>],
        kind: BlockKind,
    ) -> Result<Weight, CudaLoadError> {
        let cols = parts[0].cols_of(&tensors[0]);
        let rows: Vec<Range<usize>> = parts.iter().zip(tensors).map(|(part, of)| part.rows_of(of)).collect();
        let out_features: usize = rows.iter().map(Range::len).sum();
        let num_blocks = out_features * cols.len() / BLOCK;
        let (head, value_bytes) = kind.layout();
        let mut values = Vec::with_capacity(num_blocks * value_bytes);
        let mut scales = Vec::with_capacity(num_blocks * 2);
        let mut mins = Vec::with_capacity(if head == 4 { num_blocks * 2 } else { 0 });
        for ((part, tensor), rows) in parts.iter().zip(tensors).zip(&rows) {
            let matrix = self.matrix(part, tensor)?;
            for row in rows.clone() {
                let blocks = matrix.row(tensor.row_order.file_row(row)).chunks_exact(head + value_bytes);
                for block in blocks.skip(cols.start / BLOCK).take(cols.len() / BLOCK) {
                    scales.extend_from_slice(&block[..2]);
                    mins.extend_from_slice(&block[2..head]);
                    values.extend_from_slice(&block[head..]);
                }
            }
        }
        let bytes = |bytes: &[u8]| {
            let buffer = self.cuda.alloc(bytes.len())?;
            self.uploader.borrow_mut().write(buffer.as_slice(), bytes)?;
            Ok::<_, CudaError>(buffer)
        };
        let mins = (!mins.is_empty()).then(|| bytes(&mins)).transpose()?;
        let format = Format::Blocks { kind, values: bytes(&values)?, scales: bytes(&scales)?, mins };
        let bias = self.biases(parts, |index| rows[index].clone())?;
        Ok(Weight { format, bias, out_features, in_features: cols.len() })
    }

    /// Rounds a layer in bf16, each row by its largest value.
    fn to_fp8(&self, weight: &Weight) -> Result<Format, CudaError> {
        let (n, k) = (weight.out_features, weight.in_features);
        let (values, scales) = (self.cuda.alloc(n * k)?, self.cuda.alloc(4 * n)?);
        let (to, to_scales) = (super::address(&values), super::address(&scales));
        self.runner.launch(&launcher::quantize_fp8(to, to_scales, weight.bf16_address(), n, k))?;
        self.cuda.synchronize()?;
        Ok(Format::Fp8 { values, scales, is_multiplied: self.multiplies_fp8 })
    }

    /// Copies rows of a matrix in natural order, as bf16, to the values of `data` from `at` on.
    fn copy(
        &self,
        data: &DeviceBuffer,
        at: usize,
        matrix: &Matrix<'_>,
        order: RowOrder,
        rows: Range<usize>,
        cols: &Range<usize>,
    ) -> Result<(), CudaError> {
        let width = cols.len();
        let to = data.slice::<bf16>(2 * at, rows.len() * width);
        self.uploader.borrow_mut().fill(to, width, |first, values| {
            let first = rows.start + first / width;
            convert(matrix, order, first..first + values.len() / width, cols, values);
        })
    }

    /// The biases of all parts, zero where a part has none; none if no part has one.
    fn biases(
        &self,
        parts: &[Slice<'_>],
        rows: impl Fn(usize) -> Range<usize>,
    ) -> Result<Option<DeviceBuffer>, CudaLoadError> {
        let names: Vec<String> = parts.iter().map(|part| format!("{}.bias", part.name)).collect();
        if !names.iter().any(|name| self.weights.contains(name)) {
            return Ok(None);
        }
        let mut all = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let rows = rows(index);
            match self.weights.contains(name) {
                true => all.extend(self.values(name)?.get(rows).ok_or_else(|| self.no_vector(name))?),
                false => all.extend(rows.map(|_| 0.0)),
            }
        }
        Ok(Some(self.upload(&all)?))
    }

    fn vector(&self, name: &str) -> Result<DeviceBuffer, CudaLoadError> {
        Ok(self.upload(&self.values(name)?)?)
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        self.weights.tensor(name)?.to_f32_vector().ok_or_else(|| self.no_vector(name))
    }

    fn no_vector(&self, name: &str) -> ModelError {
        ModelError::tensor(self.name, name, "is not a vector of floats as long as its weight".to_owned())
    }

    /// As bf16.
    fn upload(&self, values: &[f32]) -> Result<DeviceBuffer, CudaError> {
        let values: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
        let buffer = self.cuda.alloc(2 * values.len())?;
        self.uploader.borrow_mut().write(buffer.as_slice(), &values)?;
        Ok(buffer)
    }
}

/// Whether the library has products in e4m3 for every layer: the device and the version alone do not tell.
fn multiplies_fp8(gemm: &Gemm, share: &Share, config: &ModelConfig) -> Result<bool, CudaError> {
    const ROWS: usize = 256;
    let Share { queries, keys, intermediate, .. } = share;
    let hidden = config.hidden_size;
    let shapes = [
        (queries.len() + 2 * keys.len(), hidden),
        (hidden, queries.len()),
        (2 * intermediate.len(), hidden),
        (hidden, intermediate.len()),
    ];
    for (n, k) in shapes {
        if !gemm.has(GemmShape { m: ROWS, n, k, types: GemmTypes::Fp8RowsToBf16 })? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Values of a GGUF block.
const BLOCK: usize = 32;

impl BlockKind {
    /// Bytes of a block in front of its values, and of these.
    const fn layout(self) -> (usize, usize) {
        match self {
            Self::Q8_0 => (2, 32),
            Self::Q4_0 => (2, 16),
            Self::Q4_1 => (4, 16),
        }
    }
}

fn block_kind(dtype: DType) -> Option<BlockKind> {
    match dtype {
        DType::Q8_0 => Some(BlockKind::Q8_0),
        DType::Q4_0 => Some(BlockKind::Q4_0),
        DType::Q4_1 => Some(BlockKind::Q4_1),
        DType::F32 | DType::F16 | DType::Bf16 => None,
    }
}

impl Layer {
    pub(super) fn weights(&self) -> [&Weight; 4] {
        [&self.qkv, &self.attention_output, &self.gate_up, &self.down]
    }
}

impl Scratch {
    fn new<'w>(
        cuda: &Cuda,
        weights: impl Iterator<Item = &'w Weight>,
        max_tokens: usize,
    ) -> Result<Self, CudaError> {
        let (mut values, mut input) = (0, 0);
        for weight in weights {
            values = values.max(weight.scratch_values());
            input = input.max(if weight.is_fp8() { weight.in_features } else { 0 });
        }
        let scales = if input > 0 { max_tokens } else { 0 };
        Ok(Self {
            weights: cuda.alloc(2 * values)?,
            fp8: cuda.alloc(max_tokens * input)?,
            fp8_scales: cuda.alloc(4 * scales)?,
        })
    }
}

/// Columns of rows in natural order as bf16, on as many threads as the machine has.
fn convert(matrix: &Matrix<'_>, order: RowOrder, rows: Range<usize>, cols: &Range<usize>, out: &mut [bf16]) {
    let width = cols.len();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(out.len() / THREAD_VALUES).max(1);
    let share = rows.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for (index, out) in out.chunks_mut(share * width).enumerate() {
            let first = rows.start + index * share;
            scope.spawn(move || {
                let mut row = vec![0.0; matrix.cols()];
                for (offset, out) in out.chunks_exact_mut(width).enumerate() {
                    let file_row = order.file_row(first + offset);
                    if matrix.dtype() == DType::Bf16 {
                        let bytes = &matrix.row(file_row)[2 * cols.start..2 * cols.end];
                        let pairs = bytes.as_chunks::<2>().0;
                        out.iter_mut().zip(pairs).for_each(|(to, from)| *to = bf16::from_le_bytes(*from));
                        continue;
                    }
                    matrix.dequantize_row(file_row, &mut row);
                    let values = &row[cols.clone()];
                    out.iter_mut().zip(values).for_each(|(to, from)| *to = bf16::from_f32(*from));
                }
            });
        }
    });
}

/// cos and sin of every position, f32 `[max_model_len, D / 2]` each.
fn rope_tables(
    runner: &Runner,
    config: &ModelConfig,
    max_model_len: usize,
) -> Result<DeviceBuffer, CudaError> {
    let frequencies = config.rope.inverse_frequencies();
    let angles = |position: usize| frequencies.iter().map(move |frequency| position as f32 * frequency);
    let cos = (0..max_model_len).flat_map(|position| angles(position).map(f32::cos));
    let sin = (0..max_model_len).flat_map(|position| angles(position).map(f32::sin));
    let values: Vec<f32> = cos.chain(sin).collect();
    let buffer = runner.cuda().alloc(4 * values.len())?;
    buffer.as_slice().write(&values)?;
    Ok(buffer)
}

/// The vocabulary rows of each of `size` ranks.
fn vocab_of_ranks(vocab_size: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..size).map(move |rank| vocab_rows(vocab_size, Shard { rank, size }))
}

impl JoinedLogits {
    fn new(cuda: &Cuda, vocab_size: usize, size: usize, max_rows: usize) -> Result<Self, CudaError> {
        let widest = vocab_of_ranks(vocab_size, size).map(|rows| rows.len()).max().unwrap_or(0);
        let ends = vocab_of_ranks(vocab_size, size).map(|rows| rows.end as i32);
        let starts: Vec<i32> = std::iter::once(0).chain(ends).collect();
        let on_device = cuda.alloc(4 * starts.len())?;
        on_device.as_slice().write(&starts)?;
        Ok(Self {
            parts: cuda.alloc(4 * size * max_rows * widest)?,
            starts: on_device,
            logits: cuda.alloc(4 * max_rows * vocab_size)?,
            widest,
        })
    }
}

impl Workspace {
    fn new(cuda: &Cuda, config: &ModelConfig, options: CudaLlamaOptions) -> Result<Self, CudaError> {
        let CudaLlamaOptions { max_tokens, max_logits_rows, shard, .. } = options;
        let widest = vocab_of_ranks(config.vocab_size, shard.size).map(|rows| rows.len()).max().unwrap_or(0);
        let (hidden, query) = (config.hidden_size, config.query_size());
        let intermediate = config.intermediate_size;
        // Rows that no step has written are read by graphs of a larger bucket: zeros there harm nothing.
        let values = |rows: usize, width: usize, bytes: usize| cuda.alloc_zeroed(rows * width * bytes);
        let rows = max_tokens.max(max_logits_rows);
        Ok(Self {
            arrays: StepArrays::new(cuda, options)?,
            hidden: values(max_tokens, hidden, 4)?,
            normed: values(rows, hidden, 2)?,
            qkv: values(max_tokens, query + 2 * config.kv_size(), 2)?,
            attention: values(max_tokens, query, 2)?,
            partials: cuda.alloc(PARTIAL_BYTES)?,
            delta: values(max_tokens, hidden, 2)?,
            gate_up: values(max_tokens, 2 * intermediate, 2)?,
            gated: values(max_tokens, intermediate, 2)?,
            logits: values(max_logits_rows, widest, 4)?,
            joined: (shard.size > 1)
                .then(|| JoinedLogits::new(cuda, config.vocab_size, shard.size, max_logits_rows))
                .transpose()?,
        })
    }
}
