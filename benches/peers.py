#!/usr/bin/env python3
"""Measures Tandem beside llama.cpp: same weights, same machine, same threads, in turn.

  benches/peers.sh build            fetch and build llama.cpp
  benches/peers.sh models           and make the weight files
  benches/peers.sh [run]            and measure; writes peers.json and peers.md

Rows: prefill512, prefill4096, decode1 (short context), decode4096 (one sequence at that context), decode16 (16 at
once), serve1 and serve16 (whole servers, both driven by `tandem bench --url`). Each round of a row measures Tandem, then
llama.cpp; the medians of all rounds are compared. The llama.cpp is the one in the PyPI source package below, built in
release for this machine, or for AVX2 alone with --isa avx2 (Tandem then gets --isa avx2 too).
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE = "llama_cpp_python-0.3.36"
REQUIREMENT = "llama-cpp-python==0.3.36"
ARCHIVE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PEER = "llama.cpp (llama-cpp-python 0.3.36)"
TARGETS = ["llama-bench", "llama-batched-bench", "llama-server", "llama-quantize", "llama-perplexity"]
COMMON_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release", "LLAMA_CURL": "OFF", "LLAMA_OPENSSL": "OFF", "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_UI": "OFF",
}
# A build folder and what makes it.
BUILDS = {
    "native": ("build", {"GGML_NATIVE": "ON"}),
    "avx2": ("build-avx2", {
        "GGML_NATIVE": "OFF", "GGML_AVX2": "ON", "GGML_FMA": "ON", "GGML_F16C": "ON", "GGML_BMI2": "ON",
        "GGML_AVX_VNNI": "OFF", "GGML_AVX512": "OFF", "GGML_AVX512_VNNI": "OFF", "GGML_AVX512_BF16": "OFF",
    }),
}
MODELS = {"q4_1": "Q4_1", "q8_0": "Q8_0", "q4_0": "Q4_0", "bf16": "BF16"}
DOWNLOAD_TIMEOUT_S = 900
BUILD_TIMEOUT_S = 4 * 3600
READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: `prompt` and `output` tokens, `concurrency` requests at once."""

    name: str
    title: str
    kind: str
    prompt: int
    output: int
    concurrency: int = 1

    def smaller(self):
        """For trying the script out."""
        return dataclasses.replace(self, prompt=max(16, self.prompt // 8), output=max(1, self.output // 8))


ROWS = [
    Row("prefill512", "prefill 512", "prefill", 512, 1),
    Row("prefill4096", "prefill 4,096", "prefill", 4096, 1),
    Row("decode1", "decode 1", "decode", 128, 128),
    Row("decode4096", "decode 1 at a context of 4,096", "decode", 4096, 64),
    Row("decode16", "decode 16 at once", "batch", 128, 64, 16),
    Row("serve1", "server, 1 at once", "serve", 128, 64),
    Row("serve16", "server, 16 at once", "serve", 128, 64, 16),
]
ROW_NAMES = [row.name for row in ROWS]


class Problem(Exception):
    """Something that a person has to mend; its text says what."""


def say(text):
    print(f"peers: {text}", file=sys.stderr, flush=True)


# Processes


def run(command, timeout, log=None, accept=(0,)):
    """Runs a command to its end and returns its standard output. What it says beside that goes into `log` if given."""
    name = os.path.basename(command[0])
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Problem(f"{name} was not done after {timeout:.0f} s: {shlex.join(command)}")
    except OSError as error:
        raise Problem(f"{name} does not start: {error}")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n{done.stdout}{done.stderr}\n")
    if done.returncode not in accept:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-5:]
        where = f" (all of it: {log})" if log else ""
        raise Problem(f"{name} failed with {done.returncode}{where}: {shlex.join(command)}\n  " + "\n  ".join(said))
    return done


class Server:
    """A server that is stopped, by its own process id, when the block ends."""

    def __init__(self, name, command, log):
        self.name, self.command, self.log = name, command, log
        self.port = free_port()

    def __enter__(self):
        command = [part.format(port=self.port) for part in self.command]
        self.output = open(self.log, "w", encoding="utf-8")
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output)
        except OSError as error:
            self.output.close()
            raise Problem(f"{self.name} does not start: {error}")
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_ready(self):
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Problem(f"{self.name} ended with {self.process.returncode} while it started; see {self.log}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.1)
        raise Problem(f"{self.name} was not ready after {READY_TIMEOUT_S} s; see {self.log}")

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.output.close()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Building


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def source(folder):
    """The folder of llama.cpp's source; fetched if it is not there."""
    tree = os.path.join(folder, PACKAGE, "vendor", "llama.cpp")
    if os.path.exists(os.path.join(tree, "CMakeLists.txt")):
        return tree
    archive = os.path.join(folder, f"{PACKAGE}.tar.gz")
    if not os.path.exists(archive):
        say(f"downloading {REQUIREMENT}")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder]
        run(command + [REQUIREMENT], DOWNLOAD_TIMEOUT_S)
    if not os.path.exists(archive) or sha256(archive) != ARCHIVE_SHA256:
        raise Problem(f"{archive} is not the expected file (SHA-256 differs); remove it and check the PyPI index in use")
    unpacked = os.path.join(folder, f"{PACKAGE}.unpacking")
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    # An earlier try may have left a part.
    shutil.rmtree(os.path.join(folder, PACKAGE), ignore_errors=True)
    os.rename(os.path.join(unpacked, PACKAGE), os.path.join(folder, PACKAGE))
    os.rmdir(unpacked)
    return tree


