//! Checks of attention over the paged KV cache.

use half::bf16;

use super::super::launcher::{self, Attention, Heads, KvCache, KvType, Sequences, Splits};
use super::super::reference;
use super::{Buffer, Case, Checks, wide};

/// Heads of both head dims, with 1, 3, 4 and 8 query heads for a KV head.
const HEADS: [Heads; 4] = [
    Heads { num_heads: 2, num_kv_heads: 2, head_dim: 64 },
    Heads { num_heads: 6, num_kv_heads: 2, head_dim: 64 },
    Heads { num_heads: 8, num_kv_heads: 2, head_dim: 128 },
    Heads { num_heads: 8, num_kv_heads: 1, head_dim: 128 },
];

/// (context, tokens in the step) of each sequence.
type Lengths = &'static [(usize, usize)];

pub(super) fn decode(checks: &mut Checks<'_>) {
    let single: Lengths = &[(0, 1), (1, 1), (14, 1), (15, 1), (0, 0), (16, 1), (17, 1), (333, 1)];
    let several: Lengths = &[(0, 3), (15, 2), (700, 8), (31, 0), (47, 1), (13, 8)];
    for heads in HEADS {
        for (lengths, num_splits, kv_type) in [
            (single, 1, KvType::Bf16),
            (single, 4, KvType::Bf16),
            (single, 3, KvType::Fp8),
            (several, 1, KvType::Fp8),
            (several, 5, KvType::Bf16),
        ] {
            let name = format!("attention_decode {kv_type:?} {heads:?} {num_splits} splits {lengths:?}");
            checks.case(name, |case| {
                let setup = Setup::new(case, heads, kv_type, lengths)?;
                let bytes = launcher::splits_bytes(setup.num_tokens, heads, num_splits);
                let splits = Splits { num_splits, workspace: case.output::<u8>(bytes)?.address };
                let max_tokens = lengths.iter().map(|&(_, tokens)| tokens).max().unwrap_or(0);
                let Setup { attention, sequences, num_tokens, .. } = setup;
                // All at once, or the last ones first: a launch is for any neighbours of a step.
                let all = sequences.num_sequences;
                let cut = if num_splits == 5 { 2 } else { 0 };
                for part in [cut..all, 0..cut] {
                    let sequences = sequences.part(part);
                    case.launch(launcher::attention_decode(
                        attention, sequences, max_tokens, num_tokens, splits,
                    ))?;
                    if num_splits > 1 {
                        case.launch(launcher::attention_combine(attention, sequences, num_tokens, splits))?;
                    }
                }
                setup.check(case)
            });
        }
    }
}

pub(super) fn prefill(checks: &mut Checks<'_>) {
    let cases: [Lengths; 3] =
        [&[(0, 1), (0, 70), (5, 0), (17, 33)], &[(130, 67), (0, 15)], &[(63, 1), (0, 64), (64, 129)]];
    for heads in HEADS {
        for (lengths, kv_type) in [
            (cases[0], KvType::Bf16),
            (cases[1], KvType::Bf16),
            (cases[2], KvType::Bf16),
            (cases[1], KvType::Fp8),
        ] {
            checks.case(format!("attention_prefill {kv_type:?} {heads:?} {lengths:?}"), |case| {
                let setup = Setup::new(case, heads, kv_type, lengths)?;
                let max_tokens = lengths.iter().map(|&(_, tokens)| tokens).max().unwrap_or(0);
                case.launch(launcher::attention_prefill(setup.attention, setup.sequences, max_tokens))?;
                setup.check(case)
            });
        }
    }
}

/// Sequences with keys and values in blocks in random order, all else NaN, and what attention should make of them.
struct Setup {
    attention: Attention,
    sequences: Sequences,
    /// More than the sequences have.
    num_tokens: usize,
    out: Buffer<bf16>,
    expected: Vec<f64>,
}

