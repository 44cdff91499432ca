//! Speed of each operation and its share of the machine's limits, on the shapes of a 135M and a 1B Llama model.
//!
//! `cargo bench -p tandem-kernels` (quiet machine). Nothing is asserted: numbers are for people.

use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tandem_kernels::comm::{Communicator, Sum, TcpCommunicator, TcpOptions};
use tandem_kernels::cpu::{
    Activation, AttentionBatch, Buffer, Cpu, CpuOptions, Epilogue, KvCache, KvCacheConfig, Layout, Linear,
    LinearSpec, Part, Rope, SegmentPlan,
};
use tandem_kernels::limits::{self, Limits};
use tandem_kernels::sampling::{self, Cut, Filters, NoiseKey, NoisyDraw, RowOps, SamplingScratch};
use tandem_kernels::{Activations, AttentionPrecision, DType, KvDType, Matrix};

fn main() {
    let isa = std::env::var("TANDEM_ISA").ok().map(|isa| isa.parse().expect("TANDEM_ISA"));
    let threads =
        std::env::var("TANDEM_THREADS").ok().map(|threads| threads.parse().expect("TANDEM_THREADS"));
    let cpu = Cpu::new(CpuOptions { isa, threads }).expect("cpu backend");
    let limits = limits::measure(&cpu);
    println!("{} with {} threads: {limits:.3?}", cpu.isa(), cpu.threads());
    // `cargo bench -p tandem-kernels -- decode small` runs these sections only.
    let sections: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |name: &str| sections.is_empty() || sections.iter().any(|section| section == name);
    if wanted("prefill") {
        prefill(&cpu, &limits);
    }
    if wanted("decode") {
        decode(&cpu, &limits);
    }
    if wanted("attention") {
        attention(&cpu, &limits);
    }
    if wanted("small") {
        small(&cpu);
    }
    if wanted("collectives") {
        collectives();
    }
}

/// Sums of two ranks over loopback, each with one thread, with and without a core to itself: time of one, and what it moves.
fn collectives() {
    for spin in [true, false] {
        for (rows, columns) in [(1, 576), (1, 2048), (1, 8192), (16, 2048), (64, 2048), (512, 2048)] {
            let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
            let near = TcpStream::connect(listener.local_addr().expect("address")).expect("loopback");
            let far = listener.accept().expect("loopback").0;
            let rank = |number: usize, stream: TcpStream| {
                let peers = if number == 0 { vec![None, Some(stream)] } else { vec![Some(stream), None] };
                let options = TcpOptions { timeout: Duration::from_secs(10), spin };
                TcpCommunicator::new(number, peers, options).expect("connections")
            };
            let (mut ours, mut theirs) = (rank(0, near), rank(1, far));
            let sum = move |comm: &mut TcpCommunicator, times: usize| {
                let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).expect("cpu");
                let own = vec![1.0; rows * columns];
                let (mut gathered, mut out) = (vec![0.0; 2 * own.len()], vec![0.0; own.len()]);
                let sum = Sum { parts: 1, columns, bias: None };
                let start = Instant::now();
                for _ in 0..times {
                    let team = cpu.team();
                    comm.all_reduce(&team, &own, &sum, &mut gathered, &mut out).expect("both are there");
                }
                start.elapsed() / times as u32
            };
            let times = (2_000_000 / (rows * columns)).clamp(20, 2000);
            let time = thread::scope(|scope| {
                scope.spawn(|| sum(&mut theirs, times));
                sum(&mut ours, times)
            });
            let bytes = (rows * columns * 4) as f64;
            println!(
                "all-reduce {rows:4} x {columns:5} {:8.0} bytes each way, {}: {:9.1} us, {:6.2} GB/s",
                bytes,
                if spin { "spinning" } else { "sleeping" },
                time.as_secs_f64() * 1e6,
                bytes / time.as_secs_f64() / 1e9
            );
        }
    }
}

/// Best of many runs within about a third of a second.
fn best(mut run: impl FnMut()) -> Duration {
    run();
    let start = Instant::now();
    let mut best = Duration::MAX;
    while start.elapsed() < Duration::from_millis(300) {
        let one = Instant::now();
        run();
        best = best.min(one.elapsed());
    }
    best
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn values(&mut self, len: usize) -> Buffer {
        let mut buffer = Buffer::zeroed(len);
        buffer.iter_mut().for_each(|x| *x = (self.next() >> 40) as f32 / (1u64 << 24) as f32 - 0.5);
        buffer
    }
}

