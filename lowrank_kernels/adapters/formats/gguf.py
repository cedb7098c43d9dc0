"""llama.cpp's GGUF adapters, through the package gguf.

A tensor of ne [K, R] is stored as R rows of K: A keeps its shape, and so does B. Of an embedding, A is (V, R). The rows
of B follow those of the weight: llama.cpp's converter turns the rows of q and k in the Llama family from two halves a
head (transformers) into pairs, and puts GPT-NeoX' q, k and v, which lie head by head, one after another.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapter import Adapter, Factors
from ..base import Base
from ..folder import write_aside
from .format import FLOAT64, MERGE, Format, Options, is_file, one_rank, paired

# transformers' model_type -> llama.cpp's architecture, for those whose weights its converter keeps as they are but for
# the rows below.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gpt_neox": "gptneox",
}
# What an adapter of each family can have factors of, by transformers' names.
_LLAMA = (
    "model.embed_tokens",
    "lm_head",
    *(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkvo"),
    *(f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down")),
)
_NEOX = (
    "gpt_neox.embed_in",
    "embed_out",
    *(f"gpt_neox.layers.{{}}.attention.{part}" for part in ("query_key_value", "dense")),
    *(f"gpt_neox.layers.{{}}.mlp.{part}" for part in ("dense_h_to_4h", "dense_4h_to_h")),
)
_SUFFIXES = (".weight.lora_a", ".weight.lora_b")


def write(adapter: Adapter, path: Path, options: Options) -> None:
    gguf = _package()
    base = _needed(options.base)
    architecture = _architecture(base)
    names = {module: _name(module, architecture, base) for module in adapter.modules}
    _check_ties(adapter, base)
    # One alpha a file, a float32; 0 would mean that there is none, and s = 1.
    alpha, modules = _one_alpha(adapter)
    tensors: dict[str, Tensor] = {}
    for module, f in modules.items():
        turn, _ = _rows(module, architecture, base)
        a = f.lora_a.float().T if f.embedding else f.lora_a.float()
        tensors[names[module] + _SUFFIXES[0]] = a
        tensors[names[module] + _SUFFIXES[1]] = turn(f.lora_b.float())

    def save(place: Path) -> None:
        writer = gguf.GGUFWriter(place, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.detach().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, save)


def _one_alpha(adapter: Adapter) -> tuple[float, dict[str, Factors]]:
    """The file's alpha, and factors for it: s · R where that is one number everywhere, else s is written into B."""
    alphas = {_float32(f.scaling * f.rank) for f in adapter.modules.values()}
    if len(alphas) == 1 and (alpha := alphas.pop()):
        return alpha, dict(adapter.modules)
    alpha = float(one_rank(adapter))
    folded = {}
    for module, f in adapter.modules.items():
        scaled = f._replace(scaling=f.scaling * f.rank / alpha).folded()
        folded[module] = scaled._replace(scaling=alpha / f.rank)
    return alpha, folded


def read(path: Path, options: Options) -> Adapter:
    reader = open_gguf(path)
    architecture = reader.text("general.architecture")
    if reader.text("general.type") != "adapter" or reader.text("adapter.type") != "lora":
        raise ValueError(f"convert: expected {path} to be a LoRA adapter, got a GGUF file of another kind")
    if architecture not in ARCHITECTURES.values():
        raise ValueError(_unknown(architecture, f"of {path}"))
    paths = _paths(architecture, reader.tensors)
    alpha = reader.float("adapter.lora.alpha")
    keys = {_SUFFIXES[0]: "a", _SUFFIXES[1]: "b"}
    modules = {}
    for name, own in paired(path, reader.tensors, keys).items():
        if name not in paths:
            raise ValueError(f"convert: expected tensors of linears and embeddings in {path}, got {name[:200]}")
        embedding = name == "token_embd"
        a, b = own["a"].T.contiguous() if embedding else own["a"], own["b"]
        _, back = _rows(paths[name], architecture, options.base)
        scaling = alpha / a.shape[0] if alpha else 1.0
        modules[paths[name]] = Factors(a, back(b), scaling, embedding=embedding)
    return Adapter(modules, origin=str(path))