def build_tools(folder):
    """cmake and ninja: the machine's, else from PyPI into a virtual environment."""
    tools = [shutil.which("cmake"), shutil.which("ninja")]
    if all(tools):
        return tools
    environment = os.path.join(folder, "venv")
    tools = [os.path.join(environment, "bin", name) for name in ("cmake", "ninja")]
    if not all(os.path.exists(tool) for tool in tools):
        say("installing cmake and ninja")
        run([sys.executable, "-m", "venv", "--clear", environment], DOWNLOAD_TIMEOUT_S)
        pip = [os.path.join(environment, "bin", "python"), "-m", "pip", "install", "--quiet", "cmake>=3.28,<5", "ninja>=1.11"]
        run(pip, DOWNLOAD_TIMEOUT_S)
    return tools


def build(options):
    """Builds what is missing and returns the folder of the programs."""
    tree = source(options.dir)
    cmake, ninja = build_tools(options.dir)
    name, flags = BUILDS[options.isa]
    folder = os.path.join(options.dir, name)
    log = os.path.join(options.dir, f"{name}.log")
    if not os.path.exists(os.path.join(folder, "build.ninja")):
        say(f"configuring {folder}")
        settings = [f"-D{key}={value}" for key, value in (COMMON_OPTIONS | flags).items()]
        command = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", tree, "-B", folder]
        run(command + settings, BUILD_TIMEOUT_S, log)
    say(f"building in {folder} (log: {log})")
    run([ninja, "-C", folder, f"-j{options.jobs}"] + TARGETS, BUILD_TIMEOUT_S, log)
    return os.path.join(folder, "bin")


# Weight files


def default_model():
    done = run([sys.executable, os.path.join(REPOSITORY, "scripts", "fetch-model.py")], DOWNLOAD_TIMEOUT_S)
    return done.stdout.strip()


def model_files(options, binaries):
    """The files to measure by the name of their weights: those named, else those of each weight type that is asked for,
    made from the default model where they are missing."""
    if options.file:
        return {os.path.basename(path).removesuffix(".gguf"): path for path in options.file}
    origin = default_model()
    folder = os.path.join(options.dir, "models")
    os.makedirs(folder, exist_ok=True)
    files = {}
    for name in options.models:
        kind = MODELS[name]
        if name == "q4_1":
            files[kind] = origin
            continue
        path = os.path.join(folder, f"SmolLM2-135M-Instruct.{kind}.gguf")
        if not os.path.exists(path):
            say(f"making {path}")
            command = [os.path.join(binaries, "llama-quantize"), "--allow-requantize", origin, f"{path}.part", kind]
            run(command + [str(options.threads)], options.timeout, os.path.join(folder, "quantize.log"))
            os.rename(f"{path}.part", path)
        files[kind] = path
    return files


# Measuring


