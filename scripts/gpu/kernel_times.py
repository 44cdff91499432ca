#!/usr/bin/env python3
"""Where the time of a step on a GPU goes, kernel by kernel, by NVIDIA's ncu (Nsight Compute).

  scripts/gpu/kernel_times.py BINARY MODEL [--batch N] [--prompt N] [--layers N] [--skip N] [--kernels N] [-- flags of tandem bench]

A few layers tell as much as all and load sooner: with --layers the model is the config.json of MODEL with so many, and random weights.
Steps are not recorded (--enforce-eager), so that each kernel is seen by itself; ncu runs one at a time, and what the overlap of launches
saves is not in these times. Prompts come first: --skip leaves out so many launches, and so does --only for kernels of other names.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys
import tempfile

from processes import environment

LIMIT_S = 300
# In ns and bytes.
METRICS = ["gpu__time_duration.sum", "dram__bytes.sum"]
# The project's own; cuBLASLt's are told of by tandem itself (--log-level tandem_engine::load=debug).
OWN = "^(gemv|skinny|attention|rms_norm|add_rms|rope|embed|gather|sample|argmax|silu|quantize|dequantize|add_bias)"


def rows_of(text):
    """What ncu writes as CSV, between its own words; the line after the names has units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    for row in csv.DictReader(lines):
        try:
            values = [float(row[name].replace(",", "")) for name in METRICS]
        except (KeyError, ValueError):
            continue
        yield (row["Kernel Name"].split("(")[0], row["Grid Size"]), values


def table(text):
    found = {}
    for key, values in rows_of(text):
        found.setdefault(key, []).append(values)
    lines = [f"{'kernel':<34} {'grid':<16} {'launches':>8} {'median us':>10} {'least us':>9} {'MB':>9} {'GB/s':>7}"]
    for (name, grid), launches in found.items():
        times = sorted(ns for ns, _ in launches)
        median_ns, moved = times[len(times) // 2], sorted(moved for _, moved in launches)[len(launches) // 2]
        lines.append(f"{name:<34} {grid:<16} {len(launches):>8} {median_ns / 1e3:>10.2f} {times[0] / 1e3:>9.2f} "
                     f"{moved / 1e6:>9.2f} {moved / median_ns:>7.0f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--kernels", type=int, default=200, help="launches to look at")
    parser.add_argument("--only", default=OWN, help="a regular expression for their names")
    parser.add_argument("flags", nargs="*", help="further flags of tandem bench, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-kernel-times-") as work:
        work = pathlib.Path(work)
        config = json.loads((options.model / "config.json").read_text()) | {"num_hidden_layers": options.layers}
        (work / "config.json").write_text(json.dumps(config))
        log = work / "ncu.csv"
        command = ["ncu", "--clock-control", "none", "--cache-control", "none", "--csv", "--page", "raw", "--metrics",
                   ",".join(METRICS), "--target-processes", "all", "-k", f"regex:{options.only}", "--launch-skip",
                   options.skip, "-c", options.kernels, "--log-file", log, options.binary.resolve(), "bench", work,
                   "--load-format", "dummy", "--device", "cuda", "--enforce-eager", "--prompt-tokens", options.prompt,
                   "--output-tokens", 16, "--concurrency", options.batch, "--num-requests", options.batch,
                   "--max-num-seqs", options.batch, "--max-model-len", options.prompt + 64, *options.flags]
        try:
            done = subprocess.run(list(map(str, command)), env=environment(work), capture_output=True, text=True, check=False,
                                  timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            sys.exit(f"not done after {LIMIT_S} s: fewer --layers, a smaller --batch or --prompt")
        except FileNotFoundError:
            sys.exit("ncu is not on the path; it comes with Nsight Compute")
        if not log.exists():
            sys.exit(f"ncu ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
        print(table(log.read_text()))


if __name__ == "__main__":
    main()
