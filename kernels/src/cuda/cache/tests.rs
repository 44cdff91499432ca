use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Barrier;
use std::sync::atomic::AtomicBool;

use super::*;

/// A folder of one test, gone afterwards.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = crate::stub::build_dir().join(format!("cache-tests/{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn key(source: &str) -> CacheKey {
    CacheKey::new("add.cu", source, "sm_90a", &["--std=c++17"], (13, 0))
}

fn get(cache: &KernelCache, key: &CacheKey, image: &[u8]) -> (Vec<u8>, Origin) {
    let Ok(got) = cache.get_or_compile(key, || Ok::<_, Infallible>(image.to_vec()));
    got
}

#[test]
fn an_image_is_compiled_once() {
    let folder = Folder::new("once");
    let cache = KernelCache::at(&folder.0);
    assert_eq!(get(&cache, &key("a"), b"image"), (b"image".to_vec(), Origin::Compiled));
    assert_eq!(get(&cache, &key("a"), b"other"), (b"image".to_vec(), Origin::Cache));
    assert_eq!(get(&cache, &key("b"), b"other"), (b"other".to_vec(), Origin::Compiled));
    // No temporary file is left.
    let names: BTreeSet<_> = fs::read_dir(&folder.0)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names, BTreeSet::from([key("a").file_name(), key("b").file_name()]));
}

#[test]
fn a_key_is_everything_that_an_image_depends_on() {
    let keys = [
        CacheKey::new("add.cu", "a", "sm_90a", &["-x"], (13, 0)),
        CacheKey::new("add.cu", "b", "sm_90a", &["-x"], (13, 0)),
        CacheKey::new("add.cu", "a", "sm_80", &["-x"], (13, 0)),
        CacheKey::new("add.cu", "a", "sm_90a", &["-y"], (13, 0)),
        CacheKey::new("add.cu", "a", "sm_90a", &["-x"], (13, 1)),
        CacheKey::new("add.cu", "a", "sm_90a", &["-x"], (12, 0)),
        CacheKey::new("sub.cu", "a", "sm_90a", &["-x"], (13, 0)),
    ];
    let names: BTreeSet<_> = keys.iter().map(CacheKey::file_name).collect();
    assert_eq!(names.len(), keys.len(), "{names:?}");
    // Whatever a source is called, its file is in the folder.
    let name = CacheKey::new("../../etc/a b", "", "sm_80", &[], (13, 0)).file_name();
    assert!(
        name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) && !name.contains(".."),
        "{name}"
    );
}

#[test]
fn hashes_are_those_of_fnv_1a() {
    assert_eq!(hash(b""), 0x6c62272e07bb014262b821756295c58d);
    assert_eq!(hash(b"a"), 0xd228cb696f1a8caf78912b704e4a8964);
}

#[test]
fn any_damage_is_compiled_again() {
    let folder = Folder::new("damage");
    let cache = KernelCache::at(&folder.0);
    let path = folder.0.join(key("a").file_name());
    get(&cache, &key("a"), b"image");
    let whole = fs::read(&path).unwrap();
    let mut damaged: Vec<Vec<u8>> = (0..whole.len()).map(|len| whole[..len].to_vec()).collect();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        damaged.push(bytes);
    }
    damaged.push([&whole[..], b"x"].concat());
    damaged.push([&MAGIC[..], &[0xff; 64]].concat());
    for bytes in damaged {
        fs::write(&path, &bytes).unwrap();
        assert_eq!(get(&cache, &key("a"), b"image").1, Origin::Compiled, "{bytes:?}");
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
    // Another key's file under this key's name, as after a collision of hashes.
    get(&cache, &key("b"), b"other");
    fs::copy(folder.0.join(key("b").file_name()), &path).unwrap();
    assert_eq!(get(&cache, &key("a"), b"image"), (b"image".to_vec(), Origin::Compiled));
}

#[test]
fn without_a_place_to_write_images_stay_in_memory() {
    let folder = Folder::new("unwritable");
    fs::create_dir_all(&folder.0).unwrap();
    // A file in the place of the folder stops root too, which permissions do not.
    let file = folder.0.join("file");
    fs::write(&file, b"").unwrap();
    for cache in [KernelCache::at(file.join("below")), KernelCache::at(&file), KernelCache { dir: None }] {
        for _ in 0..2 {
            let (image, origin) = get(&cache, &key("a"), b"image");
            assert_eq!(image, b"image");
            let Origin::CompiledInMemory(reason) = origin else { panic!("{origin:?}") };
            assert!(!reason.is_empty());
        }
    }
    // A folder in the place of the image: it cannot be renamed over, and no temporary file stays.
    let cache = KernelCache::at(&folder.0);
    fs::create_dir_all(folder.0.join(key("a").file_name()).join("x")).unwrap();
    assert!(matches!(get(&cache, &key("a"), b"image").1, Origin::CompiledInMemory(_)));
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 2);
}

#[test]
fn a_source_that_does_not_compile_leaves_nothing() {
    let folder = Folder::new("error");
    let cache = KernelCache::at(&folder.0);
    assert_eq!(cache.get_or_compile(&key("a"), || Err("syntax")).unwrap_err(), "syntax");
    assert!(!folder.0.exists());
}

#[test]
fn many_writers_at_once_leave_a_whole_file() {
    let folder = Folder::new("many");
    let cache = KernelCache::at(&folder.0);
    let image: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8).collect();
    const WRITERS: usize = 8;
    for round in 0..4 {
        let key = key(&round.to_string());
        let barrier = Barrier::new(WRITERS);
        std::thread::scope(|scope| {
            for _ in 0..WRITERS {
                scope.spawn(|| {
                    barrier.wait();
                    // Readers too, all the while.
                    for _ in 0..4 {
                        let (got, origin) = get(&cache, &key, &image);
                        assert!(got == image && !matches!(origin, Origin::CompiledInMemory(_)), "{origin:?}");
                        if round == 3 {
                            let _ = fs::remove_file(folder.0.join(key.file_name()));
                        }
                    }
                });
            }
        });
    }
    assert!(
        fs::read_dir(&folder.0)
            .unwrap()
            .all(|entry| { entry.unwrap().file_name().to_string_lossy().ends_with(".bin") })
    );
}

#[test]
fn a_reader_never_sees_half_of_a_file() {
    let folder = Folder::new("half");
    let path = folder.0.join(key("a").file_name());
    let image = vec![7; 1 << 20];
    let bytes = encode(&key("a"), &image);
    write(&folder.0, &path, &bytes).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..30 {
                write(&folder.0, &path, &bytes).unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
        let mut reads = 0;
        while !done.load(Ordering::SeqCst) || reads == 0 {
            assert!(read(&path, &key("a")).is_some(), "read {reads}");
            reads += 1;
        }
    });
}
