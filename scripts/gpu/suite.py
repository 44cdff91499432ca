#!/usr/bin/env python3
"""Checks and measures a build of Tandem on an NVIDIA GPU, within a number of minutes.

  scripts/gpu-suite.sh BINARY OUT [--model FILE] [--small]

Needs the binary, this folder, `benches` and `tests/golden` where they are, Python's standard library and the driver; torch and
transformers are used where they are. The most important comes first; what there is no time for is listed as skipped. Writes
OUT/report.json after every item and OUT/log.txt with everything that was said, prints a table, and exits with 1 if a check or a
benchmark failed. GPU_SUITE_MINUTES (12) bounds the whole; the real model is taken from --model, else from the cache folder.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import signal
import sys
import tempfile
import time

import benchmarks
import checks
from benchmarks import FP8
from checks import GOLDEN
from processes import DRIVER, Failed, Log, Skipped, environment, free_port, last_line, run

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = {
    "decode_prompt": 1024, "decode_output": 64, "prefill_prompt": 2048, "served_at_once": 256, "served_prompt": 1000,
    "served_output": 1000, "served_needs_s": 45, "copy_bytes": 4 << 30, "product": 8192,
}
SMALL_SIZES = {
    "decode_prompt": 24, "decode_output": 4, "prefill_prompt": 48, "served_at_once": 3, "served_prompt": 20,
    "served_output": 6, "served_needs_s": 1, "copy_bytes": 1 << 20, "product": 64,
}


class Suite:
    def __init__(self, options):
        self.small, self.given_model = options.small, options.model
        self.binary = options.binary.resolve()
        self.minutes = float(os.environ.get("GPU_SUITE_MINUTES") or 12)
        self.start = time.monotonic()
        options.out.mkdir(parents=True, exist_ok=True)
        self.report_path = options.out / "report.json"
        self.log = Log(options.out / "log.txt")
        self.work = pathlib.Path(tempfile.mkdtemp(prefix="tandem-gpu-suite-"))
        self.shape = GOLDEN / "dummy-d64" if self.small else ROOT / "benches" / "llama-8b"
        self.sizes = SMALL_SIZES if self.small else SIZES
        self.environment = environment(self.work)
        self.floors = None
        self.report = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "minutes": self.minutes, "small": self.small,
            "finished": False, "machine": {}, "limits": {}, "checks": [], "measurements": [],
        }

    def left_s(self):
        """Seconds until the end, a few for ending left out."""
        return self.start + 60 * self.minutes - 5 - time.monotonic()

    def real_model(self):
        caches = [os.environ.get("TANDEM_CACHE_DIR"), os.path.join(os.environ.get("XDG_CACHE_HOME") or
                  os.path.expanduser("~/.cache"), "tandem")]
        if self.small and not self.given_model:
            raise Skipped("small shapes only")
        places = [self.given_model] if self.given_model else [pathlib.Path(c) / "models" / MODEL_NAME for c in caches if c]
        for place in places:
            if place.is_file():
                return place
        if self.given_model:
            raise Failed(f"--model: there is no file {self.given_model}")
        raise Skipped(f"{MODEL_NAME} is neither given with --model nor in the cache folder")

    def model_arguments(self, batched_tokens=2048):
        return [self.shape, "--load-format", "dummy", "--device", "cuda", *(
            ["--max-model-len", 256, "--max-num-batched-tokens", 48, "--kv-cache-memory-bytes", "8MiB"] if self.small
            else ["--max-model-len", 4096, "--max-num-batched-tokens", batched_tokens])]

    def scaled(self, at_once):
        return min(at_once, 3) if self.small else at_once

    def child(self, *arguments, limit_s):
        command = [sys.executable, pathlib.Path(__file__).with_name("limits.py"), *arguments]
        # torch has libraries of its own, and would take those of LD_LIBRARY_PATH for them.
        status, out, err = run(self, command, limit_s, os.environ)
        if status != 0:
            raise Failed(last_line(err))
        return json.loads(out.strip().splitlines()[-1])

    def look_at_machine(self):
        """Machine, versions, and the device's own limits."""
        machine = {"host": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}
        machine["tandem"] = run(self, [self.binary, "--version"], 20)[1].strip()
        smi = shutil.which("nvidia-smi") or shutil.which(f"{DRIVER}/bin/nvidia-smi")
        if smi:
            query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
            try:
                machine["nvidia_smi"] = run(self, [smi, f"--query-gpu={query}", "--format=csv,noheader"], 20)[1].strip()
            except Failed as error:
                machine["nvidia_smi"] = str(error)
        self.report["machine"] = machine
        status, out, err = run(self, [self.binary, "check", GOLDEN / "dummy-d64", "--load-format", "dummy", "--device", "cuda",
                                      "--host", "127.0.0.1", "--port", free_port(), "--metrics-port", 0], 60)
        if status != 0:
            raise Failed(last_line(err))
        machine["check"] = out.strip().splitlines()
        limits, missing = {}, []
        sizes = self.sizes
        for arguments in (["copy", sizes["copy_bytes"]], ["torch", sizes["copy_bytes"], sizes["product"]]):
            try:
                found = self.child(*arguments, limit_s=90)
            except Failed as error:
                missing.append(f"{arguments[0]}: {error}")
                continue
            machine["gpu"] = found.pop("device", machine.get("gpu"))
            for name, value in found.items():
                is_limit = name != "with"
                limits[name] = max(value, limits.get(name, 0)) if is_limit else ", ".join(filter(None, [limits.get(name), value]))
        if missing:
            limits["missing"] = missing
        self.report["limits"] = limits
        config = json.loads((self.shape / "config.json").read_text())
        self.floors = lambda of: benchmarks.Floors(config, limits, of)

    def item(self, kind, name, needs_s, body):
        """Carries out one check or benchmark, if there is time for it, and notes what came of it."""
        entries, start = self.report[kind], time.monotonic()
        entry = {"name": name, "status": "pass"}
        try:
            if not self.small and self.left_s() < needs_s:
                raise Skipped(f"{max(0, self.left_s()):.0f} s are left, and it needs {needs_s}")
            found = body(self)
            if kind == "measurements":
                for measurement in found:
                    entries.append(measurement)
                    self.save()
                return
            entry["numbers"] = found
        except Skipped as error:
            entry |= {"status": "skipped", "reason": str(error)}
        except Failed as error:
            entry |= {"status": "failed", "reason": str(error), "numbers": error.numbers}
        except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
            # An answer of another form than expected; the next item may do better.
            entry |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        entries.append(entry | {"seconds": round(time.monotonic() - start, 1)})
        self.save()

    def save(self):
        partial = self.report_path.with_suffix(".partial")
        partial.write_text(json.dumps(self.report, indent=1) + "\n")
        partial.replace(self.report_path)

    def run(self):
        try:
            self.look_at_machine()
        except Failed as error:
            self.report["checks"].append({"name": "a GPU that can be used", "status": "failed", "reason": str(error)})
            return
        d64, d128 = GOLDEN / "dummy-d64", GOLDEN / "dummy-d128"
        first_checks = [
            ("kernels beside plain loops", 20, checks.kernels),
            ("dummy-d64 bf16 beside the CPU", 10, checks.dummy(d64, "--dummy-weights", "bf16")),
            ("dummy-d128 bf16 beside the CPU", 10, checks.dummy(d128, "--dummy-weights", "bf16")),
            ("graphs on and off", 10, checks.graphs),
            ("the same again", 10, checks.repeats),
            ("the real model beside transformers", 15, checks.golden),
        ]
        more_checks = [
            ("dummy-d64 Q8_0 beside the CPU", 10, checks.dummy(d64, "--dummy-weights", "q8_0")),
            ("dummy-d64 Q4_0 beside the CPU", 10, checks.dummy(d64, "--dummy-weights", "q4_0")),
            ("dummy-d128 Q4_1 beside the CPU", 10, checks.dummy(d128, "--dummy-weights", "q4_1")),
            ("two ranks beside the CPU", 15, checks.dummy(d64, "--dummy-weights", "bf16", "--tensor-parallel-size", 2)),
            ("two ranks with sums in one shot", 20, checks.dummy(d64, "--dummy-weights", "bf16", "--tensor-parallel-size", 2,
                                                                  "--custom-all-reduce", "always")),
            ("tokens with and without log-probabilities", 10, checks.sampling),
            ("many requests at once", 10, checks.many),
            ("two layers of 8B's widths beside the CPU", 45, checks.wide),
        ]
        speeds = [
            ("decode", 40, benchmarks.decode(1, 32, 64)),
            ("server", 60, benchmarks.server()),
            ("fp8: decode", 30, benchmarks.decode(1, 64, of=FP8)),
            ("fp8: server", 60, benchmarks.server(of=FP8)),
            ("decode of many", 30, benchmarks.decode(256, requests=256, batched_tokens=16384)),
            ("decode without overlap", 30, benchmarks.decode(1, 64, name="decode without overlap", more=["--no-async-scheduling"])),
            ("transformers", 40, benchmarks.transformers),
        ]
        if self.small:
            # Every function once.
            first_checks = [item for item in first_checks if not item[0].startswith("dummy")]
            more_checks = [item for item in more_checks if not item[0].startswith("dummy")]
        # If nothing is right, speeds say nothing; but what comes last is worth less than the first speeds.
        for kind, items in (("checks", first_checks), ("measurements", speeds[:2]), ("checks", more_checks),
                            ("measurements", speeds[2:])):
            for name, needs_s, body in items:
                self.item(kind, name, needs_s, body)
        self.report["finished"] = True
        self.report["seconds"] = round(time.monotonic() - self.start, 1)
        self.save()

    def table(self):
        machine, limits = self.report["machine"], self.report["limits"]
        gpu = (machine.get("gpu") or {}).get("name", "no GPU found")
        lines = [f"{gpu}; {machine.get('tandem')}; {machine.get('nvidia_smi') or 'no nvidia-smi'}"]
        bandwidth, product = limits.get("copy_bytes_per_s"), limits.get("bf16_flops_per_s")
        lines.append("limits: " + ", ".join(filter(None, [
            f"copy {bandwidth / 1e9:.0f} GB/s" if bandwidth else "copy not measured",
            f"bf16 {product / 1e12:.1f} TFLOP/s" if product else "bf16 product not measured", limits.get("with")])))
        for entry in self.report["checks"]:
            numbers = entry.get("numbers") or {}
            found = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
            lines.append(f"{entry['status']:<9} {entry['name']:<46} {entry.get('reason') or found}")
        for entry in self.report["measurements"]:
            if entry["status"] != "measured":
                lines.append(f"{entry['status']:<9} {entry['name']:<46} {entry['reason']}")
                continue
            share = f"{100 * entry['share']:5.1f} % of {entry['limit']:,.1f}" if entry["share"] else "no limit known"
            lines.append(f"{'measured':<9} {entry['name']:<46} {entry['value']:>12,.1f} {entry['unit']:<6} {share}")
        return "\n".join(lines)

    def failed(self):
        return [e for e in self.report["checks"] + self.report["measurements"] if e["status"] == "failed"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path, help="folder for report.json and log.txt")
    parser.add_argument("--model", type=pathlib.Path, help=f"{MODEL_NAME}, for the comparison with transformers' numbers")
    parser.add_argument("--small", action="store_true", help="tiny shapes: to see that the suite itself works, not to measure")
    suite = Suite(parser.parse_args())
    # So that servers are ended when the suite is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        suite.run()
    finally:
        suite.save()
        shutil.rmtree(suite.work, ignore_errors=True)
    print(suite.table())
    sys.exit(1 if suite.failed() else 0)


if __name__ == "__main__":
    main()
