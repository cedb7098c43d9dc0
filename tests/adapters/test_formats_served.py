"""What conversion reads, ``load_adapter``, the bank and the server read; content hashes are the keys of its copies."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.adapters import convert, read
from lowrank_kernels.serving import AdapterBank

pytest.importorskip("gguf")
pytest.importorskip("peft")

from tests.serving.tiny_model import KINDS, make_model, write_adapter

TOKENS = (torch.arange(9) * 7 + 3)[None] % 64


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One adapter in each format that language models have."""
    folder = tmp_path_factory.mktemp("adapters")
    source = write_adapter(folder / "peft", **KINDS["patterns"])
    names = {
        "gguf": "of_llama.gguf",
        "mlx": "of_mlx",
        "kohya": "of_kohya.safetensors",
        "openvino": "of_openvino.safetensors",
    }
    model = make_model()
    return {"peft": source} | {to: convert(source, folder / name, to=to, base=model) for to, name in names.items()}


@torch.no_grad()
def test_every_format_computes_what_peft_s_does(places: dict[str, Path]) -> None:
    expected = None
    for place in places.values():
        model = make_model()
        report = lk.load_adapter(model, place)
        found = model(TOKENS).logits
        report.undo()
        expected = found if expected is None else expected
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with AdapterBank(make_model()) as bank:
        for to, place in places.items():
            bank.load(to, place)
        with bank.batch(list(places)):
            found = bank.model(TOKENS.expand(len(places), -1)).logits
        torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-5)


def test_the_hash_is_the_files_own_and_one_copy_is_kept_of_it(places: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(places["peft"], tmp_path / "again")
    with AdapterBank(make_model()) as bank:
        bank.load("one", places["peft"])
        bank.load("two", tmp_path / "again")
        bank.load("three", places["mlx"])
        assert bank.content_hash("one") == bank.content_hash("two") == read(places["peft"]).content_hash()
        assert bank.content_hash("three") == read(places["mlx"]).content_hash() != bank.content_hash("one")
        assert bank._adapters["one"].parts is bank._adapters["two"].parts is not bank._adapters["three"].parts


@pytest.mark.parametrize("kind", ["dora", "bias", "everywhere"])
def test_the_hash_of_a_folder_is_that_of_what_is_served(kind: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / kind, **KINDS[kind])
    with AdapterBank(make_model()) as bank:
        bank.load("a", folder)
        assert bank.content_hash("a") == read(folder).content_hash()


def test_a_folder_that_changed_is_not_served_under_the_old_name(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1), ("other", 2)):
        write_adapter(tmp_path / name, seed, **KINDS["lora"])
    with AdapterBank(make_model(), host_bytes=0) as bank:
        bank.load("a", tmp_path / "a")
        bank.budget_bytes = bank.nbytes
        bank.load("b", tmp_path / "b")  # evicts a, of which no copy is kept
        shutil.copy(tmp_path / "other" / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(ValueError, match="has changed since; load it again"), bank.batch(["a"]):
            pass
        assert bank.resident() == ["b"]
        bank.load("a", tmp_path / "a")
        with bank.batch(["a"]):
            pass


def test_the_server_loads_files_beside_folders(places: dict[str, Path]) -> None:
    pytest.importorskip("fastapi")
    from lowrank_kernels.serving.server import adapter_folder, load_all

    loaded: dict[str, Path] = {}
    batcher: Any = SimpleNamespace(load=loaded.__setitem__, bank=SimpleNamespace(names=loaded.keys))
    root = places["peft"].parent
    assert load_all(batcher, root, "base") == {}
    assert loaded.keys() == {"peft", "of_llama", "of_mlx", "of_kohya", "of_openvino"}
    assert adapter_folder(root, "of_llama.gguf") == places["gguf"].resolve()
    (root / "notes.txt").write_text("no adapter")
    with pytest.raises(ValueError, match="the name of a folder"):
        adapter_folder(root, "notes.txt")
