//! Tokens from logits that are on the device, and log-probabilities of tokens: rows and their lists go over, token ids and what was asked
//! of them come back.

use std::sync::Arc;

use super::launcher::{
    self as sampling, Answers, LogProbs, SampleLists, SampleRow, Targets, TokenBias, UsedToken, status,
};
use super::{Cuda, CudaError, DeviceBuffer, DeviceSlice, PinnedBuffer, Runner};

/// Draws on a device.
#[derive(Debug)]
pub struct Sampler {
    vocab_size: usize,
    max_rows: usize,
    host: PinnedBuffer,
    device: DeviceBuffer,
    /// f32 `[rows, V]`.
    workspace: DeviceBuffer,
    /// u64 `[rows]`.
    keys: DeviceBuffer,
    /// i32 `[rows]` tokens, then status.
    answers: Arc<DeviceBuffer>,
    /// Those of the last draws and of those before, which nobody may have read yet.
    answered: [PinnedBuffer; 2],
    /// Log-probabilities of a step, one kind behind the other: f32 of targets, i32 ranks, i32 best tokens, f32 of these.
    scores: DeviceBuffer,
    scored: [PinnedBuffer; 2],
    /// Draws so far.
    num_draws: usize,
    lists: Lists,
    rows: Vec<SampleRow>,
    /// Of what is to be scored, rows of logits and targets as the kernel takes them.
    score_rows: Vec<i32>,
    score_targets: Vec<i32>,
    /// Best tokens of each.
    num_top: usize,
    /// Whether every row is that of its number and takes the largest logit as it is.
    is_plain: bool,
}

/// Draws of a step that were queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuedDraws {
    number: usize,
    num_rows: usize,
    num_scores: usize,
    num_top: usize,
}

/// What log-probabilities are wanted of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreTarget {
    Token(u32),
    /// What this row of the same step draws.
    Drawn(usize),
}

/// Log-probabilities of the raw distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// Of the target; NaN if the row has no distribution, or nothing was drawn from it.
    pub log_prob: f32,
    /// 1 + the number of tokens with larger logits.
    pub rank: u32,
    /// The best tokens in order, as many as any target of the step wanted, at most the vocabulary's.
    pub top: Vec<(u32, f32)>,
}

#[derive(Debug, Default)]
struct Lists {
    used: Vec<UsedToken>,
    bias: Vec<TokenBias>,
    allowed: Vec<i32>,
    banned: Vec<i32>,
}

/// What came of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawn {
    Token(u32),
    /// A logit is NaN, or the largest is not finite.
    NotFinite,
    /// No token is left to draw.
    AllMasked,
}

/// A list of a row: where it begins, and how long it is.
pub type Span = (i32, i32);

impl Sampler {
    /// Entries of each kind of list that all rows of a step may have together.
    pub const MAX_ENTRIES: usize = 256 * 1024;
    /// Best tokens that a target may want.
    pub const MAX_TOP: usize = 20;

    /// Takes the memory for steps of at most `max_rows` rows.
    ///
    /// # Errors
    /// [`CudaError`]: memory.
    pub fn new(cuda: &Cuda, vocab_size: usize, max_rows: usize) -> Result<Self, CudaError> {
        let places = Places::new(max_rows);
        let keys = cuda.alloc_zeroed(8 * max_rows)?;
        let score_bytes = 4 * score_words(max_rows, Self::MAX_TOP);
        Ok(Self {
            vocab_size,
            max_rows,
            host: cuda.alloc_pinned(places.end)?,
            device: cuda.alloc(places.end)?,
            workspace: cuda.alloc(4 * max_rows * vocab_size)?,
            keys,
            answers: Arc::new(cuda.alloc_zeroed(8 * max_rows)?),
            answered: [cuda.alloc_pinned(8 * max_rows)?, cuda.alloc_pinned(8 * max_rows)?],
            scores: cuda.alloc(score_bytes)?,
            scored: [cuda.alloc_pinned(score_bytes)?, cuda.alloc_pinned(score_bytes)?],
            num_draws: 0,
            lists: Lists::default(),
            rows: Vec::with_capacity(max_rows),
            score_rows: Vec::with_capacity(max_rows),
            score_targets: Vec::with_capacity(max_rows),
            num_top: 0,
            is_plain: true,
        })
    }

    /// i32: what each row of the last draws came to; of one that could not be drawn, anything.
    pub fn drawn_tokens(&self) -> &Arc<DeviceBuffer> {
        &self.answers
    }

