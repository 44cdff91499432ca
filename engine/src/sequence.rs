//! The running state of one choice: its tokens, how many of them are computed, and the blocks that hold their
//! KV.

use crate::prefix_cache::HashChain;

/// Identity and rank of a sequence: smaller runs first and is preempted last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SequenceKey {
    /// Lower first.
    pub(crate) priority: i32,
    /// Order of submission.
    pub(crate) serial: u64,
    pub(crate) choice: u32,
}

pub(crate) struct Sequence {
    pub(crate) key: SequenceKey,
    /// Prompt and output.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    /// Tokens whose KV is in the blocks.
    pub(crate) context_len: usize,
    /// Tokens on top of these that planned steps compute: the next one begins behind them.
    pub(crate) in_flight: usize,
    /// The token behind all others, while a step that was begun has not said which it is.
    pub(crate) awaited: Option<AwaitedToken>,
    pub(crate) block_table: Vec<u32>,
    pub(crate) chain: HashChain,
    /// Sequences that this one stands for: all choices while it computes their prompt, else 1.
    pub(crate) num_choices: usize,
    /// Prompt and all the output that may come.
    pub(crate) max_len: usize,
    /// When the prompt is scored: how many of its tokens are, counted from the start. The first needs no
    /// score.
    pub(crate) num_scored: Option<usize>,
    /// Prompt tokens found in the prefix cache when the sequence was first admitted.
    pub(crate) cached_tokens: Option<usize>,
}

/// A token that is being drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AwaitedToken {
    /// Number of the step.
    pub(crate) step: u64,
    /// Index among what is wanted of the step's logits.
    pub(crate) row: u32,
}

impl Sequence {
    /// Whether any output is wanted.
    pub(crate) fn samples(&self) -> bool {
        self.max_len > self.prompt_len
    }

    /// Tokens that are computed once all planned steps are over.
    pub(crate) fn planned_len(&self) -> usize {
        self.context_len + self.in_flight
    }

    /// Tokens that no step has been planned for; none of a sequence whose last one is awaited.
    pub(crate) fn num_unplanned(&self) -> usize {
        match self.awaited {
            Some(_) => usize::from(self.planned_len() + 1 < self.max_len),
            None => self.tokens.len() - self.planned_len(),
        }
    }

    /// One token on top of a computed context.
    pub(crate) fn is_decoding(&self) -> bool {
        self.planned_len() >= self.prompt_len && self.num_unplanned() == 1
    }

    /// What was computed, and what is on its way to be, is gone; no token is.
    pub(crate) fn forget_computed(&mut self) {
        self.context_len = 0;
        self.in_flight = 0;
    }

    /// Whether scores of prompt tokens are still missing. The KV of cached blocks would save computing
    /// exactly the rows that are wanted.
    pub(crate) fn is_being_scored(&self) -> bool {
        self.num_scored.is_some_and(|scored| scored < self.prompt_len)
    }

    /// Whether the logits of the token at `position` are wanted.
    pub(crate) fn wants_logits(&self, position: usize) -> bool {
        self.wants_score(position)
            // The token of a position past the known ones is awaited, and the last.
            || (self.samples() && position + 1 >= self.tokens.len())
    }

    /// Whether the logits at `position` score the prompt token that follows.
    pub(crate) fn wants_score(&self, position: usize) -> bool {
        let target = position + 1;
        target < self.prompt_len && self.num_scored.is_some_and(|scored| target >= scored)
    }

    /// The most query tokens within both limits, if `context_len` tokens are computed.
    pub(crate) fn chunk_len(&self, context_len: usize, max_tokens: usize, max_rows: usize) -> usize {
        let most = (self.tokens.len() - context_len).min(max_tokens);
        if !self.is_being_scored() {
            let wants_row = self.wants_logits(context_len + most.saturating_sub(1));
            return if wants_row && max_rows == 0 { most.saturating_sub(1) } else { most };
        }
        let mut rows = 0;
        for len in 0..most {
            rows += usize::from(self.wants_logits(context_len + len));
            if rows > max_rows {
                return len;
            }
        }
        most
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prefix_cache::ChainHasher;

    fn sequence(prompt_len: usize, context_len: usize, num_scored: Option<usize>) -> Sequence {
        Sequence {
            key: SequenceKey { priority: 0, serial: 0, choice: 0 },
            tokens: vec![1; prompt_len],
            prompt_len,
            context_len,
            in_flight: 0,
            awaited: None,
            block_table: Vec::new(),
            chain: ChainHasher::new([0; 16], [0; 16], 16).start(None),
            num_choices: 1,
            max_len: prompt_len + 4,
            num_scored,
            cached_tokens: None,
        }
    }

    #[test]
    fn only_the_last_token_needs_logits_unless_the_prompt_is_scored() {
        let plain = sequence(4, 0, None);
        assert_eq!((0..4).filter(|p| plain.wants_logits(*p)).collect::<Vec<_>>(), [3]);
        let scored = sequence(4, 0, Some(1));
        assert_eq!((0..4).filter(|p| scored.wants_logits(*p)).collect::<Vec<_>>(), [0, 1, 2, 3]);
        let half_scored = sequence(4, 0, Some(3));
        assert_eq!((0..4).filter(|p| half_scored.wants_logits(*p)).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn chunks_keep_to_tokens_and_rows() {
        assert_eq!(sequence(100, 0, None).chunk_len(0, 30, 0), 30);
        assert_eq!(sequence(100, 0, None).chunk_len(80, 30, 1), 20);
        assert_eq!(sequence(100, 0, None).chunk_len(80, 30, 0), 19, "the last token needs a row");
        assert_eq!(sequence(100, 0, None).chunk_len(99, 30, 0), 0);
        assert_eq!(sequence(100, 0, Some(1)).chunk_len(0, 64, 10), 10);
        assert_eq!(
            sequence(100, 0, Some(51)).chunk_len(0, 64, 10),
            60,
            "the first 50 positions need no rows"
        );
        assert_eq!(sequence(100, 0, None).chunk_len(0, 0, 10), 0);
    }
}
