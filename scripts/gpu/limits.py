#!/usr/bin/env python3
"""What a GPU can do at most, and what transformers does on it; each prints one JSON object.

  limits.py copy BYTES             bandwidth of a copy on the device, through the driver alone
  limits.py torch BYTES N          the same and a product of bf16 matrices of N rows and columns, through torch
  limits.py transformers CONFIG    prefill and decode of random weights in bf16 with scaled_dot_product_attention

Run by suite.py, each in a process of its own: so its memory is free again afterwards, and what hangs can be ended.
"""

import ctypes
import inspect
import json
import sys
import time

ROUNDS = 20
DECODE_STEPS = 32


def best(work, wait, rounds=ROUNDS):
    """Seconds of the fastest round: other load on the machine only ever makes one slower."""
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


class Driver:
    """The few calls that a copy takes."""

    def __init__(self):
        for name in ("libcuda.so.1", "libcuda.so", "/usr/local/nvidia/lib64/libcuda.so.1"):
            try:
                self.library = ctypes.CDLL(name)
                break
            except OSError as error:
                reason = error
        else:
            raise RuntimeError(f"no CUDA driver: {reason}")
        self.call("cuInit", 0)
        self.device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(self.device), 0)

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name}: CUDA error {status}")

    def describe(self):
        name, version, memory = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_size_t()
        self.call("cuDeviceGetName", name, len(name), self.device)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), self.device)
        attribute, values = ctypes.c_int(), []
        for number in (75, 76, 16):  # compute capability, major and minor; multiprocessors
            self.call("cuDeviceGetAttribute", ctypes.byref(attribute), number, self.device)
            values.append(attribute.value)
        return {
            "name": name.value.decode(errors="replace"),
            "cuda_of_driver": f"{version.value // 1000}.{version.value % 1000 // 10}",
            "memory_bytes": memory.value,
            "compute_capability": f"{values[0]}.{values[1]}",
            "multiprocessors": values[2],
        }

    def copy(self, size):
        context, stream = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self.call("cuCtxSetCurrent", context)
        self.call("cuStreamCreate", ctypes.byref(stream), 0)
        source, target = ctypes.c_uint64(), ctypes.c_uint64()
        for address in (source, target):
            self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        # Memory that was never written may be served without being read.
        self.call("cuMemsetD8Async", source, ctypes.c_ubyte(7), ctypes.c_size_t(size), stream)
        seconds = best(
            lambda: self.call("cuMemcpyDtoDAsync_v2", target, source, ctypes.c_size_t(size), stream),
            lambda: self.call("cuStreamSynchronize", stream),
        )
        return 2 * size / seconds


def copy(size):
    driver = Driver()
    device = driver.describe()
    # Both ends have to fit.
    size = min(int(size), device["memory_bytes"] // 8)
    return {"device": device, "copy_bytes_per_s": driver.copy(size), "with": "the driver"}


def with_torch(size, n):
    import torch

    size, n = int(size), int(n)
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")

    def copy_seconds():
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return best(lambda: target.copy_(source), torch.cuda.synchronize)

    copy_s = copy_seconds()
    # Random values: zeros draw less power and run faster than any real product.
    left, right = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product_s = best(lambda: torch.matmul(left, right), torch.cuda.synchronize)
    return {
        "copy_bytes_per_s": 2 * size / copy_s,
        "bf16_flops_per_s": 2 * n**3 / product_s,
        "with": f"torch {torch.__version__}",
    }


def transformers(config):
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    from transformers import __version__ as version

    with open(config, encoding="utf-8") as file:
        config = LlamaConfig.from_dict(json.load(file))
    # Newer versions call it otherwise.
    names = inspect.signature(LlamaForCausalLM.forward).parameters
    cache_name = "cache" if "cache" in names else "past_key_values"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"), torch.no_grad():
        config._attn_implementation = "sdpa"
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        results = {"with": f"transformers {version}, torch {torch.__version__}, sdpa, bf16", "decode": {}}
        prompt = torch.randint(0, config.vocab_size, (1, 2048))
        seconds = best(lambda: model(prompt, logits_to_keep=1), torch.cuda.synchronize, rounds=4)
        results["prefill_tokens_per_s"] = 2048 / seconds
        for batch in (1, 32):
            prompt = torch.randint(0, config.vocab_size, (batch, 1024))
            cache = {cache_name: DynamicCache(), "use_cache": True}

            def step(tokens, cache=cache):
                return model(tokens, logits_to_keep=1, **cache).logits[:, -1].argmax(-1, keepdim=True)

            # The first step after a prompt finds nothing compiled and allocated.
            tokens = step(step(prompt))
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(DECODE_STEPS):
                tokens = step(tokens)
            torch.cuda.synchronize()
            results["decode"][batch] = batch * DECODE_STEPS / (time.perf_counter() - start)
            del cache, step
    return results


def main():
    what, *arguments = sys.argv[1:]
    print(json.dumps({"copy": copy, "torch": with_torch, "transformers": transformers}[what](*arguments)))


if __name__ == "__main__":
    main()