class Sides:
    """Both programs on one weight file."""

    def __init__(self, options, binaries, model):
        self.options, self.binaries, self.model = options, binaries, model
        self.flags = ["--threads", str(options.threads)] + shlex.split(options.tandem_flags)
        if options.isa == "avx2":
            self.flags += ["--isa", "avx2"]

    def tandem(self, row, _round):
        """Rates and the share of the machine's limit."""
        report = self.tandem_bench(
            ["--model", self.model] + self.flags
            + sizes(row) + ["--requests", str(row.concurrency), "--concurrency", str(row.concurrency)])
        result = report["results"][0]
        phase = "prefill" if row.kind == "prefill" else "decode"
        measured = {
            "tokens_per_second": result[f"{phase}_tokens_per_second"],
            "share_of_limit": result[f"{phase}_share_of_limit"],
            "limits": report["limits"],
            "isa": report["isa"], "activations": report["activations"],
        }
        if "warning" in report:
            measured["warning"] = report["warning"]
        return measured

    def tandem_bench(self, arguments):
        command = [self.options.tandem, "bench", "--format", "json"] + arguments
        # 1: measured, but something about it is wrong.
        done = run(command, self.options.timeout, accept=(0, 1))
        try:
            report = json.loads(done.stdout)
        except ValueError:
            raise Problem(f"tandem bench failed: {shlex.join(command)}\n  {done.stderr.strip()}")
        if done.returncode != 0:
            if "of a limit" not in done.stderr:
                raise Problem(f"tandem bench failed: {shlex.join(command)}\n  {done.stderr.strip()}")
            report["warning"] = done.stderr.strip()
            say(f"warning: {done.stderr.strip()}")
        return report

    def peer(self, row, _round):
        if row.kind == "batch":
            return self.peer_batched(row)
        command = [
            os.path.join(self.binaries, "llama-bench"), "-m", self.model, "-t", str(self.options.threads), "-r", "1",
            "-o", "json",
        ]
        if row.kind == "prefill":
            command += ["-p", str(row.prompt), "-n", "0"]
        else:
            command += ["-p", "0", "-n", str(row.output), "-d", str(row.prompt)]
        tests = parse(command, run(command, self.options.timeout).stdout, json.loads)
        if len(tests) != 1:
            raise Problem(f"llama-bench gave {len(tests)} results for one: {shlex.join(command)}")
        return {"tokens_per_second": tests[0]["avg_ts"]}

    def peer_batched(self, row):
        context = row.concurrency * (row.prompt + row.output)
        threads = str(self.options.threads)
        command = [
            os.path.join(self.binaries, "llama-batched-bench"), "-m", self.model, "-t", threads, "-tb", threads,
            "-c", str(context), "-b", "2048", "-ub", "512", "-npp", str(row.prompt), "-ntg", str(row.output),
            "-npl", str(row.concurrency), "--output-format", "jsonl",
        ]
        def result_line(text):
            # What the program logs may stand around its one result.
            lines = [line[line.index("{"):] for line in text.splitlines() if '"speed_tg"' in line]
            return json.loads(lines[0])
        result = parse(command, run(command, self.options.timeout).stdout, result_line)
        return {"tokens_per_second": result["speed_tg"]}

    def servers(self, folder, concurrency):
        """Both servers, ready to be entered. The peer's context is divided among its slots."""
        slot = max(row.prompt + row.output for row in ROWS if row.kind == "serve") + 64
        threads = str(self.options.threads)
        peer = [
            os.path.join(self.binaries, "llama-server"), "-m", self.model, "-t", threads, "-tb", threads,
            "-np", str(concurrency), "-c", str(concurrency * slot), "--host", "127.0.0.1", "--port", "{port}",
        ]
        tandem = [
            self.options.tandem, "serve", self.model, "--host", "127.0.0.1", "--port", "{port}", "--metrics-port", "0",
            "--max-model-len", str(slot),
        ] + self.flags
        return (
            Server("tandem serve", tandem, os.path.join(folder, "tandem-serve.log")),
            Server("llama-server", peer, os.path.join(folder, "llama-server.log")),
        )

    def serve(self, server, row, round_number):
        """Another seed in every row and round, so that no prefix cache knows the prompts."""
        seed = 10_000 * (1 + ROW_NAMES.index(row.name)) + round_number
        requests = row.concurrency * (2 if self.options.quick else 4)
        report = self.tandem_bench(
            ["--url", server.url, "--concurrency", str(row.concurrency), "--requests", str(max(requests, 2))]
            + sizes(row) + ["--seed", str(seed), "--timeout", str(int(self.options.timeout))])
        result = report["results"][0]
        wanted = result["num_requests"] * row.prompt
        # A server may put a token before the prompt.
        if abs(result["total_prompt_tokens"] - wanted) > result["num_requests"] or result["total_cached_tokens"]:
            raise Problem(f"{server.name} computed other prompts than were sent: {json.dumps(result)}")
        return {
            "tokens_per_second": result["output_tokens_per_second"],
            "ttft_ms": result["ttft_ms"]["p50"], "tpot_ms": result["tpot_ms"]["p50"], "report": report,
        }


