//! Linear layers: packed weights [N, K] times activations [T, K].
//!
//! Work is split over units of two panels (32 columns), and over rows as well when there are few of them. For its unit a
//! worker walks blocks of rows and segments of K in register tiles. Tiles read 4-bit weights as they are packed: unpacking
//! them once for many rows was slower on every ISA, for a vector of nibbles costs three operations beside the two
//! dot products per row that it feeds, and half the bytes come out of L2.
//!
//! Every output element is the same sequence of operations in all of these cases (see [`tile`]). Where there is a matrix unit,
//! it does all of bf16 (see [`matrix`]).

mod epilogue;
#[cfg(target_arch = "x86_64")]
mod matrix;
mod tile;

use std::ops::Range;

pub use epilogue::Epilogue;
use epilogue::{Finish, FinishGated, Reduce};
#[cfg(target_arch = "x86_64")]
pub(super) use matrix::saturate as saturate_matrix_unit;
use tile::{Ahead, TILE_STRIDE, TileArgs, TileFn, TileKind, Weights, tile_fn};

use super::activation::{GROUP, RowWriter, View};
use super::buffer::SharedMut;
use super::isa::{Detected, MatrixUnit};
use super::pack::{Format, LANES};
use super::simd::{Simd, dispatch};
use super::{Activation, Buffer, Layout, Linear, Scratch, Team};
use crate::{Activations, Isa};

/// Partial sums of a block of rows at the start of a worker's scratch.
const PARTIAL_BYTES: usize = 512 * 1024;
const _: () = assert!(PARTIAL_BYTES <= Scratch::PER_WORKER);

/// Prefetching further ahead would push what is needed first out of the L1 cache.
const MAX_AHEAD: usize = 32 * 1024;

/// How far few rows on a matrix unit fetch ahead.
const MATRIX_AHEAD: usize = 4096;

