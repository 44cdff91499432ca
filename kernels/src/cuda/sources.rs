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
    ($($module:literal),* $(,)?) => {
        /// All modules; each is compiled by itself.
        pub const SOURCES: &[Source] =
            &[$(Source { module: $module, text: include_str!(concat!("../../cu/", $module, ".cu")) }),*];
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
    "skinny_gemm",
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