    /// Begins the rows of a step.
    pub fn clear(&mut self) {
        let Lists { used, bias, allowed, banned } = &mut self.lists;
        used.clear();
        bias.clear();
        allowed.clear();
        banned.clear();
        self.rows.clear();
        self.score_rows.clear();
        self.score_targets.clear();
        self.num_top = 0;
        self.is_plain = true;
    }

    /// Whether lists of these lengths fit beside those of the step so far, and one more row.
    pub fn has_room(&self, used: usize, bias: usize, allowed: usize, banned: usize) -> bool {
        let Lists { used: u, bias: b, allowed: a, banned: n } = &self.lists;
        let fits = |has: usize, more: usize| has + more <= Self::MAX_ENTRIES;
        self.rows.len() < self.max_rows
            && fits(u.len(), used)
            && fits(b.len(), bias)
            && fits(a.len(), allowed)
            && fits(n.len(), banned)
    }

    /// Whether one more target with so many best tokens can be scored.
    pub fn has_room_for_score(&self, num_top: usize) -> bool {
        self.score_rows.len() < self.max_rows && num_top <= Self::MAX_TOP
    }

    /// Adds a target under a row of logits; its number among those of the step.
    ///
    /// # Panics
    /// If there is no room for it, or if the row that draws it was not added.
    pub fn score(&mut self, logits_row: u32, target: ScoreTarget, num_top: usize) -> usize {
        assert!(self.has_room_for_score(num_top), "{} targets of a step", self.score_rows.len());
        self.score_rows.push(logits_row.cast_signed());
        self.score_targets.push(match target {
            ScoreTarget::Token(token) => token.cast_signed(),
            ScoreTarget::Drawn(row) => {
                assert!(row < self.rows.len(), "a row that draws");
                -1 - row as i32
            }
        });
        self.num_top = self.num_top.max(num_top);
        self.score_rows.len() - 1
    }

    /// Adds tokens of the sequence so far, each once; where they are.
    pub fn used(&mut self, tokens: impl Iterator<Item = UsedToken>) -> Span {
        span(&mut self.lists.used, tokens)
    }

    /// Adds biases; a token that is listed twice has the sum of both.
    pub fn bias(&mut self, biases: impl Iterator<Item = TokenBias>) -> Span {
        let mut all: Vec<TokenBias> = biases.collect();
        all.sort_by_key(|bias| bias.token);
        all.dedup_by(|next, first| {
            let is_same = next.token == first.token;
            if is_same {
                first.bias += next.bias;
            }
            is_same
        });
        span(&mut self.lists.bias, all.into_iter())
    }

    /// Adds the tokens that may be drawn.
    pub fn allowed(&mut self, tokens: &[u32]) -> Span {
        span(&mut self.lists.allowed, sorted(tokens))
    }

    /// Adds tokens that may not.
    pub fn banned(&mut self, tokens: &[u32]) -> Span {
        span(&mut self.lists.banned, sorted(tokens))
    }

    /// Adds a row; its number among those of the step.
    ///
    /// # Panics
    /// If there are as many as may be.
    pub fn push(&mut self, row: SampleRow) -> usize {
        assert!(self.rows.len() < self.max_rows, "{} rows of a step", self.rows.len());
        let is_bare = row.temperature == 0.0
            && (row.num_used, row.num_bias, row.num_allowed, row.num_banned) == (0, 0, -1, 0);
        self.is_plain &= is_bare && row.logits_row as usize == self.rows.len();
        self.rows.push(row);
        self.rows.len() - 1
    }

