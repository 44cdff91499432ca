//! The paged KV cache: a pool of blocks of 16 tokens.
//!
//! A **unit** = (layer, KV head, block) is contiguous: first its keys, then its values. Lanes run over slots for scores and
//! over the head dim for values (`Dp` is the head dim padded to 16):
//!
//! | dtype | keys | values |
//! |---|---|---|
//! | bf16 | `[Dp/2][16][2]` | `[8][Dp][2]` (pairs of slots) |
//! | f32, f16 | `[Dp][16]` | `[16][Dp]` |
//! | int8 | `[Dp/4][16][4]` | `[4][Dp][4]` (four slots), then f32 scales of the 16 keys and of the 16 values |
//!
//! An int8 byte b with scale s is the value (b − 128) · s, where s = amax/127 of the token's head. A NaN or infinity in a
//! token's key or value makes that scale NaN, so that what looks at the token fails.
//!
//! Units lie `[layer][KV head][block]`, so one head of one layer walks forward through memory when its blocks do. Memory is
//! committed by the system when a block is first written. What leaves the process is converted by
//! [`KvCache::export_unit`] to `[K|V][slot][D]`.
//!
//! Who owns which block is the engine's business; slots past a context hold anything, NaN included.

use super::Bytes;
use super::buffer::SharedMut;
use super::simd::Simd;
use crate::{KernelError, KvDType};

/// Tokens in a block.
pub const BLOCK_SIZE: usize = 16;

/// The widest head that attention takes; bounds its scratch memory.
pub const MAX_HEAD_DIM: usize = 512;

/// Geometry of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCacheConfig {
    pub num_layers: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub num_blocks: usize,
    pub dtype: KvDType,
}

impl KvCacheConfig {
    /// Memory of one block over all layers and heads.
    pub fn bytes_per_block(&self) -> usize {
        self.num_layers * self.num_kv_heads * UnitLayout::new(self.head_dim, self.dtype).unit_bytes()
    }
}

/// Keys and values of all layers and KV heads.
pub struct KvCache {
    config: KvCacheConfig,
    layout: UnitLayout,
    data: Bytes,
}