impl Team<'_> {
    /// `out` [T, N] = (or +=) x · Wᵀ + bias.
    ///
    /// # Panics
    /// If shapes or the class of `x` do not match the layer, or the layer is gate and up.
    pub fn linear(&self, weights: &Linear, x: &Activation, out: &mut [f32], epilogue: Epilogue) {
        assert_eq!(weights.layout(), Layout::Plain, "gate and up need an activation as output");
        assert_eq!(out.len(), x.rows() * weights.out_features(), "output of a linear layer");
        let out = SharedMut::new(out.as_mut_ptr());
        self.run_linear(&Job::new(self.isa, weights, x, Output::Rows { out, epilogue }));
    }

    /// `out` [T, I] = silu(gate(x)) · up(x), rounded to the class of `out`.
    ///
    /// # Panics
    /// If shapes or the class of `x` do not match the layer, or the layer is not gate and up.
    pub fn gated_linear(&self, weights: &Linear, x: &Activation, out: &mut Activation) {
        assert_eq!(weights.layout(), Layout::GateUp, "layout of a gated layer");
        assert_eq!(out.cols(), weights.out_features(), "output of a gated layer");
        let out = out.writer(x.rows());
        self.run_linear(&Job::new(self.isa, weights, x, Output::Gated(out)));
    }

    /// The sum of each segment apart: `out` [segments, T, N], without bias; for ranks that own some of the segments.
    ///
    /// # Panics
    /// As `linear`.
    pub fn linear_segments(&self, weights: &Linear, x: &Activation, out: &mut [f32]) {
        assert_eq!(weights.layout(), Layout::Plain, "segments of gate and up");
        let segments = weights.segments().count();
        assert_eq!(
            out.len(),
            segments * x.rows() * weights.out_features(),
            "output of a segmented linear layer"
        );
        let out = SharedMut::new(out.as_mut_ptr());
        self.run_linear(&Job::new(self.isa, weights, x, Output::Segments { out }));
    }

    /// `out` [T, N] = (or +=) the sum of `partials` [segments, T, N] in the fixed tree, plus `bias` [N]. With all
    /// segments of a layer this gives the bits of `linear`.
    ///
    /// # Panics
    /// If shapes do not match.
    pub fn reduce_segments(
        &self,
        partials: &[f32],
        segments: usize,
        bias: Option<&[f32]>,
        out: &mut [f32],
        epilogue: Epilogue,
    ) {
        assert!((1..=super::pack::MAX_SEGMENTS).contains(&segments), "{segments} segments");
        assert_eq!(partials.len(), segments * out.len(), "partial sums");
        let columns = bias.map_or(LANES, <[f32]>::len);
        // Without a bias rows do not matter; cut the flat output into pieces of a vector where that is whole.
        let columns = if bias.is_none() && !out.len().is_multiple_of(columns) { out.len() } else { columns };
        let rows = super::activation::whole_rows(out.len(), columns.max(1));
        let stride = out.len();
        let out = SharedMut::new(out.as_mut_ptr());
        let bias = bias.map_or(std::ptr::null(), <[f32]>::as_ptr);
        let (partials, bias) =
            (SharedMut::new(partials.as_ptr().cast_mut()), SharedMut::new(bias.cast_mut()));
        let add = epilogue == Epilogue::Add;
        let isa = self.isa;
        self.for_row_ranges(rows, columns * segments, |rows| {
            let kernel = Reduce {
                partials: partials.get(),
                segments,
                segment_stride: stride,
                bias: bias.get(),
                out: out.get(),
                rows,
                columns,
                add,
            };
            // SAFETY: lengths are checked above, row ranges are disjoint.
            unsafe { dispatch(isa, kernel) };
        });
    }

    fn run_linear(&self, job: &Job<'_>) {
        if job.rows == 0 {
            return;
        }
        let units = job.weights.panels.div_ceil(job.unit_panels);
        let workers = self.threads();
        // A few items per worker even out their speeds; below that, cut the rows too.
        let row_parts = if workers == 1 { 1 } else { (4 * workers).div_ceil(units) };
        let rows_per_part = job.rows.div_ceil(row_parts).next_multiple_of(job.shape.rows).min(job.rows);
        let row_parts = job.rows.div_ceil(rows_per_part);
        let scratch = self.scratch;
        self.run_shares(units * row_parts, |worker, item| {
            let (unit, part) = (item / row_parts, item % row_parts);
            let rows = part * rows_per_part..job.rows.min((part + 1) * rows_per_part);
            // SAFETY: the scratch is this worker's; items write disjoint columns or rows of the output.
            unsafe { job.unit(unit, rows, scratch.of(worker)) };
        });
    }
}

/// Rows and panels of a register tile.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    panels: usize,
}

/// Where results go.
enum Output {
    /// [T, N]
    Rows { out: SharedMut<f32>, epilogue: Epilogue },
    /// [segments, T, N]
    Segments { out: SharedMut<f32> },
    /// [T, I] of gate and up.
    Gated(RowWriter),
}

/// One call of a linear layer, checked; shared by the workers.
struct Job<'a> {
    isa: Detected,
    weights: &'a Linear,
    x: View,
    rows: usize,
    output: Output,
    kind: TileKind,
    /// What computes instead of the kernels of `kind`.
    matrix_unit: Option<MatrixUnit>,
    shape: Shape,
    /// Panels that are finished together: a pair, or the two pairs that fill one group of a gated output.
    unit_panels: usize,
}

impl<'a> Job<'a> {
    fn new(isa: Detected, weights: &'a Linear, x: &Activation, output: Output) -> Self {
        assert_eq!(x.cols(), weights.in_features(), "input of a linear layer");
        assert_eq!(x.class(), weights.activations(), "activation class of a linear layer");
        let kind = tile_kind(weights);
        let matrix_unit = isa.matrix_unit().filter(|_| kind.weights == Weights::Bf16);
        let shape = tile_shape(isa.isa(), kind.weights);
        let unit_panels = if matches!(output, Output::Gated(_)) { 4 } else { 2 };
        Self { isa, weights, x: x.view(), rows: x.rows(), output, kind, matrix_unit, shape, unit_panels }
    }

