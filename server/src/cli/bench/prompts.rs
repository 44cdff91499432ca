//! Random prompts: no two alike, so that no cache of a server helps, and the same ones for the same seed.

/// Words that most vocabularies have as one token, with the space before them.
const WORDS: &str = "time year people way day man thing woman life child world school state family student group \
                     country problem hand part place case week company system program question work government number \
                     night point home water room mother area money story fact month lot right study book eye job word \
                     business issue side kind head house service friend father power hour game line end member law";

/// A generator of random numbers: SplitMix64.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The sequence of one of many prompts of a seed: each is a function of both numbers alone.
    pub(super) fn of_prompt(seed: u64, index: u64) -> Self {
        let mut by_index = Self(index);
        Self(seed ^ by_index.next())
    }

    /// The next 64 random bits.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// `length` token ids below `vocab_size`.
    pub(super) fn token_ids(&mut self, length: usize, vocab_size: u64) -> Vec<u32> {
        (0..length).map(|_| (self.next() % vocab_size) as u32).collect()
    }

    /// `length` words with a space before each.
    pub(super) fn words(&mut self, length: usize) -> String {
        let words: Vec<&str> = WORDS.split(' ').collect();
        (0..length).flat_map(|_| [" ", words[self.next() as usize % words.len()]]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_distinct_and_repeat_with_their_seed() {
        let prompt = |seed, index| Random::of_prompt(seed, index).token_ids(8, 1000);
        assert_eq!(prompt(1, 2), prompt(1, 2));
        assert!(prompt(1, 2) != prompt(1, 3) && prompt(1, 2) != prompt(2, 2));
        assert!(prompt(1, 2).iter().all(|&id| id < 1000));
        let words = Random::new(5).words(300);
        assert!(words.split(' ').skip(1).all(|word| WORDS.contains(word) && !word.is_empty()), "{words}");
        assert_eq!(words.split(' ').count(), 301, "a space before each word");
    }
}