impl KvCache {
    /// # Errors
    /// `HeadDim` if the head dim is odd, zero or beyond 512, `CacheGeometry`, `OutOfMemory`.
    pub fn new(config: KvCacheConfig) -> Result<Self, KernelError> {
        let head_dim = config.head_dim;
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
            return Err(KernelError::HeadDim { head_dim, max: MAX_HEAD_DIM });
        }
        let layout = UnitLayout::new(head_dim, config.dtype);
        let bytes = [config.num_layers, config.num_kv_heads, config.num_blocks]
            .into_iter()
            .try_fold(layout.unit_bytes(), usize::checked_mul)
            .filter(|&bytes| bytes > 0 && u32::try_from(config.num_blocks * BLOCK_SIZE).is_ok())
            .ok_or(KernelError::CacheGeometry)?;
        Ok(Self { config, layout, data: Bytes::try_zeroed(bytes)? })
    }

    pub const fn config(&self) -> &KvCacheConfig {
        &self.config
    }

    /// Bytes of an exported unit: `[K|V][16][D]` in the cache's dtype, for int8 with the scales `[K|V][16]` in f32 behind.
    pub const fn unit_bytes(&self) -> usize {
        self.layout.exported_scales_at() + self.layout.scales_bytes()
    }

    /// Copies a block in all layers and heads.
    ///
    /// # Panics
    /// If a block is outside the cache.
    pub fn copy_block(&mut self, from: u32, to: u32) {
        let bytes = self.layout.unit_bytes();
        for layer in 0..self.config.num_layers {
            for head in 0..self.config.num_kv_heads {
                let (from, to) = (self.unit_at(layer, head, from), self.unit_at(layer, head, to));
                self.data.copy_within(from..from + bytes, to);
            }
        }
    }

    /// Fills blocks with NaN: a test's proof that free slots are never used.
    ///
    /// # Panics
    /// If a block is outside the cache.
    pub fn fill_nan(&mut self, blocks: &[u32]) {
        let bytes = self.layout.unit_bytes();
        for layer in 0..self.config.num_layers {
            for head in 0..self.config.num_kv_heads {
                for &block in blocks {
                    let at = self.unit_at(layer, head, block);
                    // All ones is a NaN in every dtype; int8 has it in its scales.
                    self.data[at..at + bytes].fill(0xff);
                }
            }
        }
    }

    /// Writes the first `filled` slots of a unit to `out` as `[K|V][slot][D]` little endian, zeros for the other slots; int8
    /// with 128 added, and scales `[K|V][slot]` behind.
    ///
    /// # Panics
    /// If an index is outside the cache, `filled` beyond 16 or `out` not exactly `unit_bytes`.
    pub fn export_unit(&self, layer: usize, head: usize, block: u32, filled: usize, out: &mut [u8]) {
        assert!(filled <= BLOCK_SIZE, "{filled} slots of a block");
        assert_eq!(out.len(), self.unit_bytes(), "an exported unit");
        let unit = &self.data[self.unit_at(layer, head, block)..][..self.layout.unit_bytes()];
        out.fill(0);
        self.for_each_value(filled, |at, exported, bytes| {
            out[exported..exported + bytes].copy_from_slice(&unit[at..at + bytes]);
        });
    }

    /// Reads a whole exported unit back.
    ///
    /// # Panics
    /// If an index is outside the cache or `exported` not exactly `unit_bytes`.
    pub fn import_unit(&mut self, layer: usize, head: usize, block: u32, exported: &[u8]) {
        assert_eq!(exported.len(), self.unit_bytes(), "an exported unit");
        let start = self.unit_at(layer, head, block);
        let (layout, config) = (self.layout, self.config);
        let unit = &mut self.data[start..start + layout.unit_bytes()];
        for_each_value(layout, config.head_dim, BLOCK_SIZE, |at, from, bytes| {
            unit[at..at + bytes].copy_from_slice(&exported[from..from + bytes]);
        });
    }

    fn for_each_value(&self, slots: usize, visit: impl FnMut(usize, usize, usize)) {
        for_each_value(self.layout, self.config.head_dim, slots, visit);
    }

    fn unit_at(&self, layer: usize, head: usize, block: u32) -> usize {
        let KvCacheConfig { num_layers, num_kv_heads, num_blocks, .. } = self.config;
        let block = block as usize;
        assert!(layer < num_layers && head < num_kv_heads && block < num_blocks, "unit outside the cache");
        ((layer * num_kv_heads + head) * num_blocks + block) * self.layout.unit_bytes()
    }

    /// Where workers read and write the units of a layer.
    ///
    /// # Panics
    /// If the layer is outside the cache.
    pub(crate) fn layer(&mut self, layer: usize) -> KvLayer {
        let at = self.unit_at(layer, 0, 0);
        let units = SharedMut::new(self.data[at..].as_mut_ptr());
        KvLayer { units, ..self.layer_for_reading(layer) }
    }

    /// As [`Self::layer`], for those that do not write.
    pub(crate) fn layer_for_reading(&self, layer: usize) -> KvLayer {
        let at = self.unit_at(layer, 0, 0);
        let KvCacheConfig { num_kv_heads, num_blocks, head_dim, .. } = self.config;
        KvLayer {
            units: SharedMut::new(self.data[at..].as_ptr().cast_mut()),
            layout: self.layout,
            num_kv_heads,
            num_blocks,
            head_dim,
        }
    }

    /// Key and value of one element, for tests.
    #[cfg(test)]
    pub(crate) fn read(&self, layer: usize, head: usize, slot: usize, d: usize) -> (f32, f32) {
        let unit = self.unit_at(layer, head, (slot / BLOCK_SIZE) as u32);
        let value = |at: usize| {
            use half::{bf16, f16};
            let bytes = &self.data[unit + at..];
            match self.config.dtype {
                KvDType::F32 => f32::from_le_bytes(bytes[..4].try_into().unwrap()),
                KvDType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
                KvDType::Bf16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
                KvDType::Int8 => f32::from(bytes[0]) - 128.0,
            }
        };
        let slot = slot % BLOCK_SIZE;
        let (key, value_of) = (value(self.layout.key_at(slot, d)), value(self.layout.value_at(slot, d)));
        if self.config.dtype != KvDType::Int8 {
            return (key, value_of);
        }
        let scale = |at: usize| f32::from_le_bytes(self.data[unit + at..][..4].try_into().unwrap());
        let scales = self.layout.scales_at() + slot * 4;
        (key * scale(scales), value_of * scale(scales + BLOCK_SIZE * 4))
    }
}

/// One layer of a cache as workers see it. It borrows nothing: whoever makes one keeps the cache alive and unmoved, writes
/// through it only if it came from `&mut`, and lets no slot be read while it is written.
#[derive(Clone, Copy)]
pub(crate) struct KvLayer {
    units: SharedMut<u8>,
    pub(crate) layout: UnitLayout,
    pub(crate) num_kv_heads: usize,
    pub(crate) num_blocks: usize,
    pub(crate) head_dim: usize,
}

