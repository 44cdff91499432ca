//! Tensor parallelism never changes a bit: ranks on threads of one process, over real sockets, against one rank.

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use tandem_kernels::comm::{TcpCommunicator, TcpOptions};
use tandem_kernels::cpu::{BLOCK_SIZE, Cpu, CpuOptions, KvCache};
use tandem_kernels::{Activations, DType, Isa, KvDType};
use tandem_models::{
    DummyOptions, ForwardBatch, Llama, LlamaOptions, LoadedBytes, ModelFiles, Shard, TensorParallel,
};
use tandem_tests::{default_model, golden_path, instruction_sets};

const OPTIONS: TcpOptions = TcpOptions { timeout: Duration::from_secs(120), spin: false };

/// A model and how it is computed.
#[derive(Clone)]
struct Subject {
    files: fn() -> ModelFiles,
    activations: Activations,
    kv_dtype: KvDType,
    isa: Isa,
}

/// Connections between all ranks: `[rank][peer]`.
fn connections(size: usize) -> Vec<Vec<Option<TcpStream>>> {
    let mut peers: Vec<Vec<Option<TcpStream>>> =
        (0..size).map(|_| (0..size).map(|_| None).collect()).collect();
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
    for low in 0..size {
        for high in low + 1..size {
            let address = listener.local_addr().expect("it listens");
            peers[low][high] = Some(TcpStream::connect(address).expect("it accepts"));
            peers[high][low] = Some(listener.accept().expect("it was called").0);
        }
    }
    peers
}

