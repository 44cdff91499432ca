//! Which full blocks can be used again, by the tokens that led to them.
//!
//! A block's key is a 128-bit keyed hash of its parent's key and its own tokens; the chain starts from the
//! model's fingerprint and the caller's salt. The hash key is a secret of this process, so nobody outside can
//! aim at a collision, and on a hit parent and tokens are compared all the same. Only full blocks of accepted
//! tokens are ever entered, so a block in here is never written again. A block that no sequence references is
//! idle: it counts as free capacity, and the one that has been idle longest is given up first.
//!
//! Reference counts are the block manager's; this file knows blocks by number only.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher24};

/// The keys of one sequence's full blocks, computed as far as they were needed. Tokens are only ever appended
/// to a sequence, so keys stay true.
#[derive(Debug, Clone)]
pub(crate) struct HashChain {
    root: u128,
    keys: Vec<u128>,
}

/// Makes keys.
#[derive(Clone)]
pub(crate) struct ChainHasher {
    secret: [u8; 16],
    fingerprint: [u8; 16],
    block_size: usize,
}

pub(crate) struct PrefixCache {
    hasher: ChainHasher,
    entries: HashMap<u128, Entry>,
    key_of_block: HashMap<u32, u128>,
    /// Idle blocks by the moment they became so.
    idle: BTreeMap<u64, u32>,
    idle_since: HashMap<u32, u64>,
    /// Orders the moments.
    ticks: u64,
}

struct Entry {
    block: u32,
    parent: u128,
    tokens: Box<[u32]>,
}

impl ChainHasher {
    pub(crate) fn new(secret: [u8; 16], fingerprint: [u8; 16], block_size: usize) -> Self {
        Self { secret, fingerprint, block_size }
    }

    /// A chain that meets only chains of the same salt.
    pub(crate) fn start(&self, salt: Option<&str>) -> HashChain {
        let mut hasher = self.tagged(if salt.is_some() { 1 } else { 0 });
        hasher.write(&self.fingerprint);
        hasher.write(salt.unwrap_or_default().as_bytes());
        HashChain { root: hasher.finish128().as_u128(), keys: Vec::new() }
    }

    /// Computes the keys of the first `num_blocks` blocks of `tokens`.
    fn extend(&self, chain: &mut HashChain, tokens: &[u32], num_blocks: usize) {
        for block in tokens.chunks_exact(self.block_size).take(num_blocks).skip(chain.keys.len()) {
            let parent = chain.parent(chain.keys.len());
            let mut hasher = self.tagged(2);
            hasher.write(&parent.to_le_bytes());
            block.iter().for_each(|token| hasher.write(&token.to_le_bytes()));
            chain.keys.push(hasher.finish128().as_u128());
        }
    }

    /// Roots and links are hashed apart: no salt looks like a block.
    fn tagged(&self, tag: u8) -> SipHasher24 {
        let mut hasher = SipHasher24::new_with_key(&self.secret);
        hasher.write(&[tag]);
        hasher
    }
}

impl HashChain {
    fn parent(&self, block_idx: usize) -> u128 {
        if block_idx == 0 { self.root } else { self.keys[block_idx - 1] }
    }
}

impl PrefixCache {
    pub(crate) fn new(hasher: ChainHasher) -> Self {
        Self {
            hasher,
            entries: HashMap::new(),
            key_of_block: HashMap::new(),
            idle: BTreeMap::new(),
            idle_since: HashMap::new(),
            ticks: 0,
        }
    }

    /// Cached blocks of the longest known prefix of `tokens`, at most `max_blocks`. Changes nothing but the
    /// chain's memory.
    pub(crate) fn find(&self, chain: &mut HashChain, tokens: &[u32], max_blocks: usize) -> Vec<u32> {
        let mut hits = Vec::new();
        for (block_idx, block_tokens) in
            tokens.chunks_exact(self.hasher.block_size).take(max_blocks).enumerate()
        {
            self.hasher.extend(chain, tokens, block_idx + 1);
            let Some(entry) = self.entries.get(&chain.keys[block_idx]) else { break };
            if entry.parent != chain.parent(block_idx) || *entry.tokens != *block_tokens {
                break;
            }
            hits.push(entry.block);
        }
        hits
    }

    /// Enters a full block, referenced by a sequence, as block `block_idx` of `tokens`. When an equal one is
    /// known already that one stays, and `block` remains uncached.
    pub(crate) fn insert(&mut self, chain: &mut HashChain, tokens: &[u32], block_idx: usize, block: u32) {
        self.hasher.extend(chain, tokens, block_idx + 1);
        let key = chain.keys[block_idx];
        if self.entries.contains_key(&key) || self.key_of_block.contains_key(&block) {
            return;
        }
        let start = block_idx * self.hasher.block_size;
        let tokens = tokens[start..start + self.hasher.block_size].into();
        self.entries.insert(key, Entry { block, parent: chain.parent(block_idx), tokens });
        self.key_of_block.insert(block, key);
    }

    /// Forgets a block's content; true when the block was idle, and is the caller's now.
    pub(crate) fn forget(&mut self, block: u32) -> bool {
        let Some(key) = self.key_of_block.remove(&block) else { return false };
        self.entries.remove(&key);
        self.unmark_idle(block)
    }