    /// Queues that the rows and their lists go over, before the step that they are of: behind it, whoever sends the next ones would
    /// wait for it.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn upload(&mut self) -> Result<(), CudaError> {
        if self.is_plain && self.score_rows.is_empty() {
            return Ok(());
        }
        let places = Places::new(self.max_rows);
        let Lists { used, bias, allowed, banned } = &self.lists;
        let rows = if self.is_plain { &[][..] } else { &self.rows };
        let words = self.host.write::<i32>(0, places.end / 4)?;
        let filled = [
            (places.rows, fill(words, places.rows, rows.iter().map(words_of_row))),
            (places.score_rows, fill(words, places.score_rows, self.score_rows.iter().map(|row| [*row]))),
            (places.targets, fill(words, places.targets, self.score_targets.iter().map(|token| [*token]))),
            (places.used, fill(words, places.used, used.iter().map(words_of_used))),
            (places.bias, fill(words, places.bias, bias.iter().map(words_of_bias))),
            (places.allowed, fill(words, places.allowed, allowed.iter().map(|id| [*id]))),
            (places.banned, fill(words, places.banned, banned.iter().map(|id| [*id]))),
        ];
        for (place, len) in filled.into_iter().filter(|(_, len)| *len > 0) {
            self.device.slice::<i32>(place, len).upload(&mut self.host, place)?;
        }
        Ok(())
    }

    /// Queues the draws of the rows, which were uploaded, from `logits` f32 `[R, V]`, and the way back of what comes of them. Of the last
    /// two draws it can be asked.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn draw(&mut self, runner: &Runner, logits: DeviceSlice<'_, f32>) -> Result<QueuedDraws, CudaError> {
        let num_rows = self.rows.len();
        let tokens = self.answers.as_slice::<i32>().address();
        let answers = Answers { tokens, status: tokens + 4 * self.max_rows as u64 };
        if num_rows == 0 {
            // Nothing but the news that all before it is done comes back.
        } else if self.is_plain {
            let keys = self.keys.as_slice::<u64>().address();
            for launch in sampling::argmax(answers, keys, logits.address(), num_rows, self.vocab_size) {
                runner.launch(&launch)?;
            }
        } else {
            let places = Places::new(self.max_rows);
            let at = |place: usize| self.device.slice::<u8>(place, 0).address();
            let lists = SampleLists {
                used: at(places.used),
                bias: at(places.bias),
                allowed: at(places.allowed),
                banned: at(places.banned),
            };
            let workspace = self.workspace.as_slice::<f32>().address();
            let rows = at(places.rows);
            let logits = logits.address();
            runner.launch(&sampling::sample(
                answers,
                workspace,
                logits,
                rows,
                lists,
                num_rows,
                self.vocab_size,
            ))?;
        }
        self.num_draws += 1;
        let (num_scores, num_top) = (self.score_rows.len(), self.num_top);
        let draws = QueuedDraws { number: self.num_draws, num_rows, num_scores, num_top };
        if num_scores > 0 {
            self.queue_scores(runner, logits, draws)?;
        }
        self.answers.as_slice::<i32>().download(&mut self.answered[draws.number % 2], 0)?;
        Ok(draws)
    }

    /// Whether everything up to these draws is done, without waiting.
    ///
    /// # Errors
    /// [`CudaError`].
    ///
    /// # Panics
    /// If two more have been queued since.
    pub fn is_ready(&self, draws: QueuedDraws) -> Result<bool, CudaError> {
        self.answered[self.place_of(draws)].is_ready()
    }

    /// What came of each row, in their order; waits for it.
    ///
    /// # Errors
    /// [`CudaError`].
    ///
    /// # Panics
    /// If two more have been queued since.
    pub fn answers(&mut self, draws: QueuedDraws) -> Result<impl Iterator<Item = Drawn> + '_, CudaError> {
        let (place, max_rows) = (self.place_of(draws), self.max_rows);
        let all = self.answered[place].read::<i32>(0, 2 * max_rows)?;
        Ok((0..draws.num_rows).map(move |row| match (all[row], all[max_rows + row]) {
            (token, status::OK) if token >= 0 => Drawn::Token(token.cast_unsigned()),
            (_, status::ALL_MASKED) => Drawn::AllMasked,
            _ => Drawn::NotFinite,
        }))
    }

    /// Log-probabilities of each target, in their order; waits for them.
    ///
    /// # Errors
    /// [`CudaError`].
    ///
    /// # Panics
    /// If two more have been queued since.
    pub fn scores(&mut self, draws: QueuedDraws) -> Result<Vec<Scored>, CudaError> {
        let QueuedDraws { num_scores, num_top, .. } = draws;
        let place = self.place_of(draws);
        let words = self.scored[place].read::<i32>(0, score_words(num_scores, num_top))?;
        let (log_probs, rest) = words.split_at(num_scores);
        let (ranks, rest) = rest.split_at(num_scores);
        let (top_tokens, top) = rest.split_at(num_scores * num_top);
        let float = |bits: i32| f32::from_bits(bits.cast_unsigned());
        let best_of = |target: usize| {
            let range = target * num_top..(target + 1) * num_top;
            let best = top_tokens[range.clone()].iter().zip(&top[range]);
            best.filter(|(token, _)| **token >= 0)
                .map(|(token, log_prob)| (token.cast_unsigned(), float(*log_prob)))
                .collect()
        };
        let scored = (0..num_scores).map(|target| Scored {
            log_prob: float(log_probs[target]),
            rank: ranks[target].cast_unsigned(),
            top: best_of(target),
        });
        Ok(scored.collect())
    }

    /// Queues the log-probabilities of a step whose draws are queued, and their way back.
    fn queue_scores(
        &mut self,
        runner: &Runner,
        logits: DeviceSlice<'_, f32>,
        draws: QueuedDraws,
    ) -> Result<(), CudaError> {
        let QueuedDraws { number, num_scores, num_top, .. } = draws;
        let words = self.scores.slice::<i32>(0, score_words(num_scores, num_top));
        // What is not written, for nothing was drawn, is NaN.
        words.fill_bytes(0xff)?;
        let at = |word: usize| words.address() + 4 * word as u64;
        let out = LogProbs {
            target: at(0),
            rank: at(num_scores),
            top_tokens: at(2 * num_scores),
            top: at((2 + num_top) * num_scores),
        };
        let places = Places::new(self.max_rows);
        let list = |place: usize| self.device.slice::<u8>(place, 0).address();
        let targets = Targets {
            rows: list(places.score_rows),
            tokens: list(places.targets),
            drawn: self.answers.as_slice::<i32>().address(),
        };
        let vocab_size = self.vocab_size;
        runner.launch(&sampling::log_probs(
            out,
            logits.address(),
            targets,
            num_scores,
            num_top,
            vocab_size,
        ))?;
        words.download(&mut self.scored[number % 2], 0)
    }

    fn place_of(&self, draws: QueuedDraws) -> usize {
        assert!(self.num_draws < draws.number + 2, "the answers were overwritten");
        draws.number % 2
    }
}

