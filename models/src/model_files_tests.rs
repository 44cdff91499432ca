//! Tests of recognising and opening models, on written files and on the golden checkpoints.

use super::*;
use crate::rope::RopeScaling;
use crate::safetensors::SafetensorsFile;
use crate::test_folder::TestFolder;
use crate::weights::Tensor;

const CONFIG: &str = r#"{"model_type":"llama","hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,
    "num_attention_heads":4,"num_key_value_heads":2,"vocab_size":40,"tie_word_embeddings":true}"#;

fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")).join(name)
}

fn dummy(path: &Path, dtype: DType, seed: u64) -> Result<ModelFiles, ModelError> {
    open_dummy(path, DummyOptions { dtype, seed, threads: 2 })
}

fn refusal(path: &Path) -> String {
    match open(path) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn golden_checkpoints_open() {
    let tp8 = open(&golden("tiny-tp8")).unwrap();
    assert_eq!(
        (&tp8.name[..], tp8.source, tp8.summary.dtype),
        ("tiny-tp8", ModelSource::Safetensors, DType::Bf16)
    );
    assert_eq!((tp8.config.num_heads, tp8.config.num_kv_heads, tp8.config.head_dim), (16, 8, 16));
    // Embedding and head 2 · 320 · 128; per layer q, o, k, v, three of 128 · 256, two norms; the last norm.
    let parameters = 2 * 320 * 128 + 3 * (2 * 256 * 128 + 2 * 128 * 128 + 3 * 128 * 256 + 2 * 128) + 128;
    assert_eq!((tp8.summary.num_parameters, tp8.summary.num_bytes), (parameters, 2 * parameters));

    let bias = open(&golden("tiny-bias")).unwrap().config;
    assert!(bias.attention_bias && bias.attention_output_bias && bias.mlp_bias && bias.tie_word_embeddings);
    assert_eq!((bias.head_dim, bias.query_size(), bias.vocab_size), (32, 192, 259));

    let llama31 = open(&golden("tiny-llama31")).unwrap();
    assert!(matches!(
        llama31.config.rope.scaling,
        RopeScaling::Llama3 { original_max_position_embeddings: 64, .. }
    ));
    assert_eq!((&llama31.config.eos_token_ids[..], llama31.config.bos_token_id), (&[2][..], Some(1)));
    assert_eq!((llama31.tokenizer.clone(), llama31.chat_template.clone()), (TokenizerFiles::None, None));

    let mha = open(&golden("tiny-mha-f16")).unwrap();
    assert_eq!((mha.summary.dtype, mha.config.group_size()), (DType::F16, 1));
    assert_eq!(mha.config.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    let norm: Tensor<'_> = mha.weights().tensor("model.norm.weight").unwrap();
    assert!(norm.to_f32_vector().unwrap().iter().all(|value| (0.3..1.7).contains(value)));
}

#[test]
fn golden_logits_are_readable_and_finite() {
    let file = SafetensorsFile::open(&golden("tiny-tp8/golden.safetensors")).unwrap();
    let (ids, logits) = (file.get("input_ids").unwrap(), file.get("logits").unwrap());
    assert_eq!(
        (ids.dtype, ids.shape, logits.dtype, logits.shape),
        ("I64", &[200][..], "F32", &[200, 320][..])
    );
    assert!(ids.data.as_chunks().0.iter().all(|&id| (0..320).contains(&i64::from_le_bytes(id))));
    assert!(logits.data.as_chunks().0.iter().all(|&value| f32::from_le_bytes(value).is_finite()));
}

#[test]
fn fingerprints_tell_models_apart_and_only_models() {
    let names = ["tiny-tp8", "tiny-bias", "tiny-llama31", "tiny-mha-f16"];
    let mut prints: Vec<[u8; 16]> =
        names.iter().map(|name| open(&golden(name)).unwrap().fingerprint).collect();
    assert_eq!(open(&golden("tiny-tp8")).unwrap().fingerprint, prints[0]);

    // The same files under another name are the same model; one changed weight or setting makes another.
    let copy = TestFolder::new();
    let weights = std::fs::read(golden("tiny-tp8/model.safetensors")).unwrap();
    let config = std::fs::read_to_string(golden("tiny-tp8/config.json")).unwrap();
    copy.write("config.json", &config);
    copy.write("model.safetensors", &weights);
    assert_eq!(open(copy.path()).unwrap().fingerprint, prints[0]);
    let mut changed = weights.clone();
    *changed.last_mut().unwrap() ^= 1;
    copy.write("model.safetensors", &changed);
    prints.push(open(copy.path()).unwrap().fingerprint);
    copy.write("model.safetensors", &weights);
    copy.write("config.json", config.replace("\"rope_theta\": 10000.0", "\"rope_theta\": 20000.0"));
    prints.push(open(copy.path()).unwrap().fingerprint);
    copy.write("config.json", &config);
    copy.write("tokenizer.json", "{}");
    prints.push(open(copy.path()).unwrap().fingerprint);
    let distinct: std::collections::BTreeSet<_> = prints.iter().collect();
    assert_eq!(distinct.len(), prints.len());
}

#[test]
fn the_tensor_table_is_compared_with_the_configuration() {
    let folder = TestFolder::new();
    folder.write("model.safetensors", std::fs::read(golden("tiny-tp8/model.safetensors")).unwrap());
    let config = std::fs::read_to_string(golden("tiny-tp8/config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(config.contains(from));
        folder.write("config.json", config.replace(from, to));
        refusal(folder.path())
    };
    assert!(
        with("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4")
            .contains("tensor model.layers.3.input_layernorm.weight: is missing")
    );
    assert!(with("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2").contains("tensor model.layers.2."));
    assert!(
        with("\"vocab_size\": 320", "\"vocab_size\": 321")
            .contains("tensor model.embed_tokens.weight: shape [320, 128], expected [321, 128]")
    );
    assert!(
        with("\"attention_bias\": false", "\"attention_bias\": true")
            .contains("self_attn.q_proj.bias: is missing")
    );
    assert!(
        with("\"head_dim\": 16", "\"head_dim\": 8")
            .contains("self_attn.q_proj.weight: shape [256, 128], expected [128, 128]")
    );
    folder.write(
        "config.json",
        config.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true"),
    );
    assert_eq!(
        open(folder.path()).unwrap().summary.num_parameters,
        open(&golden("tiny-tp8")).unwrap().summary.num_parameters - 320 * 128
    );
}

#[test]
fn folders_are_recognised_or_explained() {
    let folder = TestFolder::new();
    assert!(refusal(&folder.path().join("nothing")).contains("No such file"));
    assert!(refusal(Path::new("owner/Model-1B-Instruct")).contains("nothing is downloaded from a hub"));
    assert!(
        refusal(folder.path())
            .ends_with("neither a config.json with safetensors nor a .gguf file in this folder")
    );
    folder.write("config.json", CONFIG);
    assert!(
        refusal(folder.path()).ends_with(
            "config.json is there, but neither model.safetensors nor model.safetensors.index.json"
        )
    );
    let gguf = folder.write(
        "a.gguf",
        std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/gguf/llama-q4_1")).unwrap(),
    );
    let by_folder = open(folder.path()).unwrap();
    let by_file = open(&gguf).unwrap();
    assert_eq!((by_folder.source, by_folder.fingerprint), (ModelSource::Gguf, by_file.fingerprint));
    assert_eq!((&by_file.name[..], by_file.summary.dtype), ("a", DType::Q4_1));
    folder.write("b.gguf", "");
    assert!(
        refusal(folder.path()).ends_with("2 .gguf files in this folder, name one of them: a.gguf, b.gguf")
    );
    assert!(refusal(&folder.path().join("b.gguf")).ends_with("b.gguf: the file is empty"));
    assert!(refusal(&folder.path().join("config.json")).ends_with("config.json: not a GGUF file"));
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_refused_at_once() {
    assert!(refusal(Path::new("/dev/zero")).ends_with("/dev/zero: not a regular file"));
    let error = dummy(Path::new("/dev/null"), DType::F32, 1).err().unwrap().to_string();
    assert!(error.ends_with("/dev/null: not a regular file"), "{error}");
    let folder = TestFolder::new();
    folder.write("config.json/file", "");
    assert!(dummy(folder.path(), DType::F32, 1).err().unwrap().to_string().ends_with("not a regular file"));
}

#[test]
fn dummy_models_need_only_a_configuration() {
    let folder = TestFolder::new();
    let file = folder.write("config.json", CONFIG);
    let by_folder = dummy(folder.path(), DType::Q4_1, 3).unwrap();
    let by_file = dummy(&file, DType::Q4_1, 3).unwrap();
    let other_seed = dummy(&file, DType::Q4_1, 4).unwrap();
    assert_eq!((by_folder.fingerprint, &by_folder.name), (by_file.fingerprint, &by_file.name));
    assert_eq!(by_file.name, folder.path().file_name().unwrap().to_string_lossy());
    assert_ne!(by_file.fingerprint, other_seed.fingerprint);
    assert_eq!(
        (by_file.source, by_file.summary.dtype, &by_file.tokenizer),
        (ModelSource::Dummy, DType::Q4_1, &TokenizerFiles::None)
    );
    let embedding = by_file.weights().tensor("model.embed_tokens.weight").unwrap();
    assert_eq!((&embedding.shape[..], embedding.data.len()), (&[40, 64][..], 40 * 40));
}
