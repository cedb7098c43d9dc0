"""The CUDA C++ device code without a GPU: run on the host under sanitizers, and weighed in the built module.

`PYTHONPATH=. python tests/proof/test_cuda_on_host.py` writes cuda_budget.json from the module that is built here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from lowrank_kernels import _extension

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "host_executor" / "dora_norm_driver.cpp"
BUDGET = Path(__file__).with_name("cuda_budget.json")

# ---- the host executor ------------------------------------------------------------------------------

CXX = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(CXX is None, reason="no g++ to compile the device code with")
BUILDS = {
    "plain": [],
    "address": ["-fsanitize=address", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
    "first barrier missing": ["-fsanitize=thread", "-DLRK_SKIP_BARRIER=0"],
    "second barrier missing": ["-fsanitize=thread", "-DLRK_SKIP_BARRIER=1"],
    "data not waited for": ["-fsanitize=thread", "-DLRK_SKIP_WAIT=1"],
    "readers not waited for": ["-fsanitize=thread", "-DLRK_SKIP_WAIT=2"],
}
Run = Callable[[str, str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """(build, mode) -> the driver's run; each build is compiled once, when first asked for."""
    folder = tmp_path_factory.mktemp("host_executor")

    @cache
    def compiled(build: str) -> Path:
        program = folder / build.replace(" ", "_")
        command = [str(CXX), "-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Wextra", "-Werror", *BUILDS[build]]
        command += [f"-I{ROOT / 'csrc'}", str(DRIVER), "-o", str(program)]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr[-4000:]
        return program

    def run(build: str, mode: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
        return subprocess.run([compiled(build), mode], capture_output=True, text=True, timeout=3600, env=env)

    return run


@needs_compiler
@pytest.mark.parametrize(
    ("mode", "cases"),
    [("short", 7), pytest.param("long", 17, marks=pytest.mark.nightly)],  # "short" with more sizes
)
def test_device_code_is_right_on_the_host(mode: str, cases: int, driver: Run) -> None:
    result = driver("plain", mode)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("of the allowed error") == cases


@needs_compiler
@pytest.mark.parametrize(
    ("mode", "cases"),
    [("cluster", 2), pytest.param("clusters", 6, marks=pytest.mark.nightly)],  # the same with more sizes and dtypes
)
def test_blocks_of_a_cluster_fetch_together(mode: str, cases: int, driver: Run) -> None:
    """Right, and the same bits as blocks that fetch for themselves."""
    result = driver("plain", mode)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("of the allowed error") == cases


@needs_compiler
def test_offsets_beyond_two_to_the_31(driver: Run) -> None:
    """Rows of W, A, B and m so far apart that an offset in 32 bits would wrap, in address space that costs nothing."""
    result = driver("plain", "far")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("of the allowed error") == 3


@needs_compiler
@pytest.mark.parametrize(
    ("sanitizer", "mode"),
    [
        ("address", "short"),
        pytest.param("address", "cluster", marks=pytest.mark.nightly),  # the clusters' races are the other sanitizer's
        pytest.param("address", "clusters", marks=pytest.mark.nightly),  # "cluster" with more sizes and dtypes
        ("thread", "short"),
        # Minutes, of hundreds of threads. That it would find a race is test_a_missing_wait_in_a_cluster_is_found.
        pytest.param("thread", "cluster", marks=pytest.mark.nightly),
    ],
)
def test_device_code_is_clean_under(sanitizer: str, mode: str, driver: Run) -> None:
    result = driver(sanitizer, mode)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert "Sanitizer" not in result.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("build", "where"), [("first barrier missing", "prepare_kernel"), ("second barrier missing", "mma_kernel")]
)
def test_a_missing_barrier_is_found(build: str, where: str, driver: Run) -> None:
    result = driver(build, "exchange")
    assert result.returncode != 0
    assert "ThreadSanitizer: data race" in result.stderr and where in result.stderr, result.stderr[-2000:]


@needs_compiler
@pytest.mark.parametrize("build", ["data not waited for", "readers not waited for"])
def test_a_missing_wait_in_a_cluster_is_found(build: str, driver: Run) -> None:
    result = driver(build, "cluster")
    assert result.returncode != 0
    assert "ThreadSanitizer: data race" in result.stderr and "copy_to_cluster" in result.stderr, result.stderr[-2000:]


@needs_compiler
def test_a_read_past_the_end_is_found(driver: Run) -> None:
    result = driver("address", "overrun")
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr and "load_eight" in result.stderr


# ---- the built module -------------------------------------------------------------------------------

Usage = dict[str, dict[str, dict[str, int]]]
"""Architecture -> kernel -> registers a thread, spilled bytes a thread, shared bytes a block."""

