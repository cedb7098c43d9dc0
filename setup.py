"""Builds the two compiled modules with CMake; everything else about the package is in pyproject.toml.

Environment:
  LRK_CUDA        auto (default): CUDA is compiled when nvcc is found, GPU or not, and left out with the
                  reason recorded when it cannot be compiled; 1: a missing nvcc or a failed compile is
                  an error; 0: never.
  LRK_CUDA_ARCHS  GPU architectures, such as "80;90a". Default: 80;86;89;90a;100;120, less what this
                  nvcc does not know.
  LRK_BUILD_TYPE  CMake's build type, Release by default.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;86;89;90a;100;120"


def _find_nvcc() -> str | None:
    """nvcc as CUDACXX, CUDA_HOME, PATH or the usual folder give it."""
    candidates = [os.environ.get("CUDACXX")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(str(Path(os.environ[variable]) / "bin" / "nvcc"))
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and (path := shutil.which(candidate)):
            return path
    return None


def _known_archs(nvcc: str) -> set[str]:
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"compute_(\w+)", listing))


def _tool(name: str, folder: str) -> str | None:
    """A tool as its Python package has it, whose version pyproject.toml asks for; else the one on PATH."""
    try:
        directory = getattr(importlib.import_module(name), folder)
    except (ImportError, AttributeError):
        return shutil.which(name)
    return shutil.which(name, path=directory) or shutil.which(name)


class CudaPlan:
    """Whether to compile CUDA, for what, and the sentence that says why."""

    def __init__(self) -> None:
        mode = os.environ.get("LRK_CUDA", "auto").lower()
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"LRK_CUDA: expected auto, 0 or 1, got {mode!r}")
        self.required = mode == "1"
        self.nvcc = None if mode == "0" else _find_nvcc()
        self.archs: list[str] = []
        if mode == "0":
            self.note = "LRK_CUDA=0"
        elif self.nvcc is None:
            if self.required:
                raise SystemExit("LRK_CUDA=1: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda; install one")
            self.note = "no nvcc was found"
        else:
            self.archs = self._choose_archs(self.nvcc)
            self.note = f"compiled by {self.nvcc}" if self.archs else f"{self.nvcc} knows no wanted architecture"

    def _choose_archs(self, nvcc: str) -> list[str]:
        asked = os.environ.get("LRK_CUDA_ARCHS")
        if asked:
            return [arch for arch in re.split(r"[;, ]+", asked) if arch]
        try:
            known = _known_archs(nvcc)
        except (OSError, subprocess.CalledProcessError):
            return DEFAULT_ARCHS.split(";")
        # nvcc lists 90 and 90a apart since 12.x; an older one takes 90a whenever it lists 90.
        return [a for a in DEFAULT_ARCHS.split(";") if a in known or a.rstrip("af") in known]

    def give_up(self, note: str) -> None:
        self.archs = []
        self.note = note

    @property
    def enabled(self) -> bool:
        return bool(self.archs)


class CMakeBuild(build_ext):
    """One CMake build yields both extensions.

    The build folder is kept, so a rebuild compiles only what changed; `pip install -e .` copies the
    modules next to the sources.
    """

    def run(self) -> None:
        if self.extensions:
            self._build(CudaPlan())
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._output / target.name, target)

    @property
    def _folder(self) -> Path:
        return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"

    @property
    def _output(self) -> Path:
        return self._folder / "out"

    def _build(self, cuda: CudaPlan) -> None:
        try:
            self._cmake(cuda)
        except subprocess.CalledProcessError as error:
            if not cuda.enabled or cuda.required:
                raise SystemExit(f"building the extension failed: {error}") from error
            cuda.give_up(f"compiling with {cuda.nvcc} failed; see the build log")
            print(f"lowrank_kernels: going on without CUDA: {cuda.note}", file=sys.stderr)
            try:
                self._cmake(cuda)
            except subprocess.CalledProcessError as again:
                raise SystemExit(f"building the extension failed: {again}") from again

    def _cmake(self, cuda: CudaPlan) -> None:
        import pybind11
        import torch

        torch_folder = Path(torch.__file__).parent
        cmake, ninja = _tool("cmake", "CMAKE_BIN_DIR"), _tool("ninja", "BIN_DIR")
        if cmake is None:
            raise SystemExit("cmake was not found; pip install 'cmake>=3.26' ninja")
        options = {
            "CMAKE_BUILD_TYPE": os.environ.get("LRK_BUILD_TYPE", "Release"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LRK_TORCH_INCLUDE_DIRS": str(torch_folder / "include"),
            "LRK_TORCH_LIB_DIR": str(torch_folder / "lib"),
            "LRK_TORCH_VERSION": torch.__version__,
            "LRK_CUDA": "ON" if cuda.enabled else "OFF",
            "LRK_CUDA_ARCHS": ";".join(cuda.archs),
            "LRK_CUDA_NOTE": cuda.note,
            "LRK_OUTPUT_DIR": str(self._output),
        }
        if cuda.enabled:
            options["CMAKE_CUDA_COMPILER"] = str(cuda.nvcc)
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        self._folder.mkdir(parents=True, exist_ok=True)
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(self._folder)]
        subprocess.run(configure + [f"-D{name}={value}" for name, value in options.items()], check=True)
        subprocess.run([cmake, "--build", str(self._folder)], check=True)


setup(
    ext_modules=[
        Extension("lowrank_kernels._C", sources=[], py_limited_api=True),
        Extension("lowrank_kernels._native", sources=[]),
    ],
    cmdclass={"build_ext": CMakeBuild},
    # The wheel is tagged for every CPython from 3.10 on although _native serves only the one it was
    # built with: nothing depends on _native (lowrank_kernels/_extension.py reads the same facts from
    # _C), its file name carries the Python version, and another version simply does not see it. The
    # alternative, a wheel per Python version, would rebuild the identical ops for each.
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