impl KvLayer {
    /// Block 0 of a head; the others follow in steps of `unit_bytes`.
    ///
    /// # Safety
    /// The head is below `num_kv_heads`.
    pub(crate) unsafe fn head(&self, head: usize) -> *mut u8 {
        self.units.get().add(head * self.num_blocks * self.layout.unit_bytes())
    }
}

/// Visits (offset in the unit, offset in the exported unit, bytes) of every value of the first `slots` slots.
fn for_each_value(
    layout: UnitLayout,
    head_dim: usize,
    slots: usize,
    mut visit: impl FnMut(usize, usize, usize),
) {
    let bytes = layout.dtype.bytes();
    for slot in 0..slots {
        for d in 0..head_dim {
            let exported = (slot * head_dim + d) * bytes;
            visit(layout.key_at(slot, d), exported, bytes);
            visit(layout.value_at(slot, d), BLOCK_SIZE * head_dim * bytes + exported, bytes);
        }
        if layout.scales_bytes() > 0 {
            for at in [slot * 4, (BLOCK_SIZE + slot) * 4] {
                visit(layout.scales_at() + at, layout.exported_scales_at() + at, 4);
            }
        }
    }
}

/// Where things are inside a unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnitLayout {
    head_dim: usize,
    padded: usize,
    dtype: KvDType,
}

impl UnitLayout {
    const fn new(head_dim: usize, dtype: KvDType) -> Self {
        Self { head_dim, padded: head_dim.next_multiple_of(16), dtype }
    }

    pub(crate) const fn dtype(self) -> KvDType {
        self.dtype
    }

    /// Head dim rounded up to whole vectors.
    pub(crate) const fn padded(self) -> usize {
        self.padded
    }

    pub(crate) const fn unit_bytes(self) -> usize {
        self.scales_at() + self.scales_bytes()
    }

    /// Where the 16 scales of the keys start; those of the values follow.
    pub(crate) const fn scales_at(self) -> usize {
        2 * self.keys_bytes()
    }

    const fn scales_bytes(self) -> usize {
        match self.dtype {
            KvDType::Int8 => 2 * BLOCK_SIZE * size_of::<f32>(),
            KvDType::F32 | KvDType::F16 | KvDType::Bf16 => 0,
        }
    }

    const fn exported_scales_at(self) -> usize {
        2 * BLOCK_SIZE * self.head_dim * self.dtype.bytes()
    }

    /// Bytes of the keys, after which the values start.
    pub(crate) const fn keys_bytes(self) -> usize {
        BLOCK_SIZE * self.padded * self.dtype.bytes()
    }

    const fn key_at(self, slot: usize, d: usize) -> usize {
        let index = match self.dtype {
            KvDType::Bf16 => d / 2 * 32 + slot * 2 + d % 2,
            KvDType::Int8 => d / 4 * 64 + slot * 4 + d % 4,
            KvDType::F32 | KvDType::F16 => d * 16 + slot,
        };
        index * self.dtype.bytes()
    }

    const fn value_at(self, slot: usize, d: usize) -> usize {
        let index = match self.dtype {
            KvDType::Bf16 => slot / 2 * 2 * self.padded + d * 2 + slot % 2,
            KvDType::Int8 => slot / 4 * 4 * self.padded + d * 4 + slot % 4,
            KvDType::F32 | KvDType::F16 => slot * self.padded + d,
        };
        self.keys_bytes() + index * self.dtype.bytes()
    }

    /// Rounds one token's key and value into a slot.
    ///
    /// # Safety
    /// `unit` is a whole unit, `key` and `value` are `head_dim` values.
    #[inline(always)]
    pub(crate) unsafe fn store<S: Simd>(
        self,
        s: S,
        unit: *mut u8,
        slot: usize,
        key: *const f32,
        value: *const f32,
    ) {
        match self.dtype {
            KvDType::F32 => {
                for d in 0..self.head_dim {
                    unit.add(self.key_at(slot, d)).cast::<f32>().write(*key.add(d));
                    unit.add(self.value_at(slot, d)).cast::<f32>().write(*value.add(d));
                }
            }
            KvDType::F16 => {
                let mut rounded = [0u16; 16];
                for start in (0..self.head_dim).step_by(16) {
                    let n = (self.head_dim - start).min(16);
                    s.store_f16(rounded.as_mut_ptr(), s.load_n(key.add(start), n));
                    for i in 0..n {
                        unit.add(self.key_at(slot, start + i)).cast::<u16>().write(rounded[i]);
                    }
                    s.store_f16(rounded.as_mut_ptr(), s.load_n(value.add(start), n));
                    for i in 0..n {
                        unit.add(self.value_at(slot, start + i)).cast::<u16>().write(rounded[i]);
                    }
                }
            }
            KvDType::Bf16 => self.store_bf16(s, unit, slot, key, value),
            KvDType::Int8 => self.store_int8(s, unit, slot, key, value),
        }
    }

