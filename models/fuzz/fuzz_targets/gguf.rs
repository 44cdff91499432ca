//! Any bytes either make a checked header whose ranges lie in the file, or an error; never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tandem_models::gguf::Header;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = Header::read("fuzz", bytes) {
        for (info, range) in header.tensors.values() {
            assert_eq!(info.num_bytes(), Some(bytes[range.clone()].len() as u64));
        }
    }
});