impl Setup {
    fn new(case: &mut Case<'_>, heads: Heads, kv_type: KvType, lengths: Lengths) -> Result<Self, String> {
        let Heads { num_heads, num_kv_heads, head_dim } = heads;
        const UNUSED: usize = 2;
        let blocks_of = |&(context, tokens): &(usize, usize)| (context + tokens).div_ceil(16);
        let num_blocks = lengths.iter().map(blocks_of).sum::<usize>() + 3;
        let table_stride = lengths.iter().map(blocks_of).max().unwrap_or(0) + 1;
        let mut free = case.random.shuffled(num_blocks);
        // Far outside: nobody may follow it.
        let mut tables = vec![1 << 24; lengths.len() * table_stride];
        for (sequence, length) in lengths.iter().enumerate() {
            for entry in &mut tables[sequence * table_stride..][..blocks_of(length)] {
                *entry = free.pop().expect("enough blocks");
            }
        }

        let mut cu_seqlens = vec![0];
        for &(_, tokens) in lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + tokens as i32);
        }
        let used_tokens = cu_seqlens[lengths.len()] as usize;
        let num_tokens = used_tokens + UNUSED;
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let mut qkv = case.random.bf16s(num_tokens * width, 1.0);
        // Keys and values are read from the cache only.
        for row in qkv.chunks_mut(width) {
            row[num_heads * head_dim..].fill(bf16::NAN);
        }

        let cache_len = num_blocks * num_kv_heads * 16 * head_dim;
        let mut caches = [vec![bf16::NAN; cache_len], vec![bf16::NAN; cache_len]];
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut expected = vec![0.0; used_tokens * num_heads * head_dim];
        for (sequence, &(context, tokens)) in lengths.iter().enumerate() {
            let length = context + tokens;
            for kv_head in 0..num_kv_heads {
                let kv = [(); 2].map(|()| case.random.bf16s(length * head_dim, 2.0)).map(|values| {
                    if kv_type == KvType::Bf16 {
                        return values;
                    }
                    let rounded = |x: &bf16| reference::f64_of_fp8(reference::fp8_of_f64(x.to_f64()));
                    values.iter().map(|x| bf16::from_f64(rounded(x))).collect()
                });
                for position in 0..length {
                    let block = tables[sequence * table_stride + position / 16] as usize;
                    let at = ((block * num_kv_heads + kv_head) * 16 + position % 16) * head_dim;
                    for (cache, values) in caches.iter_mut().zip(&kv) {
                        cache[at..at + head_dim].copy_from_slice(&values[position * head_dim..][..head_dim]);
                    }
                }
                let [keys, values] = kv.map(|values| wide(&values));
                let group = num_heads / num_kv_heads;
                for token in 0..tokens {
                    let row = cu_seqlens[sequence] as usize + token;
                    for head in kv_head * group..(kv_head + 1) * group {
                        let query = wide(&qkv[row * width + head * head_dim..][..head_dim]);
                        let visible = (context + token + 1) * head_dim;
                        let out = reference::attention(
                            &query,
                            &keys[..visible],
                            &values[..visible],
                            f64::from(scale),
                        );
                        expected[(row * num_heads + head) * head_dim..][..head_dim].copy_from_slice(&out);
                    }
                }
            }
        }

        let caches = match kv_type {
            KvType::Bf16 => [case.input(&caches[0])?.address, case.input(&caches[1])?.address],
            KvType::Fp8 => {
                let codes = |cache: &[bf16]| -> Vec<u8> {
                    let code = |x: &bf16| if x.is_nan() { 0xff } else { reference::fp8_of_f64(x.to_f64()) };
                    cache.iter().map(code).collect()
                };
                [case.input(&codes(&caches[0]))?.address, case.input(&codes(&caches[1]))?.address]
            }
        };
        let context_lens: Vec<i32> = lengths.iter().map(|&(context, _)| context as i32).collect();
        let out = case.output(num_tokens * num_heads * head_dim)?;
        let attention = Attention {
            qkv: case.input(&qkv)?.address,
            out: out.address,
            cache: KvCache { k: caches[0], v: caches[1], kv_type },
            heads,
            scale,
        };
        let sequences = Sequences {
            num_sequences: lengths.len(),
            cu_seqlens: case.input(&cu_seqlens)?.address,
            context_lens: case.input(&context_lens)?.address,
            block_tables: case.input(&tables)?.address,
            table_stride,
        };
        Ok(Self { attention, sequences, num_tokens, out, expected })
    }

    fn check(&self, case: &mut Case<'_>) -> Result<(), String> {
        let found = case.read(self.out)?;
        let (used, unused) = found.split_at(self.expected.len());
        if unused.iter().any(|x| x.to_bits() != 0xffff) {
            return Err("tokens of no sequence were written".into());
        }
        case.expect("out", used.iter().map(|x| x.to_f32()), &self.expected, 6e-3)
    }
}