fn linear(cpu: &Cpu, dtype: DType, n: usize, k: usize, class: Activations, segments: usize) -> Linear {
    let mut random = Random(0x1234_5678_9abc_def1);
    // Small exponents: whatever the bytes mean, values stay finite. None of zero in the last byte of a float: arithmetic with
    // subnormal numbers takes a hundred times as long.
    let float_bytes = dtype.row_bytes(1).unwrap_or(usize::MAX);
    let bytes: Vec<u8> = (0..n * dtype.row_bytes(k).expect("whole blocks"))
        .map(|at| random.next() as u8 & 0x3b | if at % float_bytes == float_bytes - 1 { 0x30 } else { 0 })
        .collect();
    let matrix = Matrix::new(dtype, n, k, &bytes).expect("matrix");
    let spec = LinearSpec { activations: class, segments: SegmentPlan::new(segments), layout: Layout::Plain };
    cpu.pack_linear(&[Part::new(matrix)], &spec).expect("pack")
}

fn peak(limits: &Limits, class: Activations) -> f64 {
    match class {
        Activations::F32 => limits.f32_tflops * 1e12,
        Activations::Bf16 => limits.bf16_tflops * 1e12,
        Activations::Int16 => limits.int8_tops * 0.5e12,
        Activations::Int8 => limits.int8_tops * 1e12,
    }
}

const KINDS: [(DType, Activations); 8] = [
    (DType::Q4_1, Activations::Int8),
    (DType::Q4_0, Activations::Int8),
    (DType::Q8_0, Activations::Int8),
    (DType::Q4_1, Activations::Int16),
    (DType::Q4_0, Activations::Int16),
    (DType::Q8_0, Activations::Int16),
    (DType::Bf16, Activations::Bf16),
    (DType::F32, Activations::F32),
];

fn prefill(cpu: &Cpu, limits: &Limits) {
    println!("\nprefill: T x N x K, share of the arithmetic limit");
    for (dtype, class) in KINDS {
        for (t, n, k, segments) in [
            (504, 1536, 576, 1),
            (512, 3072, 576, 1),
            (512, 576, 1536, 3),
            (16, 3072, 576, 1),
            (512, 2048, 8192, 8),
        ] {
            let weights = linear(cpu, dtype, n, k, class, segments);
            let mut x = Activation::new(t, k, class);
            cpu.team().quantize(&Random(7).values(t * k), &mut x);
            let mut out = Buffer::zeroed(t * n);
            let time = best(|| cpu.team().linear(&weights, &x, &mut out, Epilogue::Store)).as_secs_f64();
            let rate = (2 * t * n * k) as f64 / time;
            println!(
                "  {dtype:>5} x {class:<5} {t:>4} x {n:>5} x {k:>5}: {:7.1} us {:6.3} T/s {:5.1} %",
                time * 1e6,
                rate / 1e12,
                100.0 * rate / peak(limits, class)
            );
        }
    }
}

fn decode(cpu: &Cpu, limits: &Limits) {
    println!("\ndecode: one row over layers beyond the caches, share of the read limit");
    for (dtype, class) in KINDS {
        for (n, k) in [(1536, 576), (2048, 8192)] {
            let one = linear(cpu, dtype, n, k, class, 1);
            let layers: Vec<Linear> =
                (0..(160 << 20) / one.bytes()).map(|_| linear(cpu, dtype, n, k, class, 1)).collect();
            let mut x = Activation::new(1, k, class);
            cpu.team().quantize(&Random(7).values(k), &mut x);
            let mut out = Buffer::zeroed(n);
            let time = best(|| {
                layers.iter().for_each(|weights| cpu.team().linear(weights, &x, &mut out, Epilogue::Store))
            });
            let rate = (one.bytes() * layers.len()) as f64 / time.as_secs_f64() / 1e9;
            println!(
                "  {dtype:>5} x {class:<5} {n:>5} x {k:>5}: {:6.2} us each {rate:6.1} GB/s {:5.1} %",
                time.as_secs_f64() * 1e6 / layers.len() as f64,
                100.0 * rate / limits.read_gb_per_s
            );
        }
    }
}

/// Attention of a 135M model: 9 query heads, 3 KV heads, head dim 64.
struct Attention {
    kv: KvCache,
    qkv: Buffer,
    out: Buffer,
    /// Tokens and context of each of the sequences.
    tokens: usize,
    context: usize,
    sequences: usize,
    block_tables: Vec<u32>,
    precision: AttentionPrecision,
}

impl Attention {
    const HEADS: usize = 9;
    const KV_HEADS: usize = 3;
    const HEAD_DIM: usize = 64;

