//! Tests of rounding at load, on written files and on random weights.

use crate::batch::ForwardBatch;
use crate::gguf::test_file::TestFile;
use crate::llama::{Llama, LlamaOptions};
use crate::model_files::{DummyOptions, ModelFiles, open, open_dummy};
use crate::quantize::quantize;
use crate::test_folder::TestFolder;
use crate::weights::RowOrder;
use half::bf16;
use std::path::{Path, PathBuf};
use tandem_kernels::cpu::{Cpu, CpuOptions, KvCache};
use tandem_kernels::{Activations, DType, KvDType};

const CONFIG: &str = r#"{"model_type":"llama","hidden_size":96,"intermediate_size":128,"num_hidden_layers":1,
    "num_attention_heads":3,"num_key_value_heads":1,"vocab_size":50,"tie_word_embeddings":true,"attention_bias":true}"#;

fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")).join(name)
}

fn dummy(folder: &TestFolder, dtype: DType) -> ModelFiles {
    folder.write("config.json", CONFIG);
    open_dummy(folder.path(), DummyOptions { dtype, seed: 1, threads: 1 }).unwrap()
}

/// Every name with type and data, after rounding on this many threads.
fn contents(files: &ModelFiles) -> Vec<(String, DType, Vec<u8>)> {
    let weights = files.weights();
    let names = weights.names().into_iter();
    let tensors = names.map(|name| (name.to_owned(), weights.tensor(name).unwrap()));
    tensors.map(|(name, tensor)| (name, tensor.dtype, tensor.data.into_owned())).collect()
}

/// A GGUF file whose matrices are of this type (ggml's number), all of the same bytes.
fn gguf(folder: &TestFolder, type_id: u32, fill: impl Fn(usize) -> u8) -> PathBuf {
    let mut file = TestFile::llama(type_id);
    for tensor in file.tensors.iter_mut().filter(|tensor| tensor.dims.len() == 2) {
        tensor.data.iter_mut().enumerate().for_each(|(at, byte)| *byte = fill(at));
    }
    folder.write(&format!("{type_id}.gguf"), file.bytes())
}

#[test]
fn matrices_are_rounded_and_vectors_are_not() {
    for dtype in [DType::Q8_0, DType::Q4_0, DType::Q4_1] {
        let folder = TestFolder::new();
        let plain = dummy(&folder, DType::Bf16);
        let rounded = dummy(&folder, DType::Bf16).quantized(dtype, 2).unwrap();
        assert_eq!(rounded.summary.dtype, dtype);
        assert_eq!(rounded.summary.num_parameters, plain.summary.num_parameters);
        for (before, (name, after, data)) in contents(&plain).into_iter().zip(contents(&rounded)) {
            let tensor = rounded.weights().tensor(&name).unwrap();
            assert_eq!(rounded.weights().info(&name).unwrap().dtype, after);
            if tensor.shape.len() == 1 {
                assert_eq!((after, &data), (DType::Bf16, &before.2), "{name}");
                continue;
            }
            assert_eq!(after, dtype, "{name}");
            let source = plain.weights().tensor(&name).unwrap();
            let (mut was, mut is) = (vec![0.0; tensor.cols()], vec![0.0; tensor.cols()]);
            for row in 0..tensor.rows() {
                source.matrix().unwrap().dequantize_row(row, &mut was);
                tensor.matrix().unwrap().dequantize_row(row, &mut is);
                let largest = was.iter().fold(0.0f32, |a, b| a.max(b.abs()));
                // A step of four bits over both signs, and the f16 of scales.
                assert!(was.iter().zip(&is).all(|(a, b)| (a - b).abs() <= largest * 0.14), "{name} {row}");
            }
            assert!(was != is, "{name} was not rounded");
        }
    }
}

#[test]
fn a_golden_checkpoint_is_the_same_on_any_number_of_threads() {
    let round = |threads| open(&golden("tiny-tp8")).unwrap().quantized(DType::Q4_1, threads).unwrap();
    let (alone, many) = (round(1), round(7));
    assert!(contents(&alone) == contents(&many));
    assert_eq!(alone.fingerprint, many.fingerprint);
}

