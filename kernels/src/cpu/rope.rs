//! Rotary position embedding and the write into the KV cache.
//!
//! Half-split rotation (GPT-NeoX, Hugging Face): element i of a head turns with element i + rotary_dim/2; elements from
//! rotary_dim on stay. As in transformers an angle is the f32 product of position and inverse frequency; cosine and sine
//! are then taken accurately. They are computed once per step for its positions and serve all layers.

use std::ops::Range;

use super::buffer::SharedMut;
use super::isa::Detected;
use super::kv_cache::{BLOCK_SIZE, KvCache, KvLayer};
use super::simd::{Kernel, Simd, dispatch};
use super::{Buffer, Cpu};

/// Inverse frequencies, and cosines and sines of the step's positions.
pub struct Rope {
    inverse_frequencies: Vec<f32>,
    attention_scaling: f32,
    max_rows: usize,
    rows: usize,
    /// [max_rows][2][rotary_dim / 2]: cosines, then sines.
    table: Buffer,
}

impl Rope {
    /// `inverse_frequencies` [rotary_dim / 2]; cosines and sines are multiplied with `attention_scaling`.
    pub fn new(inverse_frequencies: &[f32], attention_scaling: f32, max_rows: usize) -> Self {
        let table = Buffer::zeroed(max_rows * 2 * inverse_frequencies.len());
        Self {
            inverse_frequencies: inverse_frequencies.to_vec(),
            attention_scaling,
            max_rows,
            rows: 0,
            table,
        }
    }

    /// Elements of a head that turn.
    pub const fn rotary_dim(&self) -> usize {
        2 * self.inverse_frequencies.len()
    }
}

impl Cpu {
    /// Computes cosines and sines for `positions` [T].
    ///
    /// # Panics
    /// If there are more than the rope's `max_rows`.
    pub fn prepare_rope(&self, rope: &mut Rope, positions: &[u32]) {
        assert!(
            positions.len() <= rope.max_rows,
            "{} positions in a rope of {}",
            positions.len(),
            rope.max_rows
        );
        rope.rows = positions.len();
        let half = rope.inverse_frequencies.len();
        let table = SharedMut::new(rope.table.as_mut_ptr());
        let (frequencies, scaling) = (&rope.inverse_frequencies, rope.attention_scaling);
        // A sine costs about as much as 32 loads and stores.
        self.for_row_ranges(positions.len(), 32 * half, |rows| {
            for row in rows {
                // SAFETY: the row is inside the table and written by one worker.
                let out =
                    unsafe { std::slice::from_raw_parts_mut(table.get().add(row * 2 * half), 2 * half) };
                let (cosines, sines) = out.split_at_mut(half);
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (sine, cosine) = f64::from(positions[row] as f32 * frequency).sin_cos();
                    cosines[i] = cosine as f32 * scaling;
                    sines[i] = sine as f32 * scaling;
                }
            }
        });
    }

    /// Rotates the query heads of `qkv` f32 [T, (H + 2K)·D] in place, and writes rotated keys and values of `layer` to
    /// their slots [T] (`block · 16 + offset`).
    ///
    /// # Panics
    /// If shapes do not match the cache and the prepared positions, or a slot is outside the cache.
    pub fn rope_and_store_kv(
        &self,
        qkv: &mut [f32],
        rope: &Rope,
        slot_mapping: &[u32],
        layer: usize,
        kv: &mut KvCache,
    ) {
        let rows = slot_mapping.len();
        assert_eq!(rows, rope.rows, "rows of a prepared rope");
        if rows == 0 {
            return;
        }
        let width = super::activation::whole_rows(qkv.len(), rows);
        let store =
            RotateAndStore::new(SharedMut::new(qkv.as_mut_ptr()), width, rope, slot_mapping, kv.layer(layer));
        let isa = self.isa;
        self.for_row_ranges(rows, width, |rows| {
            // SAFETY: qkv has these rows, ranges are disjoint, and two tokens of a step never share a slot.
            unsafe { store.rows(isa, rows) };
        });
    }
}

/// The rotation and the write of one layer, checked; workers call [`Self::rows`].
pub(crate) struct RotateAndStore<'a> {
    qkv: SharedMut<f32>,
    width: usize,
    /// Heads that turn: of queries, then of keys.
    heads: usize,
    rope: &'a Rope,
    slot_mapping: &'a [u32],
    kv: KvLayer,
}

impl<'a> RotateAndStore<'a> {
    /// `qkv` f32 [T, width] is the step's first row; rows may be filled later, before [`Self::rows`] is called for them.
    ///
    /// # Panics
    /// As [`Cpu::rope_and_store_kv`].
    pub(crate) fn new(
        qkv: SharedMut<f32>,
        width: usize,
        rope: &'a Rope,
        slot_mapping: &'a [u32],
        kv: KvLayer,
    ) -> Self {
        assert_eq!(slot_mapping.len(), rope.rows, "rows of a prepared rope");
        assert!(
            width.is_multiple_of(kv.head_dim) && width / kv.head_dim > 2 * kv.num_kv_heads,
            "width of qkv"
        );
        assert!(rope.rotary_dim() <= kv.head_dim, "rotary dim");
        let slots = kv.num_blocks * BLOCK_SIZE;
        assert!(slot_mapping.iter().all(|&slot| (slot as usize) < slots), "slot outside the cache");
        let heads = width / kv.head_dim - kv.num_kv_heads;
        Self { qkv, width, heads, rope, slot_mapping, kv }
    }

