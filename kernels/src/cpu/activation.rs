//! The input of linear layers, rounded to its numeric class.
//!
//! | class | a row holds |
//! |---|---|
//! | f32 | f32 values |
//! | bf16 | bf16 values (nearest even) |
//! | int8 | i8 values, and per 32 values a scale `amax/127`, the i32 sum, and scale · sum |
//! | int16 | integers `128 · high + low` with a scale `amax/16256`, as 32 × i8 `high` then 32 × i8 `low`; sums as int8 |
//!
//! int16 costs two dot products where bf16 over integer weights would cost two as well, needs no weights in bf16, and keeps
//! 14 bits below the largest of 32 values where bf16 keeps 8 of each.
//!
//! Rows are padded to 32 values with zeros. The sums multiply the zero points and minima of the weights, so that a dot
//! product runs on the stored unsigned values.
//!
//! A NaN or infinity in a block of an int8 row makes its scale NaN, so that every output of the row is NaN: a bad row
//! must never look like a good one. Blocks below 1e-35 count as zero (their reciprocal scale would overflow).

use super::Team;
use super::buffer::{Bytes, SharedMut};
use super::simd::{Kernel, Simd, dispatch};
use crate::Activations;

/// The largest integers of the two integer classes; 16256 = 127 · 128, so that the high byte stays in ±127.
const INT8_MAX: f32 = 127.0;
const INT16_MAX: f32 = 16256.0;

/// Values that share a scale and a sum.
pub(crate) const GROUP: usize = 32;

/// Rows of [T, cols] values in one numeric class; memory for `max_rows` is reserved once.
pub struct Activation {
    class: Activations,
    rows: usize,
    max_rows: usize,
    cols: usize,
    values: Bytes,
    scales: Bytes,
    sums: Bytes,
    scaled_sums: Bytes,
}

impl Activation {
    /// Room for `max_rows` rows of `cols` values in any class.
    pub fn new(max_rows: usize, cols: usize, class: Activations) -> Self {
        let groups = cols.div_ceil(GROUP);
        let per_group = max_rows * groups * 4;
        Self {
            class,
            rows: 0,
            max_rows,
            cols,
            values: Bytes::zeroed(max_rows * row_bytes(cols, Activations::F32)),
            scales: Bytes::zeroed(per_group),
            sums: Bytes::zeroed(per_group),
            scaled_sums: Bytes::zeroed(per_group),
        }
    }

    pub const fn class(&self) -> Activations {
        self.class
    }

    /// Changes the class of what is written next; forgets the rows.
    pub const fn set_class(&mut self, class: Activations) {
        self.class = class;
        self.rows = 0;
    }

    /// Rows of the last operation that filled it.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    pub const fn max_rows(&self) -> usize {
        self.max_rows
    }

    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// Sets the number of rows about to be written and gives the place of each.
    ///
    /// # Panics
    /// If there is no room for `rows`.
    pub(crate) fn writer(&mut self, rows: usize) -> RowWriter {
        assert!(rows <= self.max_rows, "{rows} rows in an activation of {}", self.max_rows);
        self.rows = rows;
        RowWriter {
            class: self.class,
            cols: self.cols,
            row_bytes: row_bytes(self.cols, self.class),
            groups: self.cols.div_ceil(GROUP),
            values: SharedMut::new(self.values.as_mut_ptr()),
            scales: SharedMut::new(self.scales.as_mut_ptr().cast()),
            sums: SharedMut::new(self.sums.as_mut_ptr().cast()),
            scaled_sums: SharedMut::new(self.scaled_sums.as_mut_ptr().cast()),
        }
    }

    pub(crate) fn view(&self) -> View {
        View {
            values: self.values.as_ptr(),
            row_bytes: row_bytes(self.cols, self.class),
            scales: self.scales.as_ptr().cast(),
            sums: self.sums.as_ptr().cast(),
            scaled_sums: self.scaled_sums.as_ptr().cast(),
            groups: self.cols.div_ceil(GROUP),
        }
    }
}

/// Bytes from one row to the next. A multiple of 64; never of 2048, or the rows of a tile would fight for the same
/// sets of the L1 cache.
const fn row_bytes(cols: usize, class: Activations) -> usize {
    let value = match class {
        Activations::F32 => 4,
        Activations::Bf16 | Activations::Int16 => 2,
        Activations::Int8 => 1,
    };
    let bytes = (cols.next_multiple_of(GROUP) * value).next_multiple_of(64);
    // The f32 size bounds the others because all of them pad the same way.
    if bytes.is_multiple_of(2048) { bytes + 64 } else { bytes }
}

/// Where kernels read rows.
#[derive(Clone, Copy)]
pub(crate) struct View {
    pub(crate) values: *const u8,
    pub(crate) row_bytes: usize,
    pub(crate) scales: *const f32,
    pub(crate) sums: *const i32,
    pub(crate) scaled_sums: *const f32,
    pub(crate) groups: usize,
}

