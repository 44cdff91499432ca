//! Who holds which KV block.
//!
//! A block is in exactly one place: on the free list, idle in the prefix cache, or in as many block tables as
//! its reference count says. Copies that the step being planned will make are kept here too: their sources
//! stay untouched until the step is over, even when their last reference goes away meanwhile.

use std::collections::HashMap;

use crate::config::EngineConfig;
use crate::prefix_cache::{ChainHasher, HashChain, PrefixCache};
use crate::step_plan::BlockCopy;

pub(crate) struct BlockManager {
    /// References by block.
    references: Vec<u32>,
    free: Vec<u32>,
    cache: Option<PrefixCache>,
    /// Copies of the step being planned or run.
    copies: Vec<BlockCopy>,
    /// Sources of those copies without a reference; free once the step is over.
    held: Vec<u32>,
    /// Free blocks whose old content is still to be overwritten, when that is switched on.
    to_poison: Option<Vec<u32>>,
}

/// Where blocks are; the three add up to the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlockCounts {
    pub(crate) free: usize,
    pub(crate) used: usize,
    pub(crate) cached: usize,
}

impl BlockManager {
    pub(crate) fn new(config: &EngineConfig, hasher: ChainHasher) -> Self {
        let mut blocks = Self {
            references: vec![0; config.num_blocks],
            free: Vec::new(),
            cache: config.prefix_caching.then(|| PrefixCache::new(hasher)),
            copies: Vec::new(),
            held: Vec::new(),
            to_poison: config.poison_freed_blocks.then(Vec::new),
        };
        blocks.reset();
        blocks
    }

    /// Makes every block free: the memory is new, and nothing that was in the old one exists. Tables that
    /// name blocks are void.
    pub(crate) fn reset(&mut self) {
        self.references.fill(0);
        // Low numbers first: a free list is taken from its end.
        self.free = (0..self.references.len() as u32).rev().collect();
        if let Some(cache) = &mut self.cache {
            cache.clear();
        }
        self.copies.clear();
        self.held.clear();
        if let Some(to_poison) = &mut self.to_poison {
            to_poison.clone_from(&self.free);
        }
    }

