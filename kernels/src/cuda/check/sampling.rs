//! Checks of sampling: the very tokens.

use super::super::launcher::{
    self, Answers, LogProbs, SampleLists, SampleRow, Targets, TokenBias, UsedToken, status,
};
use super::super::reference;
use super::{Buffer, Case, Checks, Element};

// SAFETY: words only, of which any bits are a value.
unsafe impl Element for SampleRow {}
// SAFETY: as above.
unsafe impl Element for UsedToken {}
// SAFETY: as above.
unsafe impl Element for TokenBias {}

/// Rows as a language model makes them, peaked, flat, and rounded so that many are equal; some are excluded.
fn random_row(case: &mut Case<'_>, vocab: usize) -> Vec<f32> {
    let spread = [2.0, 12.0, 0.0, 40.0][case.random.below(4)];
    let rounding = [0.0, 4.0, 1.0][case.random.below(3)];
    let mut row = vec![0.0; vocab];
    for x in &mut row {
        // A sum of four is bell-shaped enough.
        let sum: f32 = (0..4).map(|_| case.random.f32()).sum();
        *x = if rounding > 0.0 { (sum * spread * rounding).round() / rounding } else { sum * spread };
    }
    for _ in 0..case.random.below(vocab / 2 + 1) {
        row[case.random.below(vocab)] = [f32::NEG_INFINITY, 0.0, -0.0][case.random.below(3)];
    }
    row
}

/// Rows that must fail, and one whose last token wins.
fn special_rows(vocab: usize) -> Vec<Vec<f32>> {
    let with = |token: usize, logit: f32| {
        let mut row = vec![-1.0; vocab];
        row[token] = logit;
        row
    };
    vec![
        with(vocab / 2, f32::NAN),
        with(vocab - 1, -f32::NAN),
        with(0, f32::INFINITY),
        vec![f32::NEG_INFINITY; vocab],
        with(vocab - 1, 3.0),
    ]
}

struct Outputs {
    answers: Answers,
    tokens: Buffer<i32>,
    status: Buffer<i32>,
}

impl Outputs {
    fn new(case: &mut Case<'_>, num_rows: usize) -> Result<Self, String> {
        let (tokens, status) = (case.output::<i32>(num_rows)?, case.output::<i32>(num_rows)?);
        Ok(Self { answers: Answers { tokens: tokens.address, status: status.address }, tokens, status })
    }

    fn check(&self, case: &mut Case<'_>, expected: &[Result<u32, i32>]) -> Result<(), String> {
        let (tokens, status) = (case.read(self.tokens)?, case.read(self.status)?);
        for (row, expected) in expected.iter().enumerate() {
            let found =
                if status[row] == status::OK { Ok(tokens[row].cast_unsigned()) } else { Err(status[row]) };
            if found != *expected || (found.is_err() && tokens[row] != -1) {
                return Err(format!("row {row} gives {found:?} ({}) instead of {expected:?}", tokens[row]));
            }
        }
        Ok(())
    }
}

pub(super) fn argmax(checks: &mut Checks<'_>) {
    for vocab in [2, 1000, 4097, 20_003] {
        checks.case(format!("argmax of {vocab}"), |case| {
            let keys = case.input(&[0u64; 9])?;
            // Twice: the first leaves the keys as the second needs them.
            for _ in 0..2 {
                let mut rows: Vec<Vec<f32>> = (0..4).map(|_| random_row(case, vocab)).collect();
                rows.extend(special_rows(vocab));
                let logits = case.input(&rows.concat())?;
                let outputs = Outputs::new(case, rows.len())?;
                for launch in
                    launcher::argmax(outputs.answers, keys.address, logits.address, rows.len(), vocab)
                {
                    case.launch(launch)?;
                }
                let expected: Vec<_> =
                    rows.iter().map(|row| reference::argmax(row).ok_or(status::NOT_FINITE)).collect();
                outputs.check(case, &expected)?;
            }
            Ok(())
        });
    }
}

/// The lists of all rows so far.
#[derive(Default)]
struct Lists {
    used: Vec<UsedToken>,
    bias: Vec<TokenBias>,
    allowed: Vec<i32>,
    banned: Vec<i32>,
}