    /// Computes `rows` of one unit.
    ///
    /// # Safety
    /// `scratch` is `Scratch::PER_WORKER` bytes of this worker alone; no other worker writes the same rows and columns.
    unsafe fn unit(&self, unit: usize, rows: Range<usize>, scratch: *mut u8) {
        let segments = self.weights.segments().count();
        let partials = scratch.cast::<f32>();
        let first_panel = unit * self.unit_panels;
        let panels = (self.weights.panels - first_panel).min(self.unit_panels);
        let parts = panels.div_ceil(2) * segments;
        let fitting = PARTIAL_BYTES / (parts * TILE_STRIDE * size_of::<f32>());
        // Whole tiles, and few enough rows that the partial sums stay in the cache.
        let row_block = (fitting.min(128) / self.shape.rows * self.shape.rows).max(self.shape.rows);
        for start in rows.clone().step_by(row_block) {
            let rows = start..rows.end.min(start + row_block);
            let stride = rows.len() * TILE_STRIDE;
            let tiling = match self.matrix_unit {
                None => Some(Tiling::new(self, rows.clone(), panels.min(2))),
                Some(_) => None,
            };
            if let (Some(tiling), Some(out)) = (&tiling, self.finished_by_tiles(first_panel, panels)) {
                let stride = self.weights.out_features();
                self.tiles(tiling, first_panel, 0, out.add(rows.start * stride), stride);
                continue;
            }
            for pair in 0..panels.div_ceil(2) {
                // An odd panel at the end is a pair of its own, and then the only one.
                for segment in 0..segments {
                    let out = partials.add((pair * segments + segment) * stride);
                    let first_panel = first_panel + 2 * pair;
                    match &tiling {
                        Some(tiling) => self.tiles(tiling, first_panel, segment, out, TILE_STRIDE),
                        None => self.matrix_tiles(&rows, first_panel, panels.min(2), segment, out),
                    }
                }
            }
            self.finish(first_panel, panels, &rows, partials, stride);
        }
    }

    /// Where the tiles of a pair of panels store what is the result already: there is nothing to add, and no column too many.
    fn finished_by_tiles(&self, first_panel: usize, panels: usize) -> Option<*mut f32> {
        let first_column = first_panel * LANES;
        match &self.output {
            Output::Rows { out, epilogue: Epilogue::Store }
                if self.weights.segments().count() == 1
                    && self.weights.packed_bias.is_none()
                    && first_column + panels * LANES <= self.weights.out_features() =>
            {
                Some(out.get().wrapping_add(first_column))
            }
            _ => None,
        }
    }

    /// Sums one segment of K of a pair of panels for all rows into `out`, one register tile after another.
    unsafe fn tiles(
        &self,
        tiling: &Tiling,
        first_panel: usize,
        segment: usize,
        out: *mut f32,
        out_stride: usize,
    ) {
        let format = self.weights.format;
        let panels = tiling.panels;
        // There is a remainder of K only where there is one segment.
        let steps = self.weights.steps() / self.weights.segments().count();
        let first_step = segment * steps;
        let mut weights = [std::ptr::null(); 2];
        let mut scales = [std::ptr::null(); 2];
        for c in 0..panels {
            let panel = self.weights.data.as_ptr().add((first_panel + c) * self.weights.panel_bytes);
            weights[c] = panel.add(first_step * format.step_bytes());
            scales[c] = panel.add(self.weights.scales_offset + first_step * format.scale_bytes()).cast();
        }
        let value_bytes = match self.weights.activations() {
            Activations::F32 => 4,
            Activations::Bf16 | Activations::Int16 => 2,
            Activations::Int8 => 1,
        };
        let k = first_step * format.step_len();
        let target_stride = self.weights.out_features() * size_of::<f32>();
        let target = match &self.output {
            Output::Rows { out, .. } if segment == 0 => out.get().wrapping_add(first_panel * LANES),
            _ => std::ptr::null_mut(),
        };
        let mut row = 0;
        for tile in 0..tiling.count {
            let tall = usize::from(tile < tiling.taller);
            let x_row = tiling.rows.start + row;
            let x_group = x_row * self.x.groups + k / GROUP;
            for panel in (0..panels).step_by(tiling.width) {
                let args = TileArgs {
                    weights: if panel == 0 { weights } else { [weights[1]; 2] },
                    scales: if panel == 0 { scales } else { [scales[1]; 2] },
                    x: self.x.values.add(x_row * self.x.row_bytes + k * value_bytes),
                    row_bytes: self.x.row_bytes,
                    x_scales: self.x.scales.add(x_group),
                    x_sums: self.x.sums.add(x_group),
                    x_scaled_sums: self.x.scaled_sums.add(x_group),
                    groups: self.x.groups,
                    steps,
                    ahead: self.ahead(segment, steps, tile, tiling.count),
                    out: out.add(row * out_stride + panel * LANES),
                    out_stride,
                    target: match target.is_null() {
                        true => target.cast(),
                        false => target.cast::<u8>().wrapping_add(x_row * target_stride + panel * LANES * 4),
                    },
                    target_stride,
                };
                tiling.kernels[tall](self.isa, &args);
            }
            row += tiling.height + tall;
        }
    }

