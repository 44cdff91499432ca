//! For which products of few tokens the skinny kernel is the fastest, and into how many spans it splits their inputs.
//!
//! Its rivals are a GEMV up to 8 tokens and the library's products beyond, followed by what these leave to other kernels. Which is
//! best depends on the device and the shape, so it is timed at load, on the model's own layers: there are more of them than any
//! cache holds. One product after another tells how many spans are best; whether the kernel is of use at all only whole steps tell,
//! in which launches of different kernels overlap.

use std::collections::HashMap;
use std::fmt;

use tandem_kernels::cuda::launcher::{Epilogue, KSplits, MAX_SKINNY_TOKENS, skinny_depth, skinny_tiles};
use tandem_kernels::cuda::{Cuda, CudaError, DeviceBuffer, Graph, Timer};

use super::weight::{Products, Weight};
use super::{CudaLlama, Layer, address};

/// Tokens that are timed; what is chosen holds for fewer, down to the class before.
const CLASSES: [usize; 5] = [1, 8, 16, 32, MAX_SKINNY_TOKENS];
/// Blocks of one launch on each multiprocessor, at most: more would wait for others.
const BLOCKS_PER_SM: usize = 4;
/// Stages that a span has at least: fewer leave nothing to overlap.
const MIN_SPAN_STAGES: usize = 4;
/// Layers that are timed.
const TIMED_LAYERS: usize = 8;
/// A product that takes longer than its rival by this factor is not tried in whole steps.
const NEAR: f32 = 1.1;
/// Whole steps that are timed; the fastest counts.
const TIMED_STEPS: usize = 3;
/// What takes more than this part of a step's time without it is not worth choosing: times differ by as much by themselves.
const WORTH: f32 = 0.995;

/// The products of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Part {
    Qkv,
    AttentionOutput,
    GateUp,
    Down,
}

/// A product: its class of tokens, what becomes of it, W's format, N and K.
type Key = (usize, Epilogue, &'static str, usize, usize);

/// What was chosen, and the memory that it takes.
pub(super) struct Skinny {
    chosen: HashMap<Key, usize>,
    /// What may be worth choosing, and its spans.
    near: Vec<(Key, usize)>,
    /// While something is timed: always so many spans, or never this kernel.
    trial: Option<Option<usize>>,
    max_blocks: usize,
    partials: DeviceBuffer,
    counters: DeviceBuffer,
}

/// What timing one product came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TunedSkinny {
    part: Part,
    tokens: usize,
    rival_us: f32,
    num_splits: usize,
    us: f32,
}

impl fmt::Display for TunedSkinny {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { part, tokens, rival_us, num_splits, us } = self;
        write!(f, "{part:?} of {tokens} tokens: {us:.1} µs in {num_splits} spans, {rival_us:.1} µs otherwise")
    }
}

impl Skinny {
    pub(super) fn new<'w>(cuda: &Cuda, weights: impl Iterator<Item = &'w Weight>) -> Result<Self, CudaError> {
        let most_rows = weights.map(|weight| weight.out_features).max().unwrap_or(0);
        let max_blocks = BLOCKS_PER_SM * cuda.info().num_sms;
        Ok(Self {
            chosen: HashMap::new(),
            near: Vec::new(),
            trial: None,
            max_blocks,
            partials: cuda.alloc(KSplits::partial_bytes(max_blocks))?,
            counters: cuda.alloc_zeroed(KSplits::counter_bytes(most_rows))?,
        })
    }

    /// How to carry a product out, if this kernel is the best for it.
    pub(super) fn choice(&self, weight: &Weight, epilogue: Epilogue, tokens: usize) -> Option<KSplits> {
        let num_splits = match self.trial {
            Some(trial) => trial?,
            None => *self.chosen.get(&key(weight, epilogue, tokens)?)?,
        };
        let (partials, counters) = (address(&self.partials), address(&self.counters));
        (tokens <= MAX_SKINNY_TOKENS).then_some(KSplits { num_splits, partials, counters })
    }

    /// Numbers of spans that are worth trying.
    fn candidates(&self, weight: &Weight, epilogue: Epilogue) -> Vec<usize> {
        let tiles = skinny_tiles(epilogue, columns(weight, epilogue));
        let most_spans = weight.in_features / (MIN_SPAN_STAGES * skinny_depth(weight.weights()));
        let fits = |spans: &usize| *spans == 1 || (*spans <= most_spans && spans * tiles <= self.max_blocks);
        [1, 2, 3, 4, 6, 8, 12].into_iter().filter(fits).collect()
    }
}

/// Columns of what a product writes.
fn columns(weight: &Weight, epilogue: Epilogue) -> usize {
    if epilogue == Epilogue::SwiGlu { weight.out_features / 2 } else { weight.out_features }
}

fn key(weight: &Weight, epilogue: Epilogue, tokens: usize) -> Option<Key> {
    let class = CLASSES.into_iter().find(|class| tokens <= *class)?;
    Some((class, epilogue, weight.format_name(), weight.out_features, weight.in_features))
}

