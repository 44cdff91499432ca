//! What vLLM's command lines say beside what there is here: flags that ask for what is so anyway are dropped, and flags of
//! features that are not built are told apart from misspelt ones.

use std::ffi::OsString;

/// What a flag that asks for nothing new may be followed by.
enum Value {
    /// It is a switch.
    None,
    Any,
    /// With one of these it asks for nothing new; with others it stays.
    OneOf(&'static [&'static str]),
}

/// Flags without effect here.
const NEEDLESS: &[(&str, Value)] = &[
    // Prompts are always computed in chunks, beside decodes.
    ("--enable-chunked-prefill", Value::None),
    // Requests are logged by a line each, without their text.
    ("--disable-log-requests", Value::None),
    ("--no-enable-log-requests", Value::None),
    ("--disable-log-stats", Value::None),
    // No code of a model's is ever run.
    ("--trust-remote-code", Value::None),
    // Preempted sequences are computed anew.
    ("--swap-space", Value::Any),
    ("--pipeline-parallel-size", Value::OneOf(&["1"])),
    ("-pp", Value::OneOf(&["1"])),
    ("--data-parallel-size", Value::OneOf(&["1"])),
    ("-dp", Value::OneOf(&["1"])),
    // Requests have priorities, and equals are served in the order of arrival.
    ("--scheduling-policy", Value::OneOf(&["priority", "fcfs"])),
    // Defaults for sampling are read beside the weights.
    ("--generation-config", Value::OneOf(&["auto"])),
    ("--runner", Value::OneOf(&["auto", "generate"])),
    ("--task", Value::OneOf(&["auto", "generate"])),
    ("--max-logprobs", Value::OneOf(&["20"])),
];

/// Flags of features that are not built.
const NOT_YET: &[&str] = &[
    "--data-parallel-size",
    "--enable-auto-tool-choice",
    "--enable-expert-parallel",
    "--enable-lora",
    "--guided-decoding-backend",
    "--hf-overrides",
    "--kv-transfer-config",
    "--limit-mm-per-prompt",
    "--lora-modules",
    "--max-logprobs",
    "--pipeline-parallel-size",
    "--reasoning-parser",
    "--revision",
    "--rope-scaling",
    "--speculative-config",
    "--structured-outputs-config",
    "--tokenizer",
    "--tool-call-parser",
];

/// Whether a flag is of a feature that is not built.
pub(super) fn is_not_built_yet(flag: &str) -> bool {
    NOT_YET.contains(&flag)
}

/// The arguments without flags that ask for nothing new, and a note for each of those.
pub(super) fn without_needless(arguments: Vec<OsString>) -> (Vec<OsString>, Vec<String>) {
    let (mut kept, mut notes) = (Vec::with_capacity(arguments.len()), Vec::new());
    let mut arguments = arguments.into_iter().peekable();
    while let Some(argument) = arguments.next() {
        let text = argument.to_str().unwrap_or_default();
        if text == "--" {
            kept.push(argument);
            kept.extend(arguments.by_ref());
            break;
        }
        if text == "-tp" {
            kept.push("--tensor-parallel-size".into());
            continue;
        }
        let (flag, inline) = text.split_once('=').map_or((text, None), |(flag, value)| (flag, Some(value)));
        let next = arguments.peek().and_then(|next| next.to_str());
        let given = inline.or(next).unwrap_or_default();
        let (is_needless, takes_next) = match NEEDLESS.iter().find(|(name, _)| *name == flag) {
            None => (false, false),
            Some((_, Value::None)) => (inline.is_none(), false),
            Some((_, Value::Any)) => (true, inline.is_none()),
            Some((_, Value::OneOf(values))) => (values.contains(&given), inline.is_none()),
        };
        if !is_needless {
            kept.push(argument);
            continue;
        }
        notes.push(format!("{flag} changes nothing here"));
        if takes_next {
            arguments.next();
        }
    }
    (kept, notes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_ask_for_nothing_new_are_dropped() {
        let line = "tandem serve m --trust-remote-code --swap-space 4 --seed 3 -pp 1 \
             --pipeline-parallel-size=1 -tp 2 --scheduling-policy priority --max-model-len 64 -- --swap-space";
        let (kept, notes) = without_needless(line.split_whitespace().map(OsString::from).collect());
        let kept: Vec<_> = kept.iter().map(|argument| argument.to_str().unwrap()).collect();
        assert_eq!(
            kept.join(" "),
            "tandem serve m --seed 3 --tensor-parallel-size 2 --max-model-len 64 -- --swap-space"
        );
        assert_eq!(notes.len(), 5, "{notes:?}");
        assert_eq!(notes[0], "--trust-remote-code changes nothing here");
    }

    #[test]
    fn what_would_change_something_stays() {
        for line in [
            "serve --pipeline-parallel-size 2",
            "serve --enable-chunked-prefill=false",
            "serve --swap-spaces 4",
        ] {
            let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            assert_eq!(without_needless(arguments.clone()), (arguments, vec![]));
        }
    }
}
