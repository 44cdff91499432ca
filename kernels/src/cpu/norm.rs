//! RMS norm into an activation, and the residual addition.
//!
//! The mean of squares is summed in 2 × 16 lanes over the row front to back and then in the fixed tree over lanes, so it
//! depends on nothing but the row.

use std::ops::Range;

use super::activation::{GROUP, RowWriter, Source, load_group, whole_rows};
use super::simd::{Kernel, Simd, dispatch};
use super::{Activation, Cpu, Team};

impl Team<'_> {
    /// Rows of `out` = x / sqrt(mean(x²) + eps) · weight for every row of `x` f32 [T, E], rounded to the class of `out`.
    ///
    /// # Panics
    /// If shapes do not match or `out` has no room.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut Activation) {
        let rows = whole_rows(x.len(), out.cols());
        self.norm_rows(x, None, rows, weight, eps, out);
    }

    /// As `rms_norm`, for the rows of `x` with these indices, in this order.
    ///
    /// # Panics
    /// Also if an index is outside `x`.
    pub fn rms_norm_rows(&self, x: &[f32], rows: &[u32], weight: &[f32], eps: f32, out: &mut Activation) {
        let available = whole_rows(x.len(), out.cols());
        assert!(rows.iter().all(|&row| (row as usize) < available), "row of {available}");
        self.norm_rows(x, Some(rows), rows.len(), weight, eps, out);
    }

    fn norm_rows(
        &self,
        x: &[f32],
        indices: Option<&[u32]>,
        rows: usize,
        weight: &[f32],
        eps: f32,
        out: &mut Activation,
    ) {
        let cols = out.cols();
        assert_eq!(weight.len(), cols, "norm weight");
        let out = out.writer(rows);
        let isa = self.isa;
        self.for_row_ranges(rows, cols, |rows| {
            let kernel = NormRows { x, indices, rows, weight, eps, out };
            // SAFETY: indices were checked, ranges are disjoint and below the writer's rows.
            unsafe { dispatch(isa, kernel) };
        });
    }
}

impl Cpu {
    /// `x += y`, elementwise.
    ///
    /// # Panics
    /// If lengths differ.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "operands of an addition");
        // SAFETY: the kernel stays inside the two slices.
        unsafe { dispatch(self.isa, AddTo { x, y }) };
    }
}

struct NormRows<'a> {
    x: &'a [f32],
    indices: Option<&'a [u32]>,
    rows: Range<usize>,
    weight: &'a [f32],
    eps: f32,
    out: RowWriter,
}

impl Kernel for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let cols = self.weight.len();
        for row in self.rows {
            let from = self.indices.map_or(row, |indices| indices[row] as usize);
            let x = self.x.as_ptr().add(from * cols);
            let mut squares = [s.splat(0.0); 2];
            for group in 0..cols.div_ceil(GROUP) {
                let [a, b] = load_group(s, x, cols, group);
                squares = [s.fma(a, a, squares[0]), s.fma(b, b, squares[1])];
            }
            let mean = s.reduce_add(s.add(squares[0], squares[1])) / cols as f32;
            let scale = 1.0 / (mean + self.eps).sqrt();
            self.out.write(s, row, &Scaled { x, weight: self.weight.as_ptr(), cols, scale });
        }
    }
}

struct Scaled {
    x: *const f32,
    weight: *const f32,
    cols: usize,
    scale: f32,
}

impl Source for Scaled {
    #[inline(always)]
    unsafe fn group<S: Simd>(&self, s: S, group: usize) -> [S::F; 2] {
        let [a, b] = load_group(s, self.x, self.cols, group);
        let [wa, wb] = load_group(s, self.weight, self.cols, group);
        let scale = s.splat(self.scale);
        [s.mul(s.mul(a, scale), wa), s.mul(s.mul(b, scale), wb)]
    }
}

struct AddTo<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
}

impl Kernel for AddTo<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        for start in (0..self.x.len()).step_by(16) {
            let n = (self.x.len() - start).min(16);
            let (x, y) = (self.x.as_mut_ptr().add(start), self.y.as_ptr().add(start));
            s.store_n(x, n, s.add(s.load_n(x, n), s.load_n(y, n)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference;
    use super::super::testing::{Random, backends};
    use super::*;
    use crate::Activations;

    #[test]
    fn every_length_matches_the_reference() {
        let mut random = Random::new(3);
        for cols in (1..70).chain([96, 575, 576, 577]) {
            let (x, weight) = (random.vec(3 * cols), random.vec(cols));
            for cpu in backends(2) {
                let mut out = Activation::new(3, cols, Activations::F32);
                cpu.team().rms_norm(&x, &weight, 1e-5, &mut out);
                for row in 0..3 {
                    let expected = reference::rms_norm(&x[row * cols..][..cols], &weight, 1e-5);
                    for (got, expected) in reference::f32_row(&out, row).iter().zip(expected) {
                        assert!(
                            (got - expected).abs() <= 2e-6 * (1.0 + expected.abs()),
                            "{} {cols}",
                            cpu.isa()
                        );
                    }
                }
                let picked = [2, 0];
                let mut some = Activation::new(2, cols, Activations::F32);
                cpu.team().rms_norm_rows(&x, &picked, &weight, 1e-5, &mut some);
                assert_eq!(reference::f32_row(&some, 0), reference::f32_row(&out, 2));
                assert_eq!(reference::f32_row(&some, 1), reference::f32_row(&out, 0));
            }
        }
    }

    #[test]
    fn addition_stays_inside_its_slices() {
        for cpu in backends(1) {
            for len in 0..40 {
                let mut x: Vec<f32> = (0..len + 1).map(|i| i as f32).collect();
                let y = vec![0.5; len];
                cpu.add(&mut x[..len], &y);
                assert!(x[..len].iter().enumerate().all(|(i, &x)| x == i as f32 + 0.5));
                assert_eq!(x[len], len as f32);
            }
        }
    }
}