    fn new(
        cpu: &Cpu,
        (dtype, precision): (KvDType, AttentionPrecision),
        num_layers: usize,
        (sequences, tokens, context): (usize, usize, usize),
    ) -> Self {
        let width = (Self::HEADS + 2 * Self::KV_HEADS) * Self::HEAD_DIM;
        let total = tokens + context;
        let num_blocks = sequences * total.div_ceil(16);
        let config = KvCacheConfig {
            num_layers,
            num_kv_heads: Self::KV_HEADS,
            head_dim: Self::HEAD_DIM,
            num_blocks,
            dtype,
        };
        let mut kv = KvCache::new(config).expect("cache");
        let mut qkv = Random(9).values(num_blocks * 16 * width);
        let slots: Vec<u32> = (0..num_blocks as u32 * 16).collect();
        let mut rope = Rope::new(&[1.0; 32], 1.0, slots.len());
        cpu.prepare_rope(&mut rope, &slots);
        for layer in 0..num_layers {
            cpu.rope_and_store_kv(&mut qkv, &rope, &slots, layer, &mut kv);
        }
        // Every sequence's blocks are spread over the whole cache.
        let block_tables = (0..num_blocks as u32)
            .map(|i| {
                i % (num_blocks / sequences) as u32 * sequences as u32 + i / (num_blocks / sequences) as u32
            })
            .collect();
        let out = Buffer::zeroed(sequences * tokens * Self::HEADS * Self::HEAD_DIM);
        Self { kv, qkv, out, tokens, context, sequences, block_tables, precision }
    }

    fn run(&mut self, cpu: &Cpu) {
        let blocks = self.block_tables.len() / self.sequences;
        let each = |size: usize| (0..=self.sequences).map(|i| (i * size) as u32).collect::<Vec<_>>();
        let (cu_seqlens, offsets) = (each(self.tokens), each(blocks));
        let batch = AttentionBatch {
            cu_seqlens: &cu_seqlens,
            context_lens: &vec![self.context as u32; self.sequences],
            block_tables: &self.block_tables,
            block_table_offsets: &offsets,
        };
        let rows = self.sequences * self.tokens;
        let qkv = &self.qkv[..rows * (Self::HEADS + 2 * Self::KV_HEADS) * Self::HEAD_DIM];
        for layer in 0..self.kv.config().num_layers {
            cpu.attention(qkv, &batch, layer, &self.kv, 0.125, self.precision, &mut self.out);
        }
    }

    fn flops(&self) -> f64 {
        let pairs = self.tokens * self.context + self.tokens * (self.tokens + 1) / 2;
        let layers = self.kv.config().num_layers;
        (4 * layers * self.sequences * pairs * Self::HEADS * Self::HEAD_DIM) as f64
    }

    /// Bytes of keys and values that the sequences see.
    fn bytes(&self) -> f64 {
        let per_token = self.kv.config().bytes_per_block() / 16;
        (self.sequences * (self.tokens + self.context) * per_token) as f64
    }
}

const ATTENTION_CLASSES: [(KvDType, AttentionPrecision); 4] = [
    (KvDType::Bf16, AttentionPrecision::Rounded),
    (KvDType::Bf16, AttentionPrecision::Split),
    (KvDType::Int8, AttentionPrecision::Split),
    (KvDType::F32, AttentionPrecision::Split),
];

fn attention(cpu: &Cpu, limits: &Limits) {
    println!("\nattention: 9 query heads, 3 KV heads, head dim 64");
    for class in ATTENTION_CLASSES {
        for sizes in [(1, 512, 0), (1, 4096, 0), (1, 512, 3584)] {
            let mut attention = Attention::new(cpu, class, 1, sizes);
            let time = best(|| attention.run(cpu)).as_secs_f64();
            let rate = attention.flops() / time;
            let limit = if class.0 == KvDType::F32 { limits.f32_tflops } else { limits.bf16_tflops } * 1e12;
            println!(
                "  {:>5} {:?} {:>4} tokens on {:>5}: {:8.1} us {:6.3} TFLOP/s {:5.1} %",
                class.0,
                class.1,
                sizes.1,
                sizes.2,
                time * 1e6,
                rate / 1e12,
                100.0 * rate / limit
            );
        }
        for sizes in [(1, 1, 512), (1, 1, 4095), (16, 1, 160)] {
            // Thirty layers are more than the caches hold, one is not.
            for layers in [1, 30] {
                let mut attention = Attention::new(cpu, class, layers, sizes);
                let time = best(|| attention.run(cpu)).as_secs_f64();
                let rate = attention.bytes() / time / 1e9;
                println!(
                    "  {:>5} {:?} {:>2} x 1 token on {:>5}, {layers:>2} layers: {:8.1} us {rate:6.1} GB/s {:5.1} %",
                    class.0,
                    class.1,
                    sizes.0,
                    sizes.2,
                    time * 1e6,
                    100.0 * rate / limits.read_gb_per_s
                );
            }
        }
    }
}