    #[inline(always)]
    unsafe fn store_int8<S: Simd>(
        self,
        s: S,
        unit: *mut u8,
        slot: usize,
        key: *const f32,
        value: *const f32,
    ) {
        let scales = unit.add(self.scales_at()).cast::<f32>().add(slot);
        let key_range = ByteRange::of(s, key, self.head_dim);
        let value_range = ByteRange::of(s, value, self.head_dim);
        scales.write(key_range.scale);
        scales.add(BLOCK_SIZE).write(value_range.scale);
        let (first_key, first_value) = (unit.add(self.key_at(slot, 0)), unit.add(self.value_at(slot, 0)));
        let mut bytes = [0i8; 16];
        for start in (0..self.head_dim).step_by(16) {
            let n = (self.head_dim - start).min(16);
            s.store_bytes(bytes.as_mut_ptr(), key_range.round(s, s.load_n(key.add(start), n)));
            for (four, bytes) in bytes.as_chunks::<4>().0.iter().enumerate() {
                first_key.add((start / 4 + four) * 4 * BLOCK_SIZE).cast::<[i8; 4]>().write(*bytes);
            }
            s.store_bytes(bytes.as_mut_ptr(), value_range.round(s, s.load_n(value.add(start), n)));
            for i in 0..n {
                first_value.add((start + i) * 4).cast::<i8>().write(bytes[i]);
            }
        }
    }

    /// Keys go in pairs along the head dim. Values go one by one: the other half of a pair is the neighbouring slot, which
    /// another worker may be writing.
    #[inline(always)]
    unsafe fn store_bf16<S: Simd>(
        self,
        s: S,
        unit: *mut u8,
        slot: usize,
        key: *const f32,
        value: *const f32,
    ) {
        let (first_key, first_value) = (unit.add(self.key_at(slot, 0)), unit.add(self.value_at(slot, 0)));
        let mut rounded = [0u16; 16];
        for start in (0..self.head_dim).step_by(16) {
            let n = (self.head_dim - start).min(16);
            s.store_bf16(rounded.as_mut_ptr(), s.load_n(key.add(start), n));
            // The head dim is even.
            for pair in 0..n / 2 {
                let out = first_key.add((start / 2 + pair) * 4 * BLOCK_SIZE);
                out.cast::<[u16; 2]>().write([rounded[2 * pair], rounded[2 * pair + 1]]);
            }
            s.store_bf16(rounded.as_mut_ptr(), s.load_n(value.add(start), n));
            for i in 0..n {
                first_value.add((start + i) * 4).cast::<u16>().write(rounded[i]);
            }
        }
    }
}

/// How a token's head becomes bytes.
struct ByteRange {
    scale: f32,
    inverse: f32,
}

impl ByteRange {
    #[inline(always)]
    unsafe fn of<S: Simd>(s: S, x: *const f32, len: usize) -> Self {
        let mut amax = s.splat_i(0);
        for start in (0..len).step_by(16) {
            let x = s.load_n(x.add(start), (len - start).min(16));
            amax = s.max_u(amax, s.and(s.bits(x), s.splat_i(0x7fff_ffff)));
        }
        // As integers, magnitudes order like the floats, with infinity and NaN on top.
        let amax = f32::from_bits(s.reduce_max_u(amax));
        if !amax.is_finite() {
            return Self { scale: f32::NAN, inverse: 0.0 };
        }
        // The reciprocal of less would overflow.
        if amax < 1e-35 {
            return Self { scale: 0.0, inverse: 0.0 };
        }
        Self { scale: amax / 127.0, inverse: 127.0 / amax }
    }

    #[inline(always)]
    unsafe fn round<S: Simd>(&self, s: S, x: S::F) -> S::I {
        s.add_i(s.to_i(s.mul(x, s.splat(self.inverse))), s.splat_i(128))
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Kernel, dispatch};
    use super::super::testing::{Random, backends};
    use super::*;

    struct Store<'a>(&'a mut KvCache, usize, &'a [f32]);

    impl Kernel for Store<'_> {
        type Output = ();