/// Two sequences of `tokens` tokens in all: their prompts in chunks, then the rest one by one, both in one batch.
fn batches(vocab_size: usize, tokens: usize, prompt: usize, chunk: usize) -> Vec<ForwardBatch> {
    let blocks = tokens.div_ceil(BLOCK_SIZE);
    // Blocks of both sequences interleaved and backwards: nothing may lean on their order.
    let table = |sequence: usize| (0..blocks).map(move |block| (2 * (blocks - 1 - block) + sequence) as u32);
    let token =
        |sequence: usize, position: usize| ((position * 7919 + sequence * 104_729 + 13) % vocab_size) as u32;
    let mut starts: Vec<usize> = (0..prompt).step_by(chunk).collect();
    starts.extend(prompt..tokens);
    let ends = starts.iter().skip(1).copied().chain([tokens]);
    let batch = |(start, end): (usize, usize)| {
        let mut batch =
            ForwardBatch { cu_seqlens: vec![0], block_table_offsets: vec![0], ..ForwardBatch::default() };
        for sequence in 0..2 {
            let blocks: Vec<u32> = table(sequence).collect();
            for position in start..end {
                batch.token_ids.push(token(sequence, position));
                batch.positions.push(position as u32);
                let slot = blocks[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32;
                batch.slot_mapping.push(slot);
            }
            batch.block_tables.extend(&blocks);
            batch.block_table_offsets.push(batch.block_tables.len() as u32);
            batch.context_lens.push(start as u32);
            batch.cu_seqlens.push(batch.token_ids.len() as u32);
            batch.logits_rows.push(batch.token_ids.len() as u32 - 1);
        }
        batch
    };
    starts.iter().copied().zip(ends).map(batch).collect()
}

/// The bits of all logits of all batches, and what rank 0 to `size` kept and read.
fn logits(
    subject: &Subject,
    size: usize,
    threads: usize,
    batches: &[ForwardBatch],
) -> (Vec<u32>, Vec<LoadedBytes>) {
    let rank = |shard: Shard, peers: Vec<Option<TcpStream>>| {
        let cpu = Cpu::new(CpuOptions { isa: Some(subject.isa), threads: Some(threads) }).expect("a CPU");
        let files = (subject.files)();
        let options = LlamaOptions {
            activations: subject.activations,
            max_tokens: batches.iter().map(ForwardBatch::num_tokens).max().expect("a batch"),
            max_logits_rows: 2,
            shard,
        };
        let config = files.config.clone();
        let mut llama = Llama::load(&cpu, "model", config, files.weights(), options).expect("weights load");
        let num_blocks = batches[0].block_tables.len();
        let kv = Llama::kv_cache_config(llama.config(), num_blocks, subject.kv_dtype);
        let mut kv = KvCache::new(kv).expect("memory");
        kv.fill_nan(&(0..num_blocks as u32).collect::<Vec<_>>());
        let mut bits = Vec::new();
        let mut comm =
            (shard.size > 1).then(|| TcpCommunicator::new(shard.rank, peers, OPTIONS).expect("connections"));
        for batch in batches {
            let logits = match &mut comm {
                None => llama.forward(&cpu, batch, &mut kv),
                Some(comm) => llama.forward_shard(&cpu, batch, &mut kv, comm).expect("all ranks are there"),
            };
            bits.extend(logits.iter().map(|logit| logit.to_bits()));
        }
        (bits, llama.loaded_bytes())
    };
    let rank = &rank;
    let outcomes: Vec<_> = thread::scope(|scope| {
        let ranks: Vec<_> = connections(size)
            .into_iter()
            .enumerate()
            .map(|(index, peers)| scope.spawn(move || rank(Shard { rank: index, size }, peers)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    });
    assert!(outcomes.iter().skip(1).all(|(bits, _)| bits.is_empty()), "logits come to rank 0 only");
    let bits = outcomes[0].0.clone();
    assert!(bits.iter().all(|&bits| f32::from_bits(bits).is_finite()));
    (bits, outcomes.into_iter().map(|(_, loaded)| loaded).collect())
}

fn same_bits(name: &str, subject: &Subject, sizes: &[usize], threads: &[usize], batches: &[ForwardBatch]) {
    let (expected, whole) = logits(subject, 1, 2, batches);
    for &size in sizes {
        let config = (subject.files)().config;
        let plan = TensorParallel::plan("model", &config, size).expect("the model can be split");
        for &threads in threads {
            let (found, shares) = logits(subject, size, threads, batches);
            assert_eq!(found.len(), expected.len(), "{name}, {size} ranks");
            assert_eq!(
                found == expected,
                plan.exact,
                "{name} on {} at {size} ranks of {threads}",
                subject.isa
            );
            let kept: Vec<u64> = shares.iter().map(|share| share.kept).collect();
            if plan.exact {
                assert_eq!(kept.iter().sum::<u64>(), whole[0].kept, "{name}: ranks keep their shares only");
            }
            let (least, most) = (kept.iter().min().unwrap(), kept.iter().max().unwrap());
            assert!(most - least <= whole[0].kept / 8, "{name}: shares are even: {kept:?}");
        }
    }
}

fn best_isa() -> Isa {
    *instruction_sets().last().expect("the scalar one at least")
}

#[test]
fn a_model_of_eight_kv_heads_splits_up_to_eight_ways() {
    let files = || tandem_models::open(&golden_path("tiny-tp8")).expect("a checkpoint");
    let batches = batches(files().config.vocab_size, 40, 33, 20);
    for isa in [Isa::Scalar, best_isa()] {
        for (activations, kv_dtype) in [(Activations::F32, KvDType::F32), (Activations::Bf16, KvDType::Bf16)]
        {
            let subject = Subject { files, activations, kv_dtype, isa };
            same_bits("tiny-tp8", &subject, &[2, 4, 8], &[1, 2], &batches);
        }
    }
}

/// Six segments: two ranks own three each, which is no subtree; three own two; six one. All layers have biases.
#[test]
fn segments_that_are_no_power_of_two_keep_their_tree() {
    fn dummy(dtype: DType) -> ModelFiles {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/dummy-g6");
        tandem_models::open_dummy(&path, DummyOptions { dtype, seed: 7, threads: 1 })
            .expect("a configuration")
    }
    let subjects: [(fn() -> ModelFiles, Activations); 4] = [
        (|| dummy(DType::F32), Activations::F32),
        (|| dummy(DType::Bf16), Activations::Bf16),
        (|| dummy(DType::Q8_0), Activations::Int8),
        (|| dummy(DType::Q4_1), Activations::Int8),
    ];
    for (files, activations) in subjects {
        let kv_dtype = if activations == Activations::F32 { KvDType::Int8 } else { KvDType::Bf16 };
        let subject = Subject { files, activations, kv_dtype, isa: best_isa() };
        let batches = batches(files().config.vocab_size, 70, 66, 33);
        same_bits(activations.name(), &subject, &[2, 3, 6], &[1], &batches);
    }
}

/// More ranks than KV heads: heads are held twice, and the promise of equal bits does not hold, which is said.
#[test]
fn replicated_kv_heads_work_and_say_that_their_bits_are_their_own() {
    let files = || {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden/dummy-g6");
        let dummy = DummyOptions { dtype: DType::F32, seed: 7, threads: 1 };
        tandem_models::open_dummy(&path, dummy).expect("a configuration")
    };
    let plan = TensorParallel::plan("model", &files().config, 12).expect("twice the KV heads");
    assert_eq!((plan.exact, plan.kv_replicas), (false, 2));
    let subject = Subject { files, activations: Activations::F32, kv_dtype: KvDType::F32, isa: best_isa() };
    let batches = batches(files().config.vocab_size, 20, 18, 18);
    let (expected, _) = logits(&subject, 1, 1, &batches);
    let (found, _) = logits(&subject, 12, 1, &batches);
    let worst = found.iter().zip(&expected).map(|(a, b)| (f32::from_bits(*a) - f32::from_bits(*b)).abs());
    let worst = worst.fold(0.0, f32::max);
    assert!(worst < 1e-3, "{worst}");
}

#[test]
fn the_real_model_splits_in_three() {
    let files = || tandem_models::open(&default_model()).expect("the default model");
    let subject = Subject { files, activations: Activations::Int8, kv_dtype: KvDType::Bf16, isa: best_isa() };
    let batches = batches(files().config.vocab_size, 84, 80, 48);
    same_bits("SmolLM2", &subject, &[3], &[1], &batches);
    let (_, shares) = logits(&subject, 3, 1, &batches[..1]);
    let whole: u64 = files().summary.num_bytes;
    for LoadedBytes { read, kept } in shares {
        assert!(kept < whole / 2 && read < whole, "a third of {whole}: kept {kept}, read {read}");
    }
}