fn small(cpu: &Cpu) {
    println!("\nsmaller operations");
    let report = |name: &str, time: Duration| println!("  {name:<44} {:9.2} us", time.as_secs_f64() * 1e6);
    let (t, e) = (512, 576);
    let x = Random(3).values(t * e);
    let weight = Random(4).values(e);
    let mut out = Activation::new(t, e, Activations::Int8);
    report("rms norm to int8, 512 x 576", best(|| cpu.team().rms_norm(&x, &weight, 1e-5, &mut out)));
    report("rms norm to int8, 1 x 576", best(|| cpu.team().rms_norm(&x[..e], &weight, 1e-5, &mut out)));
    report("quantize to int8, 512 x 576", best(|| cpu.team().quantize(&x, &mut out)));
    out.set_class(Activations::Bf16);
    report("quantize to bf16, 512 x 576", best(|| cpu.team().quantize(&x, &mut out)));

    let config =
        KvCacheConfig { num_layers: 1, num_kv_heads: 3, head_dim: 64, num_blocks: 32, dtype: KvDType::Bf16 };
    let mut kv = KvCache::new(config).expect("cache");
    let mut qkv = Random(9).values(t * 960);
    let slots: Vec<u32> = (0..t as u32).collect();
    let mut rope = Rope::new(&[0.1; 32], 1.0, t);
    report("rope table, 512 positions", best(|| cpu.prepare_rope(&mut rope, &slots)));
    report(
        "rope and store kv, 512 tokens",
        best(|| cpu.rope_and_store_kv(&mut qkv, &rope, &slots, 0, &mut kv)),
    );
    let table = linear(cpu, DType::Q8_0, 49_152, e, Activations::Int8, 1);
    let ids: Vec<u32> = (0..t as u32).map(|i| i * 91 % 49_152).collect();
    let mut rows = Buffer::zeroed(t * e);
    report("embed 512 tokens", best(|| cpu.embed(&table, &ids, &mut rows)));

    row_operations(cpu);

    let start = Instant::now();
    let bytes = vec![0x11u8; 49_152 * 360];
    let matrix = Matrix::new(DType::Q4_1, 49_152, 576, &bytes).expect("matrix");
    let spec =
        LinearSpec { activations: Activations::Int8, segments: SegmentPlan::whole(), layout: Layout::Plain };
    let prepared = start.elapsed();
    let packed = cpu.pack_linear(&[Part::new(matrix)], &spec).expect("pack");
    report(&format!("pack {} MB of Q4_1", packed.bytes() >> 20), start.elapsed() - prepared);
}

/// Row operations on logits that are spread as a language model's are, and on flat ones.
fn row_operations(cpu: &Cpu) {
    let report = |name: &str, time: Duration| println!("  {name:<44} {:9.2} us", time.as_secs_f64() * 1e6);
    let ops = RowOps::from(cpu);
    for (kind, spread) in [("peaked", 3.0), ("flat", 0.5)] {
        // Sums of uniform values are close to normal ones.
        let mut row = Buffer::zeroed(49_152);
        for seed in 0..8 {
            let values = Random(5 + seed).values(49_152);
            row.iter_mut().zip(&*values).for_each(|(x, y)| *x += spread * 1.22 * y);
        }
        report(&format!("argmax of 49152, {kind}"), best(|| assert!(sampling::argmax(ops, &row).is_some())));
        let top = sampling::argmax(ops, &row).expect("finite logits");
        report(
            &format!("log-sum-exp, {kind}"),
            best(|| assert!(sampling::log_sum_exp(ops, &row, top.1).is_finite())),
        );
        report(&format!("20 best, {kind}"), best(|| assert!(sampling::top_n(ops, &row, 20).len() == 20)));
        let key = NoiseKey { seed: 1, position: 2, choice: 0 };
        let draw = NoisyDraw { temperature: 1.0, key, cut: Cut::none() };
        report(
            &format!("gumbel arg-max, {kind}"),
            best(|| assert!(sampling::gumbel_argmax(ops, &row, top, &draw).is_some())),
        );
        let mut scratch = SamplingScratch::default();
        for (top_k, top_p) in [(50, 1.0), (0, 0.95), (50, 0.95), (5000, 1.0)] {
            let filters = Filters { temperature: 1.0, top_k, top_p, min_p: 0.0 };
            let time = best(|| {
                let cut = sampling::filter(ops, &row, top, &filters, &mut scratch);
                assert!(sampling::gumbel_argmax(ops, &row, top, &NoisyDraw { cut, ..draw }).is_some());
            });
            report(&format!("top-k {top_k}, top-p {top_p} and a draw, {kind}"), time);
        }
    }
}