def sizes(row):
    return ["--prompt-tokens", str(row.prompt), "--output-tokens", str(row.output)]


def parse(command, text, reader):
    try:
        return reader(text)
    except (ValueError, LookupError):
        raise Problem(f"no result from {shlex.join(command)}:\n  {text.strip()[-500:]}")


def measure_row(options, row, tandem, peer):
    """Both sides in turn, `repeat` times."""
    runs = {"tandem": [], "peer": []}
    for number in range(options.repeat):
        for side, measure in (("tandem", tandem), ("peer", peer)):
            runs[side].append(measure(row, number))
        last = [runs[side][-1]["tokens_per_second"] for side in ("tandem", "peer")]
        say(f"  {row.name} {number + 1}/{options.repeat}: tandem {last[0]:.1f}, llama.cpp {last[1]:.1f} tok/s")
    return {"row": row.name, "title": row.title, "kind": row.kind, "prompt_tokens": row.prompt,
            "output_tokens": row.output, "concurrency": row.concurrency, "runs": runs}


def measure_model(options, sides, rows, folder):
    """Yields a result for each row as it is there."""
    for row in [row for row in rows if row.kind != "serve"]:
        yield measure_row(options, row, sides.tandem, sides.peer)
    serving = [row for row in rows if row.kind == "serve"]
    if serving:
        # Both live through all rows; the one that is not asked waits.
        tandem, peer = sides.servers(folder, max(row.concurrency for row in ROWS))
        with tandem, peer:
            for row in serving:
                yield measure_row(
                    options, row, lambda row, n: sides.serve(tandem, row, n), lambda row, n: sides.serve(peer, row, n))


def measure(options):
    binaries = build(options)
    files = model_files(options, binaries)
    folder = options.output or os.path.join(options.dir, "results", time.strftime("%Y%m%d-%H%M%S"))
    os.makedirs(folder, exist_ok=True)
    rows = [row.smaller() if options.quick else row for row in ROWS if row.name in options.rows]
    report = {
        "peer": PEER, "isa": options.isa, "threads": options.threads, "repeat": options.repeat, "quick": options.quick,
        "tandem_flags": options.tandem_flags, "cpu": cpu_name(), "models": [],
    }
    for name, path in files.items():
        say(f"{name}: {path}")
        model = {"weights": name, "file": os.path.basename(path), "results": []}
        report["models"].append(model)
        for result in measure_model(options, Sides(options, binaries, path), rows, folder):
            model["results"].append(result)
            # After each row: what was measured stays if a later row fails.
            write(folder, report)
    say(f"written: {folder}/peers.json and peers.md")
    print(markdown(report), end="")


def write(folder, report):
    for name, text in (("peers.json", json.dumps(report, indent=1) + "\n"), ("peers.md", markdown(report))):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else "unknown"
    except OSError:
        return "unknown"


# The table


def median(runs, key):
    return statistics.median(run[key] for run in runs)


