//! Linear layers: packed weights [N, K] times activations [T, K].
//!
//! Work is split over groups of two panels (32 columns), and over rows as well when there are few groups. For its group a
//! worker walks blocks of rows and segments of K in register tiles. Tiles read 4-bit weights as they are packed: unpacking
//! them once for many rows was slower on every ISA, for a vector of nibbles costs three operations beside the two
//! dot products per row that it feeds, and half the bytes come out of L2.
//!
//! Every output element is the same sequence of operations in all of these cases (see [`tile`]).

mod epilogue;
mod tile;

use std::ops::Range;

pub use epilogue::Epilogue;
use epilogue::{Finish, Reduce};
use tile::{TILE_STRIDE, TileArgs, TileFn, TileKind, Weights, tile_fn};

use super::activation::{GROUP, View};
use super::buffer::SharedMut;
use super::isa::Detected;
use super::pack::{Format, LANES};
use super::simd::{Simd, dispatch};
use super::{Activation, Cpu, Layout, Linear, Scratch};
use crate::{Activations, Isa};

/// Partial sums of a block of rows at the start of a worker's scratch.
const PARTIAL_BYTES: usize = 512 * 1024;
const _: () = assert!(PARTIAL_BYTES <= Scratch::PER_WORKER);

/// Prefetching further ahead would push what is needed first out of the L1 cache.
const MAX_AHEAD: usize = 32 * 1024;

impl Cpu {
    /// `out` [T, N] (or [T, I] for gate and up) = epilogue(x · Wᵀ + bias).
    ///
    /// # Panics
    /// If shapes or the class of `x` do not match the layer, or the epilogue does not match its layout.
    pub fn linear(&self, weights: &Linear, x: &Activation, out: &mut [f32], epilogue: Epilogue) {
        let swiglu = epilogue == Epilogue::SwiGlu;
        assert_eq!(
            weights.layout() == Layout::GateUp,
            swiglu,
            "gate and up take SwiGLU and nothing else does"
        );
        assert_eq!(out.len(), x.rows() * weights.out_features(), "output of a linear layer");
        let job = Job::new(self.detected(), weights, x, out.as_mut_ptr(), Some(epilogue));
        self.run_linear(&job);
    }

    /// The sum of each segment apart: `out` [segments, T, N], without bias; for ranks that own some of the segments.
    ///
    /// # Panics
    /// As `linear`; gate and up have no segments.
    pub fn linear_segments(&self, weights: &Linear, x: &Activation, out: &mut [f32]) {
        assert_eq!(weights.layout(), Layout::Plain, "segments of gate and up");
        let segments = weights.segments().count();
        assert_eq!(
            out.len(),
            segments * x.rows() * weights.out_features(),
            "output of a segmented linear layer"
        );
        let job = Job::new(self.detected(), weights, x, out.as_mut_ptr(), None);
        self.run_linear(&job);
    }

    /// `out` [T, N] = (or +=) the sum of `partials` [segments, T, N] in the fixed tree, plus `bias` [N]. With all
    /// segments of a layer this gives the bits of `linear`.
    ///
    /// # Panics
    /// If shapes do not match, or with [`Epilogue::SwiGlu`].
    pub fn reduce_segments(
        &self,
        partials: &[f32],
        segments: usize,
        bias: Option<&[f32]>,
        out: &mut [f32],
        epilogue: Epilogue,
    ) {
        assert_ne!(epilogue, Epilogue::SwiGlu, "segments of gate and up");
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
        let groups = job.weights.panels.div_ceil(2);
        let workers = self.threads();
        // A few items per worker even out their speeds; below that, cut the rows too.
        let row_parts = if workers == 1 { 1 } else { (4 * workers).div_ceil(groups) };
        let rows_per_part = job.rows.div_ceil(row_parts).next_multiple_of(job.shape.rows).min(job.rows);
        let row_parts = job.rows.div_ceil(rows_per_part);
        // One row streams weights: long contiguous runs. Many rows: small items.
        let groups_per_item = if job.rows <= 16 { groups.div_ceil(8 * workers) } else { 1 };
        let group_items = groups.div_ceil(groups_per_item);
        let scratch = &self.scratch;
        self.pool.run_items(group_items * row_parts, |worker, item| {
            let (group_item, part) = (item / row_parts, item % row_parts);
            let rows = part * rows_per_part..job.rows.min((part + 1) * rows_per_part);
            for group in group_item * groups_per_item..groups.min((group_item + 1) * groups_per_item) {
                // SAFETY: the scratch is this worker's; items write disjoint columns or rows of the output.
                unsafe { job.group(group, rows.clone(), scratch.of(worker)) };
            }
        });
    }
}

