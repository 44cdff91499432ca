//! Weights of linear layers, repacked once at load so that vector lanes run over output rows.
//!
//! 16 output rows are a **panel**; panels follow each other, N is padded to 16 with zero rows. Inside a panel, by format:
//!
//! | format | layout of a panel | from |
//! |---|---|---|
//! | f32 | `[K][16]` f32 | float files and block formats, f32 activations |
//! | bf16 | `[K/2][16][2]` bf16, K padded to 32 | float files, bf16 activations |
//! | int4 | `[K/32][4][16][4]` bytes, then `[K/32]` × (16 f16 `d`, 16 f16 `m` if any) | Q4_0, Q4_1 |
//! | int8 | `[K/32][8][16][4]` bytes (weight + 128), then scales as above | Q8_0 |
//!
//! In an int4 vector of 64 bytes the low nibbles are k-group `g` (4 values along K for each of 16 rows), the high ones
//! k-group `g + 4`, which is ggml's own order: packing only moves bytes. Block formats keep their bits, so both
//! the int8 and the int16 activation class read the same packed weights.
//!
//! With [`Layout::GateUp`] panels alternate between gate and up, so that one pair of panels yields silu(gate) · up.

use std::ops::Range;

use half::bf16;

use super::activation::GROUP;
use super::arena::Region;
use super::buffer::SharedMut;
use super::{Buffer, Cpu};
use crate::dtype::dequantize;
use crate::{Activations, DType, KernelError, Matrix};

/// Output rows of a panel: the lanes of a vector.
pub(crate) const LANES: usize = 16;

/// The most segments of a [`SegmentPlan`].
pub const MAX_SEGMENTS: usize = 128;

/// Rows of one matrix that become rows of a linear layer. Parts are concatenated along the output.
#[derive(Clone)]
pub struct Part<'a> {
    matrix: Matrix<'a>,
    bias: Option<&'a [f32]>,
    rows: Range<usize>,
    cols: Range<usize>,
    permute: Option<&'a (dyn Fn(usize) -> usize + Sync)>,
}

impl<'a> Part<'a> {
    /// All rows and columns of [N, K].
    pub const fn new(matrix: Matrix<'a>) -> Self {
        Self { matrix, bias: None, rows: 0..matrix.rows(), cols: 0..matrix.cols(), permute: None }
    }

    /// One value per row of the matrix, in the matrix's own row order.
    #[must_use]
    pub const fn bias(mut self, bias: &'a [f32]) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Takes only these (logical) rows.
    #[must_use]
    pub const fn rows(mut self, rows: Range<usize>) -> Self {
        self.rows = rows;
        self
    }

    /// Takes only these input columns; whole blocks of block formats.
    #[must_use]
    pub const fn cols(mut self, cols: Range<usize>) -> Self {
        self.cols = cols;
        self
    }

    /// Where a logical row is stored in the matrix (and in its bias).
    #[must_use]
    pub const fn permute(mut self, stored_row: &'a (dyn Fn(usize) -> usize + Sync)) -> Self {
        self.permute = Some(stored_row);
        self
    }

    fn stored_row(&self, row: usize) -> usize {
        self.permute.map_or(row, |stored_row| stored_row(row))
    }

    fn check(&self) -> Result<(), KernelError> {
        let (rows, cols, dtype) = (self.matrix.rows(), self.matrix.cols(), self.matrix.dtype());
        let Range { start, end } = self.rows;
        if start > end || end > rows {
            return Err(KernelError::RowRange { start, end, rows });
        }
        if let Some(outside) = self.rows.clone().map(|row| self.stored_row(row)).find(|&row| row >= rows) {
            return Err(KernelError::RowRange { start: outside, end: outside + 1, rows });
        }
        let Range { start, end } = self.cols;
        let block = dtype.block_len();
        if start > end || end > cols || !start.is_multiple_of(block) || !end.is_multiple_of(block) {
            return Err(KernelError::ColumnRange { start, end, cols, dtype });
        }
        match self.bias {
            Some(bias) if bias.len() != rows => Err(KernelError::BiasLength { actual: bias.len(), rows }),
            _ => Ok(()),
        }
    }
}

/// Into how many equal parts the input of a row-parallel layer is split for its sum. Each segment is accumulated apart
/// in f32; segments are added in a balanced tree inside groups of the power-of-two factor of their number, then the
/// groups in order. So any rank that owns whole segments can compute its share to the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentPlan {
    count: usize,
}

