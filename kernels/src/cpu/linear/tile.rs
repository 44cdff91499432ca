//! Register tiles: R rows of activations times C panels of 16 columns, over a segment of K.
//!
//! A tile's result is written to a small f32 buffer. What one output element adds up, and in which order, depends on
//! neither R nor C.
//!
//! Integer tiles (AVX-512, 6 × 2): per block of 32 along K and per row and panel 8 dot products, one conversion, one
//! multiplication and one or two FMAs; with two multiplying pipes that is 8 of 10–11 slots, so about 1.5 of the
//! 2.06 TOP/s that the dot products alone reach. With int16 activations the dot products are done twice, for the high and the
//! low bytes: 16 of 19–20 slots.

use crate::cpu::activation::GROUP;
use crate::cpu::isa::Detected;
use crate::cpu::simd::{Kernel, Simd, dispatch};

/// f32 values from one row of partial sums to the next: two panels.
pub(super) const TILE_STRIDE: usize = 32;

/// What the inner loop reads as weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weights {
    F32,
    Bf16,
    /// 256 bytes of packed nibbles per block.
    Nibbles,
    /// 512 bytes per block, weight + 128.
    Bytes,
}

/// The kernel for a packed format; see [`tile_fn`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TileKind {
    pub(super) weights: Weights,
    pub(super) zero_point: u8,
    pub(super) minima: bool,
    /// Bytes per value of integer activations.
    pub(super) parts: usize,
}

/// Everything a tile reads and writes, from its first step along K.
pub(super) struct TileArgs {
    pub(super) weights: [*const u8; 2],
    pub(super) scales: [*const u16; 2],
    pub(super) x: *const u8,
    pub(super) row_bytes: usize,
    pub(super) x_scales: *const f32,
    pub(super) x_sums: *const i32,
    pub(super) x_scaled_sums: *const f32,
    /// Scales and sums per row of activations.
    pub(super) groups: usize,
    /// Steps along K: values (f32), pairs (bf16) or blocks of 32.
    pub(super) steps: usize,
    pub(super) ahead: Ahead,
    pub(super) out: *mut f32,
    /// f32 values from one row of `out` to the next.
    pub(super) out_stride: usize,
    /// The rows and columns of the layer's output that this tile ends in, `target_stride` bytes apart; null if they need not
    /// be fetched. They were last used an operation ago.
    pub(super) target: *const u8,
    pub(super) target_stride: usize,
}

/// What a tile brings into the cache while it works: the weights that are needed next. The tiles of a block of rows share
/// this work, step by step in turn, so that memory is busy all the time.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Bytes from the weights being read to those wanted next.
    pub(super) weights: usize,
    /// The same for scales.
    pub(super) scales: usize,
    /// The first step in which this tile fetches, and from one to the next.
    pub(super) first: usize,
    pub(super) every: usize,
}

/// # Safety
/// The pointers of the arguments cover R rows, C panels and all steps.
pub(super) type TileFn = unsafe fn(Detected, &TileArgs);

const NIBBLES: u8 = 0;
const BYTES: u8 = 1;

/// The tile kernel of `rows` × `panels` for a format.
///
/// # Panics
/// If there is no such kernel: 1..=12 rows for plain formats, 1..=6 for those with scales, 1 or 2 panels.
pub(super) fn tile_fn(kind: TileKind, rows: usize, panels: usize) -> TileFn {
    macro_rules! shapes {
        ($entry:ident $params:tt, $($r:literal)+) => {
            match (rows, panels) {
                $(($r, 1) => shapes!(@one $entry $r 1 $params),
                ($r, 2) => shapes!(@one $entry $r 2 $params),)+
                _ => panic!("no tile of {rows} rows and {panels} panels"),
            }
        };
        (@one $entry:ident $r:literal $c:literal [$($param:tt)*]) => {
            $entry::<$r, $c, $($param)*>
        };
    }
    let TileKind { weights, zero_point, minima, parts } = kind;
    match (weights, zero_point, minima, parts) {
        (Weights::F32, ..) => shapes!(f32_entry [], 1 2 3 4 5 6 7 8 9 10 11 12),
        (Weights::Bf16, ..) => shapes!(bf16_entry [], 1 2 3 4 5 6 7 8 9 10 11 12),
        (Weights::Nibbles, 8, _, 1) => shapes!(int_entry [NIBBLES, 8, false, 1], 1 2 3 4 5 6),
        (Weights::Nibbles, 8, ..) => shapes!(int_entry [NIBBLES, 8, false, 2], 1 2 3 4 5 6),
        (Weights::Nibbles, _, _, 1) => shapes!(int_entry [NIBBLES, 0, true, 1], 1 2 3 4 5 6),
        (Weights::Nibbles, ..) => shapes!(int_entry [NIBBLES, 0, true, 2], 1 2 3 4 5 6),
        (Weights::Bytes, _, false, 1) => shapes!(int_entry [BYTES, 128, false, 1], 1 2 3 4 5 6),
        (Weights::Bytes, _, false, _) => shapes!(int_entry [BYTES, 128, false, 2], 1 2 3 4 5 6),
        (Weights::Bytes, _, true, 1) => shapes!(int_entry [BYTES, 128, true, 1], 1 2 3 4 5 6),
        (Weights::Bytes, _, true, _) => shapes!(int_entry [BYTES, 128, true, 2], 1 2 3 4 5 6),
    }
}

