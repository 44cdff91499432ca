//! Row operations against plain loops.

use super::*;
use crate::cpu::testing::{Random, backends};

#[test]
fn argmax_takes_the_lowest_id_of_equals_at_every_length() {
    let mut random = Random::new(10);
    for len in (1..70).chain([4095, 4096, 4097, 9000]) {
        let mut row: Vec<f32> = (0..len).map(|_| (random.f32() * 5.0).round()).collect();
        row[random.below(len)] = f32::NEG_INFINITY;
        if row.iter().all(|x| !x.is_finite()) {
            continue;
        }
        let maximum = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let id = row.iter().position(|&x| x == maximum).unwrap();
        for cpu in backends(1) {
            assert_eq!(argmax((&cpu).into(), &row), Some((id as u32, maximum)));
            for bad in [f32::NAN, f32::INFINITY] {
                let mut row = row.clone();
                row[len / 2] = bad;
                assert_eq!(argmax((&cpu).into(), &row), None);
            }
            assert_eq!(argmax((&cpu).into(), &vec![f32::NEG_INFINITY; len]), None);
        }
    }
}

#[test]
fn log_sum_exp_and_rank_match_f64() {
    let mut random = Random::new(11);
    for len in [1, 2, 15, 16, 17, 500, 4096, 4097, 49_152] {
        let row: Vec<f32> = (0..len).map(|_| random.f32() * 20.0).collect();
        let exact = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        for cpu in backends(1) {
            let (_, maximum) = argmax((&cpu).into(), &row).unwrap();
            let lse = log_sum_exp((&cpu).into(), &row, maximum);
            assert!((f64::from(lse) - exact).abs() < 4e-6, "{} {len}: {lse} {exact}", cpu.isa());
            let token = random.below(len);
            let greater = row.iter().filter(|&&x| x > row[token]).count() as u32;
            assert_eq!(rank((&cpu).into(), &row, token as u32), greater + 1);
            assert_eq!(log_prob(&row, lse, token as u32), row[token] - lse);
        }
    }
}

#[test]
fn top_n_is_sorted_with_ties_by_id() {
    let mut random = Random::new(13);
    for len in (1..40).chain([500, 4099]) {
        for levels in [2.0, 9.0, 1e6] {
            let mut row: Vec<f32> = (0..len).map(|_| (random.f32() * levels).round()).collect();
            row[random.below(len)] = f32::NEG_INFINITY;
            let sorted = sorted(&row);
            for n in [0, 1, 2, 5, 20, len, 2 * len] {
                for cpu in backends(1) {
                    assert_eq!(
                        top_n((&cpu).into(), &row, n),
                        sorted[..n.min(len)],
                        "{} {len} {n}",
                        cpu.isa()
                    );
                }
            }
        }
    }
}

/// All tokens in order.
fn sorted(row: &[f32]) -> Vec<(u32, f32)> {
    let mut all: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
    all.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
    all
}

#[test]
fn penalties_follow_the_field() {
    let mut row = [2.0, -2.0, 2.0, 1.0];
    let counts = [
        TokenCount { token: 0, in_prompt: true, in_output: 0 },
        TokenCount { token: 1, in_prompt: false, in_output: 2 },
        TokenCount { token: 2, in_prompt: false, in_output: 0 },
    ];
    apply_penalties(&mut row, &counts, &Penalties { repetition: 2.0, presence: 0.5, frequency: 0.25 });
    assert_eq!(row, [1.0, -5.0, 2.0, 1.0]);
    add_bias(&mut row, &[(3, -1.0)]);
    ban(&mut row, &[0]);
    assert_eq!(row, [f32::NEG_INFINITY, -5.0, 2.0, 0.0]);
    allow_only(&mut row, &[1, 3, 1]);
    assert_eq!(row, [f32::NEG_INFINITY, -5.0, f32::NEG_INFINITY, 0.0]);
}

