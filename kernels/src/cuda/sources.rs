//! The text of the kernels.

/// A file of kernels.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// What a [`Launch`](super::launcher::Launch) names.
    pub module: &'static str,
    pub text: &'static str,
}

/// Precedes the text of every module when it is compiled.
pub const PRELUDE: &str = include_str!("../../cu/common.cuh");

macro_rules! sources {
    ($($module:literal $(= $file:literal by $define:literal)?),* $(,)?) => {
        /// All modules; each is compiled by itself.
        pub const SOURCES: &[Source] = &[$(Source {
            module: $module,
            text: source!($module $(, $file, $define)?),
        }),*];
    };
}

macro_rules! source {
    ($module:literal) => {
        include_str!(concat!("../../cu/", $module, ".cu"))
    };
    // Of a file with more kernels than should be compiled one after the other.
    ($module:literal, $file:literal, $define:literal) => {
        concat!("#define ", $define, "\n#line 1\n", include_str!(concat!("../../cu/", $file, ".cu")))
    };
}

sources!(
    "activation",
    "all_reduce",
    "argmax",
    "attention_decode",
    "attention_prefill",
    "blocks",
    "columns",
    "embed",
    "gemv",
    "log_probs",
    "norm",
    "quantize",
    "rope",
    "sample",
    "skinny_bf16" = "skinny_gemm" by "ONLY_BF16",
    "skinny_fp8" = "skinny_gemm" by "ONLY_FP8",
    "skinny_q8" = "skinny_gemm" by "ONLY_Q8",
    "skinny_q4_0" = "skinny_gemm" by "ONLY_Q4_0",
    "skinny_q4_1" = "skinny_gemm" by "ONLY_Q4_1",
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Such loads may bring what was there before the launch before: on a GPU that came as wrong keys once in some thousand rows.
    #[test]
    fn only_weights_are_read_by_loads_that_see_no_other_launch() {
        for source in SOURCES.iter().filter(|source| !["gemv", "quantize"].contains(&source.module)) {
            let found =
                ["stream16(", "stream8(", "stream4("].into_iter().find(|load| source.text.contains(load));
            assert_eq!(found, None, "{}", source.module);
        }
    }
}