THREADS = {"dora_norm_mma_kernel": 256, "dora_prepare_kernel": 256}  # a block; 128 otherwise
REGISTERS_OF_A_BLOCK = 65536
SHARED_WITHOUT_ASKING = 48 * 1024 + 1024  # from sm_100 on the tool counts the 1 KiB that the system takes
_TYPES = {"f": "float32", "NS_12Bfloat16BitsE": "bfloat16", "NS_8HalfBitsE": "float16"}


def _kernel_name(mangled: str) -> str:
    """dora_norm_mma_kernel<float32, 3, 8, 8, 1> of its mangled name; other kernels keep theirs."""
    match = re.match(r"_ZN3lrk(\d+)(.*)", mangled)
    if match is None:
        return mangled
    name, rest = match[2][: int(match[1])], match[2][int(match[1]) :]
    template = re.match(rf"I({'|'.join(_TYPES)})((?:L[ib]\d+E)*)EEv", rest)
    if template is None:
        return name
    numbers = re.findall(r"L[ib](\d+)E", template[2])
    return f"{name}<{', '.join([_TYPES[template[1]], *numbers])}>"


def _cuobjdump() -> str | None:
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if found is None:
        triton = pytest.importorskip("lowrank_kernels.inspect.triton_internals")
        found = shutil.which(triton.nvidia_tool("cuobjdump"))
    return found


def _nvcc_release() -> str | None:
    """Release of the nvcc that compiled the module, if it is still there."""
    nvcc = shutil.which(str(_extension.build_info().get("cuda_note", "")).removeprefix("compiled by "))
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\S+), (V\S+)", text)
    return match[2] if match else None


@cache
def _usage() -> Usage:
    info = _extension.build_info()
    if not info["available"]:
        pytest.skip(f"no compiled extension: {info['reason']}")
    if not info["cuda"]:
        pytest.skip(f"the extension was built without CUDA: {info['cuda_note']}")
    tool = _cuobjdump()
    assert tool is not None, "no cuobjdump, neither of the CUDA toolkit nor of Triton"
    text = subprocess.run([tool, "-res-usage", info["path"]], capture_output=True, text=True, check=True).stdout
    usage: Usage = {}
    arch = name = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = _kernel_name(match[1])
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = (int(n) for n in match.groups())
            usage.setdefault(arch, {})[name] = {"registers": registers, "spills": stack + local, "shared": shared}
    return {arch: dict(sorted(kernels.items())) for arch, kernels in sorted(usage.items())}


def _worse(budget: dict[str, object], usage: Usage, release: str | None) -> list[str]:
    """What exceeds the budget. Another compiler allocates registers differently: then only the hardware's limits."""
    found = []
    for arch, kernels in usage.items():
        known = budget["kernels"].get(arch, {})  # type: ignore[attr-defined]
        for name, now in kernels.items():
            threads = next((n for kernel, n in THREADS.items() if name.startswith(kernel)), 128)
            limits = {"registers": REGISTERS_OF_A_BLOCK // threads, "spills": 0, "shared": SHARED_WITHOUT_ASKING}
            if release == budget["nvcc"]:
                if known and name not in known:
                    found.append(f"{arch} {name}: not in the budget")
                limits = known.get(name, limits)
            found += [
                f"{arch} {name}: {what} {now[what]}, budget {limits[what]}"
                for what in limits
                if now[what] > limits[what]
            ]
    return found


def test_no_kernel_of_the_module_gets_worse() -> None:
    usage = _usage()
    assert any("dora_norm_mma_kernel" in name for kernels in usage.values() for name in kernels)
    found = _worse(json.loads(BUDGET.read_text()), usage, _nvcc_release())
    assert not found, "\n".join(
        [*found, f"If this is meant, run PYTHONPATH=. python {Path(__file__).relative_to(ROOT)}"]
    )


def test_the_budget_itself_has_no_spill_and_fits() -> None:
    for arch, kernels in json.loads(BUDGET.read_text())["kernels"].items():
        for name, facts in kernels.items():
            assert facts["spills"] == 0 and facts["shared"] <= SHARED_WITHOUT_ASKING, f"{arch} {name}: {facts}"


@pytest.mark.parametrize("what", ["registers", "spills", "shared"])
def test_the_module_budget_notices(what: str) -> None:
    budget = json.loads(BUDGET.read_text())
    usage = json.loads(json.dumps(budget["kernels"]))
    assert not _worse(budget, usage, budget["nvcc"])
    arch = next(iter(usage))
    name = next(iter(usage[arch]))
    usage[arch][name][what] += 8
    assert len(_worse(budget, usage, budget["nvcc"])) == 1
    usage[arch][name][what] = 1 << 20
    assert len(_worse(budget, usage, "another compiler")) == 1


if __name__ == "__main__":
    BUDGET.write_text(json.dumps({"nvcc": _nvcc_release(), "kernels": _usage()}, indent=1) + "\n")
