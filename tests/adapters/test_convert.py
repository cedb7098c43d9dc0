"""One adapter in every format: bits, names, orientation, scales, rows; what is refused; faults that are planted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.adapters import Adapter, Factors, convert, format_of, read
from lowrank_kernels.adapters.base import Base
from lowrank_kernels.adapters.formats import FORMATS, gguf, kohya, mlx, onnx
from lowrank_kernels.adapters.formats.format import alpha_for

pytest.importorskip("safetensors")
pytest.importorskip("gguf")

PLACES = {
    "peft": "peft",
    "gguf": "adapter.gguf",
    "mlx": "mlx",
    "kohya": "kohya.safetensors",
    "diffusers": "diffusers.safetensors",
    "onnx": "adapter.onnx_adapter",
    "openvino": "openvino.safetensors",
}
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj")
SIZES = {"q_proj": (32, 24), "k_proj": (16, 24), "down_proj": (24, 7)}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def adapter(
    ranks: tuple[int, ...] = (4, 4, 4),
    scalings: tuple[float, ...] = (2.0, 2.0, 2.0),
    dtype: torch.dtype = torch.float32,
    dora: bool = False,
    paths: tuple[str, ...] = PATHS,
) -> Adapter:
    torch.manual_seed(0)
    modules = {}
    for path, rank, s in zip(paths, ranks, scalings, strict=True):
        n, k = SIZES[path.rpartition(".")[2]]
        magnitude = torch.rand(n) + 0.5 if dora else None
        modules[path] = Factors(randn(rank, k, dtype=dtype), randn(n, rank, dtype=dtype), s, magnitude)
    return Adapter(modules)


def unet(source: Adapter) -> Adapter:
    """The same factors on modules of a diffusion model."""
    names = ("down_blocks.0.to_q", "mid_block.to_k", "up_blocks.1.ff.net.0.proj")
    return replace(source, modules=dict(zip(names, source.modules.values(), strict=True)))


def for_format(to: str, source: Adapter) -> Adapter:
    return unet(source) if to == "diffusers" else source


def there_and_back(source: Adapter, to: str, folder: Path, **settings: Any) -> Adapter:
    base = LLAMA if to == "gguf" else None
    place = convert(source, folder / PLACES[to], to=to, base=base, **settings)
    assert format_of(place) == to
    return read(place, base=base)


def assert_same(a: Adapter, b: Adapter) -> None:
    """The same function, to rounding of one scaling into B."""
    assert a.modules.keys() == b.modules.keys()
    for path, f in a.modules.items():
        b64 = f.lora_b.double().abs().flatten(1)
        off = (b.modules[path].delta(torch.float64) - f.delta(torch.float64)).abs()
        most = abs(f.scaling) * (b64 @ f.lora_a.double().abs().flatten(1))  # of the products that are summed
        assert bool((off <= 2 * 2.0**-24 * most).all()), (path, float((off / most).max()))


def test_every_format_is_tried() -> None:
    assert PLACES.keys() == FORMATS.keys()
    from lowrank_kernels.cli.convert import FORMATS as of_cli

    assert set(of_cli) == set(FORMATS)


@pytest.mark.parametrize("to", PLACES)
def test_a_round_trip_keeps_every_bit(to: str, tmp_path: Path) -> None:
    source = for_format(to, adapter())
    back = there_and_back(source, to, tmp_path)
    if to in ("onnx", "openvino"):  # no word for s: 2 B, exactly
        source = replace(source, modules={path: f.folded() for path, f in source.modules.items()})
    assert back.content_hash() == source.content_hash()


@pytest.mark.parametrize("to", PLACES)
@pytest.mark.parametrize("s", [(16 / 8**0.5, 16 / 7**0.5, 5 / 3), (0.0, -1.0, 0.1)], ids=["rslora", "signs"])
def test_scalings_and_ranks_of_each_module(to: str, s: tuple[float, ...], tmp_path: Path) -> None:
    source = for_format(to, adapter((8, 7, 1), s))
    back = there_and_back(source, to, tmp_path)
    assert_same(source, back)
    if to in ("peft", "kohya", "diffusers"):
        assert back.content_hash() == source.content_hash()


@pytest.mark.parametrize("to", PLACES)
def test_portable_has_one_rank_and_no_scale(to: str, tmp_path: Path) -> None:
    source = for_format(to, adapter((8, 7, 1), (16 / 8**0.5, 1.5, 5 / 3)))
    back = there_and_back(source, to, tmp_path, portable=True)
    assert_same(source, back)
    assert {f.rank for f in back.modules.values()} == {8} and {f.scaling for f in back.modules.values()} == {1.0}
    if to == "peft":
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8.0, {}, {})
        assert not config["use_rslora"]


@pytest.mark.parametrize("to", ["peft", "mlx", "kohya", "diffusers"])
def test_dora_keeps_every_bit(to: str, tmp_path: Path) -> None:
    source = for_format(to, adapter(dora=True))
    assert there_and_back(source, to, tmp_path).content_hash() == source.content_hash()


@pytest.mark.parametrize("to", [to for to in PLACES if to != "gguf"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = for_format(to, adapter(dtype=dtype))
    for path, f in there_and_back(source, to, tmp_path).modules.items():
        assert f.lora_a.dtype == dtype and torch.equal(f.lora_a, source.modules[path].lora_a)
        assert f.lora_b.dtype == dtype  # s = 2: exact in it


def test_a_scaling_that_half_precision_cannot_hold_widens_b() -> None:
    f = adapter(dtype=torch.bfloat16).modules[PATHS[0]]
    assert f._replace(scaling=0.5).folded().lora_b.dtype == torch.bfloat16
    widened = f._replace(scaling=1 / 3).folded().lora_b
    assert widened.dtype == torch.float32 and torch.equal(widened, (f.lora_b.double() / 3).float())


def test_gguf_holds_float32_of_any_dtype(tmp_path: Path) -> None:
    source = adapter(dtype=torch.bfloat16)
    for path, f in there_and_back(source, "gguf", tmp_path).modules.items():
        assert f.lora_a.dtype == torch.float32 and torch.equal(f.lora_a, source.modules[path].lora_a.float())
        assert torch.equal(f.lora_b, source.modules[path].lora_b.float())


# -------------------------------------------------------------------------------------------------- each format's words


def test_gguf_has_rows_in_pairs_and_ne_in_llama_cpps_order(tmp_path: Path) -> None:
    source = adapter()
    reader = pytest.importorskip("gguf").GGUFReader(convert(source, tmp_path / "x.gguf", to="gguf", base=LLAMA))
    found = {t.name: t for t in reader.tensors}
    q, down = found["blk.0.attn_q.weight.lora_b"], found["blk.1.ffn_down.weight.lora_a"]
    assert list(q.shape) == [4, 32] and list(down.shape) == [7, 4]
    b = source.modules[PATHS[0]].lora_b
    first_head = [b[i] for pair in range(4) for i in (pair, pair + 4)]  # (x, y) of each rotated pair side by side
    assert torch.equal(torch.from_numpy(q.data[:8].copy()), torch.stack(first_head))
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    assert reader.fields["general.architecture"].contents() == "llama"


def test_gguf_writes_the_slices_of_a_fused_projection_one_after_another(tmp_path: Path) -> None:
    path = "gpt_neox.layers.0.attention.query_key_value"
    b = torch.arange(24.0)[:, None].expand(24, 3)  # 2 heads of 4: q, k, v of each in turn
    source = Adapter({path: Factors(randn(3, 8), b.contiguous(), 1.0)})
    base = {"model_type": "gpt_neox", "num_attention_heads": 2, "num_hidden_layers": 1}
    place = convert(source, tmp_path / "x.gguf", to="gguf", base=base)
    (written,) = (t for t in pytest.importorskip("gguf").GGUFReader(place).tensors if t.name.endswith("lora_b"))
    rows = [i + 4 * part + 12 * head for part in range(3) for head in (0, 1) for i in range(4)]
    assert written.data[:, 0].tolist() == rows
    assert read(place, base=base).content_hash() == source.content_hash()


def test_an_alpha_of_zero_is_not_left_for_llama_cpp_to_guess(tmp_path: Path) -> None:
    place = convert(adapter(scalings=(0.0,) * 3), tmp_path / "x.gguf", to="gguf", base=LLAMA)
    back = read(place, base=LLAMA)
    assert {f.scaling for f in back.modules.values()} == {1.0}
    assert not any(f.lora_b.any() for f in back.modules.values())


def test_gguf_of_an_embedding_is_transposed(tmp_path: Path) -> None:
    source = Adapter({"model.embed_tokens": Factors(randn(3, 11), randn(8, 3), 1.0, embedding=True)})
    base = LLAMA | {"tie_word_embeddings": False}
    place = convert(source, tmp_path / "x.gguf", to="gguf", base=base)
    shapes = {t.name: list(t.shape) for t in pytest.importorskip("gguf").GGUFReader(place).tensors}
    assert shapes == {"token_embd.weight.lora_a": [3, 11], "token_embd.weight.lora_b": [3, 8]}
    assert read(place, base=base).content_hash() == source.content_hash()


def test_mlx_transposes_and_names_whole_paths(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = adapter(scalings=(3.0,) * 3)
    convert(source, tmp_path / "m", to="mlx")
    tensors = load_file(tmp_path / "m" / "adapters.safetensors")
    assert torch.equal(tensors[f"{PATHS[2]}.lora_a"], source.modules[PATHS[2]].lora_a.T)
    assert torch.equal(tensors[f"{PATHS[2]}.lora_b"], source.modules[PATHS[2]].lora_b.T)
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": sorted(PATHS)}


def test_kohya_always_has_an_alpha(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(convert(unet(adapter()), tmp_path / "k.safetensors", to="kohya"))
    assert tensors["lora_unet_down_blocks_0_to_q.alpha"].item() == 8.0
    assert {name.rpartition("to_q.")[2] for name in tensors if "to_q" in name} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }


def test_kohyas_names_are_told_by_the_base(tmp_path: Path) -> None:
    """A file without our header: the dots are those of the base's modules."""
    from safetensors.torch import load_file, save_file

    source = unet(adapter())
    place = convert(source, tmp_path / "k.safetensors", to="kohya")
    save_file(load_file(place), place)
    with pytest.raises(ValueError, match="expected base="):
        read(place)
    shapes = dict.fromkeys((*source.modules, "mid_block.to_q"), (1, 1))
    assert read(place, base=Base({}, shapes)).modules.keys() == source.modules.keys()
    with pytest.raises(ValueError, match="lora_unet_down_blocks_0_to_q could be many"):
        read(place, base=Base({}, shapes | {"down_blocks.0.to.q": (1, 1)}))


