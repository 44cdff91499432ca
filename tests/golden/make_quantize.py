#!/usr/bin/env python3
"""Writes quantize/: 96 blocks of 32 bf16 values, and what the gguf package (0.17.1, numpy 2.4.6) rounds them to.

Blocks are normal values of 2^-20 to 2^3 (48), integers with many ties (24), one outlier among small values (16), and
constants (8). The files are raw: values.bf16, q8_0, q4_0, q4_1.
"""

import os

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

random = np.random.default_rng(20260613)
blocks = [random.normal(size=32) * 2.0 ** (i % 24 - 20) for i in range(48)]
blocks += [random.integers(-9, 10, size=32) * 0.125 for _ in range(24)]
for i in range(16):
    small = random.normal(size=32) * 0.01
    small[random.integers(32)] = (-1) ** i * 2.0
    blocks.append(small)
blocks += [np.full(32, value) for value in (0.0, 1.0, -0.75, 0.003, -100.0, 7.0, 5e-6, -6e4)]

# To bf16 by rounding half to even, and back: the values that the test reads.
bits = np.array(blocks, dtype=np.float32).view(np.uint32)
bf16 = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
values = (bf16.astype(np.uint32) << 16).view(np.float32)

folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "quantize")
os.makedirs(folder, exist_ok=True)
bf16.tofile(os.path.join(folder, "values.bf16"))
for name, kind in (("q8_0", Type.Q8_0), ("q4_0", Type.Q4_0), ("q4_1", Type.Q4_1)):
    quantize(values, kind).tofile(os.path.join(folder, name))