def number(value):
    """Three digits at least, grouped in thousands."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table_lines(result):
    tandem, peer = result["runs"]["tandem"], result["runs"]["peer"]
    ours, theirs = median(tandem, "tokens_per_second"), median(peer, "tokens_per_second")
    share = f"{median(tandem, 'share_of_limit'):.0%}".replace("%", " %") if "share_of_limit" in tandem[0] else "–"
    unit = "output tok/s" if result["kind"] == "serve" else "tok/s"
    yield [f"{result['title']}, {unit}", number(ours), share, number(theirs), ratio(ours, theirs)]
    if result["kind"] == "serve":
        # Less is better: the ratio says how many times as long the peer takes.
        for key, name in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT")):
            ours, theirs = median(tandem, key), median(peer, key)
            yield [f"{result['title']}, median {name}, ms", number(ours), "–", number(theirs), ratio(theirs, ours)]


def ratio(a, b):
    return f"{a / b:.2f} ×" if b > 0 else "–"


def limits_line(results):
    limits = [run["limits"] for result in results for run in result["runs"]["tandem"] if "limits" in run]
    if not limits:
        return ""
    def span(key, digits):
        values = [limit[key] for limit in limits]
        return f"{min(values):.{digits}f}–{max(values):.{digits}f}"
    return (f"Limits of the same runs: read {span('read_gb_per_s', 0)} GB/s, int8 {span('int8_tops', 2)} TOP/s, "
            f"bf16 {span('bf16_tflops', 2)} TFLOP/s.\n\n")


def markdown(report):
    lines = []
    for model in report["models"]:
        flags = f", {report['tandem_flags']}" if report["tandem_flags"] else ""
        lines.append(f"## {model['file'].removesuffix('.gguf')}, {report['isa']}, {report['threads']} threads{flags}\n\n")
        lines.append(f"{report['cpu']}. Medians of {report['repeat']}, Tandem and the peer in turn: {report['peer']}. ")
        lines.append(limits_line(model["results"]) or "\n\n")
        if report["quick"]:
            lines.append("**Quick: an eighth of the tokens. Not to be quoted.**\n\n")
        lines.append("| | Tandem | its share of the limit | llama.cpp | ratio |\n|---|---|---|---|---|\n")
        for result in model["results"]:
            lines.extend(f"| {' | '.join(cells)} |\n" for cells in table_lines(result))
        lines.append("\n")
    return "".join(lines)


# Command line


def default_folder():
    base = os.environ.get("TANDEM_CACHE_DIR")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tandem")
    return os.path.join(base, "peers")


def default_tandem():
    target = os.environ.get("CARGO_TARGET_DIR") or os.path.join(REPOSITORY, "target")
    return os.path.join(target, "release", "tandem")


def one_of(allowed):
    def read(text):
        names = [name.strip().lower() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: choose from {', '.join(allowed)}")
        return names
    return read


def count(text):
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 10000")
    return int(text)


def arguments(argv):
    parser = argparse.ArgumentParser(
        prog="benches/peers.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("command", nargs="?", choices=["build", "models", "run"], default="run", help="how far to go [run]")
    add("--dir", default=default_folder(), help="where source, builds, weight files and results are kept [%(default)s]")
    add("--output", help="folder of the results [DIR/results/<time>]")
    add("--tandem", default=default_tandem(), help="the binary to measure [%(default)s]")
    add("--tandem-flags", default="", help="more flags for tandem bench and serve, e.g. '--activations bf16'")
    add("--isa", choices=list(BUILDS), default="native", help="instructions of both sides [%(default)s]")
    add("--rows", type=one_of(ROW_NAMES), default=ROW_NAMES, help=f"some of {','.join(ROW_NAMES)} [all]")
    add("--models", type=one_of(list(MODELS)), help=f"some of {','.join(MODELS)} [all; q4_1 with --quick]")
    add("--file", action="append", metavar="GGUF", help="measure this weight file instead; may be given several times")
    add("--repeat", type=count, help="rounds of each row [5; 1 with --quick]")
    add("--threads", type=count, default=cores, help="threads of both sides [%(default)s]")
    add("--jobs", type=count, default=cores, help="compilers at once [%(default)s]")
    add("--timeout", type=count, default=900, help="seconds that one measurement may take [%(default)s]")
    add("--quick", action="store_true", help="an eighth of the tokens, to see whether all works")
    options = parser.parse_args(argv)
    options.repeat = options.repeat or (1 if options.quick else 5)
    options.models = options.models or (["q4_1"] if options.quick else list(MODELS))
    return options


def main(argv):
    options = arguments(argv)
    # As an interrupt, so that servers are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        if options.command == "run" and not os.access(options.tandem, os.X_OK):
            raise Problem(f"{options.tandem} is not there: run `make build`, or name a binary with --tandem")
        if missing := [path for path in options.file or [] if not os.path.isfile(path)]:
            raise Problem(f"--file: {missing[0]} is not there")
        os.makedirs(options.dir, exist_ok=True)
        if options.command == "build":
            print(build(options))
        elif options.command == "models":
            for path in model_files(options, build(options)).values():
                print(path)
        else:
            measure(options)
    except Problem as problem:
        sys.exit(f"peers: {problem}")
    except OSError as error:
        sys.exit(f"peers: {error}")
    except KeyboardInterrupt:
        sys.exit("peers: interrupted")


if __name__ == "__main__":
    main(sys.argv[1:])
