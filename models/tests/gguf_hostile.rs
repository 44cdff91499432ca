//! Broken GGUF files: every seed of the fuzz target, thousands of changes to each, none of which may panic or take
//! more memory than a small multiple of the file's size.
//!
//! A binary of its own with a single test, because the allocator counts for the whole process.

use peak_alloc::PeakAlloc;
use std::path::Path;
use tandem_models::gguf::Header;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// The costliest byte of a file is one of an empty string in a list: 8 bytes become a `String` of 24, and a list of
/// metadata or tensors costs about as much per entry. What is constant is a message and the first nodes of maps.
const BYTES_PER_FILE_BYTE: usize = 8;
const CONSTANT_BYTES: usize = 16 << 10;

#[test]
fn broken_files_are_refused_within_bounds() {
    let seeds = seeds();
    assert!(seeds.len() >= 6, "the corpus is there");
    let (mut num_read, mut num_refused) = (0u32, 0u32);
    for (name, seed) in &seeds {
        let header_len = header_len(seed);
        let mut count = |accepted: bool| if accepted { num_read += 1 } else { num_refused += 1 };
        count(read_within_bounds(name, seed));
        mutations(seed, header_len, |bytes| count(read_within_bounds(name, bytes)));
    }
    assert!(num_read > 1_000, "{num_read} changed files are still valid");
    assert!(num_refused > 10_000, "{num_refused} changed files are refused");

    // Files made to cost as much memory per byte as can be: nothing but the smallest entries of each kind.
    let tokens = costly_file(1_000, 300_000, 0);
    assert!(read_within_bounds("tokens", &tokens));
    let metadata = costly_file(60_000, 1, 0);
    assert!(read_within_bounds("metadata", &metadata));
    let tensors = costly_file(0, 1, 100_000);
    assert!(!read_within_bounds("tensors", &tensors), "no Llama has these tensors");
}

fn read_within_bounds(name: &str, bytes: &[u8]) -> bool {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let outcome = Header::read("seed.gguf", bytes);
    let taken = ALLOCATOR.peak_usage().saturating_sub(before);
    let limit = BYTES_PER_FILE_BYTE * bytes.len() + CONSTANT_BYTES;
    assert!(taken <= limit, "{name}: {taken} bytes of memory for a file of {}", bytes.len());
    match outcome {
        Ok(header) => {
            for (info, range) in header.tensors.values() {
                assert_eq!(info.num_bytes(), Some(bytes[range.clone()].len() as u64));
            }
            true
        }
        Err(error) => {
            let message = error.to_string();
            assert!(
                message.starts_with("seed.gguf: ") && !message.contains('\n') && message.len() < 2_000,
                "{message}"
            );
            false
        }
    }
}

/// A valid configuration with `num_metadata` needless keys, `num_tokens` empty tokens and `num_tensors` tensors.
fn costly_file(num_metadata: usize, num_tokens: usize, num_tensors: usize) -> Vec<u8> {
    let string = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut entries: Vec<Vec<u8>> =
        vec![[string("general.architecture"), 8u32.to_le_bytes().to_vec(), string("llama")].concat()];
    for (key, value) in [
        ("llama.block_count", 1u32),
        ("llama.context_length", 1),
        ("llama.embedding_length", 32),
        ("llama.feed_forward_length", 32),
        ("llama.attention.head_count", 1),
    ] {
        entries.push([&string(key)[..], &4u32.to_le_bytes(), &value.to_le_bytes()].concat());
    }
    let epsilon = [&6u32.to_le_bytes()[..], &1e-5f32.to_le_bytes()].concat();
    entries.push([string("llama.attention.layer_norm_rms_epsilon"), epsilon].concat());
    entries.push([string("tokenizer.ggml.model"), 8u32.to_le_bytes().to_vec(), string("gpt2")].concat());
    let tokens = [
        &9u32.to_le_bytes()[..],
        &8u32.to_le_bytes(),
        &(num_tokens as u64).to_le_bytes(),
        &vec![0; 8 * num_tokens],
    ];
    entries.push([string("tokenizer.ggml.tokens"), tokens.concat()].concat());
    entries.extend(
        (0..num_metadata).map(|idx| [&string(&format!("{idx:x}"))[..], &0u32.to_le_bytes(), &[0]].concat()),
    );

    let mut file = [
        &b"GGUF"[..],
        &3u32.to_le_bytes(),
        &(num_tensors as u64).to_le_bytes(),
        &(entries.len() as u64).to_le_bytes(),
    ]
    .concat();
    entries.iter().for_each(|entry| file.extend(entry));
    for idx in 0..num_tensors {
        let numbers =
            [&1u32.to_le_bytes()[..], &1u64.to_le_bytes(), &0u32.to_le_bytes(), &0u64.to_le_bytes()].concat();
        file.extend([string(&format!("{idx:x}")), numbers].concat());
    }
    file.resize(file.len().next_multiple_of(32) + 4, 0);
    file
}

/// Deterministic changes of the part before the tensors' data.
fn mutations(seed: &[u8], header_len: usize, mut try_one: impl FnMut(&[u8])) {
    let mut bytes = seed.to_vec();
    // One flipped bit anywhere.
    for bit in 0..header_len * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        try_one(&bytes);
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    // Cut off anywhere.
    for len in 0..header_len {
        try_one(&seed[..len]);
    }
    // Extreme numbers over anything, lengths and counts among it.
    for at in 0..header_len.saturating_sub(8) {
        for extreme in [0, 1, 1 << 32, i64::MAX as u64, u64::MAX, seed.len() as u64] {
            bytes[at..at + 8].copy_from_slice(&extreme.to_le_bytes());
            try_one(&bytes);
        }
        bytes[at..at + 8].copy_from_slice(&seed[at..at + 8]);
    }
    // Several random bytes at once.
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % below
    };
    for _ in 0..2_000 {
        let mut bytes = seed.to_vec();
        for _ in 0..=random(6) {
            bytes[random(header_len)] = random(256) as u8;
        }
        try_one(&bytes);
    }
}

/// The data of the seeds is all zeros but for a few floats, so the header ends where the long run of zeros begins.
fn header_len(seed: &[u8]) -> usize {
    let data_len = seed.iter().rev().take_while(|&&byte| byte == 0).count();
    (seed.len() - data_len + 16).min(seed.len())
}

fn seeds() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/gguf");
    let mut seeds: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .expect("the corpus is there")
        .map(|entry| entry.expect("a file").path())
        .map(|path| (path.display().to_string(), std::fs::read(&path).expect("a readable seed")))
        .collect();
    seeds.sort();
    seeds
}