impl SegmentPlan {
    /// One sum over the whole input.
    pub const fn whole() -> Self {
        Self { count: 1 }
    }

    /// `count` segments; checked against the input when the layer is packed.
    pub const fn new(count: usize) -> Self {
        Self { count }
    }

    pub const fn count(self) -> usize {
        self.count
    }

    fn check(self, cols: usize) -> Result<(), KernelError> {
        let fits = self.count == 1
            || (1..=MAX_SEGMENTS).contains(&self.count)
                && cols.is_multiple_of(self.count)
                && (cols / self.count).is_multiple_of(GROUP);
        if fits { Ok(()) } else { Err(KernelError::Segments { cols, segments: self.count }) }
    }
}

/// Order of the panels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Output rows as the parts give them.
    Plain,
    /// Two parts of equal rows, gate and up, whose panels alternate; the output is silu(gate) · up.
    GateUp,
}

/// How to pack a layer.
#[derive(Clone, Copy, Debug)]
pub struct LinearSpec {
    pub activations: Activations,
    pub segments: SegmentPlan,
    pub layout: Layout,
}

/// What a panel holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    F32,
    Bf16,
    /// Unsigned nibbles; weight = d · (q − zero_point) + m. The zero point is 8 or 0.
    Int4 {
        zero_point: u8,
        minima: bool,
    },
    /// Bytes, weight = d · (q − 128) + m.
    Int8 {
        minima: bool,
    },
}

impl Format {
    /// Values along K in one addressable step of a panel.
    pub(crate) const fn step_len(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::Int4 { .. } | Self::Int8 { .. } => GROUP,
        }
    }

    /// Steps in a panel of `cols` values of K. Those of bf16 are padded with zeros to whole operands of a matrix unit.
    const fn steps(self, cols: usize) -> usize {
        let values = if matches!(self, Self::Bf16) { cols.next_multiple_of(GROUP) } else { cols };
        values.div_ceil(self.step_len())
    }

    /// Bytes of one step, without scales.
    pub(crate) const fn step_bytes(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 64,
            Self::Int4 { .. } => 256,
            Self::Int8 { .. } => 512,
        }
    }

    /// Bytes of the scales (and minima) of one step.
    pub(crate) const fn scale_bytes(self) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Int4 { minima, .. } | Self::Int8 { minima } => {
                if minima {
                    64
                } else {
                    32
                }
            }
        }
    }

    const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int4 { minima: false, .. } => "int4",
            Self::Int4 { minima: true, .. } => "int4+min",
            Self::Int8 { minima: false } => "int8",
            Self::Int8 { minima: true } => "int8+min",
        }
    }
}

/// Packed weights [N, K] of one linear layer (or of several fused along N).
pub struct Linear {
    pub(crate) format: Format,
    pub(crate) panels: usize,
    pub(crate) panel_bytes: usize,
    /// Where the scales start inside a panel.
    pub(crate) scales_offset: usize,
    pub(crate) data: Region,
    /// One value per packed row, zero where there is none.
    pub(crate) packed_bias: Option<Buffer>,
    in_features: usize,
    out_features: usize,
    activations: Activations,
    segments: SegmentPlan,
    layout: Layout,
}

impl Linear {
    /// K.
    pub const fn in_features(&self) -> usize {
        self.in_features
    }

    /// N; with [`Layout::GateUp`] the rows of one of the two.
    pub const fn out_features(&self) -> usize {
        self.out_features
    }

