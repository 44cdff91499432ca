//! Values of flags: names as vLLM spells them and as this project does, and sizes with units.

use clap::ValueEnum;

/// `--device`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// A GPU if there is one.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// `--custom-all-reduce`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CustomAllReduce {
    /// Where every rank has a GPU of its own and they reach each other's memory.
    Auto,
    /// Also where ranks share a GPU, for tests; refused where it cannot be.
    Always,
    /// All sums by NCCL or the host.
    Never,
}

/// `--dtype`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// What the weights are.
    Auto,
    /// Brain floating point.
    #[value(name = "bf16", alias = "bfloat16")]
    Bf16,
    /// Single precision for weights, activations and KV.
    #[value(name = "f32", alias = "float32", alias = "float")]
    F32,
    /// Half precision.
    #[value(name = "f16", alias = "float16", alias = "half", hide = true)]
    F16,
}

/// `--activations`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    /// int8 for quantised weights, else the weights' own.
    Auto,
    /// 8 bits with a scale for each 32 values; 16 for queries, keys and values.
    Int8,
    /// 16 bits: brain floating point, or integers beside quantised weights.
    #[value(alias = "bfloat16", alias = "int16")]
    Bf16,
    /// Single precision.
    #[value(alias = "float32")]
    F32,
}

/// `--kv-cache-dtype`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDtype {
    /// f32 with `--dtype f32`, else bf16.
    Auto,
    /// Single precision.
    #[value(alias = "float32")]
    F32,
    /// Brain floating point.
    #[value(alias = "bfloat16")]
    Bf16,
    /// Half precision.
    #[value(alias = "float16", alias = "half")]
    F16,
    /// 8 bits with a scale for each token and KV head.
    Int8,
    /// 8-bit floating point, e4m3, on GPUs.
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

/// `--isa`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Isa {
    /// The widest that this CPU has.
    Auto,
    /// AVX-512 with BF16 and VNNI, and AMX with BF16.
    Amx,
    /// AVX-512 with BF16 and VNNI.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// ARM.
    #[value(hide = true)]
    Neon,
    /// Portable.
    Scalar,
}

/// `--allowed-origins`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedOrigins {
    /// Pages of every origin.
    Any,
    /// Those of these; of none if it is empty.
    List(Vec<String>),
}

impl AllowedOrigins {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let origins: Vec<String> = match text.trim() {
            "none" => Vec::new(),
            list if list.starts_with('[') => {
                serde_json::from_str(list).map_err(|error| format!("no list of origins: {error}"))?
            }
            list => list.split(',').map(|origin| origin.trim().to_owned()).collect(),
        };
        if origins.iter().any(|origin| origin == "*") {
            return Ok(Self::Any);
        }
        // A path or a slash at the end would never match what browsers send.
        let is_origin = |origin: &String| {
            let host = origin.split_once("://").map_or("", |(_, host)| host);
            !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
        };
        match origins.iter().find(|origin| !is_origin(origin)) {
            Some(origin) => Err(format!("{origin:?} is no origin, such as https://example.org")),
            None => Ok(Self::List(origins)),
        }
    }
}

/// `--load-format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The files' own weights.
    #[value(aliases = ["gguf", "safetensors"])]
    Auto,
    /// Random weights of the configuration's shapes.
    Dummy,
}

/// `--dummy-weights`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum WeightType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Brain floating point.
    Bf16,
    /// 8 bits, one scale for each 32.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits, one scale for each 32.
    #[value(name = "q4_0")]
    Q4_0,
    /// 4 bits, one scale and minimum for each 32.
    #[value(name = "q4_1")]
    Q4_1,
}

/// `--quantization`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quantization {
    /// 8 bits, one scale for each 32.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits, one scale for each 32.
    #[value(name = "q4_0")]
    Q4_0,
    /// 4 bits, one scale and minimum for each 32.
    #[value(name = "q4_1")]
    Q4_1,
    /// 8-bit floating point, e4m3, one scale for each row of a matrix, on GPUs.
    Fp8,
}

/// `--log-format`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object a line.
    Json,
}

/// A share of a whole: above 0, at most 1.
pub(super) fn share(text: &str) -> Result<f64, String> {
    let value: f64 = text.trim().parse().map_err(|_| "not a number; write e.g. 0.9".to_owned())?;
    match value > 0.0 && value <= 1.0 {
        true => Ok(value),
        false => Err(format!("{value} is not above 0 and at most 1; write e.g. 0.9")),
    }
}

/// Bytes out of `4GiB`, `512 MiB`, `4G`, `1.5GB` or a plain number. `K`, `M`, `G`, `T` and `KiB` … are powers of
/// 1024, `KB`, `MB`, … powers of 1000.
pub(super) fn byte_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    if text.starts_with('-') {
        return Err("not a size; write e.g. 4GiB".to_owned());
    }
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim().to_ascii_lowercase();
    let factor: u64 = match unit.as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("unknown unit {unit:?}; write bytes, or a number with KiB, MiB or GiB")),
    };
    let number = number.replace('_', "");
    let bytes = match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(factor),
        Err(_) => match number.parse::<f64>() {
            Ok(value) if value.is_finite() && value * factor as f64 <= (1u64 << 60) as f64 => {
                Some((value * factor as f64) as u64)
            }
            _ => None,
        },
    };
    bytes
        .filter(|&bytes| bytes > 0 && bytes <= 1 << 60)
        .ok_or_else(|| "not a size; write e.g. 4GiB".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(byte_size("4GiB"), Ok(4 << 30));
        assert_eq!(byte_size("4 g"), Ok(4 << 30));
        assert_eq!(byte_size("1.5kb"), Ok(1_500));
        assert_eq!(byte_size("1_000"), Ok(1_000));
        for bad in ["", "4x", "-1", "0", "1e3", "99999999999TiB", "1.2.3", "inf"] {
            assert!(byte_size(bad).is_err(), "{bad}");
        }
    }
}
