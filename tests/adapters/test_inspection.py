"""The inspector, the differences of two adapters, and their exit codes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank_kernels.adapters import Adapter, Factors, convert, differences, inspect_adapter, read
from lowrank_kernels.adapters.base import Base
from lowrank_kernels.adapters.formats import FORMATS
from lowrank_kernels.adapters.formats.format import Options
from lowrank_kernels.adapters.inspection import delta_norm
from lowrank_kernels.cli import main

pytest.importorskip("safetensors")

PATHS = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qv"]


def adapter(size: float = 1.0, dora: bool = False) -> Adapter:
    torch.manual_seed(0)
    magnitude = torch.ones(8) if dora else None
    modules = {
        path: Factors(torch.randn(2, 6), size * (1 + i) * torch.randn(8, 2), 0.5, magnitude)
        for i, path in enumerate(PATHS)
    }
    return Adapter(modules)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return convert(adapter(), tmp_path / "adapter", to="peft")


def test_what_it_says(folder: Path) -> None:
    found = inspect_adapter(folder)
    said = str(found)
    assert (found.format, found.kind, found.faults) == ("peft", "LoRA", ())
    assert found.content_hash in said and "rank      2\n" in said and "scaling   0.5\n" in said
    assert "modules   6, 168 parameters of float32" in said
    assert found.readers["vLLM"] is None and found.readers["diffusers"] == "it is for diffusion models"


def test_the_picture_is_of_the_norms(folder: Path) -> None:
    found = inspect_adapter(folder)
    norms = found.norms()
    assert norms.keys() == {f"model.layers.*.self_attn.{p}_proj" for p in "qv"}
    for path, f in adapter().modules.items():
        exact = float(f.delta(torch.float64).norm())
        assert delta_norm(f) == pytest.approx(exact, rel=1e-12)
        assert exact in [pytest.approx(n) for of in norms.values() for n in of.values()], path
    q, v = found.picture()
    assert len(q.partition("|")[2].partition("|")[0]) == 3 and "█" in q + v


def test_the_readers_of_dora(tmp_path: Path) -> None:
    found = inspect_adapter(convert(adapter(dora=True), tmp_path / "adapter", to="peft")).readers
    assert found["PEFT"] is None and found["mlx-lm"] is None and found["LyCORIS"] is None
    for engine in ("vLLM", "llama.cpp", "ONNX Runtime", "OpenVINO"):
        assert "DoRA" in str(found[engine]) and "lrk merge" in str(found[engine])


def test_nan_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = adapter()
    broken.modules[PATHS[2]].lora_b[3, 1] = math.nan
    FORMATS["peft"].write(broken, tmp_path / "adapter", Options())
    assert main(["adapters", str(tmp_path / "adapter")]) == 1
    said = capsys.readouterr().out
    assert f"FAULT     NaN or Inf in {PATHS[2]}.lora_B.weight" in said and "!" in said


def test_whether_it_fits_a_base(folder: Path) -> None:
    shapes = dict.fromkeys(PATHS, (8, 6))
    assert inspect_adapter(folder, base=Base({}, shapes)).faults == ()
    (fault,) = inspect_adapter(folder, base=Base({}, shapes | {PATHS[1]: (8, 7)})).faults
    assert f"{PATHS[1]} is (8, 7), and its factors are for (8, 6)" in fault
    (fault,) = inspect_adapter(folder, base=Base({}, dict.fromkeys(PATHS[1:], (8, 6)))).faults
    assert fault == f"the base has no {PATHS[0]}"
    assert "mamba" in str(inspect_adapter(folder, base=Base({"model_type": "mamba"}, shapes)).readers["llama.cpp"])


def test_differences_and_their_exit_code(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = convert(folder, tmp_path / "mlx", to="mlx")
    assert main(["adapters", "diff", str(folder), str(again)]) == 0
    assert capsys.readouterr().out == "the same content\n"
    other = adapter()
    modules = dict(other.modules)
    modules[PATHS[0]] = modules[PATHS[0]]._replace(scaling=1.0)
    modules[PATHS[1]] = modules[PATHS[1]].padded(3)
    del modules[PATHS[5]]
    convert(replace(other, modules=modules), tmp_path / "other", to="peft")
    assert main(["adapters", "diff", str(folder), str(tmp_path / "other"), f"--json={tmp_path / 'x.json'}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == json.loads((tmp_path / "x.json").read_text())
    assert lines[0] == f"{PATHS[0]}: s B A off by 1 of its norm; scaling 0.5, 1"
    assert lines[1].startswith(f"{PATHS[1]}: ") and lines[1].endswith("rank 2, 3")
    assert lines[2] == f"{PATHS[5]}: only in the first"


def test_a_difference_of_a_bit_is_told() -> None:
    one, two = adapter(), adapter()
    two.modules[PATHS[3]].lora_a.view(torch.int32)[1, 2] ^= 1
    (line,) = differences(one, two)
    assert line.startswith(f"{PATHS[3]}: s B A off by ")
    off = float(line.split("off by ")[1].split(" ")[0])
    assert 0 < off < 1e-6


def test_the_command_writes_json_and_tells_what_cannot_be_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    place = tmp_path / "new" / "x.json"
    assert main(["adapters", str(folder), str(tmp_path / "empty"), f"--json={place}"]) == 1
    found = json.loads(place.read_text())
    assert found[0]["content_hash"] == read(folder).content_hash() and found[0]["faults"] == []
    assert "an adapter of a known format" in found[1]["faults"][0]
    assert "an adapter of a known format" in capsys.readouterr().err
