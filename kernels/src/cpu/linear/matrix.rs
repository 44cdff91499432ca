//! Tiles of bf16 on the matrix unit of Intel CPUs (AMX): 16 rows of activations times 16 columns, 32 values of K at once.
//!
//! A packed bf16 panel is what the unit wants: 16 steps of it are one operand of 1 KiB, and activations are read where they
//! lie. Up to two operands of rows and two of columns make four sums, which stay in the unit along a whole segment of K.
//!
//! # Numbers
//! For 32 values of K the unit adds up even and odd products apart, each a chain of FMAs, and then both to the sum;
//! subnormal numbers count as zero. No vector instruction rounds like that, so with bf16 weights the unit is a numeric
//! class of its own, and few rows take it as well as many: what a row gives depends on nothing but the row.

use std::arch::asm;

use crate::cpu::isa::MatrixUnit;

use super::tile::TILE_STRIDE;

/// Rows of activations in one operand, and columns of a panel.
const SIDE: usize = 16;
/// Rows that the unit works on at once.
pub(super) const ROWS: usize = 2 * SIDE;
/// Steps of a packed bf16 panel (pairs along K) in one operand.
pub(super) const STEPS: usize = 16;
/// Bytes of one operand of weights.
const OPERAND: usize = 1024;
const LINE: usize = 64;

/// Everything that the rows of a block read and write, from their first step along K.
pub(super) struct Block {
    /// Of two panels; the same twice where there is one.
    pub(super) weights: [*const u8; 2],
    /// Of the first row.
    pub(super) x: *const u8,
    pub(super) row_bytes: usize,
    pub(super) rows: usize,
    /// Operands along K.
    pub(super) operands: usize,
    /// From the weights being read to those that are needed next.
    pub(super) ahead: usize,
    /// [rows][TILE_STRIDE]
    pub(super) out: *mut f32,
}

/// Multiplies all rows of a block with two panels.
///
/// # Safety
/// The pointers of the block cover its rows and operands.
pub(super) unsafe fn multiply(unit: MatrixUnit, block: &Block) {
    let tiles = block.rows.div_ceil(ROWS);
    let mut configured = [0; 2];
    for tile in 0..tiles {
        let first = tile * ROWS;
        let rows = (block.rows - first).min(ROWS);
        let operand_rows = [rows.min(SIDE), rows.saturating_sub(SIDE)];
        if configured != operand_rows {
            configured = operand_rows;
            configure(unit, operand_rows);
        }
        let walk = Walk {
            weights: block.weights,
            x: block.x.add(first * block.row_bytes),
            row_bytes: block.row_bytes,
            operands: block.operands,
            // Tiles share what is to be fetched; the walk of one tile alone is bound by it.
            ahead: block
                .weights
                .map(|weights| weights.wrapping_add(block.ahead + tile * block.operands * OPERAND / tiles)),
            out: block.out.add(first * TILE_STRIDE),
        };
        match (rows > SIDE, tiles > 2) {
            (false, false) => walk.short::<16>(),
            (false, true) => walk.short::<4>(),
            (true, false) => walk.tall::<16>(),
            (true, true) => walk.tall::<4>(),
        }
    }
    release(unit);
}

/// Keeps the unit busy with operands that stay in the L1 cache; returns the multiplications and additions done.
pub(crate) fn saturate(unit: MatrixUnit, iterations: usize) -> usize {
    const OPERANDS: usize = 8;
    let (weights, x) = ([0u8; 2 * OPERANDS * OPERAND], [0u8; ROWS * OPERANDS * LINE]);
    let mut out = [0.0f32; ROWS * TILE_STRIDE];
    for _ in 0..iterations {
        let block = Block {
            weights: [weights.as_ptr(), weights[OPERANDS * OPERAND..].as_ptr()],
            x: x.as_ptr(),
            row_bytes: OPERANDS * LINE,
            rows: ROWS,
            operands: OPERANDS,
            ahead: 0,
            out: out.as_mut_ptr(),
        };
        // SAFETY: the arrays have these sizes.
        unsafe { multiply(unit, &block) };
    }
    std::hint::black_box(&out);
    iterations * 2 * ROWS * 2 * SIDE * OPERANDS * 2 * STEPS
}

/// What `ldtilecfg` reads.
#[repr(align(64))]
struct Palette([u8; 64]);

