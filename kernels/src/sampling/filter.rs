//! Min-p, top-k and top-p: which tokens stay candidates.

use std::cmp::Ordering;

use super::{SPAN, argmax, exp_sum};
use crate::cpu::Cpu;

/// Thresholds on softmax(logits / temperature); the neutral values keep everything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filters {
    /// Above 0.
    pub temperature: f32,
    /// Keeps the k largest; 0 is off.
    pub top_k: u32,
    /// Keeps the shortest prefix, in descending order, whose share of the candidates so far reaches p; 1 is off.
    pub top_p: f32,
    /// Keeps tokens at least this share as probable as the most probable one; 0 is off.
    pub min_p: f32,
}

/// Memory that filtering reuses.
#[derive(Debug, Default)]
pub struct SamplingScratch {
    weights: Vec<f32>,
    candidates: Vec<u32>,
}

/// Sets the logits of tokens that `filters` exclude to −∞: min-p first, then top-k, then top-p among what is left. Tokens
/// are ordered by descending logit, equal ones by ascending id, so exactly k stay and a tie at an edge is cut by id. The most
/// probable token always stays. A row that [`argmax`] refuses is left alone.
pub fn filter(cpu: &Cpu, row: &mut [f32], filters: &Filters, scratch: &mut SamplingScratch) {
    let top_k = if filters.top_k == 0 { row.len() } else { (filters.top_k as usize).min(row.len()) };
    let (cuts_k, cuts_p, cuts_min) = (top_k < row.len(), filters.top_p < 1.0, filters.min_p > 0.0);
    if !(cuts_k || cuts_p || cuts_min) {
        return;
    }
    let Some((best, maximum)) = argmax(cpu, row) else { return };
    let inverse = 1.0 / filters.temperature;
    if cuts_min {
        // p ≥ min_p · p_max in logits.
        let threshold = maximum + filters.min_p.ln() * filters.temperature;
        for logit in &mut *row {
            if *logit < threshold {
                *logit = f32::NEG_INFINITY;
            }
        }
        // min_p = 1 with rounding must not exclude the best itself.
        row[best as usize] = maximum;
    }
    if !(cuts_k || cuts_p) {
        return;
    }
    let SamplingScratch { weights, candidates } = scratch;
    weights.resize(row.len(), 0.0);
    let mut total = 0.0;
    for (span, weights) in row.chunks(SPAN).zip(weights.chunks_mut(SPAN)) {
        total += f64::from(exp_sum(cpu, span, maximum, inverse, Some(weights)));
    }
    if cuts_k {
        upper_set(row, weights, candidates, maximum, inverse, |count, _| count >= top_k);
        sort(row, candidates);
        candidates.truncate(top_k);
        total = mass(weights, candidates);
    } else {
        let needed = f64::from(filters.top_p) * total;
        upper_set(row, weights, candidates, maximum, inverse, |_, mass| mass >= needed);
        sort(row, candidates);
    }
    if cuts_p {
        let needed = f64::from(filters.top_p) * total;
        let mut sum = 0.0;
        let kept = candidates.iter().position(|&id| {
            sum += f64::from(weights[id as usize]);
            sum >= needed
        });
        candidates.truncate(kept.map_or(candidates.len(), |last| last + 1));
    }
    keep_only(row, candidates, weights);
}

/// Collects ids of all logits from some threshold on, low enough that `enough(count, mass)` holds, so that the tokens that
/// matter are sorted and not the whole vocabulary.
fn upper_set(
    row: &[f32],
    weights: &[f32],
    candidates: &mut Vec<u32>,
    maximum: f32,
    inverse_temperature: f32,
    enough: impl Fn(usize, f64) -> bool,
) {
    let mut distance = 4.0;
    loop {
        let threshold =
            if distance > 64.0 { f32::NEG_INFINITY } else { maximum - distance / inverse_temperature };
        candidates.clear();
        candidates.extend((0..row.len() as u32).filter(|&id| row[id as usize] > threshold));
        if threshold == f32::NEG_INFINITY || enough(candidates.len(), mass(weights, candidates)) {
            return;
        }
        distance *= 2.0;
    }
}

fn mass(weights: &[f32], candidates: &[u32]) -> f64 {
    candidates.iter().map(|&id| f64::from(weights[id as usize])).sum()
}

fn sort(row: &[f32], candidates: &mut [u32]) {
    candidates.sort_unstable_by(|&a, &b| {
        let by_logit = row[b as usize].partial_cmp(&row[a as usize]).unwrap_or(Ordering::Equal);
        by_logit.then(a.cmp(&b))
    });
}

/// Excludes all but `kept`; their logits wait in `spare`, whose contents are no longer needed.
fn keep_only(row: &mut [f32], kept: &[u32], spare: &mut [f32]) {
    for (spare, &id) in spare.iter_mut().zip(kept) {
        *spare = row[id as usize];
    }
    row.fill(f32::NEG_INFINITY);
    for (spare, &id) in spare.iter().zip(kept) {
        row[id as usize] = *spare;
    }
}
