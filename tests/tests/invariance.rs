//! One request, one answer: tokens and log-probabilities are the same bits whatever else is in the batch, however the
//! prompt is chunked, on a prefix-cache hit, after preemption, at any thread count, with each instruction set.
//!
//! Every test also asserts from the engine's counters that the thing it is about happened.

use std::path::PathBuf;

use tandem_engine::{
    Activations, DType, EngineHandle, EngineOptions, KvDType, LoadFormat, ModelOptions, Request,
    SamplingParams,
};
use tandem_tests::engine::{Answer, answer, collect, greedy, model, request, small, start};
use tandem_tests::{default_model, instruction_sets};

/// Models under test: the real one, and random weights of several types in a shape that no tile divides.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Subject {
    Real,
    Dummy(DType, Option<Activations>, Option<KvDType>),
}

const DUMMIES: [Subject; 8] = [
    Subject::Dummy(DType::Q4_1, None, None),
    Subject::Dummy(DType::Q4_0, None, None),
    Subject::Dummy(DType::Q8_0, None, None),
    Subject::Dummy(DType::Q4_1, Some(Activations::Bf16), None),
    Subject::Dummy(DType::Bf16, None, None),
    Subject::Dummy(DType::F32, None, None),
    Subject::Dummy(DType::Q4_1, None, Some(KvDType::Int8)),
    Subject::Dummy(DType::Bf16, None, Some(KvDType::Int8)),
];

const NUM_REQUESTS: usize = 32;

impl Subject {
    fn options(self) -> ModelOptions {
        match self {
            Self::Real => model(default_model()),
            Self::Dummy(weights, activations, kv_cache_dtype) => ModelOptions {
                load_format: LoadFormat::Dummy,
                dummy_weights: Some(weights),
                activations,
                kv_cache_dtype,
                seed: 11,
                ..model(dummy_config())
            },
        }
    }

    fn vocab_size(self) -> u32 {
        if self == Self::Real { 49152 } else { 1003 }
    }
}

fn dummy_config() -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("invariance-config.json");
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 160, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 32, "vocab_size": 1003, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false, "eos_token_id": 2}"#;
    // Several tests write the same bytes: each to a file of its own, moved into place whole.
    let own = path.with_extension(format!("{:?}", std::thread::current().id()));
    std::fs::write(&own, config).expect("the test folder is writable");
    std::fs::rename(&own, &path).expect("the test folder is writable");
    path
}

/// A fixed stream of numbers, so that a failure repeats.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % bound
    }
}

/// Mixed requests: prompts of 1 to 90 tokens, a third sharing a long beginning; greedy and every kind of sampling.
fn workload(subject: Subject) -> Vec<Request> {
    let mut numbers = Numbers(7);
    let vocab = u64::from(subject.vocab_size());
    let shared: Vec<u32> = (0..50).map(|_| numbers.below(vocab) as u32).collect();
    (0..NUM_REQUESTS)
        .map(|index| {
            let mut prompt = if index % 3 == 0 { shared.clone() } else { vec![] };
            let own = 1 + numbers.below(40);
            prompt.extend((0..own).map(|_| numbers.below(vocab) as u32));
            let mut request = request(&prompt, params(index, 8 + numbers.below(9) as usize));
            request.prompt_logprobs = (index % 8 == 5).then_some(0);
            request
        })
        .collect()
}

/// Requests that start small and grow: a few fit a small pool at first, and not to their end.
fn growing(subject: Subject) -> Vec<Request> {
    let mut numbers = Numbers(23);
    let vocab = u64::from(subject.vocab_size());
    (0..12)
        .map(|index| {
            let prompt: Vec<u32> = (0..1 + numbers.below(30)).map(|_| numbers.below(vocab) as u32).collect();
            request(&prompt, params(index, 40 + numbers.below(20) as usize))
        })
        .collect()
}

fn params(index: usize, max_tokens: usize) -> SamplingParams {
    let greedy = SamplingParams { ignore_eos: true, ..greedy(max_tokens) };
    let sampled = SamplingParams { temperature: 0.9, seed: Some(index as u64), ..greedy.clone() };
    match index % 6 {
        0 | 3 => greedy,
        1 => SamplingParams { n: 2, ..sampled },
        2 => SamplingParams { top_k: 20, top_p: 0.9, ..sampled },
        4 => SamplingParams {
            repetition_penalty: 1.2,
            frequency_penalty: 0.3,
            presence_penalty: 0.1,
            ..sampled
        },
        _ => SamplingParams { min_p: 0.05, logit_bias: vec![(5, 2.0)], banned_token_ids: vec![9], ..sampled },
    }
}

/// Each request alone, one after another, without prefix cache.
fn alone(subject: Subject, requests: Vec<Request>) -> Vec<Answer> {
    let engine = start(&subject.options(), &EngineOptions { prefix_caching: false, ..small() });
    let answers = requests.into_iter().map(|request| answer(&engine, request)).collect();
    assert_eq!(engine.snapshot().preemptions, 0);
    engine.shutdown();
    answers
}

