"""What a format is: how it is told, written and read, and what it has no words for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import LoRAConfig
from ..adapter import Adapter
from ..base import Base
from ..folder import FileTensor, few, read_header, write_aside

MAX_TENSORS = 1 << 16
MERGE = "merge the adapter into its base (lrk merge), or train one without"


class Options(NamedTuple):
    """What a writer or a reader may need beside the adapter."""

    base: Base | None = None
    names: str = "{path}.lora_{factor}.weight"


class Format(NamedTuple):
    """A format on disk.

    Args:
        name: as ``to=`` of :func:`convert` has it.
        suffix: of its file; "" for a folder.
        is_one: True if a path looks like this format.
        write: called with an adapter that has nothing the format cannot say.
        read: with a path that looks like it; raises ValueError for what does not hold together.
        cannot: {feature of :func:`features`: what would work}.
        engines: that read it.
    """

    name: str
    suffix: str
    is_one: Callable[[Path], bool]
    write: Callable[[Adapter, Path, Options], None]
    read: Callable[[Path, Options], Adapter] | None
    cannot: Mapping[str, str]
    engines: str

    def refusal(self, adapter: Adapter) -> str | None:
        """What of the adapter this format has no words for, and what would work; None if it can say it all."""
        for feature, where in features(adapter).items():
            if where and feature in self.cannot:
                return f"{self.name} has no words for {feature}, which {few(where)} has; {self.cannot[feature]}"
        return None


def features(adapter: Adapter) -> dict[str, list[str]]:
    """{what some formats cannot say: modules or tensors of the adapter that have it}."""
    modules = adapter.modules.items()
    return {
        "DoRA": [path for path, f in modules if f.magnitude is not None],
        "DoRA over embeddings and convolutions": [
            path for path, f in modules if f.magnitude is not None and (f.embedding or f.convolution)
        ],
        "lora_bias": [path for path, f in modules if f.lora_bias is not None],
        "embeddings": [path for path, f in modules if f.embedding],
        "convolutions": [path for path, f in modules if f.convolution],
        "weights trained whole": list(adapter.others),
        "float64": [path for path, f in modules if any(t.element_size() == 8 for t in f.tensors().values())],
    }


FLOAT64 = {"float64": "save the adapter in float32 first"}
FACTORS_OF_LINEARS = {
    "DoRA": MERGE,
    "lora_bias": MERGE,
    "embeddings": MERGE,
    "convolutions": MERGE,
    "weights trained whole": MERGE,
    **FLOAT64,
}
"""What is beyond a format that holds factors of linears and nothing else."""


def is_file(path: Path, suffix: str) -> bool:
    return path.suffix == suffix and path.is_file()


def header_of(path: Path, op: str = "convert") -> dict[str, FileTensor]:
    return read_header(path, MAX_TENSORS, op)


@contextmanager
def tensors_of(path: Path) -> Iterator[Any]:
    """An open safetensors file, after a check of its header."""
    from safetensors import SafetensorError, safe_open

    header_of(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"convert: expected {path} to be a whole safetensors file: {error}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file aside, and rename it. Tensors may share memory."""
    from safetensors.torch import save_file

    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda place: save_file(own, place, metadata=metadata))


def names_in(path: Path) -> set[str]:
    """Names of a safetensors file's tensors; none of a file that is not one."""
    try:
        return set(header_of(path))
    except ValueError:
        return set()


def paired(path: Path, tensors: Mapping[str, Tensor], ends: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """{module: {key: tensor}} of tensors whose names end as ``ends`` ({end: key}) says.

    Raises:
        ValueError: a name that ends otherwise, or a module without both factors, "a" and "b".
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            unknown.append(name)
        else:
            found.setdefault(name.removesuffix(end), {})[ends[end]] = tensor
    alone = [module for module, own in found.items() if not {"a", "b"} <= own.keys()]
    if unknown or alone:
        raise ValueError(
            f"convert: expected {path} to hold two factors of each module and nothing else; unknown: {few(unknown)}; "
            f"without both factors: {few(alone)}"
        )
    return found


def alpha_for(scaling: float, rank: int, root: bool = False) -> float:
    """alpha with alpha / rank (or alpha / √rank) = scaling, to the last bit where a float64 has such an alpha."""
    divisor = math.sqrt(rank) if root else rank
    alpha = scaling * divisor
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if a / divisor == scaling), alpha)


def common_scaling(adapter: Adapter) -> float | None:
    """s of every module; None where they differ."""
    found = {f.scaling for f in adapter.modules.values()}
    return found.pop() if len(found) == 1 else None


def one_rank(adapter: Adapter) -> int:
    return max(f.rank for f in adapter.modules.values())


def component(paths: Mapping[str, Any]) -> str:
    """Which part of a diffusion pipeline has modules of these paths; "" where the paths say it, or of another model."""
    if all(path.startswith(("unet.", "transformer.", "text_encoder.", "text_encoder_2.")) for path in paths):
        return ""
    first = {path.partition(".")[0] for path in paths}
    if first & {"down_blocks", "mid_block", "up_blocks"}:
        return "unet"
    if first & {"text_model"}:
        return "text_encoder"
    return "transformer" if first & {"transformer_blocks", "single_transformer_blocks"} else ""


def plain_settings(config: LoRAConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config that are kept beside the factors."""
    kept = ("task_type", "base_model_name_or_path", "revision", "bias", "modules_to_save", "lora_dropout")
    return {key: given[key] for key in kept if given.get(key) is not None}