    /// Rotates and stores `rows` on the calling worker.
    ///
    /// # Safety
    /// The rows of qkv are valid and nobody else uses them or their slots, which are distinct; the cache may be written.
    pub(crate) unsafe fn rows(&self, isa: Detected, rows: Range<usize>) {
        assert!(rows.end <= self.slot_mapping.len(), "rows of the step");
        dispatch(isa, (self, rows));
    }
}

impl Kernel for (&RotateAndStore<'_>, Range<usize>) {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self, s: S) {
        let (store, rows) = self;
        for row in rows {
            store.row(s, row);
        }
    }
}

impl RotateAndStore<'_> {
    #[inline(always)]
    unsafe fn row<S: Simd>(&self, s: S, row: usize) {
        let KvLayer { layout, num_kv_heads, head_dim, .. } = self.kv;
        let heads = self.qkv.get().add(row * self.width);
        let half = self.rope.rotary_dim() / 2;
        let cosines = self.rope.table.as_ptr().add(row * 2 * half);
        let sines = cosines.add(half);
        // Queries and keys turn; keys in place too, where nothing reads them any more.
        for head in 0..self.heads {
            rotate(s, heads.add(head * head_dim), cosines, sines, half);
        }
        let slot = self.slot_mapping[row] as usize;
        for head in 0..num_kv_heads {
            let unit = self.kv.head(head).add(slot / BLOCK_SIZE * layout.unit_bytes());
            let value = heads.add((self.heads + head) * head_dim).cast_const();
            let key = value.sub(num_kv_heads * head_dim);
            layout.store(s, unit, slot % BLOCK_SIZE, key, value);
        }
    }
}

#[inline(always)]
unsafe fn rotate<S: Simd>(s: S, x: *mut f32, cosines: *const f32, sines: *const f32, half: usize) {
    for start in (0..half).step_by(16) {
        let n = (half - start).min(16);
        let (low, high) = (x.add(start), x.add(half + start));
        let (a, b) = (s.load_n(low, n), s.load_n(high, n));
        let (cosine, sine) = (s.load_n(cosines.add(start), n), s.load_n(sines.add(start), n));
        s.store_n(low, n, s.sub(s.mul(a, cosine), s.mul(b, sine)));
        s.store_n(high, n, s.add(s.mul(b, cosine), s.mul(a, sine)));
    }
}

#[cfg(test)]
mod tests {
    use super::super::KvCacheConfig;
    use super::super::testing::{Random, backends};
    use super::*;
    use crate::KvDType;

    #[test]
    fn rotation_and_slots_match_the_plain_loop() {
        let mut random = Random::new(6);
        for (head_dim, rotary) in [(2, 2), (8, 8), (16, 8), (64, 64), (80, 32), (128, 128)] {
            let config = KvCacheConfig {
                num_layers: 2,
                num_kv_heads: 2,
                head_dim,
                num_blocks: 3,
                dtype: KvDType::F32,
            };
            let width = (3 + 4) * head_dim;
            let positions = [0u32, 1, 77, 8191];
            let slots = [33u32, 0, 17, 46];
            let frequencies: Vec<f32> =
                (0..rotary / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotary as f32)).collect();
            let qkv = random.vec(4 * width);
            for cpu in backends(2) {
                let mut kv = KvCache::new(config).unwrap();
                let mut rope = Rope::new(&frequencies, 1.0, 8);
                cpu.prepare_rope(&mut rope, &positions);
                let mut rotated = qkv.clone();
                cpu.rope_and_store_kv(&mut rotated, &rope, &slots, 1, &mut kv);
                // The same in two ranges of rows, on the caller.
                let (mut by_ranges, mut other) = (qkv.clone(), KvCache::new(config).unwrap());
                let rows = SharedMut::new(by_ranges.as_mut_ptr());
                let store = RotateAndStore::new(rows, width, &rope, &slots, other.layer(1));
                // SAFETY: the ranges are the rows of qkv, each once.
                unsafe { [0..1, 1..4].into_iter().for_each(|rows| store.rows(cpu.detected(), rows)) };
                assert_eq!(by_ranges, rotated);
                for (slot, d) in slots.iter().flat_map(|&slot| (0..head_dim).map(move |d| (slot, d))) {
                    assert_eq!(other.read(1, 1, slot as usize, d), kv.read(1, 1, slot as usize, d));
                }
                for t in 0..4 {
                    let head = |index: usize| &qkv[t * width + index * head_dim..][..head_dim];
                    let expected = |index: usize, d: usize| {
                        let x = head(index);
                        let half = rotary / 2;
                        if d >= rotary {
                            return x[d];
                        }
                        let angle = f64::from(positions[t] as f32 * frequencies[d % half]);
                        let (sine, cosine) = (angle.sin() as f32, angle.cos() as f32);
                        if d < half {
                            x[d] * cosine - x[d + half] * sine
                        } else {
                            x[d] * cosine + x[d - half] * sine
                        }
                    };
                    for h in 0..3 {
                        for d in 0..head_dim {
                            assert_eq!(
                                rotated[t * width + h * head_dim + d],
                                expected(h, d),
                                "{}",
                                cpu.isa()
                            );
                        }
                    }
                    for k in 0..2 {
                        for d in 0..head_dim {
                            let (key, value) = kv.read(1, k, slots[t] as usize, d);
                            assert_eq!(key, expected(3 + k, d));
                            assert_eq!(value, head(5 + k)[d]);
                        }
                    }
                }
            }
        }
    }
}
