"""Our files beside those that the engines' own tools made of the same adapter (benchmarks/engines/fixtures.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_kernels.adapters import convert, format_of, read
from lowrank_kernels.adapters.base import Base
from lowrank_kernels.adapters.formats import onnx

pytest.importorskip("safetensors")
pytest.importorskip("gguf")

FILES = Path(__file__).parent / "files"
BASE = FILES / "base"


def of_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert ours[name].dtype == t.dtype and torch.equal(ours[name], t), name


def test_llama_cpps_own_converter(tmp_path: Path) -> None:
    from gguf import GGUFReader

    ours = GGUFReader(convert(FILES / "peft", tmp_path / "x.gguf", to="gguf", base=BASE))
    theirs = GGUFReader(FILES / "llama_cpp.gguf")
    tensors = [{t.name: t for t in reader.tensors} for reader in (ours, theirs)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, t in tensors[1].items():
        assert list(tensors[0][name].shape) == list(t.shape) and tensors[0][name].tensor_type == t.tensor_type
        assert np.array_equal(tensors[0][name].data, t.data), name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.fields[key].contents() == theirs.fields[key].contents(), key
    assert read(FILES / "llama_cpp.gguf", base=BASE).content_hash() == read(FILES / "peft").content_hash()


def test_mlx_lms_own_file(tmp_path: Path) -> None:
    convert(FILES / "peft", tmp_path / "mlx", to="mlx")
    assert_same_tensors(
        of_safetensors(tmp_path / "mlx" / "adapters.safetensors"),
        of_safetensors(FILES / "mlx" / "adapters.safetensors"),
    )
    places = (place / "mlx" / "adapter_config.json" for place in (tmp_path, FILES))
    ours, theirs = (json.loads(place.read_text())["lora_parameters"] for place in places)
    assert ours.keys() == theirs.keys() and (ours["rank"], ours["scale"]) == (theirs["rank"], theirs["scale"])
    assert read(FILES / "mlx").content_hash() == read(FILES / "peft").content_hash()


def test_lycoris_own_file(tmp_path: Path) -> None:
    """With DoRA. The names are read with those of the base, and written again as they were."""
    base = Base({}, dict.fromkeys(("down_blocks.0.to_q", "down_blocks.0.to_out"), (16, 16)))
    theirs = FILES / "lycoris.safetensors"
    adapter = read(theirs, base=base)
    assert format_of(theirs) == "kohya" and adapter.dora
    assert {path: f.scaling for path, f in adapter.modules.items()} == dict.fromkeys(base.shapes, 5 / 3)
    ours = of_safetensors(convert(adapter, tmp_path / "x.safetensors", to="kohya"))
    ours = {name.replace("lora_unet_", "lycoris_"): t for name, t in ours.items()}
    assert_same_tensors(ours, of_safetensors(theirs))


def test_diffusers_own_file(tmp_path: Path) -> None:
    """rsLoRA and a pattern: the scalings are those of the header."""
    theirs = FILES / "diffusers.safetensors"
    adapter = read(theirs)
    assert format_of(theirs) == "diffusers"
    for path, f in adapter.modules.items():
        assert f.scaling == (7 if path.endswith("attn1.to_k") else 3) / 2**0.5, path
    place = convert(adapter, tmp_path / "x.safetensors", to="diffusers")
    assert_same_tensors(of_safetensors(place), of_safetensors(theirs))
    assert read(place).content_hash() == adapter.content_hash()


def test_onnx_runtimes_own_file(tmp_path: Path) -> None:
    theirs = onnx.read_flatbuffer((FILES / "onnxruntime.onnx_adapter").read_bytes())
    source = read(FILES / "peft")
    doubled = {path: f._replace(scaling=2.0) for path, f in source.modules.items()}
    place = convert(type(source)(doubled), tmp_path / "x.onnx_adapter", to="onnx")
    assert_same_tensors(onnx.read_flatbuffer(place.read_bytes()), theirs)
