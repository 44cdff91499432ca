//! Which tokens a choice has used, kept up to date token by token for the penalties.

use std::collections::HashMap;

/// One distinct token of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenUse {
    pub token: u32,
    pub in_prompt: bool,
    /// Occurrences among the output tokens.
    pub output_count: u32,
}

/// The distinct tokens of one choice. Each token adjusts its own logit only, so their order has no meaning.
#[derive(Debug, Clone, Default)]
pub(crate) struct UsedTokens {
    tokens: Vec<TokenUse>,
    index: HashMap<u32, usize>,
}

impl UsedTokens {
    pub(crate) fn of_prompt(prompt: &[u32]) -> Self {
        let mut used = Self::default();
        prompt.iter().for_each(|token| used.entry(*token).in_prompt = true);
        used
    }

    pub(crate) fn count_output(&mut self, token: u32) {
        self.entry(token).output_count += 1;
    }

    pub(crate) fn as_slice(&self) -> &[TokenUse] {
        &self.tokens
    }

    fn entry(&mut self, token: u32) -> &mut TokenUse {
        let idx = *self.index.entry(token).or_insert_with(|| {
            self.tokens.push(TokenUse { token, in_prompt: false, output_count: 0 });
            self.tokens.len() - 1
        });
        &mut self.tokens[idx]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_and_output_are_told_apart() {
        let mut used = UsedTokens::of_prompt(&[4, 7, 4]);
        used.count_output(7);
        used.count_output(9);
        used.count_output(9);
        let expected = [(4, true, 0), (7, true, 1), (9, false, 2)];
        let found: Vec<_> = used.as_slice().iter().map(|t| (t.token, t.in_prompt, t.output_count)).collect();
        assert_eq!(found, expected);
    }
}
