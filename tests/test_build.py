"""The compiled extension as a build product: what it says of itself, what it needs, how it fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_kernels import _extension

ROOT = Path(__file__).resolve().parents[1]

needs_extension = pytest.mark.skipif(not _extension.available(), reason=f"no compiled extension: {_extension.reason()}")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_extension
def test_build_info_names_compiler_torch_and_cuda() -> None:
    info = _extension.build_info()
    assert info["available"] is True and info["reason"] is None
    assert Path(info["path"]).exists()
    assert re.match(r"\w+ \d+\.\d+", info["compiler"])
    assert info["build_type"] and info["torch"] and info["torch_target"] == "2.10"
    assert isinstance(info["cuda"], bool) and info["cuda_note"]
    assert bool(info["cuda_archs"]) == info["cuda"]
    assert info["cpu_isa"] in ("generic", "avx2", "avx512", "amx")


@needs_extension
def test_build_info_does_not_need_the_pybind_module() -> None:
    """Another Python version has no _native; the stable-ABI library tells the same."""
    code = (
        "import sys, json; sys.modules['lowrank_kernels._native'] = None; "
        "from lowrank_kernels import _extension; print(json.dumps(_extension.build_info(), sort_keys=True))"
    )
    info = json.loads(run_python(code))
    assert info.pop("native") is False
    expected = _extension.build_info()
    expected.pop("native")
    assert info == expected


@pytest.mark.skipif(not _extension.build_info()["native"], reason="the pybind11 module is not built for this Python")
def test_build_info_needs_no_compiled_ops() -> None:
    """What was built for what is wanted most where the ops do not load: the pybind11 module tells it without torch."""
    code = "import json; from lowrank_kernels import _extension; print(json.dumps(_extension.build_info()))"
    info = json.loads(run_python(code, LRK_DISABLE_EXTENSION="1", LRK_CPU_ISA="generic"))
    assert not info["available"] and info["native"] and info["torch"] and info["compiler"]
    assert info["cpu_isa"] == "generic"
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_native', {_native_path()!r})\n"
        "native = importlib.util.module_from_spec(spec); spec.loader.exec_module(native)\n"
        "assert 'torch' not in sys.modules\n"
        "print(native.cpu_isa())\n"
    )
    if _extension.available():
        assert run_python(code) == _extension.cpu_isa()


def _native_path() -> str:
    spec = importlib.util.find_spec("lowrank_kernels._native")
    assert spec is not None and spec.origin is not None
    return spec.origin


@needs_extension
def test_ops_are_registered_with_their_mutations() -> None:
    import torch

    ops = torch.ops.lowrank_kernels
    assert ops.lora_up_.default._schema.is_mutable
    for name in ("lora_down", "lora_grad", "lora_down_grad", "dropout_keep_mask"):
        _extension.require(name)
        assert not getattr(ops, name).default._schema.is_mutable
    with pytest.raises(RuntimeError, match=r"no_such_op: the compiled extension is not available: .*rebuild"):
        _extension.require("no_such_op")


def undefined_symbols(path: str) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    listing = subprocess.run([nm, "-DC", "--undefined-only", path], capture_output=True, text=True, check=True)
    return [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines()]


@needs_extension
def test_only_stable_symbols_of_torch_are_used() -> None:
    symbols = undefined_symbols(_extension.build_info()["path"])
    assert any("torch_library_impl" in s for s in symbols)
    assert [s for s in symbols if re.search(r"\b(at|c10|torch|caffe2)::", s)] == []


@needs_extension
def test_only_the_limited_python_api_is_used() -> None:
    path = _extension.build_info()["path"]
    assert path.endswith(".abi3.so")
    names = [s.split("@")[0] for s in undefined_symbols(path)]
    python = [name for name in names if name.startswith(("Py", "_Py"))]
    # Everything that is asked of Python, and all of it is in the limited API of 3.10.
    assert set(python) <= {"PyModule_Create2"}


@needs_extension
def test_the_cuda_runtime_is_not_a_dependency() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    path = _extension.build_info()["path"]
    listing = subprocess.run([readelf, "-d", path], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*?)\]", listing)
    assert "libtorch_cpu.so" in needed
    assert [n for n in needed if re.search(r"cudart|cublas|cusparse|torch_cuda|c10|python", n)] == []
    assert "RPATH" not in listing and "RUNPATH" not in listing


def test_package_works_without_the_extension() -> None:
    code = (
        "import torch, lowrank_kernels\n"
        "from lowrank_kernels import _extension as e\n"
        "assert not e.available() and not e.has_op('lora_down')\n"
        "assert e.build_info()['reason'] == e.reason()\n"
        "assert e.cpu_isa() is None\n"
        "try: e.require('lora_down')\n"
        "except RuntimeError as error: print(error)\n"
    )
    message = run_python(code, LRK_DISABLE_EXTENSION="1")
    assert message == (
        "lora_down: the compiled extension is not available: it is switched off by LRK_DISABLE_EXTENSION"
    )


def test_an_instruction_set_that_is_none_is_refused_by_name() -> None:
    """The package works without the extension then, and says why: no other set is taken instead."""
    code = "from lowrank_kernels import _extension as e\nassert not e.available()\nprint(e.reason())"
    assert run_python(code, LRK_CPU_ISA="bogus") == (
        "expected LRK_CPU_ISA to be one of generic, avx2, avx512, amx, got 'bogus'"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"_C is not in .*; build it with `pip install -e"), (b"not a library", r"loading .*_C.abi3.so failed")],
)
def test_a_missing_or_broken_library_explains_itself(tmp_path: Path, content: bytes | None, message: str) -> None:
    """The loader, alone in a folder of its own, with no library or a broken one beside it."""
    package = tmp_path / "alone"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copy(ROOT / "lowrank_kernels" / "_extension.py", package)
    if content is not None:
        (package / "_C.abi3.so").write_bytes(content)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from alone import _extension as e\n"
        "try: e.require('lora_down')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert re.search(message, run_python(code))


@needs_extension
def test_import_is_quick_and_leaves_cuda_alone() -> None:
    code = (
        "import torch, time, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('alone', {str(ROOT / 'lowrank_kernels' / '_extension.py')!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "start = time.process_time(); spec.loader.exec_module(module); took = time.process_time() - start\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(took)\n"
    )
    # The target is 10 ms of the processor, which others on the machine do not add to; the best of three.
    assert min(float(run_python(code)) for _ in range(3)) < 0.02
