"""What an adapter is, without a model: for people and for scripts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter, Factors, not_finite
from .base import Base, read_base
from .convert import format_of, read_unchecked
from .folder import few
from .formats import FORMATS
from .formats.gguf import ARCHITECTURES

_BARS = " ▁▂▃▄▅▆▇█"
_DIFFUSION = re.compile(r"(unet\.|transformer\.)?(down|mid|up|single_transformer|transformer)_block")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class Inspection(NamedTuple):
    """What :func:`inspect_adapter` found."""

    source: Path
    format: str
    kind: str
    adapter: Adapter
    content_hash: str
    faults: tuple[str, ...]
    """What makes the adapter unusable: values that are not finite, modules that the base does not have."""
    readers: dict[str, str | None]
    """{engine: why it cannot read this adapter rightly, from a file of its own format; None if it can}."""

    def norms(self) -> dict[str, dict[int, float]]:
        """{kind of module: {layer: ‖s B A‖}} in the Frobenius norm; layer -1 for modules outside of layers."""
        found: dict[str, dict[int, float]] = {}
        for path, f in self.adapter.modules.items():
            number = _LAYER.search(path)
            kind = _LAYER.sub(".*.", path, count=1).lstrip(".") if number else path
            found.setdefault(kind, {})[int(number[1]) if number else -1] = delta_norm(f)
        return found

    def picture(self) -> list[str]:
        """A line a kind of module: its name, a bar a layer, as high as ‖s B A‖ beside the largest, and that."""
        norms = self.norms()
        finite = [n for of in norms.values() for n in of.values() if math.isfinite(n)]
        most = max(finite, default=0.0)
        layers = sorted({layer for of in norms.values() for layer in of if layer >= 0})
        width = max(map(len, norms))
        lines = []
        for kind, of in sorted(norms.items()):
            places = layers if -1 not in of else [-1]
            bars = "".join(_bar(of.get(layer), most) for layer in places)
            lines.append(f"{kind:<{width}} |{bars:<{max(len(layers), 1)}}| up to {max(of.values()):.3g}")
        return lines

    def __str__(self) -> str:
        modules = self.adapter.modules.values()
        ranks, scalings = sorted({f.rank for f in modules}), sorted({f.scaling for f in modules})
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for f in modules for t in f.tensors().values()})
        size = sum(t.numel() for f in modules for t in f.tensors().values())
        lines = [
            f"{self.source}: {self.kind} ({self.format})",
            f"  content   {self.content_hash}",
            f"  modules   {len(self.adapter.modules)}, {size:,} parameters of {', '.join(dtypes)}",
            f"  rank      {_some(ranks)}",
            f"  scaling   {_some([f'{s:.6g}' for s in scalings])}",
        ]
        if self.adapter.others:
            lines.append(f"  whole     {few(list(self.adapter.others))}")
        lines += ["  ‖s B A‖ by layer", *(f"    {line}" for line in self.picture()), "  read rightly by"]
        lines += [f"    {engine:<14} {'yes' if why is None else f'no: {why}'}" for engine, why in self.readers.items()]
        lines += [f"  FAULT     {fault}" for fault in self.faults]
        return "\n".join(lines)


def inspect_adapter(source: str | os.PathLike[str], *, base: Any = None) -> Inspection:
    """Read an adapter of any format and say what it is. NaN is told, not refused.

    Args:
        source, base: as for :func:`convert`; with a base, the adapter's modules and shapes are compared with it.

    Raises:
        ValueError: a source that is no adapter, or whose file is not whole.
    """
    given = read_base(base, "inspect_adapter")
    adapter = read_unchecked(source, base=given)
    faults = []
    if broken := not_finite(adapter):
        faults.append(f"NaN or Inf in {few(broken)}")
    faults += _misfits(adapter, given)
    kind = "DoRA" if adapter.dora else "LoRA"
    found = format_of(source)
    assert found is not None
    return Inspection(
        Path(source), found, kind, adapter, adapter.content_hash(), tuple(faults), _readers(adapter, given)
    )


def differences(a: Adapter, b: Adapter) -> list[str]:
    """What differs between two adapters, a line a module: paths, ranks, scalings, and ‖D_a - D_b‖ / ‖D_a‖ of D = s B A.

    Nothing where their content hashes are equal. The norm is of R × R matrices, in float64.
    """
    if a.content_hash() == b.content_hash():
        return []
    lines = [f"{path}: only in the first" for path in a.modules.keys() - b.modules.keys()]
    lines += [f"{path}: only in the second" for path in b.modules.keys() - a.modules.keys()]
    for path in a.modules.keys() & b.modules.keys():
        one, two = a.modules[path], b.modules[path]
        said = []
        if one.shape != two.shape:
            said.append(f"shape {one.shape}, {two.shape}")
        elif (off := _off(one, two)) > 0.0:
            said.append(f"s B A off by {off:.3g} of its norm")
        said += [f"rank {one.rank}, {two.rank}"] if one.rank != two.rank else []
        said += [f"scaling {one.scaling:.9g}, {two.scaling:.9g}"] if one.scaling != two.scaling else []
        said += ["magnitude"] if not _equal(one.magnitude, two.magnitude) else []
        said += ["lora_bias"] if not _equal(one.lora_bias, two.lora_bias) else []
        pairs = zip((one.lora_a, one.lora_b), (two.lora_a, two.lora_b), strict=True)
        if not said and any(not _equal(x, y) for x, y in pairs):
            said.append("other factors of the same product, or another dtype")
        lines += [f"{path}: {'; '.join(said)}"] if said else []
    names = a.others.keys() | b.others.keys()
    lines += [f"{name}: weights trained whole" for name in names if not _equal(a.others.get(name), b.others.get(name))]
    return sorted(lines)


def delta_norm(f: Factors) -> float:
    """‖s B A‖ in the Frobenius norm, from R × R matrices: √tr(BᵀB AAᵀ), in float64."""
    a, b = f.lora_a.double().flatten(1), f.lora_b.double().flatten(1)
    return abs(f.scaling) * math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0)) if _finite(f) else math.nan


def _finite(f: Factors) -> bool:
    return bool(f.lora_a.isfinite().all()) and bool(f.lora_b.isfinite().all())


def _off(one: Factors, two: Factors) -> float:
    """‖D_one - D_two‖ / ‖D_one‖, from the factors side by side: no sum of squares that cancels."""
    a = torch.cat([one.lora_a.double().flatten(1), two.lora_a.double().flatten(1)])
    b = torch.cat([one.scaling * one.lora_b.double().flatten(1), -two.scaling * two.lora_b.double().flatten(1)], 1)
    if all(_equal(x, y) for x, y in ((one.lora_a, two.lora_a), (one.lora_b, two.lora_b))) and (
        one.scaling == two.scaling
    ):
        return 0.0
    r_a, r_b = torch.linalg.qr(a.T)[1], torch.linalg.qr(b)[1]
    return float((r_b @ r_a.T).norm()) / (delta_norm(one) or 1.0)


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.dtype == two.dtype and torch.equal(one, two)


def _misfits(adapter: Adapter, base: Base | None) -> list[str]:
    if base is None or not base.shapes:
        return []
    absent = [path for path in adapter.modules if path not in base.shapes]
    faults = [f"the base has no {few(absent)}"] if absent else []
    wrong = []
    for path, f in adapter.modules.items():
        n, k = f.shape
        own = base.shapes.get(path)
        if own is not None and (math.prod(own) != n * k or own[0] not in (n, k)):
            wrong.append(f"{path} is {own}, and its factors are for {(n, k)}")
    return faults + ([f"other shapes in the base: {few(wrong)}"] if wrong else [])


def _readers(adapter: Adapter, base: Base | None) -> dict[str, str | None]:
    """{engine: why not}; what an engine's format has no words for it does not read."""
    found: dict[str, str | None] = {"PEFT": None, "vLLM": _vllm(adapter)}
    names = {"gguf": "llama.cpp", "mlx": "mlx-lm", "kohya": "LyCORIS", "diffusers": "diffusers"}
    names |= {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
    for name, engine in names.items():
        found[engine] = FORMATS[name].refusal(adapter)
    if base is not None and found["llama.cpp"] is None and not ({"gguf_architecture"} & base.settings.keys()):
        kind = base.settings.get("model_type")
        found["llama.cpp"] = None if kind in ARCHITECTURES else f"the order of rows of {kind} is not known here"
    diffusion = any(_DIFFUSION.match(path) for path in adapter.modules)
    for engine in ("llama.cpp", "mlx-lm", "vLLM", "OpenVINO") if diffusion else ("diffusers",):
        found[engine] = found[engine] or f"it is for {'language' if diffusion else 'diffusion'} models"
    return found


def _vllm(adapter: Adapter) -> str | None:
    if adapter.dora:
        return "vLLM refuses DoRA; merge the adapter into its base (lrk merge)"
    if any(f.lora_bias is not None for f in adapter.modules.values()):
        return "vLLM refuses lora_bias; merge the adapter into its base (lrk merge)"
    if adapter.others or any(f.embedding for f in adapter.modules.values()):
        return "vLLM skips changed embeddings and weights trained whole in silence; merge the adapter into its base"
    return None


def _bar(norm: float | None, most: float) -> str:
    if norm is None:
        return " "
    if not math.isfinite(norm):
        return "!"
    return _BARS[math.ceil((len(_BARS) - 1) * norm / most)] if most else _BARS[0]


def _some(values: Sequence[Any]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown + (f" and {len(values) - 8} more" if len(values) > 8 else "")