macro_rules! entries {
    ($($entry:ident => $kernel:ident<$($param:ident: $ty:ty),*>;)+) => {
        $(unsafe fn $entry<const R: usize, const C: usize, $(const $param: $ty),*>(isa: Detected, args: &TileArgs) {
            dispatch(isa, $kernel::<R, C, $($param),*>(args));
        }

        struct $kernel<'a, const R: usize, const C: usize, $(const $param: $ty),*>(&'a TileArgs);
        )+
    };
}

entries! {
    f32_entry => F32Tile<>;
    bf16_entry => Bf16Tile<>;
    int_entry => IntTile<SOURCE: u8, ZERO_POINT: u8, MINIMA: bool, PARTS: usize>;
}

/// Asks for the `BYTES` of each panel's weights, and the line of its scales at `scales_at`, that lie ahead of what is
/// being read, if it is this tile's turn.
#[inline(always)]
unsafe fn prefetch<S: Simd, const C: usize, const BYTES: usize>(
    s: S,
    t: &TileArgs,
    turn: &mut usize,
    step: usize,
    scale_bytes: usize,
) {
    if step != *turn {
        return;
    }
    *turn += t.ahead.every;
    for c in 0..C {
        for line in (0..BYTES).step_by(64) {
            s.prefetch(t.weights[c].wrapping_add(step * BYTES + t.ahead.weights + line));
        }
        if scale_bytes > 0 {
            s.prefetch(t.scales[c].cast::<u8>().wrapping_add(step * scale_bytes + t.ahead.scales));
        }
    }
}

#[inline(always)]
unsafe fn prefetch_target<S: Simd, const R: usize, const C: usize>(s: S, t: &TileArgs) {
    if t.target.is_null() {
        return;
    }
    for r in 0..R {
        for c in 0..C {
            s.prefetch_for_write(t.target.wrapping_add(r * t.target_stride + c * 64));
        }
    }
}

#[inline(always)]
unsafe fn finish<S: Simd, const R: usize, const C: usize>(s: S, t: &TileArgs, acc: [[S::F; C]; R]) {
    for r in 0..R {
        for c in 0..C {
            s.store(t.out.add(r * t.out_stride + c * 16), acc[r][c]);
        }
    }
}

impl<const R: usize, const C: usize> Kernel for F32Tile<'_, R, C> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        if const { R > S::PLAIN_ROWS || C > S::PANELS } {
            unreachable!("no such tile on this ISA");
        }
        let t = self.0;
        prefetch_target::<S, R, C>(s, t);
        let mut acc = [[s.splat(0.0); C]; R];
        let mut turn = t.ahead.first;
        for step in 0..t.steps {
            prefetch::<S, C, 64>(s, t, &mut turn, step, 0);
            let mut w = [s.splat(0.0); C];
            for c in 0..C {
                w[c] = s.load(t.weights[c].add(step * 64).cast());
            }
            for r in 0..R {
                let x = s.splat(*t.x.add(r * t.row_bytes + step * 4).cast::<f32>());
                for c in 0..C {
                    acc[r][c] = s.fma(w[c], x, acc[r][c]);
                }
            }
        }
        finish(s, t, acc);
    }
}

impl<const R: usize, const C: usize> Kernel for Bf16Tile<'_, R, C> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        if const { R > S::PAIR_ROWS || C > S::PANELS } {
            unreachable!("no such tile on this ISA");
        }
        let t = self.0;
        prefetch_target::<S, R, C>(s, t);
        let mut acc = [[s.splat(0.0); C]; R];
        let mut turn = t.ahead.first;
        for step in 0..t.steps {
            prefetch::<S, C, 64>(s, t, &mut turn, step, 0);
            let mut w = [s.splat_i(0); C];
            for c in 0..C {
                w[c] = s.load_i(t.weights[c].add(step * 64));
            }
            for r in 0..R {
                let x = s.splat_bytes(t.x.add(r * t.row_bytes + step * 4));
                for c in 0..C {
                    acc[r][c] = s.dot_bf16(acc[r][c], w[c], x);
                }
            }
        }
        finish(s, t, acc);
    }
}

impl<
    const R: usize,
    const C: usize,
    const SOURCE: u8,
    const ZERO_POINT: u8,
    const MINIMA: bool,
    const PARTS: usize,