impl CudaLlama {
    /// Times the products of a layer with this kernel and without, and keeps what is best.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn tune_skinny(&mut self) -> Result<Vec<TunedSkinny>, CudaError> {
        let is_whole = self.options.shard.size == 1;
        let add = if is_whole { Epilogue::AddF32 } else { Epilogue::StoreBf16 };
        let parts = [
            (Part::Qkv, Epilogue::StoreBf16),
            (Part::AttentionOutput, add),
            (Part::GateUp, Epilogue::SwiGlu),
            (Part::Down, add),
        ];
        let max_tokens = self.options.max_tokens;
        let mut tuned = Vec::new();
        for (part, epilogue) in parts {
            let weight = part.weight(&self.layers[0]);
            let candidates = self.skinny.candidates(weight, epilogue);
            // A bias stands between a product and what could be fused with it.
            if candidates.is_empty() || (epilogue == Epilogue::SwiGlu && weight.bias.is_some()) {
                continue;
            }
            for tokens in CLASSES.into_iter().filter(|tokens| *tokens <= max_tokens) {
                let key = key(part.weight(&self.layers[0]), epilogue, tokens).expect("a class");
                let rival_us = self.time_us(part, tokens, None)?;
                let mut best = (1, f32::INFINITY);
                for &num_splits in &candidates {
                    let us = self.time_us(part, tokens, Some(num_splits))?;
                    if us < best.1 {
                        best = (num_splits, us);
                    }
                }
                let (num_splits, us) = best;
                if us < rival_us {
                    self.skinny.chosen.insert(key, num_splits);
                }
                if us < NEAR * rival_us {
                    self.skinny.near.push((key, num_splits));
                }
                tuned.push(TunedSkinny { part, tokens, rival_us, num_splits, us });
            }
        }
        Ok(tuned)
    }

    /// The products that this kernel was chosen for, for the log.
    pub fn skinny_products(&self) -> Vec<String> {
        let mut chosen: Vec<_> = self.skinny.chosen.iter().collect();
        chosen.sort_by_key(|&(&(tokens, _, format, n, k), _)| (format, tokens, n, k));
        let line = |(&(tokens, epilogue, format, n, k), spans): (&Key, &usize)| {
            format!("[{tokens}, {k}] · [{n}, {k}]ᵀ ({format}, {epilogue:?}) in {spans} spans")
        };
        chosen.into_iter().map(line).collect()
    }

    /// Chooses anew for a class of tokens, by the time of whole steps, given a step of so many tokens to be timed.
    ///
    /// # Errors
    /// Those of `step_us`.
    pub(super) fn choose_by_steps<E>(
        &mut self,
        tokens: usize,
        mut step_us: impl FnMut(&mut Self) -> Result<f32, E>,
    ) -> Result<(), E> {
        let near: Vec<(Key, usize)> =
            self.skinny.near.iter().copied().filter(|((class, ..), _)| *class == tokens).collect();
        if near.is_empty() {
            return Ok(());
        }
        for (key, _) in &near {
            self.skinny.chosen.remove(key);
        }
        let mut best_us = step_us(self)?;
        for (key, num_splits) in near {
            // Two parts of a layer may be the same product.
            let before = self.skinny.chosen.insert(key, num_splits);
            let us = step_us(self)?;
            if us < WORTH * best_us {
                best_us = us;
                continue;
            }
            match before {
                Some(num_splits) => self.skinny.chosen.insert(key, num_splits),
                None => self.skinny.chosen.remove(&key),
            };
        }
        Ok(())
    }

    /// The time of a recorded step.
    pub(super) fn replays_us(&self, graph: &mut Graph) -> Result<f32, CudaError> {
        let mut timer = Timer::new(self.runner.cuda())?;
        let mut least_us = f32::INFINITY;
        for _ in 0..TIMED_STEPS {
            // The one before keeps the device busy until the clock has started.
            self.runner.replay(graph)?;
            timer.start()?;
            self.runner.replay(graph)?;
            least_us = least_us.min(timer.stop_us()?);
        }
        Ok(least_us)
    }

    /// The mean time of a product, in so many spans of this kernel or without it.
    fn time_us(&mut self, part: Part, tokens: usize, trial: Option<usize>) -> Result<f32, CudaError> {
        let mut timer = Timer::new(self.runner.cuda())?;
        let num_layers = self.layers.len().min(TIMED_LAYERS);
        self.skinny.trial = Some(trial);
        let mut run_all = || (0..num_layers).try_for_each(|layer| self.run_part(part, layer, tokens));
        // The first round loads what there is to load, and is still under way when the clock starts.
        let ran = run_all().and_then(|()| timer.start()).and_then(|()| run_all());
        self.skinny.trial = None;
        ran?;
        Ok(timer.stop_us()? / num_layers as f32)
    }

    fn run_part(&mut self, part: Part, layer: usize, tokens: usize) -> Result<(), CudaError> {
        let Self { runner, gemm, work, scratch, skinny, layers, options, .. } = self;
        let mut products = Products { runner, gemm, scratch, skinny };
        let weight = part.weight(&layers[layer]);
        match part {
            Part::Qkv => weight.multiply(&mut products, tokens, &work.normed, &work.qkv),
            Part::GateUp => weight.swiglu(&mut products, tokens, &work.normed, &work.gate_up, &work.gated),
            Part::AttentionOutput | Part::Down => {
                let x = if part == Part::Down { &work.gated } else { &work.attention };
                if options.shard.size == 1 && weight.add(&mut products, tokens, x, &work.hidden)? {
                    return Ok(());
                }
                weight.multiply(&mut products, tokens, x, &work.delta)
            }
        }
    }
}

impl Part {
    const fn weight(self, layer: &Layer) -> &Weight {
        match self {
            Self::Qkv => &layer.qkv,
            Self::AttentionOutput => &layer.attention_output,
            Self::GateUp => &layer.gate_up,
            Self::Down => &layer.down,
        }
    }
}