/// Sorts everything and cuts, in f64.
fn filter_reference(row: &[f32], filters: &Filters) -> Vec<u32> {
    let sorted = sorted(row);
    let weight = |id: u32| f64::from((row[id as usize] - sorted[0].1) / filters.temperature).exp();
    let mut ids: Vec<u32> = sorted.iter().filter(|(_, x)| x.is_finite()).map(|(id, _)| *id).collect();
    ids.retain(|&id| weight(id) >= f64::from(filters.min_p));
    if filters.top_k > 0 {
        ids.truncate(filters.top_k as usize);
    }
    let total: f64 = ids.iter().map(|&id| weight(id)).sum();
    let mut sum = 0.0;
    let mut kept: Vec<u32> = Vec::new();
    for id in ids {
        if filters.top_p < 1.0 && sum >= f64::from(filters.top_p) * total {
            break;
        }
        sum += weight(id);
        kept.push(id);
    }
    kept.sort_unstable();
    kept
}

#[test]
fn filters_match_a_full_sort() {
    let mut random = Random::new(12);
    let mut scratch = SamplingScratch::default();
    for round in 0..600 {
        let len = [1 + random.below(400), 3000 + random.below(6000)][usize::from(round % 6 == 0)];
        let spread = [0.5, 4.0, 30.0, 200.0][random.below(4)];
        let grid = [8.0, 64.0][random.below(2)];
        let row: Vec<f32> = (0..len)
            .map(|_| match random.below(9) {
                0 => f32::NEG_INFINITY,
                1 => -0.0,
                _ => (random.f32() * spread * grid).round() / grid,
            })
            .collect();
        let filters = Filters {
            temperature: [0.3, 1.0, 2.5][random.below(3)],
            top_k: [0, 1, 5, 50, 1000, 2500][random.below(6)],
            top_p: [0.1, 0.53, 0.917, 0.991, 1.0][random.below(5)],
            min_p: [0.0, 0.0, 0.031, 0.77][random.below(4)],
        };
        if row.iter().all(|x| !x.is_finite()) {
            continue;
        }
        let expected = filter_reference(&row, &filters);
        for cpu in backends(1) {
            let best = argmax((&cpu).into(), &row).unwrap();
            let cut = filter((&cpu).into(), &row, best, &filters, &mut scratch);
            let kept: Vec<u32> = (0..)
                .zip(&row)
                .filter(|&(id, &x)| x.is_finite() && cut.keeps(id, x))
                .map(|(id, _)| id)
                .collect();
            assert_eq!(kept, expected, "{} round {round} {filters:?}", cpu.isa());
        }
    }
}

#[test]
fn the_most_probable_token_survives_every_filter() {
    let mut scratch = SamplingScratch::default();
    for cpu in backends(1) {
        for row in [vec![-3.0, 1.5, 1.5, 0.25], vec![7.0], vec![2.0; 5000]] {
            let best = argmax((&cpu).into(), &row).unwrap();
            for (top_k, top_p, min_p) in [(1, 1.0, 0.0), (0, 0.0, 0.0), (3, 1e-9, 1.0)] {
                let filters = Filters { temperature: 0.9, top_k, top_p, min_p };
                let cut = filter((&cpu).into(), &row, best, &filters, &mut scratch);
                let kept: Vec<u32> =
                    (0..).zip(&row).filter(|&(i, &x)| cut.keeps(i, x)).map(|(i, _)| i).collect();
                assert_eq!(kept, [best.0], "{} {filters:?}", cpu.isa());
            }
        }
    }
}

#[test]
fn a_flat_row_of_a_large_vocabulary_is_cut_where_its_share_is_reached() {
    let row = vec![1.25; 600_000];
    let cpu = &backends(1)[0];
    let filters = Filters { temperature: 100.0, top_k: 0, top_p: 0.75, min_p: 0.0 };
    for top_k in [0, 500_000] {
        let filters = Filters { top_k, ..filters };
        let best = argmax(cpu.into(), &row).unwrap();
        let cut = filter(cpu.into(), &row, best, &filters, &mut SamplingScratch::default());
        let candidates = if top_k == 0 { 600_000 } else { top_k };
        assert_eq!(cut, Cut { logit: 1.25, last: candidates * 3 / 4 - 1 });
    }
}