// SAFETY: points into an Activation that is borrowed for as long as workers read.
unsafe impl Send for View {}
// SAFETY: as above; only reads.
unsafe impl Sync for View {}

/// Where workers write rows, each row by one worker.
#[derive(Clone, Copy)]
pub(crate) struct RowWriter {
    class: Activations,
    cols: usize,
    row_bytes: usize,
    groups: usize,
    values: SharedMut<u8>,
    scales: SharedMut<f32>,
    sums: SharedMut<i32>,
    scaled_sums: SharedMut<f32>,
}

impl RowWriter {
    /// Rounds `source(group)` into the row: the 32 values of each group, zeros past the end.
    ///
    /// # Safety
    /// `row` is below the rows given to `writer`, and no other worker writes it.
    #[inline(always)]
    pub(crate) unsafe fn write<S: Simd>(&self, s: S, row: usize, source: &impl Source) {
        for group in 0..self.groups {
            self.write_group(s, row, group, source.group(s, group));
        }
    }

    /// Rounds 32 values into one group of a row.
    ///
    /// # Safety
    /// As `write`, and `group` is inside the row.
    #[inline(always)]
    pub(crate) unsafe fn write_group<S: Simd>(&self, s: S, row: usize, group: usize, [a, b]: [S::F; 2]) {
        let values = self.values.get().add(row * self.row_bytes);
        match self.class {
            Activations::F32 => {
                let out = values.cast::<f32>().add(group * GROUP);
                s.store(out, a);
                s.store(out.add(16), b);
            }
            Activations::Bf16 => {
                let out = values.cast::<u16>().add(group * GROUP);
                s.store_bf16(out, a);
                s.store_bf16(out.add(16), b);
            }
            Activations::Int8 => {
                let quantized = quantize_group(s, [a, b], INT8_MAX);
                let out = values.cast::<i8>().add(group * GROUP);
                s.store_bytes(out, quantized.values[0]);
                s.store_bytes(out.add(16), quantized.values[1]);
                self.write_sums(row * self.groups + group, &quantized);
            }
            Activations::Int16 => {
                let quantized = quantize_group(s, [a, b], INT16_MAX);
                let out = values.cast::<i8>().add(group * 2 * GROUP);
                for (half, value) in quantized.values.into_iter().enumerate() {
                    // Nearest multiple of 128, so that what is left is in -64..64.
                    let high = s.sar::<7>(s.add_i(value, s.splat_i(64)));
                    s.store_bytes(out.add(16 * half), high);
                    s.store_bytes(out.add(GROUP + 16 * half), s.sub_i(value, s.shl::<7>(high)));
                }
                self.write_sums(row * self.groups + group, &quantized);
            }
        }
    }

    #[inline(always)]
    unsafe fn write_sums<I>(&self, group: usize, quantized: &Quantized<I>) {
        *self.scales.get().add(group) = quantized.scale;
        *self.sums.get().add(group) = quantized.sum;
        *self.scaled_sums.get().add(group) = quantized.scale * quantized.sum as f32;
    }

    pub(crate) const fn cols(&self) -> usize {
        self.cols
    }
}

/// Gives a row's values group by group.
pub(crate) trait Source {
    /// # Safety
    /// That of [`Simd`]; `group` is inside the row.
    unsafe fn group<S: Simd>(&self, s: S, group: usize) -> [S::F; 2];
}

/// 32 values at `group` of a row of `cols`, zeros past its end.
///
/// # Safety
/// `row` points to `cols` values.
#[inline(always)]
pub(crate) unsafe fn load_group<S: Simd>(s: S, row: *const f32, cols: usize, group: usize) -> [S::F; 2] {
    let start = group * GROUP;
    let left = cols - start;
    let p = row.add(start);
    if left >= GROUP {
        return [s.load(p), s.load(p.add(16))];
    }
    let second = left.saturating_sub(16);
    [s.load_n(p, left.min(16)), s.load_n(p.wrapping_add(16), second)]
}

struct Quantized<I> {
    values: [I; 2],
    scale: f32,
    sum: i32,
}

#[inline(always)]
unsafe fn quantize_group<S: Simd>(s: S, x: [S::F; 2], max: f32) -> Quantized<S::I> {
    let magnitude = s.splat_i(0x7fff_ffff);
    // As integers, magnitudes order like the floats, with infinity and NaN on top.
    let amax = s.reduce_max_u(s.max_u(s.and(s.bits(x[0]), magnitude), s.and(s.bits(x[1]), magnitude)));
    let amax = f32::from_bits(amax);
    if !amax.is_finite() || amax < 1e-35 {
        let scale = if amax.is_finite() { 0.0 } else { f32::NAN };
        return Quantized { values: [s.splat_i(0); 2], scale, sum: 0 };
    }
    let inverse = s.splat(max / amax);
    let values = [s.to_i(s.mul(x[0], inverse)), s.to_i(s.mul(x[1], inverse))];
    Quantized { values, scale: amax / max, sum: s.reduce_add_i(s.add_i(values[0], values[1])) }
}

