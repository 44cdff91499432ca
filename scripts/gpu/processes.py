"""Commands and servers that the suite starts: every wait has a deadline, and what was started is ended by its process id."""

import glob
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

# Where container runtimes put the driver if not among the system's libraries.
DRIVER = "/usr/local/nvidia"
READY_S = 120
REQUEST_S = 60
STOP_S = 15
# Exit status of the binary for a configuration that cannot work here.
REFUSED = 2


class Failed(Exception):
    """A check or benchmark that came out wrong, and what it came to."""

    def __init__(self, reason, numbers=None):
        super().__init__(reason)
        self.numbers = numbers


class Skipped(Exception):
    """One that could not be made here."""


class Log:
    """Everything that processes say, in one file."""

    def __init__(self, path):
        self.file = open(path, "ab", buffering=0)

    def head(self, text):
        self.file.write(f"\n==== {text}\n".encode())


def run(suite, command, limit_s, environment=None):
    """A command's exit status and standard output; its words go to the log. Ended at its limit."""
    limit_s = max(1, min(limit_s, suite.left_s()))
    suite.log.head(" ".join(map(str, command)))
    try:
        done = subprocess.run(
            list(map(str, command)), env=environment or suite.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=limit_s, check=False,
        )
    except subprocess.TimeoutExpired as error:
        suite.log.file.write((error.stdout or b"") + (error.stderr or b""))
        raise Failed(f"not done after {limit_s:.0f} s: {last_line(error.stderr)}") from None
    suite.log.file.write(done.stdout + done.stderr)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def last_line(text):
    text = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return (text.strip().splitlines() or ["it said nothing"])[-1][:300]


def environment(work):
    """Compiled kernels are kept in a folder of `work`, and libraries of NVIDIA's are found in Python's packages too."""
    found = dict(os.environ)
    found.setdefault("TANDEM_CACHE_DIR", str(work / "cache"))
    folders = [os.environ.get("LD_LIBRARY_PATH") or ""]
    for base in map(pathlib.Path, filter(None, sys.path)):
        # CUDA 13's first: which version a driver is too old for is found out by the binary.
        folders += sorted(glob.glob(str(base / "nvidia" / "*" / "lib")), key=lambda name: "cu13" not in name)
    folders += sorted(glob.glob("/usr/local/cuda*/lib64"), reverse=True) + glob.glob(f"{DRIVER}/lib64")
    found["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    return found


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A `tandem serve` of our own, ended by its process id when the block ends."""

    def __init__(self, suite, arguments, ready_s=READY_S):
        self.suite, self.port = suite, free_port()
        command = [suite.binary, "serve", *map(str, arguments), "--host", "127.0.0.1", "--port", str(self.port),
                   "--metrics-port", "0"]
        suite.log.head(" ".join(map(str, command)))
        self.log_start = os.fstat(suite.log.file.fileno()).st_size
        start = time.monotonic()
        self.process = subprocess.Popen(
            list(map(str, command)), env=suite.environment, stdin=subprocess.DEVNULL, stdout=suite.log.file, stderr=suite.log.file
        )
        try:
            self.wait_until_ready(start + min(ready_s, suite.left_s()))
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - start

    def wait_until_ready(self, deadline):
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                if self.process.returncode == REFUSED and b"gpu-memory-utilization" in self.words():
                    raise Skipped(f"this GPU is too small: {last_line(self.words())}")
                raise Failed(f"the server ended with {self.process.returncode}: {last_line(self.words())}")
            try:
                with urllib.request.urlopen(self.url("/readyz"), timeout=2):
                    return
            except OSError:
                time.sleep(0.05)
        raise Failed(f"the server was not ready in time: {last_line(self.words())}")

    def words(self):
        with open(self.suite.log.file.name, "rb") as file:
            file.seek(self.log_start)
            return file.read()

    def url(self, path=""):
        return f"http://127.0.0.1:{self.port}{path}"

    def complete(self, **body):
        request = urllib.request.Request(
            self.url("/v1/completions"), json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=min(REQUEST_S, max(1, self.suite.left_s()))) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Failed(f"status {error.code}: {error.read(300).decode(errors='replace')}") from None
        except OSError as error:
            raise Failed(f"no answer: {error}; the server said: {last_line(self.words())}") from None

    def scores(self, prompt, top=0):
        """Log-probabilities of a prompt's tokens but the first, and with `top` those of the best tokens there."""
        answer = self.complete(prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=top)
        logprobs = answer["choices"][0]["logprobs"]
        best = [max(found.values()) for found in logprobs["top_logprobs"][1 : len(prompt)]] if top else []
        return logprobs["token_logprobs"][1 : len(prompt)], best

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_S)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
