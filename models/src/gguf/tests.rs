//! Tests of the GGUF reader on files that the tests write.

use super::test_file::*;
use super::*;
use crate::rope::{RopeConfig, RopeScaling};
use crate::weights::RowOrder;
use tandem_kernels::DType;

fn read(file: &TestFile) -> Result<Header, ModelError> {
    Header::read("m.gguf", &file.bytes())
}

fn refusal(change: impl FnOnce(&mut TestFile)) -> String {
    let mut file = TestFile::llama(0);
    change(&mut file);
    read(&file).expect_err("refused").to_string()
}

fn with(change: impl FnOnce(&mut TestFile)) -> Header {
    let mut file = TestFile::llama(0);
    change(&mut file);
    read(&file).expect("accepted")
}

#[test]
fn a_whole_file_is_understood() {
    for version in [2, 3] {
        let header = with(|file| file.version = version);
        let config = &header.config;
        assert_eq!((config.hidden_size, config.intermediate_size, config.num_layers), (32, 64, 1));
        assert_eq!(
            (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size),
            (4, 2, 16, 8)
        );
        assert_eq!((config.max_position_embeddings, config.rms_norm_eps), (128, 1e-5));
        assert_eq!(
            config.rope,
            RopeConfig { theta: 100_000.0, rotary_dim: 16, scaling: RopeScaling::Default }
        );
        assert!(config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
        assert_eq!((&config.eos_token_ids[..], config.bos_token_id), (&[2][..], Some(1)));
        let TokenizerFiles::Gguf(tokenizer) = &header.tokenizer else { panic!("no tokenizer") };
        assert_eq!((&tokenizer.model[..], &tokenizer.pre[..]), ("gpt2", "smollm"));
        assert_eq!((tokenizer.tokens.len(), &tokenizer.tokens[7][..]), (8, "Ġa"));
        assert_eq!(tokenizer.merges, ["a b", "Ġ a"]);
        assert_eq!(tokenizer.token_types, [3, 3, 3, 1, 1, 1, 1, 1]);
        assert_eq!(
            (tokenizer.bos, tokenizer.eos, tokenizer.unknown, tokenizer.padding),
            (Some(1), Some(2), None, None)
        );
        assert!(!tokenizer.add_bos && !tokenizer.add_eos && !tokenizer.add_space_prefix);
        assert_eq!(header.chat_template.as_deref(), Some("{{ messages[0].content }}"));
    }
}

#[test]
fn tensors_have_canonical_names_natural_shapes_and_their_bytes() {
    let mut file = TestFile::llama(3);
    file.alignment = 64;
    file.set("general.alignment", u32_value(64));
    let data: Vec<u8> = (0..32 * 20u32).map(|value| (value % 255) as u8).collect();
    file.tensor_mut("blk.0.attn_k.weight").data.clone_from(&data);
    let bytes = file.bytes();
    let header = Header::read("m.gguf", &bytes).unwrap();
    let (info, range) = &header.tensors["model.layers.0.self_attn.k_proj.weight"];
    assert_eq!(
        (info.dtype, &info.shape[..], info.row_order),
        (DType::Q4_1, &[32, 32][..], RowOrder::GgufRope { head_dim: 16 })
    );
    assert_eq!(bytes[range.clone()], data);
    assert_eq!(header.tensors.len(), 2 + 9);
    let (norm, _) = &header.tensors["model.norm.weight"];
    assert_eq!((norm.dtype, &norm.shape[..], norm.row_order), (DType::F32, &[32][..], RowOrder::Natural));
}

#[test]
fn every_supported_type_is_read() {
    for (type_id, dtype) in [
        (0, DType::F32),
        (1, DType::F16),
        (2, DType::Q4_0),
        (3, DType::Q4_1),
        (8, DType::Q8_0),
        (30, DType::Bf16),
    ] {
        let header = read(&TestFile::llama(type_id)).unwrap();
        assert_eq!(header.tensors["model.embed_tokens.weight"].0.dtype, dtype);
    }
}

#[test]
fn other_types_are_refused_by_name() {
    let of_type = |type_id| refusal(|file| file.tensor_mut("blk.0.ffn_down.weight").type_id = type_id);
    assert_eq!(of_type(14), "m.gguf: tensor blk.0.ffn_down.weight: type Q6_K is not supported");
    assert_eq!(of_type(12), "m.gguf: tensor blk.0.ffn_down.weight: type Q4_K is not supported");
    assert_eq!(of_type(999), "m.gguf: tensor blk.0.ffn_down.weight: type number 999 is not supported");
}

#[test]
fn other_files_are_refused_by_name() {
    assert_eq!(
        refusal(|file| file.version = 1),
        "m.gguf: GGUF version 1 is not supported, convert the file again"
    );
    assert_eq!(
        refusal(|file| file.version = 3u32.swap_bytes()),
        "m.gguf: big-endian GGUF files are not supported"
    );
    assert_eq!(refusal(|file| file.version = 4), "m.gguf: GGUF version 4 is not supported");
    assert_eq!(Header::read("m.gguf", b"ggml\0\0\0\0").unwrap_err().to_string(), "m.gguf: not a GGUF file");
    assert!(Header::read("m.gguf", b"GG").unwrap_err().to_string().contains("ends inside the magic number"));
    let architecture = refusal(|file| _ = file.set("general.architecture", string_value("qwen2")));
    assert_eq!(architecture, "m.gguf: general.architecture qwen2 is not supported");
    let adapter = refusal(|file| _ = file.set("general.type", string_value("adapter")));
    assert_eq!(adapter, "m.gguf: general.type adapter is not supported");
    assert!(
        refusal(|file| _ = file.set("split.count", u32_value(3))).contains("split.count 3 is not supported")
    );
    assert!(refusal(|file| _ = file.set("llama.expert_count", u32_value(8))).contains("expert_count 8"));
}

#[test]
fn counts_that_the_file_can_not_hold_are_refused_before_they_cost_memory() {
    let good = TestFile::llama(0).bytes();
    for at in [8, 16] {
        for count in [u64::MAX, u64::MAX / 8, 1 << 40, 100_000, 60_000] {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            let error = Header::read("m.gguf", &bytes).unwrap_err().to_string();
            assert!(error.contains("the limit is") || error.contains("do not fit"), "{error}");
        }
    }
    let long_list = list(ValueType::String, 1 << 60, &[]);
    assert!(
        refusal(|file| _ = file.set("x", long_list)).contains("x: 1152921504606846976 elements do not fit")
    );
    let long_text = typed(ValueType::String, &u64::MAX.to_le_bytes());
    assert!(refusal(|file| _ = file.set("x", long_text)).contains("the file ends inside the value of x"));
}

#[test]
fn all_value_types_and_nested_lists_are_read() {
    let inner =
        |values: &[u8]| [&0u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes(), values].concat();
    let nested = list(ValueType::Array, 2, &[inner(&[1, 2]), inner(&[])].concat());
    let mut file = TestFile::llama(0);
    file.set("u8", typed(ValueType::U8, &[200])).set("i8", typed(ValueType::I8, &[0xff]));
    file.set("u16", typed(ValueType::U16, &[1, 2])).set("i16", typed(ValueType::I16, &[0xfe, 0xff]));
    file.set("u64", typed(ValueType::U64, &u64::MAX.to_le_bytes()))
        .set("i64", typed(ValueType::I64, &i64::MIN.to_le_bytes()));
    file.set("f64", typed(ValueType::F64, &0.5f64.to_le_bytes())).set("nested", nested);
    file.set("flags", list(ValueType::Bool, 2, &[0, 1])).set("scores", f32_list(&[0.5, -1.0]));
    let bytes = file.bytes();
    let gguf = Gguf::parse("m.gguf", &bytes).unwrap();
    assert_eq!((gguf.metadata["u8"], gguf.metadata["i8"]), (Value::Unsigned(200), Value::Signed(-1)));
    assert_eq!((gguf.metadata["u16"], gguf.metadata["i16"]), (Value::Unsigned(513), Value::Signed(-2)));
    assert_eq!(
        (gguf.metadata["u64"], gguf.metadata["i64"]),
        (Value::Unsigned(u64::MAX), Value::Signed(i64::MIN))
    );
    assert_eq!(gguf.metadata["f64"], Value::Float(0.5));
    let Value::Array(nested) = gguf.metadata["nested"] else { panic!("not a list") };
    assert_eq!((nested.len(), nested.element_type()), (2, ValueType::Array));
    let Value::Array(scores) = gguf.metadata["scores"] else { panic!("not a list") };
    assert_eq!(scores.f32s().unwrap().collect::<Vec<_>>(), [0.5, -1.0]);
    assert!(scores.i32s().is_none() && scores.strings().is_none());
}

#[test]
fn malformed_metadata_is_refused_by_key() {
    let deep = (0..5)
        .fold(vec![], |inner: Vec<u8>, _| [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &inner].concat());
    assert!(
        refusal(|file| _ = file.set("deep", typed(ValueType::Array, &deep)))
            .contains("deep: lists in more than 4 levels")
    );
    assert!(
        refusal(|file| _ = file.set("x", 77u32.to_le_bytes().to_vec()))
            .contains("x: value type 77 is unknown")
    );
    assert!(
        refusal(|file| _ = file.set("x", typed(ValueType::Bool, &[2])))
            .contains("x: 2 is neither true nor false")
    );
    assert!(
        refusal(|file| _ = file.set("x", list(ValueType::Bool, 1, &[2])))
            .contains("x: an element is neither")
    );
    let latin = typed(ValueType::String, &[&1u64.to_le_bytes()[..], &[0xe9]].concat());
    assert!(refusal(|file| _ = file.set("x", latin)).contains("the value of x is not UTF-8"));
    let twice = refusal(|file| file.metadata.push(("llama.block_count".into(), u32_value(2))));
    assert_eq!(twice, "m.gguf: llama.block_count: is there twice");
    assert!(refusal(|file| file.metadata.push((String::new(), u32_value(2)))).contains("key is empty"));
    for alignment in [0, 3, 48, 1 << 21] {
        assert!(
            refusal(|file| _ = file.set("general.alignment", u32_value(alignment)))
                .contains("general.alignment")
        );
    }
}

#[test]
fn tensor_ranges_lie_in_the_file_and_do_not_overlap() {
    let offset = |offset| refusal(|file| file.tensor_mut("blk.0.attn_q.weight").offset = Some(offset));
    assert!(offset(u64::MAX - 31).contains("reach past the end of the file"));
    assert!(offset(1 << 40).contains("reach past the end"));
    assert!(offset(33).contains("offset 33 is not a multiple of the alignment 32"));
    assert!(offset(0).contains("overlaps another tensor"));
    let truncated = TestFile::llama(0).bytes();
    let error = Header::read("m.gguf", &truncated[..truncated.len() - 1]).unwrap_err().to_string();
    assert!(error.contains("reach past the end"), "{error}");

    let dims = |dims: &[u64]| refusal(|file| file.tensor_mut("blk.0.attn_q.weight").dims = dims.to_vec());
    assert!(dims(&[u64::MAX, u64::MAX]).contains("its size overflows"));
    assert!(dims(&[64, 0]).contains("a dimension is zero"));
    assert!(dims(&[]).contains("0 dimensions") && dims(&[1; 5]).contains("5 dimensions"));
    let partial = refusal(|file| {
        file.tensors.push(TestTensor {
            name: "output.weight".into(),
            dims: vec![33, 8],
            type_id: 8,
            data: vec![],
            offset: None,
        })
    });
    assert!(partial.contains("no whole number of blocks"), "{partial}");
    let twice = refusal(|file| _ = file.tensor("token_embd.weight", &[32, 8], 0));
    assert_eq!(twice, "m.gguf: tensor token_embd.weight: is there twice");
    assert!(
        refusal(|file| _ = file.tensor("blk.0.attn_q_norm.weight", &[16], 0))
            .contains("no part of a Llama network")
    );
}

#[test]
fn configuration_is_checked_by_key() {
    let set = |key: &'static str, value| refusal(|file| _ = file.set(key, value));
    assert_eq!(set("llama.block_count", u32_value(0)), "m.gguf: llama.block_count: must not be zero");
    assert_eq!(
        set("llama.attention.head_count_kv", u32_value(3)),
        "m.gguf: llama.attention.head_count_kv: 3 does not divide llama.attention.head_count, 4"
    );
    assert_eq!(
        set("llama.attention.head_count", u32_value(0)),
        "m.gguf: llama.attention.head_count: must not be zero"
    );
    assert!(set("llama.attention.head_count", string_value("4")).contains("is not a whole number"));
    assert!(
        set("llama.feed_forward_length", i32_list(&[64, 64]))
            .contains("feed_forward_length: is not a whole number")
    );
    let uneven = refusal(|file| {
        _ = file.unset("llama.attention.key_length").set("llama.attention.head_count", u32_value(6))
    });
    assert!(uneven.contains("6 does not divide llama.embedding_length, 32"), "{uneven}");
    assert!(set("llama.attention.value_length", u32_value(32)).contains("32 is not the key length, 16"));
    assert!(set("llama.rope.dimension_count", u32_value(8)).contains("8 in heads of 16 is not supported"));
    assert!(set("llama.rope.freq_base", f32_value(f32::NAN)).contains("is not a finite number"));
    assert!(set("llama.attention.layer_norm_rms_epsilon", f32_value(0.0)).contains("is not between 0 and 1"));
    assert!(
        set("tokenizer.ggml.eos_token_id", u32_value(8)).contains("8 is not below the vocabulary size 8")
    );
    assert_eq!(
        refusal(|file| _ = file.unset("llama.context_length")),
        "m.gguf: llama.context_length: is missing"
    );
    let defaults = with(|file| {
        _ = file
            .unset("llama.attention.value_length")
            .unset("llama.attention.head_count_kv")
            .unset("llama.vocab_size")
            .unset("llama.rope.freq_base")
    });
    assert_eq!(
        (defaults.config.num_kv_heads, defaults.config.vocab_size, defaults.config.rope.theta),
        (4, 8, 10_000.0)
    );
}

#[test]
fn rope_scaling_is_none_linear_or_factors() {
    const TYPE: &str = "llama.rope.scaling.type";
    const FACTOR: &str = "llama.rope.scaling.factor";
    let scaling = |change: fn(&mut TestFile)| with(change).config.rope.scaling;
    assert_eq!(
        scaling(|file| _ = file.set(TYPE, string_value("none")).set(FACTOR, f32_value(4.0))),
        RopeScaling::Default
    );
    assert_eq!(
        scaling(|file| _ = file.set(TYPE, string_value("linear")).set(FACTOR, f32_value(4.0))),
        RopeScaling::Linear { factor: 4.0 }
    );
    assert_eq!(scaling(|file| _ = file.set(FACTOR, f32_value(2.0))), RopeScaling::Linear { factor: 2.0 });
    assert_eq!(scaling(|file| _ = file.set(FACTOR, f32_value(0.0))), RopeScaling::Default);
    let yarn = refusal(|file| _ = file.set(TYPE, string_value("yarn")).set(FACTOR, f32_value(4.0)));
    assert_eq!(yarn, "m.gguf: llama.rope.scaling.type yarn is not supported");
    assert!(refusal(|file| _ = file.set(TYPE, string_value("linear"))).contains("factor: is missing"));

    let factors = |values: Vec<f32>| {
        move |file: &mut TestFile| {
            file.tensor("rope_freqs.weight", &[values.len() as u64], 0);
            file.tensor_mut("rope_freqs.weight").data =
                values.iter().flat_map(|value| value.to_le_bytes()).collect();
        }
    };
    let expected = vec![1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0];
    assert_eq!(with(factors(expected.clone())).config.rope.scaling, RopeScaling::Factors(expected.clone()));
    assert!(refusal(factors(vec![1.0; 7])).contains("7 factors, expected 8"));
    assert!(refusal(factors(vec![0.0; 8])).contains("factor 0 is not a positive number"));
    let both = refusal(|file| {
        factors(expected)(file);
        file.set(FACTOR, f32_value(2.0));
    });
    assert!(both.contains("together with rope_freqs.weight"));
}

#[test]
fn biases_and_heads_are_found_by_their_tensors() {
    let header = with(|file| {
        for (part, len) in [("attn_q", 64), ("attn_k", 32), ("attn_v", 32)] {
            file.tensor(&format!("blk.0.{part}.bias"), &[len], 0);
        }
        file.tensor("output.weight", &[32, 8], 1);
    });
    assert!(
        header.config.attention_bias
            && !header.config.attention_output_bias
            && !header.config.tie_word_embeddings
    );
    assert_eq!(
        header.tensors["model.layers.0.self_attn.q_proj.bias"].0.row_order,
        RowOrder::GgufRope { head_dim: 16 }
    );
}

#[test]
fn tokenizers_are_well_formed() {
    let set = |key: &'static str, value| refusal(|file| _ = file.set(key, value));
    assert!(set("tokenizer.ggml.token_type", i32_list(&[1; 7])).contains("7 entries for 8 tokens"));
    assert!(set("tokenizer.ggml.token_type", i32_list(&[9; 8])).contains("9 is no kind of token"));
    assert!(set("tokenizer.ggml.scores", f32_list(&[0.0; 9])).contains("9 entries for 8 tokens"));
    assert!(set("tokenizer.ggml.scores", f32_list(&[f32::NAN; 8])).contains("a score is not a number"));
    assert!(set("tokenizer.ggml.tokens", string_list(&["x"; 9])).contains("9 tokens for a vocabulary of 8"));
    assert!(set("tokenizer.ggml.tokens", i32_list(&[1; 8])).contains("is not a list of strings"));
    assert!(
        set("tokenizer.ggml.unknown_token_id", u32_value(8))
            .contains("8 is not below the number of tokens, 8")
    );
    for merge in ["ab", "a b c", " ab", "ab ", " ", ""] {
        assert!(
            set("tokenizer.ggml.merges", string_list(&["a b", merge])).contains("entry 1 is not two pieces"),
            "{merge:?}"
        );
    }
    assert!(
        set("tokenizer.chat_template", string_value(&"x".repeat((1 << 20) + 1)))
            .contains("larger than the limit")
    );
    assert_eq!(with(|file| _ = file.unset("tokenizer.ggml.model")).tokenizer, TokenizerFiles::None);
    let defaults = with(|file| {
        _ = file.unset("tokenizer.ggml.add_bos_token").set("tokenizer.ggml.pre", string_value("llama-bpe"))
    });
    assert!(
        matches!(defaults.tokenizer, TokenizerFiles::Gguf(tokenizer) if tokenizer.add_bos && !tokenizer.add_space_prefix)
    );
}

#[test]
fn end_of_turn_tokens_end_a_sequence_too() {
    let header = with(|file| {
        _ = file
            .set("tokenizer.ggml.eot_token_id", u32_value(0))
            .set("tokenizer.ggml.eom_token_id", u32_value(2))
    });
    assert_eq!(header.config.eos_token_ids, [2, 0]);
    // Without the key, by the spelling of a control token; a plain token of that spelling does not count.
    let spelled = with(|file| _ = file.set("tokenizer.ggml.eos_token_id", u32_value(0)));
    assert_eq!(spelled.config.eos_token_ids, [0, 2]);
    let plain = with(|file| {
        file.set("tokenizer.ggml.eos_token_id", u32_value(0));
        file.set("tokenizer.ggml.token_type", i32_list(&[3, 3, 1, 1, 1, 1, 1, 1]));
    });
    assert_eq!(plain.config.eos_token_ids, [0]);
}

#[test]
fn authors_sampling_is_read() {
    let header = with(|file| {
        _ = file
            .set("general.sampling.temp", f32_value(0.5))
            .set("general.sampling.top_k", typed(ValueType::I32, &20i32.to_le_bytes()))
    });
    assert_eq!((header.generation.temperature, header.generation.top_k), (Some(0.5), Some(20)));
    assert!(refusal(|file| _ = file.set("general.sampling.top_p", f32_value(7.0))).contains("top_p"));
}

/// The fuzz target's corpus: one file per corner of the format. `TANDEM_WRITE_SEEDS=1` writes it anew.
#[test]
fn the_corpus_is_what_the_writer_makes() {
    let mut version_2 = TestFile::llama(30);
    version_2.version = 2;
    let mut everything = TestFile::llama(8);
    everything.alignment = 64;
    everything.set("general.alignment", u32_value(64));
    everything.set("flags", list(ValueType::Bool, 2, &[0, 1]));
    everything
        .set("f64", typed(ValueType::F64, &0.5f64.to_le_bytes()))
        .set("i8", typed(ValueType::I8, &[0xff]));
    let inner = [&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &7u32.to_le_bytes()].concat();
    everything.set("nested", list(ValueType::Array, 2, &[&inner[..], &inner].concat()));
    everything.set("tokenizer.ggml.scores", f32_list(&[-1.0; 8]));
    everything.tensor("rope_freqs.weight", &[8], 0).tensor("output.weight", &[32, 8], 1);
    everything.tensor_mut("rope_freqs.weight").data =
        [1.0f32; 8].iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut bare = TestFile::llama(2);
    bare.metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
    let empty = TestFile { version: 3, alignment: 32, metadata: vec![], tensors: vec![] };
    let seeds = [
        ("llama-f32", TestFile::llama(0)),
        ("llama-q4_1", TestFile::llama(3)),
        ("llama-bf16-v2", version_2),
        ("llama-everything", everything),
        ("llama-q4_0-bare", bare),
        ("empty", empty),
    ];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/gguf");
    if std::env::var_os("TANDEM_WRITE_SEEDS").is_some() {
        std::fs::create_dir_all(&folder).unwrap();
        seeds.iter().for_each(|(name, file)| std::fs::write(folder.join(name), file.bytes()).unwrap());
    }
    for (name, file) in &seeds {
        assert!(*name == "empty" || read(file).is_ok(), "{name} is valid");
        let on_disk = std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(on_disk == file.bytes(), "{name} differs: run this test with TANDEM_WRITE_SEEDS=1");
    }
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), seeds.len(), "files of nobody in the corpus");
}
