//! Compiled kernels on disk.
//!
//! One file for each (source, target, compiler): a head that repeats the key, a checksum, the image. A file that is not exactly
//! that is compiled again and replaced, whatever happened to it. Files are written beside their place and renamed into it, so any
//! number of processes may fill one directory: each sees a whole file or none. A directory that cannot be written costs time at
//! every start, nothing else.
//!
//! The directory is trusted like the program: who may write there may run code on the GPU.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Grows with the file's format.
const MAGIC: &[u8; 8] = b"TDMKRN\x00\x01";

/// No image is anywhere near this; a longer file is not one of ours.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// What an image depends on. Two that differ in anything never share a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheKey {
    name: String,
    /// Everything, as text; stored in the file and compared.
    text: String,
}

/// Where an image came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The file was there and whole.
    Cache,
    /// Compiled and written for the next start.
    Compiled,
    /// Compiled, but it could not be written, for this reason.
    CompiledInMemory(String),
}

/// A directory of compiled kernels.
#[derive(Clone, Debug)]
pub struct KernelCache {
    dir: Option<PathBuf>,
}

impl CacheKey {
    /// `name` becomes part of the file's name; `target` and `options` say what is made of `source`, `compiler` by what.
    pub fn new(name: &str, source: &str, target: &str, options: &[&str], compiler: (i32, i32)) -> Self {
        let plain = |text: &str| -> String {
            text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).collect()
        };
        let text = format!(
            "source {:032x} {}\ntarget {target}\noptions {}\ncompiler {}.{}\n",
            hash(source.as_bytes()),
            source.len(),
            options.join(" "),
            compiler.0,
            compiler.1
        );
        Self { name: format!("{}-{}", plain(name), plain(target)), text }
    }

    /// The name of the image's file.
    pub fn file_name(&self) -> String {
        format!("{}-{:032x}.bin", self.name, hash(self.text.as_bytes()))
    }
}

impl KernelCache {
    /// `kernels` in `TANDEM_CACHE_DIR`, else in `$XDG_CACHE_HOME/tandem`, else in `~/.cache/tandem`; without any of these, no
    /// directory.
    pub fn from_env() -> Self {
        Self { dir: crate::cache_folder().map(|dir| dir.join("kernels")) }
    }

    /// This directory; made when something is written.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: Some(dir.into()) }
    }

    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// The image of `key`: from its file, or from `compile`, which then fills the file.
    ///
    /// # Errors
    /// Those of `compile`. A cache that does not work is none, see [`Origin::CompiledInMemory`].
    pub fn get_or_compile<E>(
        &self,
        key: &CacheKey,
        compile: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<(Vec<u8>, Origin), E> {
        let Some(dir) = &self.dir else {
            return Ok((compile()?, Origin::CompiledInMemory("there is no cache directory".into())));
        };
        let path = dir.join(key.file_name());
        if let Some(image) = read(&path, key) {
            return Ok((image, Origin::Cache));
        }
        let image = compile()?;
        let origin = match write(dir, &path, &encode(key, &image)) {
            Ok(()) => Origin::Compiled,
            Err(error) => Origin::CompiledInMemory(format!("{}: {error}", path.display())),
        };
        Ok((image, origin))
    }
}

/// The image in the file, if that is whole and of this key.
fn read(path: &Path, key: &CacheKey) -> Option<Vec<u8>> {
    let file = File::open(path).ok()?;
    // Not what the directory says, but what can be read: nothing is allocated for a length that is only claimed.
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    decode(key, &bytes).map(<[u8]>::to_vec)
}

fn write(dir: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(dir)?;
    // Processes in different containers may share the directory and have the same number, so the name has more in it.
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let temporary = dir.join(format!(".{}-{}-{number}.tmp", std::process::id(), time.as_nanos()));
    let written = File::create_new(&temporary)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

// magic [8], length of the key u32, key, length of the image u64, checksum of key and image u128, image; little-endian.
fn encode(key: &CacheKey, image: &[u8]) -> Vec<u8> {
    let text = key.text.as_bytes();
    let mut bytes = Vec::with_capacity(MAGIC.len() + 4 + text.len() + 8 + 16 + image.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&u32::try_from(text.len()).expect("a key is short").to_le_bytes());
    bytes.extend_from_slice(text);
    bytes.extend_from_slice(&(image.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&checksum(text, image).to_le_bytes());
    bytes.extend_from_slice(image);
    bytes
}

fn decode<'a>(key: &CacheKey, bytes: &'a [u8]) -> Option<&'a [u8]> {
    let rest = bytes.strip_prefix(MAGIC)?;
    let (len, rest) = rest.split_first_chunk()?;
    let (text, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*len)).ok()?)?;
    let (image_len, rest) = rest.split_first_chunk()?;
    let (sum, image) = rest.split_first_chunk()?;
    let whole = text == key.text.as_bytes()
        && u64::from_le_bytes(*image_len) == image.len() as u64
        && u128::from_le_bytes(*sum) == checksum(text, image);
    whole.then_some(image)
}

fn checksum(text: &[u8], image: &[u8]) -> u128 {
    hash_from(hash(text), image)
}

/// FNV-1a of 128 bits: enough against accidents, and two sources with one hash would have to be as long too. Against malice
/// there is nothing to win: who can write a file here could as well write a valid one.
fn hash(bytes: &[u8]) -> u128 {
    hash_from(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d, bytes)
}

fn hash_from(start: u128, bytes: &[u8]) -> u128 {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(start, |hash, &byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests;
