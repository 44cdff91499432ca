"""Whether a GPU computes the right numbers. Each check takes the suite and returns its numbers, or raises."""

import json
import pathlib
import threading

from processes import REQUEST_S, Failed, Server, last_line, run

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
# What rounding to bf16 may do to log-probabilities, as mean and at most; a wrong kernel is apart by whole units. As in
# tests/tests/gpu.rs for random weights; the real model has fifteen times their layers.
DUMMY_BOUND = (0.02, 0.12)
MODEL_BOUND = (0.03, 0.3)


def prompt_of(seed, length):
    """As tests/tests/gpu.rs makes them, of tokens that every vocabulary here has."""
    return [3 + (seed * 7919 + i * i * 31 + i * 17) % 490 for i in range(length)]


def tokens(server, seed, length=None, **more):
    """Of an answer to a prompt that follows from the seed."""
    prompt = prompt_of(seed, length or 5 + 9 * seed)
    answer = server.complete(prompt=prompt, max_tokens=12, seed=seed, ignore_eos=True, return_token_ids=True, **more)
    return answer["choices"][0]["token_ids"]


def choices(server, seed, **more):
    """Four answers to a prompt."""
    body = {"prompt": prompt_of(seed, 20), "max_tokens": 24, "n": 4, "temperature": 1.0, "seed": seed, "ignore_eos": True}
    return [choice["token_ids"] for choice in server.complete(return_token_ids=True, **body, **more)["choices"]]


def flags(model, device, *more, kv="8MiB"):
    return [model, "--load-format", "dummy", "--device", device, "--max-model-len", 256, "--max-num-seqs", 12,
            "--max-num-batched-tokens", 48, "--kv-cache-memory-bytes", kv, *more]


def apart(expected, found):
    distances = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    return sum(distances) / len(distances), max(distances)


def within(bound, numbers):
    if not (numbers["mean"] < bound[0] and numbers["most"] < bound[1]):
        reason = f"log-probabilities are {numbers['mean']:.4f} apart on average, {numbers['most']:.4f} at most"
        raise Failed(reason, numbers)
    return numbers


def kernels(suite):
    """Every kernel beside plain loops, on random data."""
    status, out, err = run(suite, [suite.binary, "kernels", "--check"], 180)
    lines = out.strip().splitlines()
    failed = [line for line in lines if "FAILED" in line]
    if status != 0 or failed or not lines:
        raise Failed(f"{len(failed)} of {len(lines)} failed: {'; '.join(failed[:5]) or last_line(err)}")
    return {"cases": len(lines)}


def dummy(model, *weights):
    """Log-probabilities of prompts on the GPU beside those of the CPU in f32, of one chunk, of several, of few tokens."""

    def check(suite):
        with Server(suite, flags(model, "cpu", "--dtype", "f32", *weights)) as cpu:
            expected = [cpu.scores(prompt_of(n, n))[0] for n in (5, 40, 130)]
        with Server(suite, flags(model, "cuda", *weights)) as gpu:
            found = [gpu.scores(prompt_of(n, n))[0] for n in (5, 40, 130)]
        mean, most = apart(sum(expected, []), sum(found, []))
        if most == 0:
            raise Failed("the same bits as on the CPU: this was no GPU")
        return within(DUMMY_BOUND, {"mean": mean, "most": most})

    return check


def wide(suite):
    """The same with two layers of the widths of an 8B model."""
    config = json.loads((suite.shape / "config.json").read_text()) | {"num_hidden_layers": 2}
    folder = suite.work / "wide"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return dummy(folder)(suite)