/// Logits of six tokens in one step, as bits.
fn logits(files: &ModelFiles) -> Vec<u32> {
    let cpu = Cpu::new(CpuOptions { isa: None, threads: Some(2) }).unwrap();
    let options = LlamaOptions {
        activations: Activations::Int8,
        max_tokens: 6,
        max_logits_rows: 6,
        shard: crate::Shard::WHOLE,
    };
    let mut llama = Llama::load(&cpu, "test", files.config.clone(), files.weights(), options).unwrap();
    let mut kv = KvCache::new(Llama::kv_cache_config(&files.config, 1, KvDType::Bf16)).unwrap();
    let batch = ForwardBatch {
        token_ids: vec![3, 1, 7, 0, 5, 3],
        positions: (0..6).collect(),
        cu_seqlens: vec![0, 6],
        context_lens: vec![0],
        block_tables: vec![0],
        block_table_offsets: vec![0, 1],
        slot_mapping: (0..6).collect(),
        logits_rows: (0..6).collect(),
        ..ForwardBatch::default()
    };
    llama.forward(&cpu, &batch, &mut kv).iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn a_file_of_the_type_is_the_same_model_as_rounding_at_load() {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let mut plain = TestFile::llama(30);
    for tensor in &mut plain.tensors {
        match tensor.dims.len() {
            2 => tensor.data.chunks_exact_mut(2).for_each(|value| {
                value.copy_from_slice(&bf16::from_f32(random()).to_le_bytes());
            }),
            _ => tensor.data.chunks_exact_mut(4).for_each(|one| one.copy_from_slice(&1f32.to_le_bytes())),
        }
    }
    let folder = TestFolder::new();
    let plain_path = folder.write("plain.gguf", plain.bytes());
    let mut answers = vec![logits(&open(&plain_path).unwrap())];
    for (dtype, type_id) in [(DType::Q4_0, 2), (DType::Q4_1, 3), (DType::Q8_0, 8)] {
        let mut file = TestFile::llama(type_id);
        for (tensor, source) in file.tensors.iter_mut().zip(&plain.tensors) {
            if tensor.dims.len() < 2 {
                tensor.data.clone_from(&source.data);
                continue;
            }
            let values: Vec<f32> =
                source.data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect();
            quantize(dtype, &values, &mut tensor.data).unwrap();
        }
        let of_file = open(&folder.write("blocks.gguf", file.bytes())).unwrap();
        let at_load = open(&plain_path).unwrap().quantized(dtype, 2).unwrap();
        assert!(contents(&of_file) == contents(&at_load), "{dtype}");
        answers.push(logits(&of_file));
        assert_eq!(answers.last(), Some(&logits(&at_load)), "{dtype}");
    }
    let distinct: std::collections::BTreeSet<_> = answers.iter().collect();
    assert_eq!(distinct.len(), answers.len(), "each rounding must have changed the answer");
}

#[test]
fn the_order_of_rows_stays() {
    let folder = TestFolder::new();
    // bf16 bits whose high byte makes them numbers around one.
    let path = gguf(&folder, 30, |at| if at % 2 == 1 { 0x3f } else { (at / 2 % 100) as u8 });
    let files = open(&path).unwrap().quantized(DType::Q8_0, 2).unwrap();
    let query = files.weights().tensor("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!((query.dtype, query.row_order), (DType::Q8_0, RowOrder::GgufRope { head_dim: 16 }));
}

#[test]
fn every_type_is_a_model_of_its_own() {
    let folder = TestFolder::new();
    let mut prints = vec![dummy(&folder, DType::Bf16).fingerprint];
    for dtype in [DType::Q8_0, DType::Q4_0, DType::Q4_1] {
        let print = || dummy(&folder, DType::Bf16).quantized(dtype, 1).unwrap().fingerprint;
        assert_eq!(print(), print());
        prints.push(print());
        prints.push(dummy(&folder, DType::F32).quantized(dtype, 1).unwrap().fingerprint);
    }
    let distinct: std::collections::BTreeSet<_> = prints.iter().collect();
    assert_eq!(distinct.len(), prints.len());
    // A file of the type itself is what it is without the option.
    let made = || dummy(&folder, DType::Q4_0);
    let same = made().quantized(DType::Q4_0, 1).unwrap();
    assert_eq!((same.fingerprint, same.summary.clone()), (made().fingerprint, made().summary));
    assert!(contents(&same) == contents(&made()));
}

#[test]
fn what_is_quantised_already_is_refused_by_name() {
    let folder = TestFolder::new();
    let error = open(&gguf(&folder, 3, |_| 0)).unwrap().quantized(DType::Q4_0, 1).err().unwrap().to_string();
    assert!(
        error.contains("3.gguf: tensor model.embed_tokens.weight: is Q4_1 already and cannot become Q4_0"),
        "{error}"
    );
    assert!(open(&gguf(&folder, 3, |_| 0)).unwrap().quantized(DType::Q4_1, 1).is_ok());
}

#[test]
fn rows_that_are_no_whole_blocks_are_refused_by_name() {
    let folder = TestFolder::new();
    folder.write("config.json", CONFIG.replace("128", "100"));
    let options = DummyOptions { dtype: DType::F16, seed: 1, threads: 1 };
    let files = open_dummy(folder.path(), options).unwrap();
    let error = files.quantized(DType::Q8_0, 1).err().unwrap().to_string();
    assert!(
        error.ends_with("tensor model.layers.0.mlp.down_proj.weight: rows of 100 values are no whole number of Q8_0 blocks of 32"),
        "{error}"
    );
}

#[test]
fn values_that_no_block_can_hold_are_refused_by_row() {
    let folder = TestFolder::new();
    // The third row of 32 values holds an infinity at its end.
    let infinite = |at: usize| match at {
        190 => 0x80,
        191 => 0x7f,
        _ => 0,
    };
    let files = open(&gguf(&folder, 30, infinite)).unwrap().quantized(DType::Q4_1, 3).unwrap();
    let error = files.weights().tensor("model.embed_tokens.weight").unwrap_err().to_string();
    assert!(
        error.ends_with(
            "tensor model.embed_tokens.weight: row 2 holds NaN or infinity; it cannot be rounded to Q4_1"
        ),
        "{error}"
    );
}
