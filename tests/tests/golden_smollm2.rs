//! The real model against transformers in f32: log-probabilities of prompts, and the best token at every step of the
//! reference's greedy continuations. The tolerances are what each arithmetic class is known to cost.

use tandem_engine::{Activations, KvDType, ModelDType, ModelOptions, SamplingParams};
use tandem_tests::engine::{answer, greedy, model, request, small, start};
use tandem_tests::{default_model, golden};

/// How close a class must come.
struct Bound {
    name: &'static str,
    /// Mean and largest |Δ log-probability| of prompt tokens.
    mean: f32,
    max: f32,
    /// The best token must be the reference's wherever the reference's margin is above this, and at so many positions.
    decided_margin: f32,
    min_equal: usize,
}

fn options(dtype: ModelDType, activations: Option<Activations>) -> ModelOptions {
    ModelOptions { dtype, activations, ..model(default_model()) }
}

fn check(options: &ModelOptions, bound: &Bound) {
    let engine = start(options, &small());
    let golden = golden::load();
    let mut differences = Vec::new();
    let (mut num_positions, mut num_equal, mut widest_miss) = (0, 0, 0.0f32);
    for case in &golden.cases {
        // The reference's own tokens are the prompt, so one mistake does not lead to others.
        let forced: Vec<u32> = case.ids.iter().chain(&case.greedy).copied().collect();
        let mut scored = request(&forced, SamplingParams { max_tokens: 0, ..SamplingParams::default() });
        scored.prompt_logprobs = Some(1);
        let rows = prompt_rows(&engine, scored);
        for (row, &expected) in rows[1..case.ids.len()].iter().zip(&case.prompt_logprobs) {
            let found = row.as_ref().expect("every token but the first is scored").logprob;
            differences.push((found - expected).abs());
        }
        for ((row, &token), &margin) in
            rows[case.ids.len()..].iter().zip(&case.greedy).zip(&case.greedy_margin)
        {
            let best = row.as_ref().expect("scored").top[0].0;
            num_positions += 1;
            num_equal += usize::from(best == token);
            if best != token {
                widest_miss = widest_miss.max(margin);
            }
        }
    }
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;
    let max = differences.iter().copied().fold(0.0, f32::max);
    println!(
        "{}: mean {mean:.5}, largest {max:.5} over {} prompt tokens; best token equal at {num_equal} of {num_positions}, \
         others had a margin of up to {widest_miss:.3}",
        bound.name,
        differences.len()
    );
    assert!(mean <= bound.mean, "mean {mean} is above {}", bound.mean);
    assert!(max <= bound.max, "largest {max} is above {}", bound.max);
    assert!(num_equal >= bound.min_equal, "only {num_equal} best tokens are the reference's");
    assert!(widest_miss <= bound.decided_margin, "a token of margin {widest_miss} was missed");
    assert_eq!(num_positions, golden.cases.iter().map(|case| case.greedy.len()).sum::<usize>());
    engine.shutdown();
}

fn prompt_rows(
    engine: &tandem_engine::EngineHandle,
    request: tandem_engine::Request,
) -> Vec<Option<tandem_engine::TokenLogprobs>> {
    let mut stream = engine.submit(request).expect("accepted");
    let mut rows = Vec::new();
    while let Some(events) = stream.blocking_next() {
        for event in events {
            match event {
                tandem_engine::Event::Started { prompt_logprobs, .. } => {
                    rows = prompt_logprobs.expect("asked for")
                }
                tandem_engine::Event::Failed(failure) => panic!("{failure:?}"),
                _ => {}
            }
        }
    }
    rows
}

#[test]
fn f32_is_the_reference_up_to_rounding() {
    let bound = Bound { name: "f32", mean: 1e-4, max: 1e-3, decided_margin: 0.0, min_equal: 480 };
    check(&options(ModelDType::F32, None), &bound);
}

#[test]
fn bf16_activations_are_close() {
    let bound = Bound { name: "bf16", mean: 0.015, max: 0.15, decided_margin: 0.15, min_equal: 475 };
    check(&options(ModelDType::Auto, Some(Activations::Bf16)), &bound);
}

#[test]
fn int8_activations_are_the_default_and_close_enough() {
    let bound = Bound { name: "int8", mean: 0.07, max: 0.7, decided_margin: 0.5, min_equal: 455 };
    check(&options(ModelDType::Auto, None), &bound);
}

#[test]
fn an_int8_cache_alone_is_close() {
    let bound =
        Bound { name: "f32 with int8 KV", mean: 0.055, max: 0.6, decided_margin: 0.15, min_equal: 465 };
    let options = ModelOptions { kv_cache_dtype: Some(KvDType::Int8), ..options(ModelDType::F32, None) };
    check(&options, &bound);
}

#[test]
fn an_int8_cache_beside_int8_activations_is_close_enough() {
    let bound =
        Bound { name: "int8 with int8 KV", mean: 0.085, max: 0.7, decided_margin: 0.5, min_equal: 460 };
    let options = ModelOptions { kv_cache_dtype: Some(KvDType::Int8), ..options(ModelDType::Auto, None) };
    check(&options, &bound);
}

#[test]
fn f32_generates_the_references_text() {
    let engine = start(&options(ModelDType::F32, None), &small());
    for case in golden::load().cases {
        let params = SamplingParams { max_tokens: 64, ..greedy(64) };
        let found = answer(&engine, request(&case.ids, params));
        assert_eq!(found.choices[0].tokens, case.greedy, "{:?}", case.text);
    }
    engine.shutdown();
}
