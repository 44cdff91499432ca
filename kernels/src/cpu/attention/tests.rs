//! Every ISA and dtype against f64, and the invariance over chunking, batch and threads.

use super::super::testing::{Random, backends};
use super::super::{BLOCK_SIZE, KvCacheConfig, Rope, reference};
use super::*;
use crate::{AttentionPrecision, KvDType};

const CLASSES: [(KvDType, AttentionPrecision); 5] = [
    (KvDType::F32, AttentionPrecision::Rounded),
    (KvDType::F16, AttentionPrecision::Rounded),
    (KvDType::Bf16, AttentionPrecision::Rounded),
    (KvDType::Bf16, AttentionPrecision::Split),
    (KvDType::Int8, AttentionPrecision::Rounded),
];

/// One sequence of a test: its tokens' qkv rows, and its shuffled blocks.
struct Sequence {
    qkv: Vec<f32>,
    tokens: usize,
    blocks: Vec<u32>,
}

struct Fixture {
    heads: usize,
    config: KvCacheConfig,
    precision: AttentionPrecision,
    sequences: Vec<Sequence>,
}

impl Fixture {
    fn new(
        random: &mut Random,
        (heads, kv_heads, head_dim): (usize, usize, usize),
        (dtype, precision): (KvDType, AttentionPrecision),
        lens: &[usize],
    ) -> Self {
        let width = (heads + 2 * kv_heads) * head_dim;
        let needed: usize = lens.iter().map(|len| len.div_ceil(BLOCK_SIZE)).sum();
        // Every other block stays free, full of NaN.
        let mut free: Vec<u32> = (0..2 * needed as u32).collect();
        for i in (1..free.len()).rev() {
            free.swap(i, random.below(i + 1));
        }
        let sequences = lens
            .iter()
            .map(|&tokens| Sequence {
                qkv: random.vec(tokens * width),
                tokens,
                blocks: free.split_off(free.len() - tokens.div_ceil(BLOCK_SIZE)),
            })
            .collect();
        let config =
            KvCacheConfig { num_layers: 2, num_kv_heads: kv_heads, head_dim, num_blocks: 2 * needed, dtype };
        Self { heads, config, precision, sequences }
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.config.num_kv_heads) * self.config.head_dim
    }

    fn cache(&self) -> KvCache {
        let mut kv = KvCache::new(self.config).unwrap();
        kv.fill_nan(&(0..self.config.num_blocks as u32).collect::<Vec<_>>());
        kv
    }

    /// Runs one step: `parts` are (sequence, range of its tokens). Returns the output rows in that order.
    fn step(&self, cpu: &Cpu, kv: &mut KvCache, parts: &[(usize, Range<usize>)]) -> Vec<f32> {
        self.checked_step(cpu, kv, parts, false)
    }

    /// As `step`; if asked to, compared with the reference and with any rows done apart.
    fn checked_step(
        &self,
        cpu: &Cpu,
        kv: &mut KvCache,
        parts: &[(usize, Range<usize>)],
        compare: bool,
    ) -> Vec<f32> {
        let (width, head_dim) = (self.width(), self.config.head_dim);
        let (mut qkv, mut slots, mut cu_seqlens, mut context_lens) = (vec![], vec![], vec![0], vec![]);
        let (mut tables, mut offsets) = (vec![], vec![0]);
        for (index, range) in parts {
            let sequence = &self.sequences[*index];
            qkv.extend(&sequence.qkv[range.start * width..range.end * width]);
            slots.extend(
                range.clone().map(|t| sequence.blocks[t / BLOCK_SIZE] * 16 + (t % BLOCK_SIZE) as u32),
            );
            cu_seqlens.push(slots.len() as u32);
            context_lens.push(range.start as u32);
            tables.extend(&sequence.blocks[..range.end.div_ceil(BLOCK_SIZE)]);
            offsets.push(tables.len() as u32);
        }
        // No rotation: keys are stored as given.
        let mut rope = Rope::new(&[], 1.0, slots.len());
        cpu.prepare_rope(&mut rope, &vec![0; slots.len()]);
        cpu.rope_and_store_kv(&mut qkv, &rope, &slots, 1, kv);
        let batch = AttentionBatch {
            cu_seqlens: &cu_seqlens,
            context_lens: &context_lens,
            block_tables: &tables,
            block_table_offsets: &offsets,
        };
        let out_width = self.heads * head_dim;
        let mut out = vec![f32::NAN; slots.len() * out_width];
        let scale = 1.7 / (head_dim as f32).sqrt();
        cpu.attention(&qkv, &batch, 1, kv, scale, self.precision, &mut out);
        if compare {
            self.check_rows(cpu, &qkv, &batch, kv, scale, &out);
            let shape = (self.heads, self.config.num_kv_heads, head_dim);
            let expected =
                reference::attention(&qkv, &batch, shape, scale, |head, slot, d| kv.read(1, head, slot, d));
            // Queries and weights lose up to 2^-9 as one bf16 number, 2^-17 as two, 2^-15 as integers; the others are f32.
            let tolerance = match (self.config.dtype, self.precision) {
                (KvDType::Bf16, AttentionPrecision::Rounded) => 0.02,
                (KvDType::Bf16 | KvDType::Int8, _) => 2e-4,
                _ => 3e-6,
            };
            for (i, (got, expected)) in out.iter().zip(&expected).enumerate() {
                assert!(
                    (got - expected).abs() <= tolerance,
                    "{} {:?} [{i}] {got} {expected}",
                    cpu.isa(),
                    self.config
                );
            }
        }
        out
    }
}

