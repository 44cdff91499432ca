//! Writes small GGUF files for tests and for the fuzz target's seeds.

use super::value::ValueType;

/// A file in the making: fields are public so that a test can break what it likes.
#[derive(Clone)]
pub(crate) struct TestFile {
    pub version: u32,
    pub alignment: usize,
    /// Key, and type and value as they lie in the file.
    pub metadata: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<TestTensor>,
}

#[derive(Clone)]
pub(crate) struct TestTensor {
    pub name: String,
    /// Innermost first, as in the file.
    pub dims: Vec<u64>,
    pub type_id: u32,
    pub data: Vec<u8>,
    /// Offset to write instead of the right one.
    pub offset: Option<u64>,
}

pub(crate) fn u32_value(value: u32) -> Vec<u8> {
    typed(ValueType::U32, &value.to_le_bytes())
}

pub(crate) fn f32_value(value: f32) -> Vec<u8> {
    typed(ValueType::F32, &value.to_le_bytes())
}

pub(crate) fn bool_value(value: bool) -> Vec<u8> {
    typed(ValueType::Bool, &[u8::from(value)])
}

pub(crate) fn string_value(value: &str) -> Vec<u8> {
    typed(ValueType::String, &string(value))
}

pub(crate) fn string_list(values: &[&str]) -> Vec<u8> {
    list(ValueType::String, values.len(), &values.iter().flat_map(|value| string(value)).collect::<Vec<_>>())
}

pub(crate) fn i32_list(values: &[i32]) -> Vec<u8> {
    list(
        ValueType::I32,
        values.len(),
        &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>(),
    )
}

pub(crate) fn f32_list(values: &[f32]) -> Vec<u8> {
    list(
        ValueType::F32,
        values.len(),
        &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>(),
    )
}

/// A list value whose elements are given as bytes.
pub(crate) fn list(element: ValueType, len: usize, elements: &[u8]) -> Vec<u8> {
    typed(
        ValueType::Array,
        &[&(element as u32).to_le_bytes()[..], &(len as u64).to_le_bytes(), elements].concat(),
    )
}

pub(crate) fn typed(value_type: ValueType, bytes: &[u8]) -> Vec<u8> {
    [&(value_type as u32).to_le_bytes()[..], bytes].concat()
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl TestFile {
    /// A complete model: `E` 32, `I` 64, one layer, 4 heads of 16 over 2 KV heads, 8 tokens; matrices of type
    /// `type_id` (0 F32, 1 F16, 2 Q4_0, 3 Q4_1, 8 Q8_0, 30 BF16) with all bytes 0, norms in F32, a tokenizer and a
    /// template.
    pub(crate) fn llama(type_id: u32) -> Self {
        let mut file = Self { version: 3, alignment: 32, metadata: Vec::new(), tensors: Vec::new() };
        file.set("general.architecture", string_value("llama"));
        file.set("general.type", string_value("model"));
        for (key, value) in [
            ("llama.block_count", 1),
            ("llama.context_length", 128),
            ("llama.embedding_length", 32),
            ("llama.feed_forward_length", 64),
            ("llama.attention.head_count", 4),
            ("llama.attention.head_count_kv", 2),
            ("llama.attention.key_length", 16),
            ("llama.attention.value_length", 16),
            ("llama.rope.dimension_count", 16),
            ("llama.vocab_size", 8),
        ] {
            file.set(key, u32_value(value));
        }
        file.set("llama.rope.freq_base", f32_value(100_000.0));
        file.set("llama.attention.layer_norm_rms_epsilon", f32_value(1e-5));
        file.set("tokenizer.ggml.model", string_value("gpt2"));
        file.set("tokenizer.ggml.pre", string_value("smollm"));
        file.set(
            "tokenizer.ggml.tokens",
            string_list(&["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "Ġa"]),
        );
        file.set("tokenizer.ggml.token_type", i32_list(&[3, 3, 3, 1, 1, 1, 1, 1]));
        file.set("tokenizer.ggml.merges", string_list(&["a b", "Ġ a"]));
        file.set("tokenizer.ggml.bos_token_id", u32_value(1));
        file.set("tokenizer.ggml.eos_token_id", u32_value(2));
        file.set("tokenizer.ggml.add_bos_token", bool_value(false));
        file.set("tokenizer.chat_template", string_value("{{ messages[0].content }}"));
        file.tensor("token_embd.weight", &[32, 8], type_id);
        file.tensor("output_norm.weight", &[32], 0);
        for (part, cols, rows) in [
            ("attn_q", 32, 64),
            ("attn_k", 32, 32),
            ("attn_v", 32, 32),
            ("attn_output", 64, 32),
            ("ffn_gate", 32, 64),
            ("ffn_up", 32, 64),
            ("ffn_down", 64, 32),
        ] {
            file.tensor(&format!("blk.0.{part}.weight"), &[cols, rows], type_id);
        }
        file.tensor("blk.0.attn_norm.weight", &[32], 0);
        file.tensor("blk.0.ffn_norm.weight", &[32], 0);
        file
    }

    /// Sets or replaces a metadata value.
    pub(crate) fn set(&mut self, key: &str, value: Vec<u8>) -> &mut Self {
        match self.metadata.iter_mut().find(|(existing, _)| existing == key) {
            Some((_, existing)) => *existing = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
        self
    }

    pub(crate) fn unset(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(existing, _)| existing != key);
        self
    }

    /// Adds a tensor of zeros.
    pub(crate) fn tensor(&mut self, name: &str, dims: &[u64], type_id: u32) -> &mut Self {
        let (block_len, block_bytes) = match type_id {
            0 => (1, 4),
            1 | 30 => (1, 2),
            2 => (32, 18),
            3 => (32, 20),
            8 => (32, 34),
            _ => (1, 1),
        };
        let num_elements: u64 = dims.iter().product();
        let data = vec![0; (num_elements / block_len * block_bytes) as usize];
        self.tensors.push(TestTensor {
            name: name.to_owned(),
            dims: dims.to_vec(),
            type_id,
            data,
            offset: None,
        });
        self
    }

    pub(crate) fn tensor_mut(&mut self, name: &str) -> &mut TestTensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor of that name")
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(string(key));
            out.extend(value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            out.extend(string(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(tensor.type_id.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset += tensor.data.len().next_multiple_of(self.alignment) as u64;
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.data);
        }
        out
    }
}
