//! Checks of operations that take each row or value by itself.

use half::bf16;

use super::super::launcher::{self, CacheList, Heads, KvCache, KvType, Norm, RopeTables};
use super::super::reference;
use super::{Case, Checks, wide};

pub(super) fn embed(checks: &mut Checks<'_>) {
    for (num_tokens, size) in [(1, 64), (7, 576), (5, 4096 + 8)] {
        checks.case(format!("embed {num_tokens}x{size}"), |case| {
            let (begin, end) = (10, 30);
            let table = case.random.bf16s((end - begin) * size, 1.0);
            // The edges of what is ours, on both sides, and what rows 1, 0 and 3 drew: the last of them nothing that there is.
            let ids: Vec<i32> = [29, 30, 9, 10, -2, -1, -4].into_iter().cycle().take(num_tokens).collect();
            let drawn = [11, 28, 5, -7];
            let ours = |id: i32| (begin as i32..end as i32).contains(&id);
            let known = |id: i32| if id < 0 { drawn[(-1 - id) as usize] } else { id };
            let expected: Vec<f32> = (ids.iter().flat_map(|&id| (0..size).map(move |e| (known(id), e))))
                .map(|(id, e)| if ours(id) { table[(id as usize - begin) * size + e].to_f32() } else { 0.0 })
                .collect();
            let hidden = case.output::<f32>(num_tokens * size)?;
            let (table, ids, drawn) = (case.input(&table)?, case.input(&ids)?, case.input(&drawn)?);
            let range = begin..end;
            case.launch(launcher::embed(
                hidden.address,
                table.address,
                ids.address,
                drawn.address,
                num_tokens,
                size,
                range,
            ))?;
            case.expect_equal("hidden", hidden, &expected)
        });
    }
}