impl Lists {
    fn random_row(&mut self, case: &mut Case<'_>, logits_row: usize, vocab: usize) -> SampleRow {
        let seed = case.random.next();
        // One filter alone, or whatever comes.
        let only = case.random.below(4);
        let mut row = SampleRow {
            logits_row: logits_row as i32,
            temperature: [1.0, 0.7, 0.0, 1.6, 0.05][case.random.below(5)],
            top_k: [0, 0, 1, 5, 50, vocab / 2, vocab, 2 * vocab][case.random.below(8)] as i32
                * i32::from(only.is_multiple_of(2)),
            top_p: if only == 0 { 1.0 } else { [1.0, 0.6, 0.95, 0.5, 0.2, 0.0, 0.999][case.random.below(7)] },
            min_p: if only == 3 { [0.0, 0.05, 0.5, 1.0][case.random.below(4)] } else { 0.0 },
            repetition_penalty: [1.0, 1.3][case.random.below(2)],
            presence_penalty: [0.0, 0.5][case.random.below(2)],
            frequency_penalty: [0.0, -0.2][case.random.below(2)],
            seed_low: seed as u32,
            seed_high: (seed >> 32) as u32,
            position: case.random.below(5000) as u32,
            choice: case.random.below(3) as u32,
            first_used: self.used.len() as i32,
            num_used: 0,
            first_bias: self.bias.len() as i32,
            num_bias: 0,
            first_allowed: self.allowed.len() as i32,
            num_allowed: -1,
            first_banned: self.banned.len() as i32,
            num_banned: 0,
        };
        if case.random.below(2) == 0 {
            return row;
        }
        // Distinct tokens for every list.
        let tokens = case.random.shuffled(vocab);
        let some = |case: &mut Case<'_>, most: usize| case.random.below(most.min(vocab) + 1);
        let n = some(case, 60);
        row.num_used = n as i32;
        for &token in &tokens[..n] {
            let (in_prompt, output_count) = (case.random.below(2) as i32, case.random.below(4) as i32);
            self.used.push(UsedToken { token, in_prompt, output_count });
        }
        let n = some(case, 20);
        row.num_bias = n as i32;
        for &token in tokens.iter().rev().take(n) {
            self.bias.push(TokenBias { token, bias: 8.0 * case.random.f32() });
        }
        if case.random.below(3) == 0 {
            let n = some(case, 1500);
            row.num_allowed = n as i32;
            self.allowed.extend(&tokens[vocab - n..]);
        }
        let n = some(case, 30);
        row.num_banned = n as i32;
        self.banned.extend(&tokens[..n]);
        row
    }
}

pub(super) fn sample(checks: &mut Checks<'_>) {
    const NUM_ROWS: usize = 40;
    for vocab in [2, 37, 1000, 9001] {
        checks.case(format!("sample of {vocab}"), |case| {
            let mut logits: Vec<Vec<f32>> = (0..NUM_ROWS).map(|_| random_row(case, vocab)).collect();
            logits.extend(special_rows(vocab));
            let mut lists = Lists::default();
            let mut rows: Vec<SampleRow> =
                (0..logits.len()).map(|row| lists.random_row(case, row, vocab)).collect();
            // Several draws from each row: what was wrongly kept or left out is not always the winner.
            for choice in 10..if vocab < 5000 { 14 } else { 11 } {
                rows.extend_from_within(..logits.len());
                rows.iter_mut().rev().take(logits.len()).for_each(|row| row.choice = choice);
            }
            let expected: Vec<Result<u32, i32>> = (rows.iter())
                .map(|row| {
                    let logits = &logits[row.logits_row as usize];
                    reference::argmax(logits).ok_or(status::NOT_FINITE)?;
                    let adjusted = adjusted(logits, row, &lists);
                    reference::sample(&adjusted, row).ok_or(status::ALL_MASKED)
                })
                .collect();
            // A row of a bucket that is not used.
            rows.push(SampleRow { logits_row: -1, ..rows[0] });

            let outputs = Outputs::new(case, rows.len())?;
            let workspace = case.output::<f32>(rows.len() * vocab)?;
            // Empty lists have an address, too.
            let lists = SampleLists {
                used: case.input(&lists.used)?.address,
                bias: case.input(&lists.bias)?.address,
                allowed: case.input(&lists.allowed)?.address,
                banned: case.input(&lists.banned)?.address,
            };
            let (logits, on_device) = (case.input(&logits.concat())?, case.input(&rows)?);
            case.launch(launcher::sample(
                outputs.answers,
                workspace.address,
                logits.address,
                on_device.address,
                lists,
                rows.len(),
                vocab,
            ))?;
            outputs.check(case, &expected)
        });
    }
}