/// A row of plain f32 values.
struct Plain {
    row: *const f32,
    cols: usize,
}

impl Source for Plain {
    #[inline(always)]
    unsafe fn group<S: Simd>(&self, s: S, group: usize) -> [S::F; 2] {
        load_group(s, self.row, self.cols, group)
    }
}

struct QuantizeRows<'a> {
    x: &'a [f32],
    rows: std::ops::Range<usize>,
    out: RowWriter,
}

impl Kernel for QuantizeRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let cols = self.out.cols();
        for row in self.rows {
            self.out.write(s, row, &Plain { row: self.x.as_ptr().add(row * cols), cols });
        }
    }
}

impl Team<'_> {
    /// Rounds the rows of `x` f32 [T, cols] into `out`.
    ///
    /// # Panics
    /// If `x` is no whole number of rows or `out` has no room for them.
    pub fn quantize(&self, x: &[f32], out: &mut Activation) {
        let rows = whole_rows(x.len(), out.cols);
        let cols = out.cols;
        let out = out.writer(rows);
        let isa = self.isa;
        self.for_row_ranges(rows, cols, |rows| {
            let kernel = QuantizeRows { x, rows, out };
            // SAFETY: x holds every row, ranges are disjoint and below the writer's rows.
            unsafe { dispatch(isa, kernel) };
        });
    }
}

/// # Panics
/// If `len` values are no whole number of rows.
pub(crate) fn whole_rows(len: usize, cols: usize) -> usize {
    assert!(len.is_multiple_of(cols), "{len} values in rows of {cols}");
    len / cols
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Random, backends};
    use super::*;
    use half::bf16;

    /// Values, scales and i32 sums of an int8 row as plain vectors.
    fn int8_row(a: &Activation, row: usize) -> (Vec<i8>, Vec<f32>, Vec<i32>) {
        let view = a.view();
        // SAFETY: the row was written by the test.
        unsafe {
            let values = std::slice::from_raw_parts(view.values.add(row * view.row_bytes).cast(), a.cols);
            let scales = std::slice::from_raw_parts(view.scales.add(row * view.groups), view.groups);
            let sums = std::slice::from_raw_parts(view.sums.add(row * view.groups), view.groups);
            (values.to_vec(), scales.to_vec(), sums.to_vec())
        }
    }

    #[test]
    fn int8_rounds_half_to_even_and_sums() {
        for cpu in backends(2) {
            // amax 127 makes the scale 1, so halves are exact ties.
            let mut x = vec![0.0f32; 64];
            x[..6].copy_from_slice(&[127.0, 0.5, 1.5, -2.5, -126.5, 3.49]);
            x[32] = -1e-36;
            let mut a = Activation::new(1, 64, Activations::Int8);
            cpu.team().quantize(&x, &mut a);
            let (values, scales, sums) = int8_row(&a, 0);
            assert_eq!(values[..7], [127, 0, 2, -2, -126, 3, 0], "{}", cpu.isa());
            assert_eq!((scales[0], scales[1]), (1.0, 0.0));
            assert_eq!(sums, [4, 0]);
            assert!(values[32..].iter().all(|&v| v == 0));
        }
    }

    #[test]
    fn every_isa_quantizes_alike() {
        let mut random = Random::new(1);
        for cols in [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 576] {
            let x: Vec<f32> =
                (0..5 * cols).map(|_| random.f32() * 10.0f32.powi(random.below(9) as i32 - 4)).collect();
            let mut expected = None;
            for cpu in backends(2) {
                let mut a = Activation::new(5, cols, Activations::Int8);
                cpu.team().quantize(&x, &mut a);
                let rows: Vec<_> = (0..5).map(|row| int8_row(&a, row)).collect();
                assert_eq!(*expected.get_or_insert(rows.clone()), rows, "{} cols {cols}", cpu.isa());

                a.set_class(Activations::Bf16);
                cpu.team().quantize(&x, &mut a);
                let view = a.view();
                for (i, x) in x.iter().enumerate() {
                    // SAFETY: written just above.
                    let stored = unsafe {
                        view.values.add(i / cols * view.row_bytes).cast::<u16>().add(i % cols).read()
                    };
                    assert_eq!(stored, bf16::from_f32(*x).to_bits(), "{} cols {cols}", cpu.isa());
                }
            }
        }
    }

    #[test]
    fn non_finite_blocks_have_a_nan_scale() {
        for cpu in backends(1) {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![1.0f32; 64];
                x[40] = bad;
                let mut a = Activation::new(1, 64, Activations::Int8);
                cpu.team().quantize(&x, &mut a);
                let (_, scales, _) = int8_row(&a, 0);
                assert!(scales[0].is_finite() && scales[1].is_nan());
            }
        }
    }
}
