"""Adapters and deltas merged into a checkpoint on disk: the same function, untouched bits, one tensor at a time."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.adapters import Adapter, Factors

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from tests.serving.tiny_model import KINDS, make_model, write_adapter  # noqa: E402

TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files."""
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=TOKENS).logits


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "everywhere"])
def test_a_merged_checkpoint_computes_what_peft_does(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", **KINDS[kind])
    merged = lk.merge_checkpoint(adapter, base, tmp_path / "out")
    expected = logits(peft.PeftModel.from_pretrained(load(base), str(adapter)))
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=0, atol=2e-5)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(merged.changed)


def test_files_keep_their_names_and_the_config_comes_along(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", **KINDS["lora"])
    lk.merge_checkpoint(adapter, base, tmp_path / "out", dtype=torch.bfloat16)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    load(tmp_path / "out")


def test_a_chain_is_rounded_once(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    weight = torch.randn(7, 5).bfloat16()
    save_file({"a.weight": weight}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    links = [Adapter({"a": Factors(torch.randn(3, 5), torch.randn(7, 3), s)}) for s in (0.3, -1.7, 2.0)]
    lk.merge_checkpoint(links, tmp_path / "base", tmp_path / "out")
    exact = weight.double() + sum(link.modules["a"].delta(torch.float64) for link in links)
    found = tensors(tmp_path / "out")["a.weight"]
    assert float((found.double() - exact).abs().max()) <= 2.0**-8 * float(exact.abs().max())
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2.0**-7, atol=0)  # one rounding, to a neighbour


def test_an_smt_delta_is_written_bit_for_bit(base: Path, tmp_path: Path) -> None:
    model = load(base)
    name = "model.layers.1.mlp.down_proj"
    shape = tuple(model.get_submodule(name).weight.shape)
    selection = lk.smt.BlockSelection({name: torch.tensor([[0, 1], [1, 2]])}, {name: shape}, 16)
    lk.adapt(model, lk.SMTConfig(selection=selection))
    with torch.no_grad():
        layer = model.get_submodule(name)
        layer.blocks.normal_()
        layer.write_back_()
    lk.smt.save_delta(model, tmp_path / "delta")
    merged = lk.merge_checkpoint(tmp_path / "delta", base, tmp_path / "out")
    assert merged.changed == (f"{name}.weight",)
    assert torch.equal(tensors(tmp_path / "out")[f"{name}.weight"], layer.base_layer.weight)
    with pytest.raises(ValueError, match="the base that was tuned"):
        lk.merge_checkpoint(tmp_path / "delta", tmp_path / "out", tmp_path / "again")


def test_one_tensor_of_the_model_is_in_memory_at_a_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live tensors of a weight's size are counted whenever the next one is asked for."""
    module = sys.modules["lowrank_kernels.merge_checkpoint"]  # the package has the function under this name

    adapter = lk.adapters.read(write_adapter(tmp_path / "adapter", **KINDS["everywhere"]))
    own = {id(t) for f in adapter.modules.values() for t in f.tensors().values()}
    alive: list[int] = []
    stream = module.stream_safetensors

    def counting(path, shapes, kinds, tensor, metadata):  # type: ignore[no-untyped-def]
        def counted(name: str) -> Tensor:
            names = {id(o) for o in gc.get_objects() if isinstance(o, Tensor) and id(o) not in before}
            alive.append(len(names - own))
            return tensor(name)

        before = {id(o) for o in gc.get_objects() if isinstance(o, Tensor)}
        stream(path, shapes, kinds, counted, metadata)

    monkeypatch.setattr(module, "stream_safetensors", counting)
    lk.merge_checkpoint(adapter, base, tmp_path / "out")
    assert len(alive) == len(tensors(base)) and max(alive) == 0, alive


@pytest.mark.parametrize("config", [lk.LoRAConfig, lk.DoRAConfig])
@torch.no_grad()
def test_embeddings_convolutions_and_odd_widths(config: type[lk.LoRAConfig], tmp_path: Path) -> None:
    """Against the layers' own merging."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    parts = {
        "embed": torch.nn.Embedding(11, 7),
        "conv": torch.nn.Conv2d(3, 5, 3, padding=1),
        "linear": torch.nn.Linear(7, 13),
    }
    model = torch.nn.ModuleDict(parts)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    lk.adapt(model, config(r=2, alpha=3, target_modules=tuple(parts)))
    for name, p in model.named_parameters():
        if "lora" in name:
            p.add_(torch.rand_like(p))
    lk.save_adapter(model, tmp_path / "adapter")
    lk.merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    lk.merge_and_unload(model)
    found = tensors(tmp_path / "out")
    for name, t in model.state_dict().items():
        torch.testing.assert_close(found[name], t, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_square_weights_of_conv1d_are_told_by_the_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file({"h.0.c_proj.weight": torch.zeros(6, 6)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    f = Factors(torch.randn(2, 6), torch.randn(6, 2), 1.0)
    lk.merge_checkpoint(Adapter({"h.0.c_proj": f}), tmp_path / "base", tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["h.0.c_proj.weight"], f.delta().T)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"none": Factors(torch.ones(1, 5), torch.ones(7, 1), 1.0)}, "none.weight in the base"),
        ({"lm_head": Factors(torch.ones(1, 5), torch.ones(7, 1), 1.0)}, r"of shape \(7, 5\) in the base"),
        (
            {"model.layers.0.mlp.up_proj": Factors(torch.ones(1, 32), torch.ones(48, 1), 1.0, None, torch.ones(48))},
            "no bias to add to",
        ),
        ({"model.layers.0.mlp.up_proj": Factors(torch.full((1, 32), 1e38), torch.full((48, 1), 1e38), 1.0)}, "finite"),
    ],
    ids=["module", "shape", "bias", "overflow"],
)
def test_what_does_not_fit_is_refused(modules: dict[str, Factors], said: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        lk.merge_checkpoint(Adapter(modules), base, tmp_path / "out")
    left = [path for path in (tmp_path / "out").glob("*") if path.name.startswith(".")]
    assert not left


def test_the_base_is_not_written_over(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", **KINDS["lora"])
    with pytest.raises(ValueError, match="a folder that is not the base's"):
        lk.merge_checkpoint(adapter, base, base)
    with pytest.raises(ValueError, match="the folder of a safetensors checkpoint"):
        lk.merge_checkpoint(adapter, tmp_path / "adapter" / "adapter_config.json", tmp_path / "out")