def test_an_onnx_adapter_is_read_under_the_graphs_names(tmp_path: Path) -> None:
    source = adapter()
    names = "{path}.lora_{factor}.MatMul.weight"
    place = convert(source, tmp_path / "a.onnx_adapter", to="onnx", names=names)
    tensors = onnx.read_flatbuffer(place.read_bytes())
    assert torch.equal(tensors[f"{PATHS[0]}.lora_A.MatMul.weight"], source.modules[PATHS[0]].lora_a.T)
    assert torch.equal(tensors[f"{PATHS[0]}.lora_B.MatMul.weight"], 2 * source.modules[PATHS[0]].lora_b.T)
    assert_same(source, read(place, names=names))
    with pytest.raises(ValueError, match="names= says what they are"):
        read(place)


def test_a_peft_folder_of_ours_is_the_same_after_a_round_trip_through_peft(tmp_path: Path) -> None:
    """PEFT itself reads what is written, and our model computes with it what it computed with the source."""
    peft = pytest.importorskip("peft")
    from tests.serving.tiny_model import KINDS, make_model, write_adapter

    for kind in ("patterns", "rslora", "dora", "bias"):
        write_adapter(tmp_path / kind, **KINDS[kind])
        convert(tmp_path / kind, tmp_path / f"{kind} again", to="peft", portable=kind == "patterns")
        tokens = torch.arange(12)[None]
        with torch.no_grad():
            found = [
                peft.PeftModel.from_pretrained(make_model(), str(tmp_path / name))(tokens).logits
                for name in (kind, f"{kind} again")
            ]
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5 if kind == "patterns" else 0)