/// Rows and panels of a register tile.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    panels: usize,
}

/// One call of a linear layer, checked; shared by the workers.
struct Job<'a> {
    isa: Detected,
    weights: &'a Linear,
    x: View,
    rows: usize,
    out: SharedMut<f32>,
    /// `None`: segments go to the output one by one.
    epilogue: Option<Epilogue>,
    kind: TileKind,
    shape: Shape,
}

impl<'a> Job<'a> {
    fn new(
        isa: Detected,
        weights: &'a Linear,
        x: &Activation,
        out: *mut f32,
        epilogue: Option<Epilogue>,
    ) -> Self {
        assert_eq!(x.cols(), weights.in_features(), "input of a linear layer");
        assert_eq!(x.class(), weights.activations(), "activation class of a linear layer");
        let kind = tile_kind(weights);
        let scaled = !matches!(kind.weights, Weights::F32 | Weights::Bf16);
        let shape = tile_shape(isa.isa(), scaled);
        Self { isa, weights, x: x.view(), rows: x.rows(), out: SharedMut::new(out), epilogue, kind, shape }
    }

    /// Computes `rows` of one group of two panels.
    ///
    /// # Safety
    /// `scratch` is `Scratch::PER_WORKER` bytes of this worker alone; no other worker writes the same rows and columns.
    unsafe fn group(&self, group: usize, rows: Range<usize>, scratch: *mut u8) {
        let segments = self.weights.segments().count();
        let partials = scratch.cast::<f32>();
        let fitting = PARTIAL_BYTES / (segments * TILE_STRIDE * size_of::<f32>());
        // Whole tiles, and few enough rows that the partial sums stay in the cache.
        let row_block = (fitting.min(128) / self.shape.rows * self.shape.rows).max(self.shape.rows);
        let first_panel = group * 2;
        let panels = (self.weights.panels - first_panel).min(2);
        for start in rows.clone().step_by(row_block) {
            let rows = start..rows.end.min(start + row_block);
            let segment_stride = rows.len() * TILE_STRIDE;
            let steps = self.weights.steps() / segments;
            for segment in 0..segments {
                let out = partials.add(segment * segment_stride);
                // The last segment is the only one where a remainder of K could be, and only when there is one segment.
                self.tiles(first_panel, panels, &rows, segment * steps..(segment + 1) * steps, out);
            }
            self.finish(first_panel, panels, &rows, partials, segment_stride);
        }
    }

