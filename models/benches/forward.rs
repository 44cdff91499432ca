//! Times `Llama::forward` alone: no scheduler, no sampling, no text.
//!
//! ```sh
//! cargo bench --package tandem-models --bench forward -- MODEL [prefill] [decode] [long] [--threads N] [--isa I] [--activations C]
//! ```
//! Each row is the median of several runs, as milliseconds and tokens per second.

use std::path::Path;
use std::time::Instant;

use tandem_kernels::cpu::{BLOCK_SIZE, Cpu, CpuOptions, KvCache};
use tandem_kernels::{Activations, KvDType};
use tandem_models::{ForwardBatch, Llama, LlamaOptions};

/// Sequences of equal length: `new` tokens each on top of `context` cached ones.
struct Case {
    name: &'static str,
    sequences: usize,
    context: usize,
    new: usize,
    runs: usize,
}

const CASES: [Case; 6] = [
    Case { name: "prefill 512", sequences: 1, context: 0, new: 512, runs: 15 },
    Case { name: "prefill 128", sequences: 1, context: 0, new: 128, runs: 15 },
    Case { name: "decode 1", sequences: 1, context: 200, new: 1, runs: 200 },
    Case { name: "decode 16", sequences: 16, context: 160, new: 1, runs: 60 },
    Case { name: "long prefill", sequences: 1, context: 3584, new: 512, runs: 7 },
    Case { name: "long decode", sequences: 1, context: 4096, new: 1, runs: 60 },
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let value = |flag: &str| {
        arguments.iter().position(|a| a == flag).and_then(|at| arguments.get(at + 1)).map(String::as_str)
    };
    let model = arguments.first().expect("the path of a model comes first");
    let files = tandem_models::open(Path::new(model)).expect("a model");
    let threads = value("--threads").map(|n| n.parse().expect("a number of threads"));
    let activations = value("--activations").map_or(Activations::Int8, |c| c.parse().expect("a class"));
    let isa = value("--isa").map(|isa| isa.parse().expect("an instruction set"));
    let cpu = Cpu::new(CpuOptions { isa, threads }).expect("a CPU");
    let options = LlamaOptions {
        activations,
        max_tokens: 512,
        max_logits_rows: 16,
        shard: tandem_models::Shard::WHOLE,
    };
    let started = Instant::now();
    let mut llama =
        Llama::load(&cpu, model, files.config.clone(), files.weights(), options).expect("weights");
    println!("{model}: {} threads, {}, loaded in {:.2?}", cpu.threads(), cpu.isa(), started.elapsed());
    let flags = [Some(model.as_str()), value("--threads"), value("--isa"), value("--activations")];
    let names: Vec<&String> =
        arguments.iter().filter(|a| !a.starts_with('-') && !flags.contains(&Some(a.as_str()))).collect();
    for case in &CASES {
        if names.is_empty() || names.iter().any(|name| case.name.contains(name.as_str())) {
            run(&cpu, &mut llama, case);
        }
    }
}

fn run(cpu: &Cpu, llama: &mut Llama, case: &Case) {
    let batch = batch(case);
    let blocks = batch.block_tables.len();
    let config = Llama::kv_cache_config(llama.config(), blocks, KvDType::Bf16);
    let mut kv = KvCache::new(config).expect("a KV cache");
    let mut times: Vec<f64> = (0..case.runs + 1)
        .map(|_| {
            let started = Instant::now();
            let logits = llama.forward(cpu, &batch, &mut kv);
            assert!(logits.iter().take(64).all(|x| x.is_finite()), "finite logits");
            started.elapsed().as_secs_f64()
        })
        .skip(1)
        .collect();
    times.sort_by(f64::total_cmp);
    let (median, best) = (times[times.len() / 2], times[0]);
    let tokens = batch.num_tokens() as f64;
    println!(
        "{:14} {:8.3} ms {:8.1} tok/s   best {:8.3} ms {:8.1} tok/s",
        case.name,
        median * 1e3,
        tokens / median,
        best * 1e3,
        tokens / best
    );
}

fn batch(case: &Case) -> ForwardBatch {
    let mut batch =
        ForwardBatch { cu_seqlens: vec![0], block_table_offsets: vec![0], ..ForwardBatch::default() };
    let per_sequence = (case.context + case.new).div_ceil(BLOCK_SIZE);
    for sequence in 0..case.sequences {
        let first = sequence * per_sequence;
        batch.block_tables.extend((first..first + per_sequence).map(|block| block as u32));
        for position in case.context..case.context + case.new {
            batch.token_ids.push((position * 31 + sequence * 7 + 11) as u32 % 1000);
            batch.positions.push(position as u32);
            batch.slot_mapping.push((first * BLOCK_SIZE + position) as u32);
        }
        batch.cu_seqlens.push(batch.token_ids.len() as u32);
        batch.context_lens.push(case.context as u32);
        batch.block_table_offsets.push(batch.block_tables.len() as u32);
        batch.logits_rows.push(batch.token_ids.len() as u32 - 1);
    }
    batch
}