impl Fixture {
    /// Rows in ranges that cut through sequences, each on one worker: the bits of the whole step.
    fn check_rows(
        &self,
        cpu: &Cpu,
        qkv: &[f32],
        batch: &AttentionBatch<'_>,
        kv: &KvCache,
        scale: f32,
        expected: &[f32],
    ) {
        let (total, width) = (batch.rows(), self.width());
        let out_width = expected.len() / total;
        let kv = kv.layer_for_reading(1);
        for height in [total, 29, 5] {
            for start in (0..total).step_by(height) {
                let rows = start..total.min(start + height);
                // Rows outside the range are not there.
                let mut own = vec![f32::NAN; total * width];
                own[rows.start * width..rows.end * width]
                    .copy_from_slice(&qkv[rows.start * width..rows.end * width]);
                let queries = SharedMut::new(own.as_mut_ptr());
                let attention = LayerAttention::new(queries, width, batch, kv, scale, self.precision);
                let mut out = vec![f32::NAN; rows.len() * out_width];
                // SAFETY: qkv has all rows, out those of the range; no job is running.
                unsafe { attention.rows(cpu.detected(), cpu.scratch.of(0), rows.clone(), out.as_mut_ptr()) };
                let expected = &expected[rows.start * out_width..rows.end * out_width];
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&out), bits(expected), "{} rows {rows:?}", cpu.isa());
            }
        }
    }
}

#[test]
fn every_shape_and_dtype_matches_the_reference() {
    let mut random = Random::new(30);
    for shape in [
        (1, 1, 2),
        (2, 2, 8),
        (9, 3, 64),
        (4, 1, 80),
        (8, 1, 18),
        (14, 1, 16),
        (6, 2, 128),
        (5, 1, 272),
        (64, 1, 16),
    ] {
        for class in CLASSES {
            let fixture = Fixture::new(&mut random, shape, class, &[1, 16, 33, 47]);
            for cpu in backends(1) {
                let mut kv = fixture.cache();
                let parts: Vec<_> = fixture
                    .sequences
                    .iter()
                    .enumerate()
                    .map(|(i, sequence)| (i, 0..sequence.tokens))
                    .collect();
                fixture.checked_step(&cpu, &mut kv, &parts, true);
            }
        }
    }
}