pub(super) fn log_probs(checks: &mut Checks<'_>) {
    checks.case("log_probs of rows without a distribution".into(), scores_of_special_rows);
    for (vocab, num_top) in [(3, 5), (1000, 0), (9001, 7)] {
        checks.case(format!("log_probs of {vocab}, {num_top} best"), |case| {
            // The last two are a row of a bucket that is not used, and a target that could not be drawn.
            let rows = [2, 0, 1, 2, -1, 1];
            let logits: Vec<Vec<f32>> = (0..3).map(|_| random_row(case, vocab)).collect();
            let mut targets: Vec<i32> = rows.iter().map(|_| case.random.below(vocab) as i32).collect();
            let used = rows.len() - 2;
            let drawn = [-1, targets[1], targets[3]];
            let (mut log_probs, mut ranks) = (Vec::new(), Vec::new());
            let (mut top_tokens, mut top) = (Vec::new(), Vec::new());
            for (&row, &target) in rows[..used].iter().zip(&targets) {
                let expected = reference::log_probs(&logits[row as usize], target as usize, num_top);
                log_probs.push(expected.target);
                ranks.push(expected.rank);
                top_tokens.extend(expected.top.iter().map(|&(token, _)| token));
                top.extend(expected.top.iter().map(|&(_, log_prob)| log_prob));
            }

            let out = (case.output(rows.len())?, case.output(rows.len())?);
            let out_top = (case.output(rows.len() * num_top)?, case.output(rows.len() * num_top)?);
            let places = LogProbs {
                target: out.0.address,
                rank: out.1.address,
                top_tokens: out_top.0.address,
                top: out_top.1.address,
            };
            let logits = case.input(&logits.concat())?.address;
            (targets[1], targets[3], targets[5]) = (-2, -3, -1);
            let of = Targets {
                rows: case.input(&rows)?.address,
                tokens: case.input(&targets)?.address,
                drawn: case.input(&drawn)?.address,
            };
            case.launch(launcher::log_probs(places, logits, of, rows.len(), num_top, vocab))?;

            // What is left alone has the bits it had.
            ranks.extend([-1; 2]);
            top_tokens.extend(vec![-1; 2 * num_top]);
            case.expect_equal("rank", out.1, &ranks)?;
            case.expect_equal("top tokens", out_top.0, &top_tokens)?;
            let (found, found_top): (Vec<f32>, Vec<f32>) = (case.read(out.0)?, case.read(out_top.1)?);
            // An excluded token has −∞ on both sides; past the vocabulary is −∞, too.
            let pairs = found[..used].iter().zip(&log_probs).chain(found_top.iter().zip(&top));
            let (finite, infinite): (Vec<_>, Vec<_>) = pairs.partition(|(_, expected)| expected.is_finite());
            if infinite.iter().any(|(found, _)| **found != f32::NEG_INFINITY) {
                return Err("an excluded token has a log-probability".into());
            }
            let expected: Vec<f64> = finite.iter().map(|(_, expected)| **expected).collect();
            case.expect("log-probabilities", finite.iter().map(|(found, _)| **found), &expected, 1e-5)
        });
    }
}

/// Where there is no distribution, a target's log-probability is NaN, by which it is told.
fn scores_of_special_rows(case: &mut Case<'_>) -> Result<(), String> {
    let vocab = 3000;
    let mut logits = special_rows(vocab);
    let has_distribution = logits.len() - 1;
    // A target that is excluded is another matter.
    logits[has_distribution][7] = f32::NEG_INFINITY;
    let rows: Vec<i32> = (0..logits.len() as i32).collect();
    let out = (case.output::<f32>(rows.len())?, case.output::<i32>(rows.len())?);
    let (target, rank) = (out.0.address, out.1.address);
    let places = LogProbs { target, rank, top_tokens: rank, top: target };
    let logits = case.input(&logits.concat())?.address;
    let tokens = case.input(&vec![7; rows.len()])?.address;
    let of = Targets { rows: case.input(&rows)?.address, tokens, drawn: tokens };
    case.launch(launcher::log_probs(places, logits, of, rows.len(), 0, vocab))?;
    let found = case.read(out.0)?;
    match found[..has_distribution].iter().all(|x| x.is_nan()) && found[has_distribution] == f32::NEG_INFINITY
    {
        true => Ok(()),
        false => Err(format!("{found:?}")),
    }
}

/// In the order of the CPU backend: penalties, bias, allowed, banned.
fn adjusted(logits: &[f32], row: &SampleRow, lists: &Lists) -> Vec<f32> {
    let part = |first: i32, num: i32| first as usize..(first + num.max(0)) as usize;
    let mut adjusted = logits.to_vec();
    for used in &lists.used[part(row.first_used, row.num_used)] {
        let logit = &mut adjusted[used.token as usize];
        if used.in_prompt != 0 || used.output_count > 0 {
            *logit =
                if *logit > 0.0 { *logit / row.repetition_penalty } else { *logit * row.repetition_penalty };
        }
        if used.output_count > 0 {
            *logit -= row.frequency_penalty * used.output_count as f32;
            *logit -= row.presence_penalty;
        }
    }
    for bias in &lists.bias[part(row.first_bias, row.num_bias)] {
        adjusted[bias.token as usize] += bias.bias;
    }
    if row.num_allowed >= 0 {
        let allowed = &lists.allowed[part(row.first_allowed, row.num_allowed)];
        let mut kept = vec![f32::NEG_INFINITY; adjusted.len()];
        allowed.iter().for_each(|&token| kept[token as usize] = adjusted[token as usize]);
        adjusted = kept;
    }
    for &token in &lists.banned[part(row.first_banned, row.num_banned)] {
        adjusted[token as usize] = f32::NEG_INFINITY;
    }
    adjusted
}
