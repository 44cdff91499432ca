//! A model that can be predicted: one token per byte, and each token is followed by the next letter of the alphabet.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tandem_engine::{
    EngineConfig, Executor, ExecutorError, ExecutorStatus, GenerationConfig, RowError, RowKind, SampleRow,
    SampledToken, StepOutput, StepPlan, TokenLogprobs,
};

use crate::config::{self, ServeConfig};
use crate::http::state::Serving;
use crate::text::{ChatTemplate, GgufTokenizer, Tokenizer};

/// Tokens 0..256 are bytes; these two follow.
pub(super) const START: u32 = 256;
pub(super) const END: u32 = 257;
pub(super) const VOCAB: usize = 258;
pub(super) const CONTEXT: usize = 256;

const TEMPLATE: &str = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}\
                        {% if add_generation_prompt %}<|im_start|>{% endif %}";

/// What a test changes while the toy runs.
#[derive(Default)]
pub(super) struct Knobs {
    /// Milliseconds that a step takes.
    pub(super) step_ms: AtomicU64,
    /// Every row fails.
    pub(super) fail_rows: AtomicBool,
    /// The executor's group is not whole.
    pub(super) group_away: AtomicBool,
}

struct Toy {
    knobs: Arc<Knobs>,
}

impl Executor for Toy {
    fn run(&mut self, plan: &StepPlan, rows: &[SampleRow<'_>]) -> Result<StepOutput, ExecutorError> {
        std::thread::sleep(Duration::from_millis(self.knobs.step_ms.load(Ordering::Relaxed)));
        let inputs: Vec<u32> = plan
            .sequences
            .iter()
            .flat_map(|sequence| sequence.logits_rows.iter().map(|row| sequence.token_ids[*row as usize]))
            .collect();
        let rows = rows.iter().map(|row| self.answer(row, inputs[row.logits_row as usize])).collect();
        Ok(StepOutput { rows, ..StepOutput::default() })
    }

    fn poll(&mut self, _running: usize) -> ExecutorStatus {
        if self.knobs.group_away.load(Ordering::Relaxed) {
            return ExecutorStatus::Waiting { reason: "told to".into() };
        }
        ExecutorStatus::Ready { epoch: 0, admits: true }
    }

    fn abort(&mut self) {}

    fn poison_blocks(&mut self, _blocks: &[u32]) {}
}

impl Toy {
    fn answer(&self, row: &SampleRow<'_>, input: u32) -> Result<SampledToken, RowError> {
        if self.knobs.fail_rows.load(Ordering::Relaxed) {
            return Err(RowError::NotFinite);
        }
        let token = match row.kind {
            RowKind::Score { target } => target,
            RowKind::Sample(draw) => next_token(input, draw.key.choice, draw.banned_token_ids),
        };
        let logprobs = row.logprobs.map(|count| TokenLogprobs {
            token,
            logprob: -0.5,
            rank: 1,
            top: (0..count as u32)
                .map(|place| ((token + place) % VOCAB as u32, -0.5 - place as f32))
                .collect(),
        });
        Ok(SampledToken { token, logprobs })
    }
}

/// The letter after `input`, one further for each choice; after `z` the end, or `a` when that is banned.
fn next_token(input: u32, choice: u32, banned: &[u32]) -> u32 {
    let (a, z) = (u32::from(b'a'), u32::from(b'z'));
    match input {
        input if input == z && !banned.contains(&END) => END,
        input if (a..z).contains(&input) => (input + 1 + choice).min(z),
        _ => (a + choice).min(z),
    }
}

pub(super) fn engine_config() -> EngineConfig {
    EngineConfig {
        vocab_size: VOCAB,
        max_model_len: CONTEXT,
        max_num_seqs: 16,
        max_num_batched_tokens: 64,
        num_blocks: 128,
        eos_token_ids: vec![END],
        model_fingerprint: [7; 16],
        ..EngineConfig::default()
    }
}

/// A running toy, with its tokenizer and template unless it shall be known by token ids only.
pub(super) fn serving(config: EngineConfig, with_text: bool) -> (Serving, Arc<Knobs>) {
    let knobs = Arc::new(Knobs::default());
    let engine = tandem_engine::spawn(Box::new(Toy { knobs: knobs.clone() }), config);
    let tokenizer = with_text.then(|| Arc::new(tokenizer()));
    let template =
        tokenizer.clone().map(|tokenizer| Arc::new(ChatTemplate::new(TEMPLATE, tokenizer).unwrap()));
    let generation = GenerationConfig::default();
    let serving = Serving { engine, tokenizer, template, sandbox: None, generation, gpus: None };
    (serving, knobs)
}

pub(super) fn serve_config(keys: &[&str], flags: &[&str]) -> Arc<ServeConfig> {
    let mut arguments = vec!["tandem", "serve", "toy.gguf", "--served-model-name", "toy"];
    arguments.extend(keys.iter().flat_map(|key| ["--api-key", key]));
    arguments.extend(flags);
    let arguments = arguments.into_iter().map(Into::into).collect();
    match config::parse(arguments, &BTreeMap::new()).map(|parsed| parsed.command) {
        Ok(config::Command::Serve(config)) => Arc::new(*config),
        other => panic!("{other:?}"),
    }
}

fn tokenizer() -> Tokenizer {
    // GPT-2's spelling of bytes: printable ones as they are, the others from U+0100 on.
    let mut others = 0x100..;
    let spell = |byte: u8| match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        _ => char::from_u32(others.next().unwrap()).unwrap(),
    };
    let mut tokens: Vec<String> = (0..=255).map(spell).map(String::from).collect();
    tokens.extend(["<|im_start|>".to_owned(), "<|im_end|>".to_owned()]);
    let mut token_types = vec![1; 256];
    token_types.extend([3, 3]);
    let vocabulary = GgufTokenizer {
        model: "gpt2".into(),
        pre: "smollm".into(),
        tokens,
        token_types,
        bos: Some(START),
        eos: Some(END),
        ..GgufTokenizer::default()
    };
    Tokenizer::from_gguf(&vocabulary).unwrap()
}