> Kernel for IntTile<'_, R, C, SOURCE, ZERO_POINT, MINIMA, PARTS>
{
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        if const { R > S::BLOCK_ROWS || C > S::PANELS } {
            unreachable!("no such tile on this ISA");
        }
        let t = self.0;
        prefetch_target::<S, R, C>(s, t);
        let mut acc = [[s.splat(0.0); C]; R];
        let scale_stride = if MINIMA { 32 } else { 16 };
        let mut turn = t.ahead.first;
        for block in 0..t.steps {
            let x = t.x.add(block * PARTS * GROUP);
            let mut dot = [[s.splat_i(0); C]; R];
            if PARTS == 2 {
                // Horner: the high bytes' sum times 128, then the low bytes.
                dot = block_dot::<S, R, C, SOURCE>(s, t, block, x, dot);
            }
            for r in 0..R {
                let zero = zero_sum::<S, SOURCE, ZERO_POINT>(s, t, r, block);
                for c in 0..C {
                    dot[r][c] = if PARTS == 2 { s.add_i(s.shl::<7>(dot[r][c]), zero) } else { zero };
                }
            }
            dot = block_dot::<S, R, C, SOURCE>(s, t, block, x.add((PARTS - 1) * GROUP), dot);
            if SOURCE == BYTES {
                prefetch::<S, C, 512>(s, t, &mut turn, block, scale_stride * 2);
            } else {
                prefetch::<S, C, 256>(s, t, &mut turn, block, scale_stride * 2);
            }
            for c in 0..C {
                let scales = t.scales[c].add(block * scale_stride);
                let d = s.load_f16(scales);
                for r in 0..R {
                    let scale = s.mul(d, s.splat(*t.x_scales.add(r * t.groups + block)));
                    acc[r][c] = s.fma(s.to_f(dot[r][c]), scale, acc[r][c]);
                }
                if MINIMA {
                    let m = s.load_f16(scales.add(16));
                    for r in 0..R {
                        let sum = s.splat(*t.x_scaled_sums.add(r * t.groups + block));
                        acc[r][c] = s.fma(m, sum, acc[r][c]);
                    }
                }
            }
        }
        finish(s, t, acc);
    }
}

/// What the zero point of the stored weights makes a block's dot product too large by, negated.
#[inline(always)]
unsafe fn zero_sum<S: Simd, const SOURCE: u8, const ZERO_POINT: u8>(
    s: S,
    t: &TileArgs,
    r: usize,
    block: usize,
) -> S::I {
    let sum = t.x_sums.add(r * t.groups + block).cast();
    if SOURCE == BYTES && S::BYTE_ZERO_POINT == 128 {
        return s.sub_i(s.splat_i(0), s.shl::<7>(s.splat_bytes(sum)));
    }
    if SOURCE != BYTES && ZERO_POINT == 8 {
        return s.sub_i(s.splat_i(0), s.shl::<3>(s.splat_bytes(sum)));
    }
    s.splat_i(0)
}

/// `init` plus the dot products of one block of stored weights with 32 bytes of each row.
#[inline(always)]
unsafe fn block_dot<S: Simd, const R: usize, const C: usize, const SOURCE: u8>(
    s: S,
    t: &TileArgs,
    block: usize,
    x: *const u8,
    init: [[S::I; C]; R],
) -> [[S::I; C]; R] {
    if SOURCE == BYTES {
        byte_dot::<S, R, C>(s, t, block, x, init)
    } else {
        nibble_dot::<S, R, C>(s, t, block, x, init)
    }
}

/// `init` plus the dot products of one block with packed nibbles.
#[inline(always)]
unsafe fn nibble_dot<S: Simd, const R: usize, const C: usize>(
    s: S,
    t: &TileArgs,
    block: usize,
    x: *const u8,
    mut init: [[S::I; C]; R],
) -> [[S::I; C]; R] {
    let mut dot = [[s.dot4_start(init[0][0]); C]; R];
    for r in 0..R {
        for c in 0..C {
            dot[r][c] = s.dot4_start(init[r][c]);
        }
    }
    let low = s.splat_i(0x0f0f_0f0f);
    for group in 0..4 {
        let mut w = [s.splat_i(0); C];
        for c in 0..C {
            w[c] = s.load_i(t.weights[c].add(block * 256 + group * 64));
        }
        // First all low nibbles: of the two halves only one is in registers.
        for (shift, at) in [(false, 0), (true, 16)] {
            let mut half = w;
            for c in 0..C {
                half[c] = s.and(if shift { s.shr::<4>(w[c]) } else { w[c] }, low);
            }
            for r in 0..R {
                let x = s.splat_bytes(x.add(r * t.row_bytes + at + group * 4));
                for c in 0..C {
                    dot[r][c] = s.dot4(dot[r][c], half[c], x);
                }
            }
        }
    }
    for r in 0..R {
        for c in 0..C {
            init[r][c] = s.dot4_finish(dot[r][c], init[r][c]);
        }
    }
    init
}

/// The same with stored bytes weight + 128.
#[inline(always)]
unsafe fn byte_dot<S: Simd, const R: usize, const C: usize>(
    s: S,
    t: &TileArgs,
    block: usize,
    x: *const u8,
    mut dot: [[S::I; C]; R],
) -> [[S::I; C]; R] {
    for group in 0..8 {
        let mut w = [s.splat_i(0); C];
        for c in 0..C {
            w[c] = s.load_i(t.weights[c].add(block * 512 + group * 64));
        }
        for r in 0..R {
            let x = s.splat_bytes(x.add(r * t.row_bytes + group * 4));
            for c in 0..C {
                dot[r][c] = s.dot8(dot[r][c], w[c], x);
            }
        }
    }
    dot
}
