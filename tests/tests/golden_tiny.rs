//! Four small random checkpoints against transformers: every logit of 200 positions, in f32.
//!
//! The generator made each model in the file's type and converted it to f32 afterwards, and that rounded RoPE's inverse
//! frequencies to the file's type as well. A checkpoint that transformers loads from disk keeps them in f32, as Tandem
//! does; so the comparison rounds them here, and nowhere else.

use safetensors::SafeTensors;
use tandem_kernels::cpu::{BLOCK_SIZE, Cpu, CpuOptions, KvCache};
use tandem_kernels::{Activations, DType, Isa, KvDType};
use tandem_models::{ForwardBatch, Llama, LlamaOptions, ModelConfig, RopeScaling, Shard};
use tandem_tests::{golden_path, instruction_sets};

const MODELS: [&str; 4] = ["tiny-tp8", "tiny-llama31", "tiny-bias", "tiny-mha-f16"];
const TOLERANCE: f32 = 2e-3;

struct Reference {
    ids: Vec<u32>,
    logits: Vec<f32>,
}

fn reference(model: &str) -> Reference {
    let bytes =
        std::fs::read(golden_path(model).join("golden.safetensors")).expect("reference data is readable");
    let tensors = SafeTensors::deserialize(&bytes).expect("reference data is well-formed");
    let data = |name| tensors.tensor(name).expect("tensor is there").data();
    let ids = data("input_ids").as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes) as u32).collect();
    let logits = data("logits").as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    Reference { ids, logits }
}

/// Computes `ids` in chunks of `chunk` tokens through a block table that is not in order; returns all logits.
fn logits(model: &str, isa: Isa, chunk: usize, ids: &[u32]) -> Vec<f32> {
    let cpu = Cpu::new(CpuOptions { isa: Some(isa), threads: Some(2) })
        .expect("the machine has this instruction set");
    let files = tandem_models::open(&golden_path(model)).unwrap_or_else(|error| panic!("{error}"));
    let options = LlamaOptions {
        activations: Activations::F32,
        max_tokens: ids.len(),
        max_logits_rows: ids.len(),
        shard: Shard::WHOLE,
    };
    let config = with_frequencies_rounded_to(files.summary.dtype, files.config.clone());
    let mut llama = Llama::load(&cpu, model, config, files.weights(), options).expect("weights load");
    let num_blocks = ids.len().div_ceil(BLOCK_SIZE);
    let mut kv =
        KvCache::new(Llama::kv_cache_config(&files.config, num_blocks, KvDType::F32)).expect("memory");
    let table: Vec<u32> = (0..num_blocks as u32).rev().collect();
    kv.fill_nan(&table);

    let mut all = Vec::new();
    for start in (0..ids.len()).step_by(chunk) {
        let positions = start..(start + chunk).min(ids.len());
        let len = positions.len() as u32;
        let slot = |position: usize| {
            table[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32
        };
        let batch = ForwardBatch {
            token_ids: ids[positions.clone()].to_vec(),
            positions: positions.clone().map(|position| position as u32).collect(),
            cu_seqlens: vec![0, len],
            context_lens: vec![start as u32],
            block_tables: table.clone(),
            block_table_offsets: vec![0, num_blocks as u32],
            slot_mapping: positions.map(slot).collect(),
            logits_rows: (0..len).collect(),
            ..ForwardBatch::default()
        };
        all.extend_from_slice(llama.forward(&cpu, &batch, &mut kv));
    }
    all
}

/// The same model with the inverse frequencies that the generator used.
fn with_frequencies_rounded_to(dtype: DType, mut config: ModelConfig) -> ModelConfig {
    let round = |frequency: f32| match dtype {
        DType::Bf16 => half::bf16::from_f32(frequency).to_f32(),
        DType::F16 => half::f16::from_f32(frequency).to_f32(),
        other => panic!("no reference data was made in {}", other.name()),
    };
    let wanted: Vec<f32> = config.rope.inverse_frequencies().into_iter().map(round).collect();
    config.rope.scaling = RopeScaling::Default;
    let plain = config.rope.inverse_frequencies();
    config.rope.scaling =
        RopeScaling::Factors(plain.iter().zip(&wanted).map(|(plain, wanted)| plain / wanted).collect());
    config
}

#[test]
fn every_logit_is_that_of_the_reference() {
    for model in MODELS {
        let reference = reference(model);
        assert_eq!(reference.ids.len(), 200);
        for isa in instruction_sets() {
            let whole = logits(model, isa, 200, &reference.ids);
            assert_eq!(whole.len(), reference.logits.len());
            let worst = whole.iter().zip(&reference.logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            println!("{model} {isa}: largest difference {worst:.2e}");
            assert!(worst <= TOLERANCE, "{model} on {isa} differs by {worst}");
            assert!(whole.iter().all(|logit| logit.is_finite()));

            for chunk in [1, 7, 64] {
                let chunked = logits(model, isa, chunk, &reference.ids);
                let same = chunked.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{model} on {isa} changes with chunks of {chunk}");
            }
        }
    }
}
