"""What can be cut out of a decoder as a whole: KV heads with their query heads, and channels of the MLP."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..names import named_modules
from ..nn.matrix import frozen_weight
from ..nn.sharded import is_dtensor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Part:
    """What one linear holds of each structure of a group: adjacent rows of its weight, or columns.

    Attributes:
        path: of the linear.
        rows: rows of W, its outputs; or columns, its inputs.
        width: how many belong to one structure.
        size: elements of W, and of a bias, that go with one.
    """

    path: str
    rows: bool
    width: int
    size: int


@dataclass(frozen=True)
class Group:
    """The structures of one kind in one layer. A structure that is masked at the input of the last part is cut.

    Attributes:
        kind: "heads" or "channels".
        path: of the attention or the MLP.
        count: how many there are.
        parts: the linears they lie in, the one that takes their output last.
    """

    kind: str
    path: str
    count: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Parameters of one structure."""
        return sum(part.size for part in self.parts)

    @property
    def gate(self) -> Part:
        """The linear whose input is masked."""
        return self.parts[-1]


def decoder_groups(model: nn.Module, op: str) -> list[Group]:
    """The groups of a decoder as Llama, Mistral, Qwen2, Qwen3 and SmolLM are built, layer by layer.

    An attention has q_proj, k_proj, v_proj and o_proj; its structures are the KV heads, each with the query heads that
    share it, by the numbers in the model's config. An MLP has gate_proj, up_proj and down_proj. What an attention has
    besides are norms of single heads.

    Raises:
        ValueError: no config, no such layer, one whose linears are sharded or do not have the shapes that the config
            says, or one with other parameters, such as a norm over all heads, which could not be cut along.
    """
    config: Any = getattr(model, "config", None)
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    if config is None or not all(isinstance(getattr(config, name, None), int) for name in names):
        raise ValueError(
            f"{op}: expected a decoder of transformers, whose config has {', '.join(names)}, got a "
            f"{type(model).__name__}, whose structure is not recognised"
        )
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    found: list[Group] = []
    for path, module in named_modules(model):
        for kind, children in (("heads", ATTENTION), ("channels", MLP)):
            linears = {child: getattr(module, child, None) for child in children}
            if not all(hasattr(linear, "out_features") for linear in linears.values()):
                continue
            count = kv_heads if kind == "heads" else config.intermediate_size
            widths = {"q_proj": width * heads // kv_heads, "o_proj": width * heads // kv_heads}
            widths |= {"k_proj": width, "v_proj": width}
            parts = tuple(_part(f"{path}.{c}", linears[c], c != children[-1], widths.get(c, 1)) for c in children)
            for part, linear in zip(parts, linears.values(), strict=True):
                side: Any = linear.out_features if part.rows else linear.in_features  # type: ignore[union-attr]
                if is_dtensor(frozen_weight(getattr(linear, "base_layer", linear))):
                    raise ValueError(f"{op}: expected whole weights, got shards in {part.path}; prune before sharding")
                if side != count * part.width:
                    raise ValueError(
                        f"{op}: expected {part.path} to have {count} structures of {part.width} by the model's config, "
                        f"got {side} {'rows' if part.rows else 'columns'}; the structure is not recognised"
                    )
            _check_nothing_else(op, path, module, children, width if kind == "heads" else 0)
            found.append(Group(kind, path, count, parts))
    for kind, children in (("heads", ATTENTION), ("channels", MLP)):
        number = sum(group.kind == kind for group in found)
        if number != config.num_hidden_layers:
            raise ValueError(
                f"{op}: expected {config.num_hidden_layers} modules with {', '.join(children)}, one a layer, found "
                f"{number} in this {type(model).__name__}, whose structure is not recognised"
            )
    return found


def _check_nothing_else(op: str, path: str, module: nn.Module, linears: tuple[str, ...], width: int) -> None:
    """Raise ValueError for parameters beside the linears, unless they are a child's, one for each element of a head."""
    for name, p in module.named_parameters():
        child = name.partition(".")[0]
        if child not in linears and (child == name or p.numel() != width):
            raise ValueError(
                f"{op}: expected nothing in {path} that depends on its structures but {', '.join(linears)}, got {name} "
                f"of shape {tuple(p.shape)}; the structure is not recognised"
            )


def _part(path: str, linear: Any, rows: bool, width: int) -> Part:
    size = width * (linear.in_features if rows else linear.out_features)
    if rows and getattr(linear, "bias", None) is not None:
        size += width
    return Part(path, rows, width, size)


@torch.no_grad()
def keep_structures_(model: nn.Module, group: Group, keep: Tensor) -> None:
    """Cut all structures of a group but some out of its linears, plain ones, in place.

    Args:
        keep: their numbers, ascending.
    """
    for part in group.parts:
        linear: Any = model.get_submodule(part.path)
        index = (keep[:, None] * part.width + torch.arange(part.width, device=keep.device)).flatten()
        for name, dim in (("weight", 0 if part.rows else 1), ("bias", 0)):
            p = getattr(linear, name)
            if p is not None and (name == "weight" or part.rows):
                setattr(linear, name, nn.Parameter(p.index_select(dim, index.to(p.device)), p.requires_grad))
        if part.rows:
            linear.out_features = len(index)
        else:
            linear.in_features = len(index)


def allowed_heads(config: Any, most: int) -> list[int]:
    """The numbers of KV heads, ``most`` and below, with which a config can be saved and loaded: that of Llama refuses
    numbers of heads that do not divide ``hidden_size``."""
    found = [most]
    for heads in range(most - 1, 0, -1):
        cut = copy.deepcopy(config)
        write_sizes_(cut, heads, config.intermediate_size)
        try:
            type(config).from_dict(cut.to_dict())
        except Exception:  # transformers' own kind, of no common base
            continue
        found.append(heads)
    return found


def write_sizes_(config: Any, heads: int, channels: int) -> None:
    """Note in a config that each layer has so many KV heads and channels left."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.num_attention_heads = config.num_attention_heads // kv_heads * heads
    config.num_key_value_heads = heads
    config.intermediate_size = channels