    /// The class that the input must have. Integer classes are for block formats, bf16 is for float files: asked for the
    /// other's, a layer takes its own of 16 bits. A mixture of float and block parts in one layer is packed as f32 and takes f32.
    pub const fn activations(&self) -> Activations {
        self.activations
    }

    /// Name of the packed format, for logs.
    pub const fn format(&self) -> &'static str {
        self.format.name()
    }

    /// Bytes of the packed weights: what one row streams from memory.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    pub const fn segments(&self) -> SegmentPlan {
        self.segments
    }

    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// The bias [N] if there is one.
    ///
    /// # Panics
    /// With [`Layout::GateUp`], whose bias is interleaved like its panels.
    pub fn bias(&self) -> Option<&[f32]> {
        assert_eq!(self.layout, Layout::Plain, "the bias of an interleaved layer");
        self.packed_bias.as_ref().map(|bias| &bias[..self.out_features])
    }

    /// Steps along K in a panel.
    pub(crate) const fn steps(&self) -> usize {
        self.format.steps(self.in_features)
    }
}

/// One row of a panel: bytes of the taken columns.
#[derive(Clone, Copy)]
struct SourceRow<'a> {
    dtype: DType,
    bytes: &'a [u8],
}

impl Cpu {
    /// Packs `parts`, on all workers.
    ///
    /// # Errors
    /// If parts do not fit each other, their matrices or the spec.
    pub fn pack_linear(&self, parts: &[Part<'_>], spec: &LinearSpec) -> Result<Linear, KernelError> {
        let Some(first) = parts.first() else { return Err(KernelError::EmptyLinear) };
        let in_features = first.cols.len();
        for part in parts {
            part.check()?;
            if part.cols.len() != in_features {
                return Err(KernelError::InputMismatch { first: in_features, other: part.cols.len() });
            }
        }
        let out_features = match spec.layout {
            Layout::Plain => parts.iter().map(|part| part.rows.len()).sum(),
            Layout::GateUp if parts.len() == 2 && parts[0].rows.len() == parts[1].rows.len() => {
                first.rows.len()
            }
            Layout::GateUp => return Err(KernelError::GateUpParts),
        };
        if in_features == 0 || out_features == 0 {
            return Err(KernelError::EmptyLinear);
        }
        spec.segments.check(in_features)?;

        let (format, activations) = choose(parts, spec.activations);
        let order = packed_order(parts, spec.layout);
        let panels = order.len() / LANES;
        let steps = format.steps(in_features);
        let scales_offset = steps * format.step_bytes();
        let panel_bytes = (scales_offset + steps * format.scale_bytes()).next_multiple_of(64);
        let bytes = panels.checked_mul(panel_bytes).ok_or(KernelError::OutOfMemory { bytes: usize::MAX })?;
        let mut data = self.weights.borrow_mut().take(bytes)?;

        let out = SharedMut::new(data.as_mut_ptr());
        let per_item = (64 * 1024 / panel_bytes).max(1);
        self.pool.run_items(panels.div_ceil(per_item), |_, item| {
            for panel in item * per_item..panels.min((item + 1) * per_item) {
                let rows = panel_rows(parts, &order, panel);
                // SAFETY: panels are disjoint and each is packed by one worker.
                let out = unsafe {
                    std::slice::from_raw_parts_mut(out.get().add(panel * panel_bytes), panel_bytes)
                };
                pack_panel(format, in_features, scales_offset, &rows, out);
            }
        });
        let packed_bias = pack_bias(parts, &order);
        let (segments, layout) = (spec.segments, spec.layout);
        Ok(Linear {
            format,
            panels,
            panel_bytes,
            scales_offset,
            data,
            packed_bias,
            in_features,
            out_features,
            activations,
            segments,
            layout,
        })
    }
}

/// The format that holds all parts exactly (but for float files, which the bf16 class rounds to bf16), and the class
/// of its input.
fn choose(parts: &[Part<'_>], asked: Activations) -> (Format, Activations) {
    let dtypes = || parts.iter().map(|part| part.matrix.dtype());
    let all_float = !dtypes().any(DType::is_quantized);
    let all_blocks = dtypes().all(DType::is_quantized);
    match asked {
        Activations::F32 => (Format::F32, Activations::F32),
        _ if all_float => (Format::Bf16, Activations::Bf16),
        Activations::Int8 if all_blocks => (integer_format(dtypes()), Activations::Int8),
        Activations::Int16 | Activations::Bf16 if all_blocks => {
            (integer_format(dtypes()), Activations::Int16)
        }
        _ => (Format::F32, Activations::F32),
    }
}

fn integer_format(mut dtypes: impl Iterator<Item = DType> + Clone) -> Format {
    let minima = dtypes.clone().any(|dtype| dtype == DType::Q4_1);
    if dtypes.clone().all(|dtype| dtype == DType::Q4_1) {
        Format::Int4 { zero_point: 0, minima: true }
    } else if dtypes.all(|dtype| dtype == DType::Q4_0) {
        Format::Int4 { zero_point: 8, minima: false }
    } else {
        Format::Int8 { minima }
    }
}

/// Which (part, stored row) each packed row holds; `None` is padding.
fn packed_order(parts: &[Part<'_>], layout: Layout) -> Vec<Option<(usize, usize)>> {
    let rows_of = |part: usize| {
        let source = &parts[part];
        source.rows.clone().map(move |row| Some((part, source.stored_row(row))))
    };
    match layout {
        Layout::Plain => {
            let mut order: Vec<_> = (0..parts.len()).flat_map(rows_of).collect();
            order.resize(order.len().next_multiple_of(LANES), None);
            order
        }
        Layout::GateUp => {
            let [gate, up] = [0, 1].map(|part| {
                let mut rows: Vec<_> = rows_of(part).collect();
                rows.resize(rows.len().next_multiple_of(LANES), None);
                rows
            });
            gate.chunks(LANES).zip(up.chunks(LANES)).flat_map(|(gate, up)| [gate, up].concat()).collect()
        }
    }
}

fn panel_rows<'a>(
    parts: &[Part<'a>],
    order: &[Option<(usize, usize)>],
    panel: usize,
) -> [Option<SourceRow<'a>>; LANES] {
    std::array::from_fn(|lane| {
        let (part, row) = order[panel * LANES + lane]?;
        let Part { matrix, cols, .. } = &parts[part];
        let dtype = matrix.dtype();
        let at = |col: usize| col / dtype.block_len() * dtype.block_bytes();
        Some(SourceRow { dtype, bytes: &matrix.row(row)[at(cols.start)..at(cols.end)] })
    })
}

fn pack_bias(parts: &[Part<'_>], order: &[Option<(usize, usize)>]) -> Option<Buffer> {
    parts.iter().find(|part| part.bias.is_some())?;
    let mut packed = Buffer::zeroed(order.len());
    for (packed, source) in packed.iter_mut().zip(order) {
        if let Some((part, row)) = *source {
            *packed = parts[part].bias.map_or(0.0, |bias| bias[row]);
        }
    }
    Some(packed)
}

fn pack_panel(
    format: Format,
    cols: usize,
    scales_offset: usize,
    rows: &[Option<SourceRow<'_>>; LANES],
    out: &mut [u8],
) {
    let (weights, scales) = out.split_at_mut(scales_offset);
    match format {
        Format::F32 => pack_f32(cols, rows, weights),
        Format::Bf16 => pack_bf16(cols, rows, weights),
        Format::Int4 { minima, .. } => {
            for_each_block(rows, |block, lane, _, bytes| {
                let quants = &bytes[if minima { 4 } else { 2 }..];
                let out = &mut weights[block * 256 + lane * 4..];
                for group in 0..4 {
                    out[group * 64..group * 64 + 4].copy_from_slice(&quants[group * 4..group * 4 + 4]);
                }
                put_scales(scales, minima, block, lane, &bytes[..2], &bytes[2..4]);
            });
        }
        Format::Int8 { minima } => {
            for_each_block(rows, |block, lane, dtype, bytes| {
                let (quants, minimum) = biased_bytes(dtype, bytes);
                let out = &mut weights[block * 512 + lane * 4..];
                for group in 0..8 {
                    out[group * 64..group * 64 + 4].copy_from_slice(&quants[group * 4..group * 4 + 4]);
                }
                put_scales(scales, minima, block, lane, &bytes[..2], &minimum);
            });
        }
    }
}

/// Blocks outside, lanes inside: a panel is written front to back while 16 rows are read side by side.
fn for_each_block(rows: &[Option<SourceRow<'_>>; LANES], mut put: impl FnMut(usize, usize, DType, &[u8])) {
    let Some(any) = rows.iter().flatten().next() else { return };
    let blocks = any.bytes.len() / any.dtype.block_bytes();
    for block in 0..blocks {
        for (lane, row) in rows.iter().enumerate() {
            if let Some(row) = row {
                let bytes = row.dtype.block_bytes();
                put(block, lane, row.dtype, &row.bytes[block * bytes..(block + 1) * bytes]);
            }
        }
    }
}

fn put_scales(scales: &mut [u8], minima: bool, block: usize, lane: usize, d: &[u8], m: &[u8]) {
    let stride = if minima { 64 } else { 32 };
    let at = block * stride + lane * 2;
    scales[at..at + 2].copy_from_slice(d);
    if minima {
        scales[at + 32..at + 34].copy_from_slice(m);
    }
}

/// The 32 weights of a block plus 128, and its minimum as f16.
fn biased_bytes(dtype: DType, block: &[u8]) -> ([u8; 32], [u8; 2]) {
    let nibble = |quants: &[u8], i: usize| if i < 16 { quants[i] & 15 } else { quants[i - 16] >> 4 };
    match dtype {
        DType::Q8_0 => (std::array::from_fn(|i| block[2 + i] ^ 0x80), [0; 2]),
        DType::Q4_0 => (std::array::from_fn(|i| nibble(&block[2..], i) + 120), [0; 2]),
        DType::Q4_1 => (std::array::from_fn(|i| nibble(&block[4..], i) + 128), [block[2], block[3]]),
        DType::F32 | DType::F16 | DType::Bf16 => unreachable!("float rows are never packed as integers"),
    }
}

fn pack_f32(cols: usize, rows: &[Option<SourceRow<'_>>; LANES], out: &mut [u8]) {
    let mut values = vec![0.0f32; cols];
    for (lane, row) in rows.iter().enumerate() {
        let Some(row) = row else { continue };
        dequantize(row.dtype, row.bytes, &mut values);
        for (step, value) in values.iter().enumerate() {
            let at = step * 64 + lane * 4;
            out[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
    }
}

fn pack_bf16(cols: usize, rows: &[Option<SourceRow<'_>>; LANES], out: &mut [u8]) {
    let mut values = vec![0.0f32; cols];
    for (lane, row) in rows.iter().enumerate() {
        let Some(row) = row else { continue };
        let mut put = |step: usize, pair: &[u8]| {
            let at = step * 64 + lane * 4;
            out[at..at + pair.len()].copy_from_slice(pair);
        };
        if row.dtype == DType::Bf16 {
            row.bytes.chunks(4).enumerate().for_each(|(step, pair)| put(step, pair));
            continue;
        }
        dequantize(row.dtype, row.bytes, &mut values);
        for (step, pair) in values.chunks(2).enumerate() {
            let bits =
                [pair[0], pair.get(1).copied().unwrap_or(0.0)].map(|x| bf16::from_f32(x).to_le_bytes());
            put(step, &bits.concat());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, backends};
    use super::*;
    use crate::cpu::reference::random_matrix;

    fn spec(activations: Activations) -> LinearSpec {
        LinearSpec { activations, segments: SegmentPlan::whole(), layout: Layout::Plain }
    }

    #[test]
    fn formats_follow_files_and_classes() {
        let cpu = backends(1).pop().unwrap();
        let mut random = Random::new(2);
        let mut data: Vec<_> = [DType::F32, DType::F16, DType::Bf16, DType::Q8_0, DType::Q4_0, DType::Q4_1]
            .to_vec()
            .into_iter()
            .map(|dtype| (dtype, random_matrix(&mut random, dtype, 3, 32)))
            .collect();
        let mut packed = |dtypes: &[DType], class| {
            let parts: Vec<_> = data
                .iter_mut()
                .filter(|(dtype, _)| dtypes.contains(dtype))
                .map(|(dtype, bytes)| Part::new(Matrix::new(*dtype, 3, 32, bytes).unwrap()))
                .collect();
            let linear = cpu.pack_linear(&parts, &spec(class)).unwrap();
            (linear.format(), linear.activations())
        };
        use Activations::{Bf16, F32, Int8, Int16};
        assert_eq!(packed(&[DType::Q4_1], Int8), ("int4+min", Int8));
        assert_eq!(packed(&[DType::Q4_0], Bf16), ("int4", Int16));
        assert_eq!(packed(&[DType::Q8_0], Int8), ("int8", Int8));
        assert_eq!(packed(&[DType::Q8_0], F32), ("f32", F32));
        assert_eq!(packed(&[DType::Q8_0, DType::Q4_1], Int8), ("int8+min", Int8));
        assert_eq!(packed(&[DType::Q8_0, DType::Q4_0], Int8), ("int8", Int8));
        assert_eq!(packed(&[DType::F16, DType::F32], Int8), ("bf16", Bf16));
        assert_eq!(packed(&[DType::Bf16], Int16), ("bf16", Bf16));
        assert_eq!(packed(&[DType::Q8_0], Int16), ("int8", Int16));
        assert_eq!(packed(&[DType::F32], F32), ("f32", F32));
        assert_eq!(packed(&[DType::F32, DType::Q4_0], Int8), ("f32", F32));
    }

    #[test]
    fn parts_that_do_not_fit_are_errors() {
        let cpu = backends(1).pop().unwrap();
        let bytes = vec![0u8; 4 * 2 * 34];
        let matrix = Matrix::new(DType::Q8_0, 4, 64, &bytes).unwrap();
        let error = |parts: &[Part<'_>], spec: &LinearSpec| cpu.pack_linear(parts, spec).err().unwrap();
        let plain = spec(Activations::Int8);
        assert_eq!(error(&[], &plain), KernelError::EmptyLinear);
        assert!(matches!(error(&[Part::new(matrix).rows(2..5)], &plain), KernelError::RowRange { .. }));
        assert!(matches!(error(&[Part::new(matrix).cols(16..64)], &plain), KernelError::ColumnRange { .. }));
        assert!(matches!(
            error(&[Part::new(matrix).bias(&[0.0; 3])], &plain),
            KernelError::BiasLength { .. }
        ));
        assert!(matches!(
            error(&[Part::new(matrix), Part::new(matrix).cols(0..32)], &plain),
            KernelError::InputMismatch { .. }
        ));
        assert!(matches!(
            error(&[Part::new(matrix).permute(&|row| row + 1)], &plain),
            KernelError::RowRange { .. }
        ));
        let gate_up = LinearSpec { layout: Layout::GateUp, ..plain };
        assert_eq!(error(&[Part::new(matrix)], &gate_up), KernelError::GateUpParts);
        let segments = LinearSpec { segments: SegmentPlan::new(3), ..plain };
        assert!(matches!(error(&[Part::new(matrix)], &segments), KernelError::Segments { .. }));
    }
}
