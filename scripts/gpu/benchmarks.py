"""How fast a GPU is, beside what its own limits allow. Each benchmark takes the suite and yields measurements."""

import json

from processes import REFUSED, Failed, Server, Skipped, last_line, run


class Types:
    """What weights of layers and KV are held as: flags, bytes of a value, and how much faster than bf16 products are."""

    def __init__(self, name, flags, layer_bytes, kv_bytes, product_speed):
        self.name, self.flags = name, flags
        self.layer_bytes, self.kv_bytes, self.product_speed = layer_bytes, kv_bytes, product_speed


BF16 = Types("", [], 2, 2, 1)
FP8 = Types("fp8: ", ["--quantization", "fp8", "--kv-cache-dtype", "fp8"], 1, 1, 2)


class Floors:
    """The least time that the device's own limits allow; None where a limit is not known."""

    def __init__(self, config, limits, of=BF16):
        self.of = of
        self.bytes_per_s, self.flops_per_s = limits.get("copy_bytes_per_s"), limits.get("bf16_flops_per_s")
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        wide, narrow = heads * config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
        self.layers = config["num_hidden_layers"]
        self.layer_weights = self.layers * (2 * hidden * wide + 2 * hidden * narrow + 3 * hidden * inner)
        self.head_weights = hidden * config["vocab_size"]
        self.kv_bytes = 2 * of.kv_bytes * self.layers * narrow
        self.wide = wide

    def decode_s(self, batch, context):
        """One step: all weights and all KV read once."""
        if not self.bytes_per_s:
            return None
        weights = self.of.layer_bytes * self.layer_weights + 2 * self.head_weights
        bytes_s = (weights + batch * context * self.kv_bytes) / self.bytes_per_s
        flops = 2 * batch * (self.layer_weights / self.of.product_speed + self.head_weights)
        return max(bytes_s, flops / self.flops_per_s) if self.flops_per_s else bytes_s

    def prefill_s(self, tokens):
        """One prompt: every weight with every token, each token with those before it, logits once."""
        if not self.flops_per_s:
            return None
        attention = 2 * self.layers * self.wide * tokens**2
        layers = 2 * tokens * self.layer_weights / self.of.product_speed
        return (layers + 2 * self.head_weights + attention) / self.flops_per_s

    def served_s(self, requests, at_once, prompt, output):
        """Whole requests: all prompts, and steps of `at_once` sequences at their average context."""
        prefill_s, step_s = self.prefill_s(prompt), self.decode_s(at_once, prompt + output / 2)
        return requests * prefill_s + requests / at_once * output * step_s if prefill_s and step_s else None


def measured(name, value, unit, floor=None, more_is_better=True, **numbers):
    """`floor` is what the limits allow at best, in the unit of `value`."""
    share = None
    if floor and value:
        share = value / floor if more_is_better else floor / value
    return {"name": name, "status": "measured", "value": value, "unit": unit, "limit": floor, "share": share, **numbers}


def bench_rows(suite, arguments, limit_s):
    """Results of `tandem bench`."""
    status, out, err = run(suite, [suite.binary, "bench", *arguments, "--format", "json"], limit_s)
    if status == REFUSED and "memory" in err:
        raise Skipped(f"this GPU is too small: {last_line(err)}")
    if status != 0:
        raise Failed(f"tandem bench ended with {status}: {last_line(err)}")
    return json.loads(out)["results"]


def decode(*concurrency, requests=None, of=BF16, batched_tokens=2048, name="decode", more=()):
    """Decode while all of so many sequences decode, in the process of the engine; two or three rounds without `requests`."""

    def bench(suite):
        sizes, floors = suite.sizes, suite.floors(of)
        prompt, output = sizes["decode_prompt"], sizes["decode_output"]
        at_once = sorted({suite.scaled(n) for n in concurrency})
        arguments = [*suite.model_arguments(batched_tokens), *of.flags, *more, "--prompt-tokens", prompt, "--output-tokens", output,
                     "--concurrency", ",".join(map(str, at_once)), "--max-num-seqs", max(at_once)]
        if requests:
            arguments += ["--num-requests", suite.scaled(requests)]
        for row in bench_rows(suite, arguments, 240):
            batch, rate = row["concurrency"], row["decode_tokens_per_second"]
            step_s = floors.decode_s(batch, prompt + output / 2)
            yield measured(f"{of.name}{name}, batch {batch}, context {prompt}", rate, "tok/s", step_s and batch / step_s,
                           step_ms=1000 * batch / rate if rate else None, outside_of_model=row["overhead"]["total"],
                           overlapped_steps=row["overhead"]["overlapped_steps"],
                           prefill_tokens_per_s=row["prefill_tokens_per_second"])

    return bench


def server(of=BF16):
    """Start, time to first token, prompts, and whole requests, over HTTP."""
    return lambda suite: bench_server(suite, of)


def bench_server(suite, of):
    sizes, floors = suite.sizes, suite.floors(of)
    arguments = [*suite.model_arguments(), *of.flags, "--max-num-seqs", sizes["served_at_once"]]
    with Server(suite, arguments, ready_s=180) as server:
        yield measured(f"{of.name}start to ready", server.ready_s, "s")

        def load(at_once, requests, prompt, output, limit_s):
            load = ["--url", server.url(), "--concurrency", at_once, "--num-requests", requests, "--prompt-tokens", prompt,
                    "--output-tokens", output, "--timeout", max(1, int(limit_s))]
            (row,) = bench_rows(suite, load, limit_s)
            return row

        prompt = sizes["prefill_prompt"]
        row = load(1, 8, prompt, 1, 60)
        floor = floors.prefill_s(prompt)
        yield measured(f"{of.name}time to first token, {prompt} tokens", row["ttft_ms"]["p50"], "ms", floor and 1000 * floor,
                       more_is_better=False, p99=row["ttft_ms"]["p99"])
        at_once = suite.scaled(8)
        row = load(at_once, 4 * at_once, prompt, 1, 60)
        yield measured(f"{of.name}prefill, {at_once} at once, {prompt} tokens", row["prompt_tokens_per_second"], "tok/s",
                       floor and prompt / floor)
        at_once, prompt, output = sizes["served_at_once"], sizes["served_prompt"], sizes["served_output"]
        limit_s = suite.left_s() - 10
        if limit_s < sizes["served_needs_s"]:
            raise Skipped(f"{limit_s:.0f} s are left for requests over HTTP, which take {sizes['served_needs_s']}")
        requests = at_once if limit_s < 4 * sizes["served_needs_s"] else 2 * at_once
        row = load(at_once, requests, prompt, output, min(limit_s, 300))
        floor = floors.served_s(requests, at_once, prompt, output)
        yield measured(f"{of.name}served, {at_once} at once, {prompt} in, {output} out", row["output_tokens_per_second"], "tok/s",
                       floor and requests * output / floor, requests=requests, ttft_ms=row["ttft_ms"], tpot_ms=row["tpot_ms"])


def transformers(suite):
    """The same shape in transformers, where that is installed."""
    if suite.small:
        raise Skipped("small shapes say nothing of it")
    try:
        found = suite.child("transformers", suite.shape / "config.json", limit_s=180)
    except Failed as error:
        raise Skipped(str(error)) from None
    for batch, rate in found["decode"].items():
        yield measured(f"transformers: decode, batch {batch}, context 1024", rate, "tok/s", **{"with": found["with"]})
    yield measured("transformers: prefill, 2048 tokens", found["prefill_tokens_per_s"], "tok/s", **{"with": found["with"]})
