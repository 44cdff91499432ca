//! Tests of reading `config.json` and `generation_config.json`.

use super::*;

/// A small valid configuration with `changes` (JSON fields) put over it.
fn config(changes: &str) -> Result<ModelConfig, ModelError> {
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(
        r#"{"model_type":"llama","architectures":["LlamaForCausalLM"],"hidden_size":64,"intermediate_size":96,
            "num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"vocab_size":100,
            "eos_token_id":2,"bos_token_id":1}"#,
    )
    .unwrap();
    let changes: serde_json::Map<String, serde_json::Value> = serde_json::from_str(changes).unwrap();
    fields.extend(changes);
    parse(&Object::parse("config.json", &serde_json::to_vec(&fields).unwrap())?)
}

fn refusal(changes: &str) -> String {
    config(changes).unwrap_err().to_string()
}

#[test]
fn absent_fields_have_the_defaults_of_transformers() {
    let config = config("{}").unwrap();
    assert_eq!(
        (config.head_dim, config.query_size(), config.kv_size(), config.group_size()),
        (16, 64, 32, 2)
    );
    assert_eq!((config.max_position_embeddings, config.rms_norm_eps), (2048, 1e-6));
    assert_eq!(config.rope, RopeConfig { theta: 10_000.0, rotary_dim: 16, scaling: RopeScaling::Default });
    assert!(
        !config.attention_bias
            && !config.attention_output_bias
            && !config.mlp_bias
            && !config.tie_word_embeddings
    );
    assert_eq!((config.declared_dtype, config.bos_token_id), (None, Some(1)));
}