pub(super) fn norm(checks: &mut Checks<'_>) {
    for (num_tokens, size) in [(1, 64), (4, 576), (3, 4096 + 8)] {
        let shape = format!("{num_tokens}x{size}");
        checks.case(format!("rms_norm {shape}"), |case| norm_case(case, num_tokens, size, Input::Hidden));
        checks.case(format!("gather_rms_norm {shape}"), |case| {
            norm_case(case, num_tokens, size, Input::Gather)
        });
        checks.case(format!("add_rms_norm_bf16 {shape}"), |case| {
            norm_case(case, num_tokens, size, Input::AddBf16)
        });
        checks.case(format!("add_rms_norm_f32 {shape}"), |case| {
            norm_case(case, num_tokens, size, Input::AddF32)
        });
        checks.case(format!("add_bias_bf16, add_bias_f32 {shape}"), |case| {
            let x = case.random.bf16s(num_tokens * size, 1.0);
            let bias = case.random.bf16s(size, 1.0);
            let expected: Vec<f64> =
                x.iter().zip(bias.iter().cycle()).map(|(x, b)| x.to_f64() + b.to_f64()).collect();
            let in_f32: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
            let (x, in_f32, bias) = (case.input(&x)?, case.input(&in_f32)?, case.input(&bias)?);
            case.launch(launcher::add_bias_bf16(x.address, bias.address, num_tokens, size))?;
            case.expect_bf16("x", x, &expected)?;
            case.launch(launcher::add_bias_f32(in_f32.address, bias.address, num_tokens, size))?;
            case.expect_f32("x in f32", in_f32, &expected)
        });
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Input {
    Hidden,
    Gather,
    AddBf16,
    AddF32,
}

fn norm_case(case: &mut Case<'_>, num_tokens: usize, size: usize, input: Input) -> Result<(), String> {
    let mut hidden_values: Vec<f64> =
        case.random.f32s(num_tokens * size, 3.0).into_iter().map(f64::from).collect();
    let weight = case.random.bf16s(size, 1.0);
    let hidden = case.input(&hidden_values.iter().map(|&x| x as f32).collect::<Vec<_>>())?;
    let norm = Norm {
        weight: case.input(&weight)?.address,
        hidden_size: size,
        epsilon: [1e-5, 0.5][num_tokens % 2],
    };
    let out = case.output::<bf16>(num_tokens * size)?;
    let launch = match input {
        Input::Hidden => launcher::rms_norm(out.address, hidden.address, num_tokens, norm),
        Input::Gather => {
            // Backwards, and one row of a bucket that is not used.
            let rows: Vec<i32> =
                (0..num_tokens as i32).rev().map(|row| if row == 1 { -1 } else { row }).collect();
            let pick = |&row: &i32| match usize::try_from(row) {
                Ok(row) => hidden_values[row * size..(row + 1) * size].to_vec(),
                Err(_) => vec![0.0; size],
            };
            hidden_values = rows.iter().flat_map(pick).collect();
            let rows = case.input(&rows)?;
            launcher::gather_rms_norm(out.address, hidden.address, rows.address, num_tokens, norm)
        }
        Input::AddBf16 => {
            let x = case.random.bf16s(num_tokens * size, 2.0);
            hidden_values.iter_mut().zip(&x).for_each(|(h, x)| *h += x.to_f64());
            let x = case.input(&x)?;
            launcher::add_rms_norm_bf16(out.address, hidden.address, x.address, num_tokens, norm)
        }
        Input::AddF32 => {
            let x = case.random.f32s(num_tokens * size, 2.0);
            hidden_values.iter_mut().zip(&x).for_each(|(h, x)| *h += f64::from(*x));
            let x = case.input(&x)?;
            launcher::add_rms_norm_f32(out.address, hidden.address, x.address, num_tokens, norm)
        }
    };
    case.launch(launch)?;
    let expected = reference::rms_norm(&hidden_values, &wide(&weight), f64::from(norm.epsilon));
    case.expect_bf16("out", out, &expected)?;
    if input != Input::Gather {
        case.expect_f32("hidden", hidden, &hidden_values)?;
    }
    Ok(())
}

pub(super) fn rope(checks: &mut Checks<'_>) {
    for (num_heads, num_kv_heads, head_dim) in [(4, 4, 64), (9, 3, 64), (8, 1, 128), (32, 8, 128)] {
        for kv_type in [KvType::Bf16, KvType::Fp8] {
            let heads = Heads { num_heads, num_kv_heads, head_dim };
            checks.case(format!("rope_and_store_kv {kv_type:?} {heads:?}"), |case| {
                rope_case(case, heads, kv_type)
            });
        }
    }
}

fn rope_case(case: &mut Case<'_>, heads: Heads, kv_type: KvType) -> Result<(), String> {
    const NUM_TOKENS: usize = 5;
    const NUM_BLOCKS: usize = 4;
    const MAX_POSITION: usize = 50;
    let Heads { num_heads, num_kv_heads, head_dim } = heads;
    let (half, width) = (head_dim / 2, (num_heads + 2 * num_kv_heads) * head_dim);
    let qkv_values = case.random.bf16s(NUM_TOKENS * width, 2.0);
    let angles = case.random.f32s(MAX_POSITION * half, 3.0);
    let cos: Vec<f32> = angles.iter().map(|x| x.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|x| x.sin()).collect();
    let positions: Vec<i32> = (0..NUM_TOKENS).map(|_| case.random.below(MAX_POSITION) as i32).collect();
    let mut slots = case.random.shuffled(NUM_BLOCKS * 16);
    slots.truncate(NUM_TOKENS);
    slots[2] = -1;

    let cache_len = NUM_BLOCKS * num_kv_heads * 16 * head_dim;
    // What no slot was written of stays NaN.
    let mut expected_cache = [vec![f64::NAN; cache_len], vec![f64::NAN; cache_len]];
    let mut expected_qkv = wide(&qkv_values);
    for token in 0..NUM_TOKENS {
        let row = &mut expected_qkv[token * width..(token + 1) * width];
        let at = positions[token] as usize * half..(positions[token] as usize + 1) * half;
        let (q, kv) = row.split_at_mut(num_heads * head_dim);
        q.copy_from_slice(&reference::rope(q, head_dim, &cos[at.clone()], &sin[at.clone()]));
        let (k, v) = kv.split_at(num_kv_heads * head_dim);
        let k = reference::rope(k, head_dim, &cos[at.clone()], &sin[at]);
        let Ok(slot) = usize::try_from(slots[token]) else { continue };
        for (cache, values) in expected_cache.iter_mut().zip([&k[..], v]) {
            for (head, values) in values.chunks(head_dim).enumerate() {
                let at = ((slot / 16 * num_kv_heads + head) * 16 + slot % 16) * head_dim;
                cache[at..at + head_dim].copy_from_slice(values);
            }
        }
    }

    let qkv = case.input(&qkv_values)?;
    let caches =
        [case.output::<u8>(cache_len * kv_type.bytes())?, case.output::<u8>(cache_len * kv_type.bytes())?];
    let cache = KvCache { k: caches[0].address, v: caches[1].address, kv_type };
    let tables = RopeTables { cos: case.input(&cos)?.address, sin: case.input(&sin)?.address };
    let (positions, slots) = (case.input(&positions)?.address, case.input(&slots)?.address);
    case.launch(launcher::rope_and_store_kv(
        qkv.address,
        cache,
        tables,
        positions,
        slots,
        NUM_TOKENS,
        heads,
    ))?;

    case.expect_bf16("qkv", qkv, &expected_qkv)?;
    for (found, expected) in caches.into_iter().zip(&expected_cache) {
        let found = case.read(found)?;
        let found: Vec<f64> = match kv_type {
            KvType::Bf16 => wide(&super::values_of::<bf16>(&found)),
            KvType::Fp8 => found.iter().map(|&x| reference::f64_of_fp8(x)).collect(),
        };
        if found.iter().zip(expected).any(|(a, b)| a.is_nan() != b.is_nan()) {
            return Err("other slots were written".into());
        }
        // The relative step of e4m3 is 2⁻³, of subnormal numbers it is more.
        let tolerance = if kv_type == KvType::Fp8 { 4e-2 } else { 4e-3 };
        let found = found.into_iter().filter(|x| !x.is_nan()).map(|x| x as f32);
        let expected: Vec<f64> = expected.iter().copied().filter(|x| !x.is_nan()).collect();
        case.expect("cache", found, &expected, tolerance)?;
    }
    Ok(())
}

pub(super) fn activation(checks: &mut Checks<'_>) {
    for (num_tokens, size) in [(1, 8), (3, 1536), (2, 4864 + 8)] {
        checks.case(format!("silu_mul {num_tokens}x{size}"), |case| {
            let gate_up_values = case.random.bf16s(num_tokens * 2 * size, 4.0);
            let expected: Vec<f64> = (wide(&gate_up_values).chunks(2 * size))
                .flat_map(|row| {
                    (0..size).map(|i| reference::silu(row[i]) * row[size + i]).collect::<Vec<_>>()
                })
                .collect();
            let (out, gate_up) = (case.output(num_tokens * size)?, case.input(&gate_up_values)?);
            case.launch(launcher::silu_mul(out.address, gate_up.address, num_tokens, size))?;
            case.expect_bf16("out", out, &expected)
        });
    }
}

pub(super) fn blocks(checks: &mut Checks<'_>) {
    const NUM_BLOCKS: usize = 6;
    for words in [64, 16 * 64 / 2 * 3] {
        checks.case(format!("copy_blocks, fill_blocks of {words} words"), |case| {
            let mut values: Vec<Vec<u32>> = (0..3)
                .map(|_| (0..NUM_BLOCKS * words).map(|_| case.random.next() as u32).collect())
                .collect();
            let caches = [case.input(&values[0])?, case.input(&values[1])?, case.input(&values[2])?];
            let addresses = case.input(&caches.map(|cache| cache.address))?.address;
            let list = CacheList { addresses, num_caches: caches.len(), block_bytes: 4 * words };
            let pairs = case.input(&[5, 0, 5, 3, 1, 2])?;
            case.launch(launcher::copy_blocks(list, pairs.address, 3))?;
            let filled = case.input(&[4, 1])?;
            case.launch(launcher::fill_blocks(list, filled.address, 2, u32::MAX))?;
            for (cache, values) in caches.into_iter().zip(&mut values) {
                for (from, to) in [(5, 0), (5, 3), (1, 2)] {
                    values.copy_within(from * words..(from + 1) * words, to * words);
                }
                for block in [4, 1] {
                    values[block * words..(block + 1) * words].fill(u32::MAX);
                }
                case.expect_equal("cache", cache, values)?;
            }
            Ok(())
        });
    }
    for (count, first) in [(8, 0), (2056, 16), (8192, (1 << 34) + 8)] {
        checks.case(format!("fill_random {count} from {first}"), |case| {
            let (seed, scale) = (case.random.next(), 0.02f32);
            let expected: Vec<bf16> = (first..first + count as u64)
                .map(|i| {
                    let counter = i / 4;
                    let word = reference::philox(seed, [counter as u32, (counter >> 32) as u32, 0, 0])
                        [i as usize % 4];
                    bf16::from_f32(((word >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale)
                })
                .collect();
            let out = case.output(count)?;
            case.launch(launcher::fill_random(out.address, count, first, seed, scale))?;
            case.expect_equal("out", out, &expected)
        });
    }
    for (rows, columns, num_columns) in
        [(0..3, 0..8, 8), (5..9, 3..2067, 2081), (1 << 20..(1 << 20) + 2, 64..128, 1 << 14)]
    {
        checks.case(format!("draw_weights {rows:?} {columns:?} of {num_columns}"), |case| {
            let key = case.random.next();
            let table = case.random.bf16s(launcher::DRAW_TABLE, 1.0);
            let expected: Vec<bf16> = rows
                .clone()
                .flat_map(|row| columns.clone().map(move |column| (row * num_columns + column) as u64))
                .map(|element| {
                    table[(reference::splitmix(key, element / 4) >> (16 * (element % 4))) as usize % 4096]
                })
                .collect();
            let out = case.output(expected.len())?;
            let matrix = launcher::RandomMatrix { key, table: case.input(&table)?.address, num_columns };
            case.launch(launcher::draw_weights(out.address, matrix, rows.clone(), columns.clone()))?;
            case.expect_equal("out", out, &expected)
        });
    }
}