    /// The last reference to `block` went away; false when the block is not cached.
    pub(crate) fn mark_idle(&mut self, block: u32) -> bool {
        if !self.key_of_block.contains_key(&block) {
            return false;
        }
        self.ticks += 1;
        self.idle.insert(self.ticks, block);
        self.idle_since.insert(block, self.ticks);
        true
    }

    /// A sequence references `block` again.
    pub(crate) fn unmark_idle(&mut self, block: u32) -> bool {
        let Some(tick) = self.idle_since.remove(&block) else { return false };
        self.idle.remove(&tick);
        true
    }

    /// Gives up the block that has been idle longest.
    pub(crate) fn evict(&mut self) -> Option<u32> {
        let (_, &block) = self.idle.first_key_value()?;
        self.forget(block);
        Some(block)
    }

    /// Forgets everything: the memory behind the blocks is gone.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.key_of_block.clear();
        self.idle.clear();
        self.idle_since.clear();
    }

    pub(crate) fn num_idle(&self) -> usize {
        self.idle.len()
    }

    pub(crate) fn is_idle(&self, block: u32) -> bool {
        self.idle_since.contains_key(&block)
    }

    /// Whether the four tables tell one story.
    pub(crate) fn is_consistent(&self) -> bool {
        self.entries.len() == self.key_of_block.len()
            && self.entries.iter().all(|(key, entry)| self.key_of_block.get(&entry.block) == Some(key))
            && self.idle.len() == self.idle_since.len()
            && self.idle.iter().all(|(tick, block)| {
                self.idle_since.get(block) == Some(tick) && self.key_of_block.contains_key(block)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: [u32; 8] = [1, 2, 3, 4, 5, 6, 7, 8];

    fn hasher() -> ChainHasher {
        ChainHasher::new([7; 16], [1; 16], 2)
    }

    fn filled() -> PrefixCache {
        cache_of(None)
    }

    /// TOKENS in blocks 10, 11, 12, 13.
    fn cache_of(salt: Option<&str>) -> PrefixCache {
        let mut cache = PrefixCache::new(hasher());
        let mut chain = hasher().start(salt);
        (0..4).for_each(|i| cache.insert(&mut chain, &TOKENS, i, 10 + i as u32));
        cache
    }

    #[test]
    fn the_longest_known_prefix_is_found() {
        let cache = filled();
        let mut chain = hasher().start(None);
        assert_eq!(cache.find(&mut chain, &TOKENS, 4), [10, 11, 12, 13]);
        assert_eq!(cache.find(&mut chain, &TOKENS, 3), [10, 11, 12]);
        assert_eq!(cache.find(&mut hasher().start(None), &[1, 2, 3, 4, 9, 6, 7, 8], 4), [10, 11]);
        assert_eq!(cache.find(&mut hasher().start(None), &[1, 2, 3], 4), [10]);
        assert!(
            cache.find(&mut hasher().start(None), &[3, 4, 5, 6], 4).is_empty(),
            "a block without its prefix"
        );
    }

    #[test]
    fn salts_and_models_never_meet() {
        let cache = filled();
        for salt in [Some(""), Some("tenant")] {
            assert!(cache.find(&mut hasher().start(salt), &TOKENS, 4).is_empty());
        }
        let salted = cache_of(Some("tenant"));
        assert_eq!(salted.find(&mut hasher().start(Some("tenant")), &TOKENS, 4).len(), 4);
        for salt in [None, Some(""), Some("tenanT")] {
            assert!(salted.find(&mut hasher().start(salt), &TOKENS, 4).is_empty());
        }
        let other_model = ChainHasher::new([7; 16], [2; 16], 2);
        assert!(cache.find(&mut other_model.start(None), &TOKENS, 4).is_empty());
        let other_secret = ChainHasher::new([8; 16], [1; 16], 2);
        assert_ne!(other_secret.start(None).root, hasher().start(None).root);
    }

    #[test]
    fn equal_keys_are_not_enough_for_a_hit() {
        let mut cache = filled();
        let mut chain = hasher().start(None);
        assert_eq!(cache.find(&mut chain, &TOKENS, 2), [10, 11]);
        // As if another block's hash had collided with this key.
        cache.entries.get_mut(&chain.keys[1]).unwrap().tokens = [3, 5].into();
        assert_eq!(cache.find(&mut chain, &TOKENS, 2), [10]);
        cache.entries.get_mut(&chain.keys[0]).unwrap().parent ^= 1;
        assert!(cache.find(&mut chain, &TOKENS, 2).is_empty());
    }

    #[test]
    fn the_block_idle_longest_goes_first() {
        let mut cache = filled();
        for block in [12, 10, 13, 11] {
            assert!(cache.mark_idle(block));
        }
        assert!(cache.unmark_idle(12));
        assert!(cache.mark_idle(12));
        let order: Vec<_> = std::iter::from_fn(|| cache.evict()).collect();
        assert_eq!(order, [10, 13, 11, 12]);
        assert!(cache.is_consistent() && cache.entries.is_empty());
        assert!(!cache.mark_idle(10), "an evicted block is no longer cached");
    }

    #[test]
    fn of_two_equal_blocks_the_first_stays() {
        let mut cache = filled();
        cache.insert(&mut hasher().start(None), &TOKENS, 0, 20);
        assert_eq!(cache.find(&mut hasher().start(None), &TOKENS, 1), [10]);
        assert!(!cache.mark_idle(20));
        assert!(cache.is_consistent());
    }
}