        #[inline(always)]
        unsafe fn run<S: Simd>(self, s: S) {
            let Self(kv, slot, x) = self;
            let (key, value) = x.split_at(kv.config.head_dim);
            let unit = kv.unit_at(1, 1, (slot / 16) as u32);
            let layout = kv.layout;
            layout.store(s, kv.data[unit..].as_mut_ptr(), slot % 16, key.as_ptr(), value.as_ptr());
        }
    }

    #[test]
    fn units_survive_export_import_and_copy() {
        let mut random = Random::new(7);
        for dtype in [KvDType::F32, KvDType::F16, KvDType::Bf16, KvDType::Int8] {
            for head_dim in [2, 6, 14, 16, 18, 64] {
                let config = KvCacheConfig { num_layers: 2, num_kv_heads: 2, head_dim, num_blocks: 3, dtype };
                for cpu in backends(1) {
                    let mut kv = KvCache::new(config).unwrap();
                    kv.fill_nan(&[0, 1, 2]);
                    let rows: Vec<Vec<f32>> = (0..5).map(|_| random.vec(2 * head_dim)).collect();
                    for (i, row) in rows.iter().enumerate() {
                        // SAFETY: slot 16 + i is inside the cache.
                        unsafe { dispatch(cpu.detected(), Store(&mut kv, 16 + i, row)) };
                    }
                    let mut exported = vec![1u8; kv.unit_bytes()];
                    kv.export_unit(1, 1, 1, 5, &mut exported);
                    kv.import_unit(0, 0, 0, &exported);
                    kv.copy_block(0, 2);
                    for slot in 0..16 {
                        for d in 0..head_dim {
                            let (key, value) = kv.read(0, 0, 32 + slot, d);
                            let expected = if slot < 5 { kv.read(1, 1, 16 + slot, d) } else { (0.0, 0.0) };
                            assert_eq!((key, value), expected, "{dtype} {head_dim} {slot} {d}");
                            if slot < 5 {
                                let tolerance = if dtype == KvDType::F32 { 0.0 } else { 0.004 };
                                assert!((key - rows[slot][d]).abs() <= tolerance);
                                assert!((value - rows[slot][head_dim + d]).abs() <= tolerance);
                            }
                        }
                    }
                    let (key, value) = kv.read(1, 1, 21, 0);
                    assert!(key.is_nan() && value.is_nan());
                }
            }
        }
    }

    #[test]
    fn int8_rounds_to_its_scale_and_bad_rows_have_none() {
        let config = KvCacheConfig {
            num_layers: 2,
            num_kv_heads: 2,
            head_dim: 18,
            num_blocks: 1,
            dtype: KvDType::Int8,
        };
        for cpu in backends(1) {
            let mut kv = KvCache::new(config).unwrap();
            let mut row = vec![0.0f32; 36];
            row[..4].copy_from_slice(&[127.0, 0.5, -2.5, -126.5]);
            row[18..20].copy_from_slice(&[-254.0, 3.0]);
            // SAFETY: the slot is inside the cache.
            unsafe { dispatch(cpu.detected(), Store(&mut kv, 3, &row)) };
            let read = |kv: &KvCache, slot| (0..18).map(|d| kv.read(1, 1, slot, d)).collect::<Vec<_>>();
            let found = read(&kv, 3);
            assert_eq!(
                found[..4],
                [(127.0, -254.0), (0.0, 4.0), (-2.0, 0.0), (-126.0, 0.0)],
                "{}",
                cpu.isa()
            );
            assert!(found[4..].iter().all(|&(key, value)| key == 0.0 && value == 0.0));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                row[17] = bad;
                // SAFETY: as above.
                unsafe { dispatch(cpu.detected(), Store(&mut kv, 4, &row)) };
                assert!(read(&kv, 4).iter().all(|(key, value)| key.is_nan() && !value.is_nan()));
            }
            assert_eq!(read(&kv, 3), found);
        }
    }

    #[test]
    fn bad_geometry_is_an_error() {
        let config = KvCacheConfig {
            num_layers: 1,
            num_kv_heads: 1,
            head_dim: 64,
            num_blocks: 1,
            dtype: KvDType::Bf16,
        };
        assert_eq!(config.bytes_per_block(), 4096);
        let int8 = KvCacheConfig { dtype: KvDType::Int8, ..config };
        assert_eq!(int8.bytes_per_block(), 2048 + 128);
        assert_eq!(KvCache::new(int8).unwrap().unit_bytes(), 2048 + 128);
        for head_dim in [0, 3, 1024] {
            assert!(matches!(
                KvCache::new(KvCacheConfig { head_dim, ..config }),
                Err(KernelError::HeadDim { .. })
            ));
        }
        for num_blocks in [0, usize::MAX / 16, 1 << 40] {
            assert!(matches!(
                KvCache::new(KvCacheConfig { num_blocks, ..config }),
                Err(KernelError::CacheGeometry)
            ));
        }
    }
}