/// Sets the unit up for this thread, with these rows in the two operands of activations: tiles 0–1 and 2–3 are the sums of
/// the one and the other, 4 and 5 these operands, 6 and 7 the weights of two panels.
#[inline(always)]
unsafe fn configure(_: MatrixUnit, operand_rows: [usize; 2]) {
    // A tile that is not used needs a row all the same.
    let [first, second] = operand_rows.map(|rows| rows.max(1) as u8);
    let all = SIDE as u8;
    let mut palette = Palette([0; 64]);
    palette.0[0] = 1;
    for (tile, rows) in [first, first, second, second, first, second, all, all].into_iter().enumerate() {
        palette.0[16 + 2 * tile] = LINE as u8;
        palette.0[48 + tile] = rows;
    }
    asm!("ldtilecfg [{}]", in(reg) &raw const palette, options(readonly, nostack, preserves_flags));
}

/// Gives the unit back: the system need not save its registers when it switches threads.
#[inline(always)]
unsafe fn release(_: MatrixUnit) {
    asm!(
        "tilerelease",
        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
        options(nomem, nostack, preserves_flags)
    );
}

/// One or two operands of rows times two of columns, along all of K.
struct Walk {
    weights: [*const u8; 2],
    x: *const u8,
    row_bytes: usize,
    operands: usize,
    /// What is fetched meanwhile, in order.
    ahead: [*const u8; 2],
    out: *mut f32,
}

impl Walk {
    /// Up to 16 rows. Fetches `LINES` cache lines of each panel for each operand.
    #[inline(always)]
    unsafe fn short<const LINES: usize>(&self) {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{x} + 1*{row_bytes}]",
            "tileloadd tmm6, [{w0} + 1*{line}]",
            "tileloadd tmm7, [{w1} + 1*{line}]",
            ".rept {lines}",
            "prefetcht0 [{a0}]",
            "prefetcht0 [{a1}]",
            "add {a0}, {line}",
            "add {a1}, {line}",
            ".endr",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {x}, {line}",
            "add {w0}, {operand}",
            "add {w1}, {operand}",
            "dec {count}",
            "jnz 2b",
            "tilestored [{out} + 1*{stride}], tmm0",
            "tilestored [{out} + 1*{stride} + {line_const}], tmm1",
            x = inout(reg) self.x => _,
            w0 = inout(reg) self.weights[0] => _,
            w1 = inout(reg) self.weights[1] => _,
            a0 = inout(reg) self.ahead[0] => _,
            a1 = inout(reg) self.ahead[1] => _,
            count = inout(reg) self.operands => _,
            row_bytes = in(reg) self.row_bytes,
            line = in(reg) LINE,
            out = in(reg) self.out,
            stride = in(reg) TILE_STRIDE * size_of::<f32>(),
            lines = const LINES,
            operand = const OPERAND,
            line_const = const LINE,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }

    /// 17 to 32 rows.
    #[inline(always)]
    unsafe fn tall<const LINES: usize>(&self) {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{x} + 1*{row_bytes}]",
            "tileloadd tmm6, [{w0} + 1*{line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{w1} + 1*{line}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{x1} + 1*{row_bytes}]",
            ".rept {lines}",
            "prefetcht1 [{a0}]",
            "prefetcht1 [{a1}]",
            "add {a0}, {line}",
            "add {a1}, {line}",
            ".endr",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {x}, {line}",
            "add {x1}, {line}",
            "add {w0}, {operand}",
            "add {w1}, {operand}",
            "dec {count}",
            "jnz 2b",
            "tilestored [{out} + 1*{stride}], tmm0",
            "tilestored [{out} + 1*{stride} + {line_const}], tmm1",
            "tilestored [{out} + 1*{stride} + {below}], tmm2",
            "tilestored [{out} + 1*{stride} + {below} + {line_const}], tmm3",
            x = inout(reg) self.x => _,
            x1 = inout(reg) self.x.add(SIDE * self.row_bytes) => _,
            w0 = inout(reg) self.weights[0] => _,
            w1 = inout(reg) self.weights[1] => _,
            a0 = inout(reg) self.ahead[0] => _,
            a1 = inout(reg) self.ahead[1] => _,
            count = inout(reg) self.operands => _,
            row_bytes = in(reg) self.row_bytes,
            line = in(reg) LINE,
            out = in(reg) self.out,
            stride = in(reg) TILE_STRIDE * size_of::<f32>(),
            lines = const LINES,
            operand = const OPERAND,
            line_const = const LINE,
            below = const SIDE * TILE_STRIDE * size_of::<f32>(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}