    /// Blocks that `allocate` could hand out now.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.num_idle()
    }

    /// A block with one reference; cached content that nobody uses is given up for it when the free list is
    /// empty.
    ///
    /// # Panics
    /// When nothing is available: the scheduler looks first.
    pub(crate) fn allocate(&mut self) -> u32 {
        let block = self.free.pop().or_else(|| self.evict()).expect("the scheduler looked for room");
        self.references[block as usize] = 1;
        block
    }

    /// One more reference to a block that is cached or in a table already.
    pub(crate) fn share(&mut self, block: u32) {
        if let Some(cache) = &mut self.cache {
            cache.unmark_idle(block);
        }
        self.references[block as usize] += 1;
    }

    /// Gives a whole table back. The tail goes idle first, so that a prefix outlives what follows it.
    pub(crate) fn release_table(&mut self, table: &mut Vec<u32>) {
        while let Some(block) = table.pop() {
            self.release(block);
        }
    }

    fn release(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        assert!(*references > 0, "block released more often than it was taken");
        *references -= 1;
        if *references > 0 || self.cache.as_mut().is_some_and(|cache| cache.mark_idle(block)) {
            return;
        }
        if self.copies.iter().any(|copy| copy.source == block) {
            self.held.push(block);
        } else {
            self.make_free(block);
        }
    }

    pub(crate) fn is_shared(&self, block: u32) -> bool {
        self.references[block as usize] > 1
    }

    /// Trades a reference to a shared block for a copy of it, which the step makes before it computes.
    ///
    /// # Panics
    /// When nothing is available.
    pub(crate) fn copy_on_write(&mut self, source: u32) -> u32 {
        let destination = self.allocate();
        self.copies.push(BlockCopy { source, destination });
        self.release(source);
        destination
    }

    /// Copies decided since the last step.
    pub(crate) fn copies(&self) -> &[BlockCopy] {
        &self.copies
    }

    /// The step is over: sources of its copies may be used again.
    pub(crate) fn finish_step(&mut self) {
        self.copies.clear();
        for block in std::mem::take(&mut self.held) {
            self.make_free(block);
        }
    }

    /// Blocks to overwrite before the next step.
    pub(crate) fn take_blocks_to_poison(&mut self) -> Vec<u32> {
        self.to_poison.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Cached blocks of the longest known prefix of `tokens`, at most `max_blocks`. Takes no reference.
    pub(crate) fn find_prefix(&self, chain: &mut HashChain, tokens: &[u32], max_blocks: usize) -> Vec<u32> {
        self.cache.as_ref().map_or_else(Vec::new, |cache| cache.find(chain, tokens, max_blocks))
    }

    /// How many of these blocks would stop being available once referenced.
    pub(crate) fn count_idle(&self, blocks: &[u32]) -> usize {
        let Some(cache) = &self.cache else { return 0 };
        blocks.iter().filter(|block| cache.is_idle(**block)).count()
    }

    /// Block `block_idx` of a sequence is full of accepted tokens: others may find it.
    pub(crate) fn cache_block(
        &mut self,
        chain: &mut HashChain,
        tokens: &[u32],
        block_idx: usize,
        block: u32,
    ) {
        if let Some(cache) = &mut self.cache {
            cache.insert(chain, tokens, block_idx, block);
        }
    }

    /// Nobody shall find these blocks any more: their content is in doubt.
    pub(crate) fn forget(&mut self, blocks: &[u32]) {
        for &block in blocks {
            if self.cache.as_mut().is_some_and(|cache| cache.forget(block)) {
                self.make_free(block);
            }
        }
    }

    pub(crate) fn counts(&self) -> BlockCounts {
        let (free, cached) = (self.free.len(), self.num_idle());
        BlockCounts { free, cached, used: self.references.len() - free - cached }
    }

    /// Checks, between steps, that every block is where `tables` (all block tables there are) and this file
    /// say.
    pub(crate) fn check_integrity<'a>(&self, tables: impl Iterator<Item = &'a [u32]>) -> Result<(), String> {
        let mut in_tables: HashMap<u32, u32> = HashMap::new();
        tables.flatten().for_each(|block| *in_tables.entry(*block).or_default() += 1);
        let mut on_free_list: HashMap<u32, u32> = HashMap::new();
        self.free.iter().for_each(|block| *on_free_list.entry(*block).or_default() += 1);

        if !self.copies.is_empty() || !self.held.is_empty() {
            return Err("copies of a finished step are still held".into());
        }
        if self.cache.as_ref().is_some_and(|cache| !cache.is_consistent()) {
            return Err("the prefix cache contradicts itself".into());
        }
        for block in 0..self.references.len() as u32 {
            let references = self.references[block as usize];
            let tables = in_tables.get(&block).copied().unwrap_or(0);
            let free = on_free_list.get(&block).copied().unwrap_or(0);
            let idle = u32::from(self.cache.as_ref().is_some_and(|cache| cache.is_idle(block)));
            if references != tables {
                return Err(format!("block {block} has {references} references and is in {tables} tables"));
            }
            if free + idle + u32::from(references > 0) != 1 {
                return Err(format!("block {block}: free {free}, idle {idle}, references {references}"));
            }
        }
        Ok(())
    }

    fn num_idle(&self) -> usize {
        self.cache.as_ref().map_or(0, PrefixCache::num_idle)
    }

    fn evict(&mut self) -> Option<u32> {
        let block = self.cache.as_mut()?.evict()?;
        if let Some(to_poison) = &mut self.to_poison {
            to_poison.push(block);
        }
        Some(block)
    }

    fn make_free(&mut self, block: u32) {
        self.free.push(block);
        if let Some(to_poison) = &mut self.to_poison {
            to_poison.push(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: [u32; 6] = [1, 2, 3, 4, 5, 6];

    fn hasher() -> ChainHasher {
        ChainHasher::new([0; 16], [0; 16], 2)
    }

    fn manager(num_blocks: usize) -> BlockManager {
        let config =
            EngineConfig { num_blocks, block_size: 2, poison_freed_blocks: true, ..EngineConfig::default() };
        BlockManager::new(&config, hasher())
    }

    fn check(manager: &BlockManager, tables: &[&Vec<u32>]) {
        manager.check_integrity(tables.iter().map(|table| table.as_slice())).unwrap();
    }

    #[test]
    fn cached_blocks_count_as_free_and_are_given_up_from_the_tail() {
        let mut manager = manager(3);
        let mut table: Vec<u32> = (0..3).map(|_| manager.allocate()).collect();
        let blocks = table.clone();
        let mut chain = hasher().start(None);
        (0..3).for_each(|i| manager.cache_block(&mut chain, &TOKENS, i, blocks[i]));
        manager.release_table(&mut table);
        assert_eq!(manager.counts(), BlockCounts { free: 0, used: 0, cached: 3 });
        assert_eq!(manager.available(), 3);

        let mut other = vec![manager.allocate()];
        assert_eq!(other, [blocks[2]]);
        assert_eq!(manager.find_prefix(&mut chain, &TOKENS, 3), blocks[..2]);
        check(&manager, &[&other]);
        manager.release_table(&mut other);
        assert_eq!(manager.counts(), BlockCounts { free: 1, used: 0, cached: 2 });
        check(&manager, &[]);
    }

    #[test]
    fn a_copys_source_is_not_handed_out_before_the_step_is_over() {
        let mut manager = manager(2);
        let source = manager.allocate();
        manager.share(source);
        let mut first = vec![source];
        let mut second = vec![manager.copy_on_write(source)];
        assert_eq!(manager.copies(), [BlockCopy { source, destination: second[0] }]);
        manager.release_table(&mut first);
        assert_eq!(manager.available(), 0, "the source is still to be read");
        assert!(manager.check_integrity([second.as_slice()].into_iter()).is_err());
        manager.finish_step();
        assert_eq!(manager.available(), 1);
        check(&manager, &[&second]);
        manager.release_table(&mut second);
        check(&manager, &[]);
    }

    #[test]
    fn whatever_becomes_free_is_poisoned_before_it_is_used_again() {
        let mut manager = manager(2);
        assert_eq!(manager.take_blocks_to_poison().len(), 2, "fresh memory");
        let mut table = vec![manager.allocate(), manager.allocate()];
        let (cached, plain) = (table[0], table[1]);
        manager.cache_block(&mut hasher().start(None), &TOKENS, 0, cached);
        manager.release_table(&mut table);
        assert_eq!(manager.take_blocks_to_poison(), [plain]);
        let mut table = vec![manager.allocate(), manager.allocate()];
        assert_eq!(manager.take_blocks_to_poison(), [cached], "evicted for a new use");
        manager.release_table(&mut table);
    }

    #[test]
    fn forgotten_blocks_are_free_or_stay_with_their_sequence() {
        let mut manager = manager(2);
        let mut table = vec![manager.allocate(), manager.allocate()];
        let blocks = table.clone();
        let mut chain = hasher().start(None);
        (0..2).for_each(|i| manager.cache_block(&mut chain, &TOKENS, i, blocks[i]));
        let mut other = vec![blocks[0]];
        manager.share(blocks[0]);
        manager.release_table(&mut table);
        manager.forget(&blocks);
        assert_eq!(manager.counts(), BlockCounts { free: 1, used: 1, cached: 0 });
        check(&manager, &[&other]);
        manager.release_table(&mut other);
        assert_eq!(manager.counts(), BlockCounts { free: 2, used: 0, cached: 0 });
    }

    #[test]
    fn new_memory_makes_every_block_free_and_unknown() {
        let mut manager = manager(4);
        manager.take_blocks_to_poison();
        let mut chain = hasher().start(None);
        let mut idle = vec![manager.allocate()];
        manager.cache_block(&mut chain, &TOKENS, 0, idle[0]);
        manager.release_table(&mut idle);
        let used = manager.allocate();
        manager.share(used);
        manager.cache_block(&mut chain, &TOKENS, 1, used);
        let copy = manager.copy_on_write(used);
        manager.share(copy);

        manager.reset();
        check(&manager, &[]);
        assert_eq!(manager.counts(), BlockCounts { free: 4, used: 0, cached: 0 });
        assert!(manager.copies().is_empty());
        assert!(manager.find_prefix(&mut chain, &TOKENS, 3).is_empty());
        let mut to_poison = manager.take_blocks_to_poison();
        to_poison.sort_unstable();
        assert_eq!(to_poison, [0, 1, 2, 3]);
        // A sequence that was there before enters its blocks anew.
        let mut table = vec![manager.allocate()];
        manager.cache_block(&mut chain, &TOKENS, 0, table[0]);
        assert_eq!(manager.find_prefix(&mut chain, &TOKENS, 3), table);
        manager.release_table(&mut table);
        check(&manager, &[]);
    }

    #[test]
    fn integrity_sees_a_leak_and_a_double_use() {
        let mut manager = manager(2);
        let block = manager.allocate();
        assert!(manager.check_integrity(std::iter::empty()).unwrap_err().contains("1 references"));
        let table = [block];
        assert!(manager.check_integrity([&table[..], &table[..]].into_iter()).is_err());
    }
}