    /// The same on the matrix unit.
    #[cfg(target_arch = "x86_64")]
    unsafe fn matrix_tiles(
        &self,
        rows: &Range<usize>,
        first_panel: usize,
        panels: usize,
        segment: usize,
        out: *mut f32,
    ) {
        let unit = self.matrix_unit.expect("asked for only where there is one");
        let format = self.weights.format;
        let count = self.weights.segments().count();
        let steps = self.weights.steps() / count;
        let segment_bytes = steps * format.step_bytes();
        let panel = |panel: usize| {
            self.weights
                .data
                .as_ptr()
                .add((first_panel + panel) * self.weights.panel_bytes + segment * segment_bytes)
        };
        // Many rows fetch the pair of panels that follows, or what follows in this one; few are bound by memory and stay on its
        // streams.
        let ahead = if rows.len() <= matrix::ROWS {
            MATRIX_AHEAD
        } else if segment + 1 < count {
            segment_bytes
        } else {
            2 * self.weights.panel_bytes - segment * segment_bytes
        };
        let block = matrix::Block {
            weights: [panel(0), panel(panels - 1)],
            x: self.x.values.add(rows.start * self.x.row_bytes + segment * steps * 4),
            row_bytes: self.x.row_bytes,
            rows: rows.len(),
            operands: steps / matrix::STEPS,
            ahead,
            out,
        };
        matrix::multiply(unit, &block);
    }

    #[cfg(not(target_arch = "x86_64"))]
    unsafe fn matrix_tiles(&self, _: &Range<usize>, _: usize, _: usize, _: usize, _: *mut f32) {
        unreachable!("no matrix unit was detected");
    }

    unsafe fn finish(
        &self,
        first_panel: usize,
        panels: usize,
        rows: &Range<usize>,
        partials: *const f32,
        stride: usize,
    ) {
        let width = self.weights.out_features();
        let segments = self.weights.segments().count();
        let bias = |bias: &Buffer| bias.as_ptr().add(first_panel * LANES);
        let bias = self.weights.packed_bias.as_ref().map_or(std::ptr::null(), bias);
        let first_column = first_panel * LANES;
        let finish = |partials, segments, bias, out: *mut f32, epilogue| Finish {
            epilogue,
            partials,
            segments,
            segment_stride: stride,
            rows: rows.len(),
            panels,
            bias,
            out: out.add(first_column),
            out_stride: width,
            columns: width - first_column,
        };
        match &self.output {
            Output::Rows { out, epilogue } => {
                let out = out.get().add(rows.start * width);
                dispatch(self.isa, finish(partials, segments, bias, out, *epilogue));
            }
            Output::Segments { out } => {
                for segment in 0..segments {
                    let out = out.get().add((segment * self.rows + rows.start) * width);
                    let partials = partials.add(segment * stride);
                    dispatch(self.isa, finish(partials, 1, std::ptr::null(), out, Epilogue::Store));
                }
            }
            Output::Gated(out) => {
                let group = first_panel / self.unit_panels;
                let gated = FinishGated {
                    partials,
                    pairs: panels / 2,
                    pair_stride: stride,
                    rows: rows.clone(),
                    bias,
                    columns: width - group * GROUP,
                    group,
                    out: *out,
                };
                dispatch(self.isa, gated);
            }
        }
    }

