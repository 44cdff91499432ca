//! Tests of safetensors weights: single file, shards, and names that lead out of the folder.

use super::*;
use crate::safetensors::tests::file_bytes;
use crate::test_folder::TestFolder;

/// A shard with one BF16 tensor of two elements.
fn shard(name: &str) -> Vec<u8> {
    file_bytes(&format!(r#"{{"{name}":{{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}}}"#), &[1, 2, 3, 4])
}

fn index(entries: &str) -> String {
    format!(r#"{{"metadata":{{"total_size":8}},"weight_map":{{{entries}}}}}"#)
}

fn refusal(folder: &TestFolder) -> String {
    match open(folder.path()) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn shards_are_joined_by_the_index() {
    let folder = TestFolder::new();
    folder.write("one.safetensors", shard("a"));
    folder.write("two.safetensors", shard("b"));
    folder.write(INDEX, index(r#""a":"one.safetensors","b":"two.safetensors""#));
    let weights = open(folder.path()).unwrap();
    assert_eq!(weights.names(), ["a", "b"]);
    assert_eq!(weights.tensor("b").unwrap().data[..], [1, 2, 3, 4]);
    assert_eq!(weights.sample("b").unwrap(), [1, 2, 3, 4]);
    assert!(!weights.contains("c") && weights.tensor("c").is_err());
}

#[test]
fn index_and_shards_must_agree() {
    let folder = TestFolder::new();
    folder.write("one.safetensors", shard("a"));
    folder.write("two.safetensors", shard("a"));
    folder.write(INDEX, index(r#""a":"one.safetensors","b":"one.safetensors""#));
    assert!(refusal(&folder).ends_with("tensor b: is not in the shard that the index names"));
    folder.write(INDEX, index(r#""a":"one.safetensors","b":"two.safetensors""#));
    assert!(refusal(&folder).ends_with("tensor a: is not listed in the index"));
    folder.write(INDEX, "{}");
    assert!(refusal(&folder).ends_with("weight_map: is missing"));
    folder.write(INDEX, index(r#""a":7"#));
    assert!(refusal(&folder).ends_with("weight_map.a: is not a file name"));
    folder.write(INDEX, index(r#""a":"gone.safetensors""#));
    assert!(refusal(&folder).contains("gone.safetensors: No such file"));
}

#[test]
fn shard_names_stay_in_the_folder() {
    let outside = TestFolder::new();
    let target = outside.write("outside.safetensors", shard("a"));
    let folder = TestFolder::new();
    folder.write("sub/one.safetensors", shard("a"));
    let absolute = target.to_str().unwrap();
    for name in [
        "../outside.safetensors",
        "sub/one.safetensors",
        "./one.safetensors",
        "",
        ".",
        "..",
        "a\\\\b",
        absolute,
        "one.safetensors/",
    ] {
        folder.write(INDEX, index(&format!(r#""a":"{name}""#)));
        assert!(refusal(&folder).contains("not a plain file name"), "{name}: {}", refusal(&folder));
    }
    folder.write(INDEX, index("\"a\":\"one\\u0000.safetensors\""));
    assert!(refusal(&folder).contains("not a plain file name"));
}

#[cfg(unix)]
#[test]
fn links_may_lead_to_the_hub_cache_and_nowhere_else() {
    use std::os::unix::fs::symlink;
    let repository = TestFolder::new();
    let blob = repository.write("blobs/0123", shard("a"));
    let elsewhere = repository.write("elsewhere/0123", shard("a"));
    let index_json = repository.write(&format!("snapshots/main/{INDEX}"), index(r#""a":"one.safetensors""#));
    let snapshot = index_json.parent().unwrap();
    let link = snapshot.join("one.safetensors");
    symlink(&blob, &link).unwrap();
    assert_eq!(open(snapshot).unwrap().names(), ["a"]);
    std::fs::remove_file(&link).unwrap();
    symlink(&elsewhere, &link).unwrap();
    let error = open(snapshot).err().unwrap().to_string();
    assert!(error.ends_with("shard one.safetensors: a link out of the folder"), "{error}");
    // A link inside the folder, as Kubernetes mounts have them.
    std::fs::remove_file(&link).unwrap();
    std::fs::create_dir(snapshot.join("..data")).unwrap();
    std::fs::write(snapshot.join("..data/one.safetensors"), shard("a")).unwrap();
    symlink("..data/one.safetensors", &link).unwrap();
    assert_eq!(open(snapshot).unwrap().names(), ["a"]);
}

#[test]
fn types_the_network_can_not_use_are_refused_by_name() {
    for dtype in ["F8_E5M2", "I8", "U8"] {
        let folder = TestFolder::new();
        folder.write(
            SINGLE,
            file_bytes(
                &format!(r#"{{"w":{{"dtype":"{dtype}","shape":[4],"data_offsets":[0,4]}}}}"#),
                &[0; 4],
            ),
        );
        assert!(refusal(&folder).ends_with(&format!("tensor w: type {dtype} is not supported")));
    }
}

/// Two matrices in e4m3, one with a scale and one with a scale for each row, and what else such checkpoints have.
fn fp8_file(scale_of_b: &str) -> Vec<u8> {
    let header = format!(
        r#"{{"a.weight":{{"dtype":"F8_E4M3","shape":[1,2],"data_offsets":[0,2]}},
            "a.weight_scale":{{"dtype":"BF16","shape":[],"data_offsets":[2,4]}},
            "a.input_scale":{{"dtype":"BF16","shape":[1],"data_offsets":[4,6]}},
            "b.weight":{{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[6,10]}},
            "b.weight{scale_of_b}":{{"dtype":"F32","shape":[2,1],"data_offsets":[10,18]}},
            "norm":{{"dtype":"BF16","shape":[1],"data_offsets":[18,20]}}}}"#
    );
    let data = [
        &[0x38, 0xc0][..],
        &half::bf16::from_f32(0.5).to_le_bytes(),
        &half::bf16::from_f32(9.0).to_le_bytes(),
        &[0x38, 0x40, 0x30, 0xb8],
        &0.25f32.to_le_bytes(),
        &2.0f32.to_le_bytes(),
        &half::bf16::from_f32(7.0).to_le_bytes(),
    ];
    file_bytes(&header, &data.concat())
}

#[test]
fn matrices_in_fp8_are_handed_out_in_bf16() {
    let folder = TestFolder::new();
    folder.write(SINGLE, fp8_file("_scale"));
    let weights = open(folder.path()).unwrap();
    assert_eq!(weights.names(), ["a.weight", "b.weight", "norm"]);
    let values = |name: &str| weights.tensor(name).unwrap().to_f32_values().unwrap();
    assert_eq!(values("a.weight"), [0.5, -1.0]);
    assert_eq!(values("b.weight"), [0.25, 0.5, 1.0, -2.0]);
    assert_eq!(weights.info("b.weight").unwrap().dtype, DType::Bf16);
    let (a, b) = (weights.fp8("a.weight").unwrap(), weights.fp8("b.weight").unwrap());
    assert_eq!((a.codes, a.cols, a.scales.of_row(0)), (&[0x38, 0xc0][..], 2, 0.5));
    assert_eq!((b.codes.len(), b.scales.of_row(0), b.scales.of_row(1)), (4, 0.25, 2.0));
    assert!(weights.fp8("norm").is_none() && weights.fp8("c.weight").is_none());
    // The scale is part of what tells a model from another.
    assert_eq!(weights.sample("a.weight").unwrap().len(), 2 + 4);
    assert_eq!(weights.sample("b.weight").unwrap().len(), 4 + 8);

    folder.write(SINGLE, fp8_file("_other"));
    assert!(
        refusal(&folder).contains("tensor b.weight: is F8_E4M3 and has no scale"),
        "{}",
        refusal(&folder)
    );
}