/// Token by token, in any chunks, alone or beside others, with any number of threads: the same bits.
#[test]
fn chunking_batch_and_threads_leave_no_trace() {
    let mut random = Random::new(31);
    for class in CLASSES {
        let fixture = Fixture::new(&mut random, (6, 2, 24), class, &[600, 70]);
        for threads in [1, 2, 3] {
            for cpu in backends(threads) {
                let row = fixture.heads * fixture.config.head_dim;
                let mut kv = fixture.cache();
                let both = fixture.checked_step(&cpu, &mut kv, &[(0, 0..600), (1, 0..70)], threads == 1);
                for chunk in [1, 7, 64, 255, 257] {
                    let mut kv = fixture.cache();
                    let mut alone = Vec::new();
                    for start in (0..600).step_by(chunk) {
                        alone.extend(fixture.step(&cpu, &mut kv, &[(0, start..600.min(start + chunk))]));
                    }
                    assert_eq!(alone, both[..600 * row], "{} {class:?} chunks of {chunk}", cpu.isa());
                }
                // A decode beside a prefill.
                let mut kv = fixture.cache();
                fixture.step(&cpu, &mut kv, &[(0, 0..599)]);
                let mixed = fixture.step(&cpu, &mut kv, &[(1, 0..70), (0, 599..600)]);
                assert_eq!(mixed[..70 * row], both[600 * row..]);
                assert_eq!(mixed[70 * row..], both[599 * row..600 * row]);
            }
        }
        let outputs: Vec<Vec<Vec<f32>>> = (1..=3)
            .map(|threads| {
                let run = |cpu: &Cpu| fixture.step(cpu, &mut fixture.cache(), &[(0, 0..600)]);
                backends(threads).iter().map(run).collect()
            })
            .collect();
        assert_eq!(outputs[0], outputs[1]);
        assert_eq!(outputs[0], outputs[2]);
    }
}

#[test]
fn a_bad_query_spoils_only_its_row() {
    let mut random = Random::new(32);
    for class in CLASSES {
        let mut fixture = Fixture::new(&mut random, (2, 1, 16), class, &[20]);
        for cpu in backends(2) {
            let clean = fixture.step(&cpu, &mut fixture.cache(), &[(0, 0..20)]);
            let width = fixture.width();
            let kept = std::mem::replace(&mut fixture.sequences[0].qkv[7 * width], f32::NAN);
            let bad = fixture.step(&cpu, &mut fixture.cache(), &[(0, 0..20)]);
            fixture.sequences[0].qkv[7 * width] = kept;
            // Token 7, head 0.
            for (i, (bad, clean)) in bad.iter().zip(&clean).enumerate() {
                if i / 16 == 14 {
                    assert!(bad.is_nan());
                } else {
                    assert_eq!(bad, clean);
                }
            }
        }
    }
}

/// A key or value that is not finite spoils every query that sees it, and no other.
#[test]
fn a_bad_key_or_value_spoils_who_sees_it() {
    let mut random = Random::new(33);
    let head_dim = 16;
    for class in CLASSES {
        let mut fixture = Fixture::new(&mut random, (2, 1, head_dim), class, &[300]);
        let width = fixture.width();
        for cpu in backends(2) {
            let clean = fixture.step(&cpu, &mut fixture.cache(), &[(0, 0..300)]);
            for (bad_token, head) in [(7, 2), (7, 3), (281, 2), (281, 3)] {
                let at = bad_token * width + head * head_dim + 5;
                let kept = std::mem::replace(&mut fixture.sequences[0].qkv[at], f32::NAN);
                let bad = fixture.step(&cpu, &mut fixture.cache(), &[(0, 0..300)]);
                fixture.sequences[0].qkv[at] = kept;
                let (bad, clean) = (bad.as_chunks::<32>().0, clean.as_chunks::<32>().0);
                assert_eq!(bad[..bad_token], clean[..bad_token], "{} {class:?}", cpu.isa());
                for row in &bad[bad_token..] {
                    assert!(row[5].is_nan() && row[head_dim + 5].is_nan(), "{} {class:?}", cpu.isa());
                }
            }
        }
    }
}
