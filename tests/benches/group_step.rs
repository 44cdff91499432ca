//! What a group costs a step besides the model: `cargo bench --package tandem-tests --bench group_step`.
//!
//! Two ranks of a model so small that its own time hardly counts, as threads of this process, decode one sequence. Printed is what
//! is left of a step when the model's time is taken away: encoding the plan, the way to the ranks and back, drawing the token.

use std::time::Duration;

use tandem_engine::{EngineHandle, EngineOptions, ModelOptions, SamplingParams};
use tandem_tests::engine::{answer, greedy, model, request, start};
use tandem_tests::golden_path;
use tandem_tests::ranks::Group;

const TOKENS: usize = 1500;

fn overhead(engine: &EngineHandle) -> f64 {
    let prompt: Vec<u32> = (5..25).collect();
    let params = SamplingParams { ignore_eos: true, logprobs: None, ..greedy(TOKENS) };
    answer(engine, request(&prompt, params.clone()));
    let before = engine.snapshot().decode_times;
    answer(engine, request(&prompt, params));
    let times = engine.snapshot().decode_times.since(&before);
    let micros = |time: Duration| time.as_secs_f64() * 1e6 / times.steps as f64;
    println!(
        "  a step: {:.1} us scheduling, {:.1} the model, {:.1} sampling and the way there and back, {:.1} emitting",
        micros(times.scheduling),
        micros(times.forward),
        micros(times.sampling),
        micros(times.emitting)
    );
    micros(times.sampling)
}

fn main() {
    let options = EngineOptions { max_model_len: Some(2000), max_num_seqs: 4, ..EngineOptions::default() };
    let model = ModelOptions { threads: Some(1), ..model(golden_path("tiny-tp8")) };
    println!("one process");
    let alone = start(&model, &options);
    let least = overhead(&alone);
    alone.shutdown();

    println!("two ranks");
    let group = Group::start(model, options, 2);
    let found = overhead(&group.engine);
    println!("the control channel: {:.1} us a step", found - least);
    group.stop();
}