    /// What tile `tile` of `count` fetches while it walks a segment.
    ///
    /// One tile is bound by memory, and at the start of each panel the hardware's streams start anew. Short panels fetch
    /// the place in the next pair that they are reading in this one; long ones stay on their own streams. Several tiles
    /// read the same segment one after another and fetch what follows it.
    const fn ahead(&self, segment: usize, steps: usize, tile: usize, count: usize) -> Ahead {
        let pair = 2 * self.weights.panel_bytes;
        if count == 1 {
            let bytes = if pair <= MAX_AHEAD { pair } else { 2048 };
            return Ahead { weights: bytes, scales: bytes, first: 0, every: 1 };
        }
        let format = self.weights.format;
        let (weights, scales) = (steps * format.step_bytes(), steps * format.scale_bytes());
        let last = self.weights.segments().count() - 1;
        if segment < last {
            return Ahead { weights, scales, first: tile, every: count };
        }
        Ahead { weights: pair - last * weights, scales: pair - last * scales, first: tile, every: count }
    }
}

/// How a block of rows is cut into register tiles.
struct Tiling {
    rows: Range<usize>,
    panels: usize,
    /// Panels of one tile.
    width: usize,
    count: usize,
    /// Rows of a tile; the first `taller` have one more. Even heights: 8 rows are 4 + 4, not 6 + 2.
    height: usize,
    taller: usize,
    /// For a tile of `height` rows, and for one more.
    kernels: [TileFn; 2],
}

impl Tiling {
    fn new(job: &Job<'_>, rows: Range<usize>, panels: usize) -> Self {
        let count = rows.len().div_ceil(job.shape.rows);
        let (height, taller) = (rows.len() / count, rows.len() % count);
        let width = panels.min(job.shape.panels);
        let kernel = |height| tile_fn(job.kind, height, width);
        let kernels = [kernel(height), kernel(height + usize::from(taller > 0))];
        Self { rows, panels, width, count, height, taller, kernels }
    }
}

/// The kernel for a layer.
fn tile_kind(weights: &Linear) -> TileKind {
    let parts = if weights.activations() == Activations::Int16 { 2 } else { 1 };
    let kind = |weights, zero_point, minima| TileKind { weights, zero_point, minima, parts };
    match weights.format {
        Format::F32 => kind(Weights::F32, 0, false),
        Format::Bf16 => kind(Weights::Bf16, 0, false),
        Format::Int4 { zero_point, minima } => kind(Weights::Nibbles, zero_point, minima),
        Format::Int8 { minima } => kind(Weights::Bytes, 128, minima),
    }
}

fn tile_shape(isa: Isa, weights: Weights) -> Shape {
    #[inline(always)]
    const fn of<S: Simd>(weights: Weights) -> Shape {
        let rows = match weights {
            Weights::F32 => S::PLAIN_ROWS,
            Weights::Bf16 => S::PAIR_ROWS,
            Weights::Nibbles | Weights::Bytes => S::BLOCK_ROWS,
        };
        Shape { rows, panels: S::PANELS }
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx if weights == Weights::Bf16 => Shape { rows: matrix::ROWS, panels: 2 },
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => of::<super::simd::Avx512>(weights),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => of::<super::simd::Avx2>(weights),
        _ => of::<super::simd::Scalar>(weights),
    }
}

#[cfg(test)]
mod tests;