def _paths(architecture: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """{name in the file: path in transformers' model}."""
    numbers = [int(part) for name in tensors for part in name.split(".")[1:2] if part.isdecimal() and len(part) < 6]
    layers = max(numbers, default=0) + 1
    places = _NEOX if architecture == "gptneox" else _LLAMA
    paths = [place.format(i) for place in places for i in range(layers if "{}" in place else 1)]
    known = _name_map(architecture, layers)
    return {name: path for path in paths if (name := known.get_name(path)) is not None}


def _name(module: str, architecture: str, base: Base) -> str:
    layers = base.number("num_hidden_layers", "n_layer") or 0
    found = _name_map(architecture, layers).get_name(module)
    if found is None:
        raise ValueError(
            f"convert: expected modules of the base that GGUF's {architecture} has a tensor for, got {module[:200]} "
            f"({layers} layers)"
        )
    return str(found)


def _name_map(architecture: str, layers: int) -> Any:
    gguf = _package()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(kind, layers)


def _check_ties(adapter: Adapter, base: Base) -> None:
    """A model whose head is its embedding has one tensor for both in GGUF."""
    tied = base.settings.get("tie_word_embeddings", base.settings.get("model_type") == "gemma")
    ends = [path for path, f in adapter.modules.items() if f.embedding or path in ("lm_head", "embed_out")]
    if tied and ends:
        raise ValueError(
            f"convert: gguf has one tensor for the embedding and the head of this base, which are tied, and the "
            f"adapter has factors for {ends[0]} alone; {MERGE}"
        )


def _rows(
    module: str, architecture: str, base: Base | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """How the rows of B go into the file, and back."""
    leaf = module.rpartition(".")[2]
    if architecture == "llama" and leaf in ("q_proj", "k_proj"):
        base = _needed(base)
        heads = base.number("num_attention_heads")
        if leaf == "k_proj":
            heads = base.number("num_key_value_heads") or heads
        return _by_heads(module, heads, 2, False), _by_heads(module, heads, 2, True)
    if architecture == "gptneox" and leaf == "query_key_value":
        heads = _needed(base).number("num_attention_heads")
        return partial(_swapped, module, heads, 3, (0, 1)), partial(_swapped, module, heads, 3, (0, 1), back=True)
    return _same, _same


def _by_heads(module: str, heads: int | None, parts: int, back: bool) -> Callable[[Tensor], Tensor]:
    return partial(_swapped, module, heads, parts, (1, 2), back=back)


def _same(b: Tensor) -> Tensor:
    return b


def _swapped(
    module: str, heads: int | None, parts: int, axes: tuple[int, int], b: Tensor, back: bool = False
) -> Tensor:
    """B's rows as (heads, parts, rows of a part), two of these axes swapped."""
    n = b.shape[0]
    if not heads or n % (heads * parts):
        raise ValueError(
            f"convert: expected a base whose heads divide the {n} rows of {module[:200]}, got {heads} heads"
        )
    sizes = [heads, parts, n // heads // parts]
    if back:
        sizes[axes[0]], sizes[axes[1]] = sizes[axes[1]], sizes[axes[0]]
    return b.reshape(*sizes, -1).transpose(*axes).reshape(b.shape)


def _architecture(base: Base) -> str:
    known = base.settings.get("gguf_architecture") or ARCHITECTURES.get(str(base.settings.get("model_type")), "")
    if known not in ARCHITECTURES.values():
        raise ValueError(_unknown(str(base.settings.get("model_type") or known), "of the base"))
    return str(known)


def _unknown(kind: str, where: str) -> str:
    return (
        f"convert: expected the architecture {where} to be one whose rows are known, {', '.join(ARCHITECTURES)}, got "
        f"{kind[:80]!r}; {MERGE}"
    )


def _needed(base: Base | None) -> Base:
    if base is None:
        raise ValueError("convert: gguf needs base=, the model's folder, config or GGUF file, for its heads and names")
    return base


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("gguf files need the extra: pip install 'lowrank_kernels[convert]'") from None
    return gguf


class GGUFFile(NamedTuple):
    """Fields and float tensors of a GGUF file, read and checked."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def text(self, key: str) -> str:
        value = self.fields.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str) -> int | None:
        value = self.fields.get(key)
        return value if type(value) is int else None

    def float(self, key: str) -> float:
        value = self.fields.get(key)
        if not isinstance(value, (int, float)):
            raise ValueError(f"convert: expected {key} in {self.path} to be a number, got {str(value)[:80]!r}")
        return value


def open_gguf(path: Path) -> GGUFFile:
    """The fields of a file that are texts and numbers, and its float tensors, as maps of the file.

    Raises:
        ValueError: a file that is not GGUF, or not whole.
    """
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if len(field.types) == 1
            and name.startswith(("general.", "adapter.", "llama.", "qwen", "gemma", "gptneox."))
        }
        kinds = {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}
        tensors = {
            t.name: torch.from_numpy(t.data.copy())
            for t in reader.tensors
            if t.tensor_type in kinds and ".lora_" in t.name
        }
        tensors |= {t.name: torch.empty(0) for t in reader.tensors if t.name not in tensors}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, struct.error) as error:
        raise ValueError(f"convert: expected {path} to be a whole GGUF file: {str(error)[:200]}") from None
    return GGUFFile(path, fields, tensors)


FORMAT = Format(
    "gguf",
    ".gguf",
    partial(is_file, suffix=".gguf"),
    write,
    read,
    {
        "DoRA": MERGE,
        "lora_bias": MERGE,
        "convolutions": MERGE,
        "weights trained whole": MERGE,
        **FLOAT64,
    },
    "llama.cpp",
)