/// Words of the scores of so many targets.
fn score_words(num_scores: usize, num_top: usize) -> usize {
    num_scores * (2 + 2 * num_top)
}

/// Where rows and lists begin, in bytes.
struct Places {
    rows: usize,
    score_rows: usize,
    targets: usize,
    used: usize,
    bias: usize,
    allowed: usize,
    banned: usize,
    end: usize,
}

impl Places {
    fn new(max_rows: usize) -> Self {
        const ALIGN: usize = 256;
        let mut end = 0;
        let mut place = |count: usize, bytes: usize| {
            let at = end;
            end += (count * bytes).next_multiple_of(ALIGN);
            at
        };
        Self {
            rows: place(max_rows, size_of::<SampleRow>()),
            score_rows: place(max_rows, 4),
            targets: place(max_rows, 4),
            used: place(Sampler::MAX_ENTRIES, size_of::<UsedToken>()),
            bias: place(Sampler::MAX_ENTRIES, size_of::<TokenBias>()),
            allowed: place(Sampler::MAX_ENTRIES, 4),
            banned: place(Sampler::MAX_ENTRIES, 4),
            end,
        }
    }
}

/// Writes values of `N` words from byte `place` on; how many words.
fn fill<const N: usize>(
    words: &mut [i32],
    place: usize,
    values: impl ExactSizeIterator<Item = [i32; N]>,
) -> usize {
    let len = values.len() * N;
    let (to, _) = words[place / 4..][..len].as_chunks_mut::<N>();
    to.iter_mut().zip(values).for_each(|(to, value)| *to = value);
    len
}

/// In the order of the fields, which is that of the kernel's.
fn words_of_row(row: &SampleRow) -> [i32; 20] {
    let float = |value: f32| value.to_bits().cast_signed();
    [
        row.logits_row,
        float(row.temperature),
        row.top_k,
        float(row.top_p),
        float(row.min_p),
        float(row.repetition_penalty),
        float(row.presence_penalty),
        float(row.frequency_penalty),
        row.seed_low.cast_signed(),
        row.seed_high.cast_signed(),
        row.position.cast_signed(),
        row.choice.cast_signed(),
        row.first_used,
        row.num_used,
        row.first_bias,
        row.num_bias,
        row.first_allowed,
        row.num_allowed,
        row.first_banned,
        row.num_banned,
    ]
}

fn words_of_used(used: &UsedToken) -> [i32; 3] {
    [used.token, used.in_prompt, used.output_count]
}

fn words_of_bias(bias: &TokenBias) -> [i32; 2] {
    [bias.token, bias.bias.to_bits().cast_signed()]
}

fn span<T>(list: &mut Vec<T>, entries: impl Iterator<Item = T>) -> Span {
    let first = list.len();
    list.extend(entries);
    (first as i32, (list.len() - first) as i32)
}

fn sorted(tokens: &[u32]) -> impl Iterator<Item = i32> {
    let mut tokens: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens.into_iter()
}