#[test]
fn attention_bias_covers_the_output_projection_too() {
    let config = config(r#"{"attention_bias": true, "num_key_value_heads": null, "head_dim": 32}"#).unwrap();
    assert!(config.attention_bias && config.attention_output_bias && !config.mlp_bias);
    assert_eq!((config.num_kv_heads, config.head_dim, config.query_size()), (4, 32, 128));
}

#[test]
fn both_generations_of_rope_fields_are_read() {
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let fields = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192"#;
    let old =
        config(&format!(r#"{{"rope_theta": 500000, "rope_scaling": {{"rope_type": "llama3", {fields}}}}}"#))
            .unwrap();
    let new =
        config(&format!(r#"{{"rope_parameters": {{"rope_theta": 5e5, "rope_type": "llama3", {fields}}}}}"#))
            .unwrap();
    assert_eq!(old.rope, RopeConfig { theta: 500_000.0, rotary_dim: 16, scaling: llama3 });
    assert_eq!(old.rope, new.rope);
    let linear = config(r#"{"rope_scaling": {"type": "linear", "factor": 2}}"#).unwrap();
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    let plain = config(r#"{"rope_parameters": {"rope_theta": 100000.0}, "rope_scaling": null}"#).unwrap();
    assert_eq!((plain.rope.theta, plain.rope.scaling), (100_000.0, RopeScaling::Default));
}

#[test]
fn contradicting_or_unknown_rope_fields_are_refused() {
    let theta = r#"{"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}"#;
    assert!(refusal(theta).contains("contradicts rope_parameters.rope_theta"));
    let scaling =
        r#"{"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}}"#;
    assert_eq!(refusal(scaling), "config.json: rope_scaling: contradicts rope_parameters");
    for kind in ["dynamic", "yarn", "longrope", "su", "mrope", "proportional"] {
        let new = format!(r#"{{"rope_parameters": {{"rope_type": "{kind}", "factor": 2.0}}}}"#);
        assert_eq!(refusal(&new), format!("config.json: rope_parameters.rope_type {kind} is not supported"));
        let old = format!(r#"{{"rope_scaling": {{"type": "{kind}", "factor": 2.0}}}}"#);
        assert_eq!(refusal(&old), format!("config.json: rope_scaling.type {kind} is not supported"));
    }
    assert!(
        refusal(r#"{"rope_parameters": {"full_attention": {"rope_theta": 1}}}"#)
            .contains("for full_attention")
    );
    assert!(refusal(r#"{"rope_scaling": {"type": "linear"}}"#).contains("rope_scaling.factor: is missing"));
    assert!(
        refusal(r#"{"rope_scaling": {"type": "linear", "factor": 0}}"#).contains("not a positive number")
    );
    assert!(refusal(r#"{"rope_scaling": {"factor": 2}}"#).contains("rope_scaling.rope_type: is missing"));
    assert!(
        refusal(r#"{"partial_rotary_factor": 0.5}"#).contains("partial_rotary_factor 0.5 is not supported")
    );
    let order = r#"{"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 64}}"#;
    assert!(refusal(order).contains("low_freq_factor is not below high_freq_factor"));
}

#[test]
fn dtype_has_two_names_and_several_spellings() {
    assert_eq!(config(r#"{"torch_dtype": "bfloat16"}"#).unwrap().declared_dtype, Some(DType::Bf16));
    assert_eq!(config(r#"{"dtype": "float16"}"#).unwrap().declared_dtype, Some(DType::F16));
    assert_eq!(config(r#"{"dtype": "torch.float32"}"#).unwrap().declared_dtype, Some(DType::F32));
    assert_eq!(config(r#"{"dtype": null, "torch_dtype": "half"}"#).unwrap().declared_dtype, Some(DType::F16));
    assert_eq!(refusal(r#"{"dtype": "float8_e4m3fn"}"#), "config.json: dtype float8_e4m3fn is not supported");
}

#[test]
fn token_ids_are_one_or_many_and_in_range() {
    assert_eq!(config(r#"{"eos_token_id": [7, 8, 7]}"#).unwrap().eos_token_ids, [7, 8]);
    assert_eq!(
        config(r#"{"eos_token_id": null, "bos_token_id": null}"#).unwrap().eos_token_ids,
        Vec::<u32>::new()
    );
    assert!(
        refusal(r#"{"eos_token_id": 100}"#)
            .contains("eos_token_id: 100 is not below the vocabulary size 100")
    );
    assert!(refusal(r#"{"bos_token_id": 4294967295}"#).contains("bos_token_id"));
    assert!(refusal(r#"{"eos_token_id": -1}"#).contains("-1 is not a token id"));
    assert!(refusal(r#"{"eos_token_id": "</s>"}"#).contains("is not a token id"));
}

#[test]
fn other_networks_are_refused_by_name() {
    assert_eq!(refusal(r#"{"model_type": "mixtral"}"#), "config.json: model_type mixtral is not supported");
    assert_eq!(
        refusal(r#"{"architectures": ["LlamaForSequenceClassification"]}"#),
        "config.json: architectures LlamaForSequenceClassification is not supported"
    );
    assert_eq!(refusal(r#"{"hidden_act": "gelu"}"#), "config.json: hidden_act gelu is not supported");
    assert_eq!(refusal(r#"{"sliding_window": 4096}"#), "config.json: sliding_window 4096 is not supported");
    assert!(config(r#"{"sliding_window": 4096, "use_sliding_window": false}"#).is_ok());
    for method in ["gptq", "awq", "bitsandbytes", "compressed-tensors"] {
        let changes = format!(r#"{{"quantization_config": {{"quant_method": "{method}", "bits": 4}}}}"#);
        assert_eq!(
            refusal(&changes),
            format!("config.json: quantization_config.quant_method {method} is not supported")
        );
    }
    for fp8 in [
        r#"{"quant_method": "fp8", "activation_scheme": "static"}"#,
        r#"{"quant_method": "compressed-tensors", "format": "float-quantized"}"#,
    ] {
        assert!(config(&format!(r#"{{"quantization_config": {fp8}}}"#)).is_ok(), "{fp8}");
    }
    assert!(refusal(r#"{"model_type": null}"#).contains("model_type: is missing"));
}

#[test]
fn impossible_sizes_are_refused_by_field() {
    for field in [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "max_position_embeddings",
    ] {
        for value in ["0", "-1", "1.5", "\"8\"", "4294967296", "18446744073709551615", "1e30", "[1]", "true"]
        {
            let refusal = refusal(&format!(r#"{{"{field}": {value}, "head_dim": 16}}"#));
            assert!(refusal.starts_with("config.json: "), "{refusal}");
            let named = refusal.contains(field) || refusal.contains("num_key_value_heads");
            assert!(named, "{field} = {value}: {refusal}");
        }
    }
    let shared = refusal(r#"{"num_attention_heads": 256, "num_key_value_heads": 1, "hidden_size": 1024}"#);
    assert!(shared.contains("256 query heads share a KV head"), "{shared}");
    assert!(refusal(r#"{"num_key_value_heads": 3}"#).contains("3 does not divide num_attention_heads, 4"));
    assert!(refusal(r#"{"head_dim": 7}"#).contains("head_dim: 7 is odd"));
    assert!(refusal(r#"{"hidden_size": 66}"#).contains("4 does not divide hidden_size, 66"));
    assert!(refusal(r#"{"rms_norm_eps": 0}"#).contains("rms_norm_eps"));
    assert!(refusal(r#"{"rms_norm_eps": 1e300}"#).contains("not a finite number"));
    assert!(refusal(r#"{"rope_theta": 0}"#).contains("rope_theta"));
    assert!(refusal(r#"{"rope_theta": -1e4}"#).contains("rope_theta"));
}

#[test]
fn generation_config_gives_sampling_defaults() {
    let parse =
        |text: &str| parse_generation(&Object::parse("generation_config.json", text.as_bytes()).unwrap());
    let found = parse(
        r#"{"temperature": 0.6, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 5, "do_sample": true}"#,
    );
    let expected = GenerationConfig {
        temperature: Some(0.6),
        top_k: Some(40),
        top_p: Some(0.9),
        min_p: None,
        repetition_penalty: Some(1.1),
    };
    assert_eq!(found.unwrap(), expected);
    assert_eq!(parse("{}").unwrap(), GenerationConfig::default());
    for bad in [
        r#"{"temperature": -1}"#,
        r#"{"top_p": 0}"#,
        r#"{"top_p": 1.5}"#,
        r#"{"min_p": 2}"#,
        r#"{"repetition_penalty": 0}"#,
        r#"{"top_k": -1}"#,
        r#"{"top_k": 4294967296}"#,
    ] {
        assert!(parse(bad).unwrap_err().to_string().starts_with("generation_config.json: "), "{bad}");
    }
}