def greedy(server, seed, length):
    """The likeliest tokens after a prompt, and their log-probabilities."""
    body = {"prompt": prompt_of(seed, length), "max_tokens": 24, "temperature": 0, "logprobs": 0}
    choice = server.complete(ignore_eos=True, return_token_ids=True, **body)["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def graphs(suite):
    """Recorded steps and single launches are the same operations: the same numbers, but for the choice among kernels and algorithms
    that every start makes anew by time."""
    answers = []
    for more in ([], ["--enforce-eager"]):
        with Server(suite, flags(GOLDEN / "dummy-d64", "cuda", *more)) as server:
            answers.append([greedy(server, seed, 5 + 9 * seed) for seed in range(6)])
    expected, found = [], []
    for recorded, eager in zip(*answers, strict=True):
        # Where two tokens are level, the rest is another text.
        equal = next((i for i, (a, b) in enumerate(zip(recorded[0], eager[0], strict=True)) if a != b), len(recorded[0]))
        expected += recorded[1][:equal]
        found += eager[1][:equal]
    if len(expected) < 24 * len(answers[0]) / 2:
        raise Failed(f"only {len(expected)} tokens are the same with --enforce-eager")
    mean, most = apart(expected, found)
    return within(DUMMY_BOUND, {"mean": mean, "most": most, "tokens": len(expected)})


def repeats(suite):
    """The same request again gives the same bits: nothing races."""
    with Server(suite, flags(GOLDEN / "dummy-d64", "cuda", "--no-enable-prefix-caching")) as server:
        for length in (3, 20, 60, 150):
            first = greedy(server, 1, length), server.scores(prompt_of(2, length))[0]
            for _ in range(8):
                # A penalty, even one that changes no logit, makes each step wait for the tokens of the one before.
                if tokens(server, 1, length, temperature=0, frequency_penalty=1e-20) != first[0][0][:12]:
                    raise Failed(f"a prompt of {length} tokens has other tokens when steps do not overlap")
                if (greedy(server, 1, length), server.scores(prompt_of(2, length))[0]) != first:
                    raise Failed(f"a prompt of {length} tokens has other answers when it is sent again")
        for seed in range(4):
            # Choices of one request are rows of one step, whether it is begun before the last is over or not.
            beside, after = (choices(server, seed, **more) for more in ({}, {"frequency_penalty": 1e-20}))
            if beside != after or len(set(map(tuple, beside))) < len(beside):
                raise Failed(f"choices differ when steps overlap: {beside} and {after}")
    return {"prompts": 8, "times": 9, "choices": 16}


def sampling(suite):
    """Tokens do not depend on whether log-probabilities are wanted."""
    settings = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"temperature": 0, "frequency_penalty": 1.5, "logit_bias": {"17": 5.0, "40": -100.0}},
        {"temperature": 1.0, "allowed_token_ids": [9, 8, 7, 300, 301, 302]},
        {"temperature": 0, "min_tokens": 8, "stop_token_ids": [285, 20, 52]},
    ]
    with Server(suite, flags(GOLDEN / "dummy-d64", "cuda", "--no-enable-prefix-caching")) as server:
        others = [s for i, s in enumerate(settings) if tokens(server, i, **s) != tokens(server, i, logprobs=1, **s)]
    if others:
        raise Failed(f"other tokens when log-probabilities are wanted with {others}")
    return {"settings": len(settings)}


def many(suite):
    """Prompts in chunks beside decodes, choices that share a prompt, cached prefixes, preemption: all are answered."""
    answers = {}
    with Server(suite, flags(GOLDEN / "dummy-d64", "cuda", kv="640KiB")) as server:
        alone = [tokens(server, seed, temperature=0) for seed in range(6)]

        def ask(request):
            try:
                answers[request] = tokens(server, request % 6, temperature=0, n=1 + request % 2)
            except Failed as error:
                answers[request] = error

        threads = [threading.Thread(target=ask, args=(request,), daemon=True) for request in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(REQUEST_S)
    wrong = [r for r in range(12) if not isinstance(answers.get(r), list) or answers[r][:1] != alone[r % 6][:1]]
    if wrong:
        raise Failed(f"requests {wrong} have no answer, or one that begins otherwise: {answers.get(wrong[0])}")
    return {"requests": 12}


def golden(suite):
    """The real model beside transformers in f32 (tests/golden/smollm2)."""
    model = suite.real_model()
    golden = json.loads((GOLDEN / "smollm2" / "golden.json").read_text())
    expected, found, positions, equal, missed = [], [], 0, 0, 0.0
    with Server(suite, [model, "--device", "cuda", "--max-model-len", 512, "--max-num-seqs", 8]) as server:
        for case in golden["cases"]:
            # The reference's own tokens are the prompt, so one mistake does not lead to others.
            scores, best = server.scores(case["ids"] + case["greedy"], top=1)
            start = len(case["ids"]) - 1
            expected += case["prompt_logprobs"]
            found += scores[:start]
            for score, top, margin in zip(scores[start:], best[start:], case["greedy_margin"], strict=True):
                positions += 1
                equal += score >= top
                missed = max(missed, 0.0 if score >= top else margin)
    mean, most = apart(expected, found)
    numbers = {"mean": mean, "most": most, "positions": positions, "best_equal": equal, "missed_margin": missed}
    if equal < 0.97 * positions or missed > MODEL_BOUND[1]:
        raise Failed(f"the best token is the reference's at {equal} of {positions}; one of margin {missed:.3f} was missed", numbers)
    return within(MODEL_BOUND, numbers)