def test_gates_are_a_part_of_b(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    lk.adapt(model, lk.LoRAConfig(r=2, gate=True, init="orthonormal"))
    with torch.no_grad():
        model[0].lora_gate.copy_(torch.tensor([0.5, -2.0]))
        model[0].lora_B.weight.normal_()
    lk.save_adapter(model, tmp_path, fold_gate=False)
    (found,) = read(tmp_path).modules.values()
    torch.testing.assert_close(found.lora_b, model[0].lora_B.weight.detach() * torch.tensor([0.5, -2.0]))


# ------------------------------------------------------------------------------------------------------------- refusals

WITH = {
    "DoRA": adapter(dora=True),
    "lora_bias": Adapter({PATHS[0]: adapter().modules[PATHS[0]]._replace(lora_bias=torch.ones(32))}),
    "embeddings": Adapter({"model.embed_tokens": Factors(randn(2, 9), randn(8, 2), 1.0, embedding=True)}),
    "convolutions": Adapter({"model.conv": Factors(randn(2, 3, 3, 3), randn(8, 2, 1, 1), 1.0)}),
    "weights trained whole": replace(adapter(), others={"score.weight": torch.ones(2, 24)}),
    "float64": adapter(dtype=torch.float64),
}


@pytest.mark.parametrize(("to", "feature"), [(to, f) for to in PLACES for f in FORMATS[to].cannot if f in WITH])
def test_what_a_format_has_no_words_for_is_refused_by_name(to: str, feature: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{to} has no words for {feature}.*; (merge|save)"):
        convert(WITH[feature], tmp_path / PLACES[to], to=to, base=LLAMA)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("to", "source", "base", "said"),
    [
        ("gguf", adapter(), None, "gguf needs base="),
        ("gguf", adapter(), {**LLAMA, "model_type": "mamba"}, "one whose rows are known"),
        ("gguf", adapter(), {**LLAMA, "num_attention_heads": 5}, "whose heads divide the 32 rows"),
        ("gguf", adapter(), {**LLAMA, "num_hidden_layers": 1}, "has a tensor for"),
        ("gguf", WITH["embeddings"], {**LLAMA, "tie_word_embeddings": True}, "which are tied"),
        ("mlx", unet(adapter()), None, "mlx-lm has under the same names"),
        ("diffusers", adapter(), None, "modules of a diffusion model"),
        ("onnx", adapter(scalings=(float("nan"),) * 3), None, "a finite scaling"),
        ("x", adapter(), None, "to= to be one of"),
    ],
)
def test_other_refusals(to: str, source: Adapter, base: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        convert(source, tmp_path / PLACES.get(to, "x"), to=to, base=base)
    assert not list(tmp_path.iterdir())


def test_targets_have_the_suffix_of_their_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        convert(adapter(), tmp_path / "x.bin", to="gguf", base=LLAMA)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a folder as target"):
        convert(adapter(), tmp_path / "file", to="peft")


def test_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    source = adapter()
    source.modules[PATHS[0]].lora_a[1, 2] = float("nan")
    FORMATS["peft"].write(source, tmp_path / "p", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"NaN or Inf in model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        convert(tmp_path / "p", tmp_path / "m", to="mlx")


@pytest.mark.parametrize("to", PLACES)
def test_a_file_that_is_cut_off_is_refused(to: str, tmp_path: Path) -> None:
    source = for_format(to, adapter())
    convert(source, tmp_path / PLACES[to], to=to, base=LLAMA)
    place = next(p for p in sorted(tmp_path.rglob("*")) if p.is_file() and p.suffix != ".json")
    content = place.read_bytes()
    for length in (0, 4, 9, 100, len(content) // 2, len(content) - 1):
        place.write_bytes(content[:length])
        with pytest.raises(ValueError, match="expected"):
            read(tmp_path / PLACES[to], base=LLAMA)


def test_two_patterns_that_disagree_are_refused(tmp_path: Path) -> None:
    convert(adapter(), tmp_path / "p", to="peft")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"q_proj": 3, "layers.0.*": 4}
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"alpha_pattern .* one value"):
        read(tmp_path / "p")


# ------------------------------------------------------------------------------------------------------- planted faults


@pytest.mark.parametrize(
    ("to", "fault"),
    [
        ("gguf", mock.patch.object(gguf, "_rows", lambda *_: (gguf._same, gguf._same))),
        ("gguf", mock.patch.object(gguf, "_one_alpha", lambda a: (16.0, dict(a.modules)))),
        ("mlx", mock.patch.object(mlx, "common_scaling", lambda a: 1.0)),
        ("kohya", mock.patch.object(kohya, "alpha_for", lambda s, r: s)),
        ("onnx", mock.patch.object(Factors, "folded", lambda f: f)),
        ("openvino", mock.patch.object(Factors, "folded", lambda f: f)),
    ],
    ids=["rows", "alpha", "scale", "alpha without R", "s left out of B", "s left out of B, OpenVINO"],
)
def test_a_fault_in_a_writer_is_seen(to: str, fault: Any, tmp_path: Path) -> None:
    """The checks above fail with each of these, so that they would show such a writer."""
    source = for_format(to, adapter())
    base = LLAMA if to == "gguf" else None
    with fault:
        place = convert(source, tmp_path / PLACES[to], to=to, base=base)
    with pytest.raises(AssertionError):
        assert_same(source, read(place, base=base))


def test_alphas_give_their_scaling_back(tmp_path: Path) -> None:
    for alpha in (1, 3, 10, 16, 31, 0.3):
        for r in (1, 3, 7, 12, 49):
            assert alpha_for(alpha / r, r) / r == alpha / r
            source = adapter((r,) * 3, (alpha / math.sqrt(r),) * 3)
            assert source.content_hash() == there_and_back(source, "peft", tmp_path).content_hash()


# --------------------------------------------------------------------------------------------------------- content hash


def test_the_hash_sees_a_bit_and_no_order() -> None:
    a, b = adapter(), adapter()
    backwards = replace(b, modules=dict(reversed(list(b.modules.items()))))
    assert a.content_hash() == backwards.content_hash()
    b.modules[PATHS[1]].lora_b.view(torch.int32)[3, 1] ^= 1
    assert a.content_hash() != b.content_hash()
    assert adapter(scalings=(2.0, 2.0, 2.0000000000000004)).content_hash() != a.content_hash()
    assert adapter(dtype=torch.bfloat16).content_hash() != a.content_hash()