/// All requests at once.
fn together(engine: &EngineHandle, requests: Vec<Request>) -> Vec<Answer> {
    let streams: Vec<_> =
        requests.into_iter().map(|request| engine.submit(request).expect("accepted")).collect();
    streams.into_iter().map(collect).collect()
}

fn assert_same(found: &[Answer], expected: &[Answer], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.outcome(), expected.outcome(), "{what}: request {index}");
        assert!(expected.choices.iter().all(|choice| choice.tokens.len() == choice.logprob_bits.len()));
    }
}

/// After the last request everything is back: the ledger balances and no block is in use.
fn assert_clean(engine: &EngineHandle) {
    let snapshot = engine.snapshot();
    assert!(snapshot.is_balanced());
    assert_eq!((snapshot.in_flight, snapshot.used_blocks), (0, 0));
    assert_eq!(snapshot.free_blocks + snapshot.cached_blocks, snapshot.num_blocks);
    engine.shutdown();
}

fn check_batching_chunking_caching(subject: Subject) {
    let expected = alone(subject, workload(subject));

    for budget in [512, 96, 37] {
        let options =
            EngineOptions { max_num_batched_tokens: budget, max_num_seqs: 32.min(budget), ..small() };
        let engine = start(&subject.options(), &options);
        assert_same(&together(&engine, workload(subject)), &expected, &format!("batched, budget {budget}"));
        let snapshot = engine.snapshot();
        assert!(
            snapshot.max_step_sequences >= 16,
            "only {} sequences in a step",
            snapshot.max_step_sequences
        );
        assert!(snapshot.chunk_sizes.len() >= 3, "chunks of {:?} only", snapshot.chunk_sizes);

        // The second time the prompts come from the prefix cache.
        let again = together(&engine, workload(subject));
        assert_same(&again, &expected, "cached");
        assert!(again.iter().any(|answer| answer.cached_tokens > 0));
        assert!(engine.snapshot().prefix_cache_hit_tokens > snapshot.prefix_cache_hit_tokens);
        assert_clean(&engine);
    }
}

fn check_preemption(subject: Subject) {
    let expected = alone(subject, growing(subject));
    let engine = start(&subject.options(), &tiny_pool(subject));
    assert_same(&together(&engine, growing(subject)), &expected, "preempted");
    assert!(engine.snapshot().preemptions > 0);
    assert_clean(&engine);
}

/// A pool that holds only a few of the workload's sequences at once.
fn tiny_pool(subject: Subject) -> EngineOptions {
    let inspected = tandem_engine::inspect(&subject.options()).expect("the model is fine");
    let per_block =
        inspected.plan(&small()).map(|plan| plan.kv_bytes / plan.num_blocks as u64).expect("a plan");
    EngineOptions { kv_cache_memory_bytes: Some(per_block * 20), max_model_len: Some(200), ..small() }
}

#[test]
fn dummy_shapes_do_not_see_batch_chunks_cache_or_preemption() {
    for subject in DUMMIES {
        check_batching_chunking_caching(subject);
        check_preemption(subject);
    }
}

#[test]
fn the_real_model_does_not_see_batch_chunks_or_cache() {
    check_batching_chunking_caching(Subject::Real);
}

#[test]
fn the_real_model_does_not_see_preemption() {
    check_preemption(Subject::Real);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for subject in DUMMIES.into_iter().chain([Subject::Real]) {
        let expected = alone(subject, workload(subject));
        for threads in [1, 3] {
            let engine = start(&ModelOptions { threads: Some(threads), ..subject.options() }, &small());
            assert_same(&together(&engine, workload(subject)), &expected, &format!("{threads} threads"));
            assert_clean(&engine);
        }
    }
}

#[test]
fn every_instruction_set_is_invariant_on_its_own() {
    for isa in instruction_sets() {
        for subject in DUMMIES {
            let options = ModelOptions { isa: Some(isa), ..subject.options() };
            let engine = start(&options, &EngineOptions { prefix_caching: false, ..small() });
            let expected: Vec<Answer> = workload(subject).into_iter().map(|r| answer(&engine, r)).collect();
            assert_same(&together(&engine, workload(subject)), &expected, &format!("{isa}"));
            assert!(engine.snapshot().max_step_sequences >= 16);
            assert_clean(&engine);
        }
    }
}

#[test]
fn a_conversation_goes_on_from_the_cache_with_the_same_bits() {
    let engine = start(&Subject::Real.options(), &small());
    let mut prompt: Vec<u32> = (100..140).collect();
    for turn in 0..3 {
        let fresh = start(&Subject::Real.options(), &EngineOptions { prefix_caching: false, ..small() });
        let expected = answer(&fresh, request(&prompt, greedy(20)));
        fresh.shutdown();
        let found = answer(&engine, request(&prompt, greedy(20)));
        assert_eq!(found.outcome(), expected.outcome(), "turn {turn}");
        // Blocks of the answer, not only of the prompt, are found again.
        assert!(
            turn == 0 || found.cached_tokens >= (prompt.len() - 5) / 16 * 16 - 16,
            "{}",
            found.cached_tokens
        );
        prompt.extend(&found.choices[0].tokens);
        prompt.extend([5, 6, 7, 8, 9]);
    }
    assert_clean(&engine);
}