    /// Sums the steps of one segment of K for all rows into `out`, one register tile after another.
    unsafe fn tiles(
        &self,
        first_panel: usize,
        panels: usize,
        rows: &Range<usize>,
        steps: Range<usize>,
        out: *mut f32,
    ) {
        let format = self.weights.format;
        let mut weights = [std::ptr::null(); 2];
        let mut scales = [std::ptr::null(); 2];
        for c in 0..panels {
            let panel = self.weights.data.as_ptr().add((first_panel + c) * self.weights.panel_bytes);
            weights[c] = panel.add(steps.start * format.step_bytes());
            scales[c] = panel.add(self.weights.scales_offset + steps.start * format.scale_bytes()).cast();
        }
        let count = rows.len().div_ceil(self.shape.rows);
        // Even heights: 8 rows are 4 + 4, not 6 + 2.
        let (height, taller) = (rows.len() / count, rows.len() % count);
        let value_bytes = match self.x_class() {
            Activations::F32 => 4,
            Activations::Bf16 | Activations::Int16 => 2,
            Activations::Int8 => 1,
        };
        let k = steps.start * format.step_len();
        let width = panels.min(self.shape.panels);
        let heights = [height, height + usize::from(taller > 0)];
        let kernels: [TileFn; 2] = heights.map(|height| tile_fn(self.kind, height, width));
        let mut row = 0;
        for tile in 0..count {
            let tall = usize::from(tile < taller);
            let x_row = rows.start + row;
            let x_group = x_row * self.x.groups + k / GROUP;
            for panel in (0..panels).step_by(width) {
                let args = TileArgs {
                    weights: if panel == 0 { weights } else { [weights[1]; 2] },
                    scales: if panel == 0 { scales } else { [scales[1]; 2] },
                    x: self.x.values.add(x_row * self.x.row_bytes + k * value_bytes),
                    row_bytes: self.x.row_bytes,
                    x_scales: self.x.scales.add(x_group),
                    x_sums: self.x.sums.add(x_group),
                    x_scaled_sums: self.x.scaled_sums.add(x_group),
                    groups: self.x.groups,
                    steps: steps.len(),
                    // The first tile brings the panels in for those below it.
                    ahead: if tile == 0 { self.ahead() } else { 0 },
                    out: out.add(row * TILE_STRIDE + panel * LANES),
                };
                kernels[tall](self.isa, &args);
            }
            row += heights[tall];
        }
    }

    unsafe fn finish(
        &self,
        first_panel: usize,
        panels: usize,
        rows: &Range<usize>,
        partials: *const f32,
        segment_stride: usize,
    ) {
        let width = self.weights.out_features();
        let gate_up = self.weights.layout() == Layout::GateUp;
        let first_column = if gate_up { first_panel / 2 * LANES } else { first_panel * LANES };
        let segments = self.weights.segments().count();
        let bias = match &self.weights.packed_bias {
            Some(bias) if self.epilogue.is_some() => bias.as_ptr().add(first_panel * LANES),
            _ => std::ptr::null(),
        };
        let finish = |segments, skipped: usize, out_row, epilogue| Finish {
            epilogue,
            partials: partials.add(skipped * segment_stride),
            segments,
            segment_stride,
            rows: rows.len(),
            panels,
            bias,
            out: self.out.get().add(out_row * width + first_column),
            out_stride: width,
            columns: width - first_column,
        };
        if let Some(epilogue) = self.epilogue {
            dispatch(self.isa, finish(segments, 0, rows.start, epilogue));
            return;
        }
        for segment in 0..segments {
            let out_row = segment * self.rows + rows.start;
            dispatch(self.isa, finish(1, segment, out_row, Epilogue::Store));
        }
    }

    /// One row is bound by memory, and at the start of each panel the hardware's streams start anew. Short panels fetch
    /// the place in the next group that they are reading in this one; long ones stay on their own streams.
    const fn ahead(&self) -> usize {
        let group = 2 * self.weights.panel_bytes;
        if group <= MAX_AHEAD { group } else { 2048 }
    }

    const fn x_class(&self) -> Activations {
        self.weights.activations()
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

fn tile_shape(isa: Isa, scaled: bool) -> Shape {
    #[inline(always)]
    const fn of<S: Simd>(scaled: bool) -> Shape {
        Shape { rows: if scaled { S::BLOCK_ROWS } else { S::PLAIN_ROWS }, panels: S::PANELS }
    }
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => of::<super::simd::Avx512>(scaled),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => of::<super::simd::Avx2>(scaled),
        _ => of::<super::simd::Scalar>(scaled),
    }
}

#[cfg(test)]
mod tests;
