"""LoRA-GA: start where full fine-tuning's first step would go (Wang et al., arXiv 2407.05000)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..finite import all_finite
from ..gradients import summed_gradients
from ..merge import merge_lora_
from ..names import named_modules
from ..nn.matrix import as_matrix, frozen_weight, is_linear

if TYPE_CHECKING:
    from ..nn import LoRALinear

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weight_svd")
_CHANGE = "LoRA-GA's start, which was taken out of it; use lk.save_lora_ga_adapter with what lora_ga_ returned"
EXACT_UP_TO = 2000
"""Columns or rows above which the SVD is a randomised one."""


class Start(NamedTuple):
    """s B₀ A₀, which :func:`lora_ga_` took out of a layer's W; kept by the layer as ``lora_ga_start``."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float

    def put_back_(self, layer: LoRALinear) -> None:
        """W ← W + s B₀ A₀: as it was before, to within two roundings."""
        merge_lora_(layer.matrix, self.lora_a, self.lora_b, scaling=self.scaling)
        layer.lora_ga_start = None  # type: ignore[assignment]


def estimate_gradients(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor], linears: Mapping[str, nn.Linear]
) -> dict[str, Tensor]:
    """Mean gradient of each weight over some batches: G (N, K), float32, on the CPU.

    A weight's gradient goes to the CPU and is freed as soon as it is complete, so about one layer's is alive on the
    device; nothing else of the model gets one.

    Args:
        model: not adapted yet; in the mode (training or evaluation) that it should be in.
        batches: the paper's default is 64 of 2 examples.
        loss: (model, batch) -> the scalar to differentiate.
        linears: by path, such as ``lk.plan_adaptation(model, config).targets``.

    Returns:
        G by path. ``requires_grad`` of every parameter and all ``.grad`` are afterwards what they were.

    Raises:
        TypeError: linears that are none, a loss that is not a scalar tensor.
        ValueError: no linears, no batches, a loss that is not finite or depends on none of the weights, a weight that
            got no gradient or one that is not finite.
    """
    if not isinstance(linears, Mapping) or not all(is_linear(linear) for linear in linears.values()):
        raise TypeError(
            "estimate_gradients: expected linears to be a dict of path to nn.Linear (or transformers' Conv1D)"
        )
    if not linears:
        raise ValueError("estimate_gradients: expected linears to estimate for, got none")
    for name, linear in linears.items():
        weight = frozen_weight(linear)
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"estimate_gradients: expected dense weights, which get a gradient, got one stored as {weight.format} "
                f"in {name}; lk.dequantize_ makes it dense"
            )
    count = 0
    with summed_gradients(model, {name: linear.weight for name, linear in linears.items()}, to_cpu=True) as sums:
        for batch in batches:
            with torch.enable_grad():
                value = loss(model, batch)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise TypeError(f"estimate_gradients: expected loss to return a scalar tensor, got {value!r:.80}")
            if not value.requires_grad or not torch.isfinite(value):
                raise ValueError(f"estimate_gradients: expected a finite loss of the weights, got {value!r:.80}")
            value.backward()
            count += 1
    if count == 0:
        raise ValueError("estimate_gradients: expected at least one batch, got none")
    for name in linears:
        if name not in sums or not all_finite(sums[name]):
            what = "got NaN or Inf" if name in sums else "the loss does not reach it"
            raise ValueError(f"estimate_gradients: expected a finite gradient of {name}, but {what}")
    return {name: as_matrix(linears[name], gradient.div_(count)) for name, gradient in sums.items()}


def lora_ga_factors(
    gradient: Tensor,
    r: int,
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
    scaling: float = 1.0,
    weight: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A (R, K) and B (N, R) from the leading 2 R singular vectors of G = U S Vᵀ.

    - ``ArB2r``: A = V[:, :R]ᵀ, B = U[:, R:2R];  ``A2rBr``: A = V[:, R:2R]ᵀ, B = U[:, :R];
    - ``ArBr``: B = U[:, 0:2R:2], A = V[:, 1:2R:2]ᵀ;  ``random``: a random split of the first 2 R.

    At scale ``unit``, G AᵀA + BBᵀ G is then the best approximation of G of rank 2 R.

    Args:
        gradient: G (N, K), computed with in float32 (float64 stays).
        scale: "stable": both times N^(1/4) / √γ; "gd": both over s; "unit"; "weight_svd": both times
            √(mean of W's R leading singular values / s).
        gamma: γ of "stable".
        scaling: s.
        weight: W, for "weight_svd".
        seed: of the randomised SVD (rank 4 R, 4 power iterations) of a G with more than 2000 rows or columns, and of
            the random split.

    Raises:
        TypeError: a gradient that is not a matrix of floats, a rank or a seed that is not an integer.
        ValueError: a rank below 1 or of more than half of min(N, K), a gradient that is not finite or nothing but
            zeros, a γ or, where it is divided by ("gd", "weight_svd"), an s that is not a number to divide by; unknown
            names.

    Source: Wang et al., arXiv 2407.05000, theorem 3.1, equation 7, and the authors' code for the names.
    """
    _check_choices(direction, scale, gamma, seed)
    if not isinstance(gradient, Tensor) or gradient.dim() != 2 or not gradient.is_floating_point():
        raise TypeError("lora_ga: expected gradient to be a matrix (N, K) of floats")
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"lora_ga: expected r to be an integer, got {r!r}")
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
        raise ValueError(f"lora_ga: expected scaling to be a finite number, got {scaling!r}")
    if (scale == "gd" and scaling == 0.0) or (scale == "weight_svd" and scaling <= 0.0):
        least = "other than" if scale == "gd" else "above"
        raise ValueError(
            f"lora_ga: expected scaling {least} 0 for scale={scale!r}, which divides by it, got {scaling!r}; give the "
            f"layer an alpha, or use scale='stable'"
        )
    n, k = gradient.shape
    if r < 1:
        raise ValueError(f"lora_ga: expected a rank of at least 1, got {r}")
    if 2 * r > min(n, k):
        raise ValueError(f"lora_ga: expected a rank of at most min(N, K) / 2 = {min(n, k) // 2}, got {r}")
    if not all_finite(gradient):
        raise ValueError("lora_ga: expected a finite gradient, got NaN or Inf")
    if not gradient.any():
        raise ValueError("lora_ga: expected a gradient that is not zero throughout; were there targets in the batches?")
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    with torch.random.fork_rng(devices=[g.device] if g.device.type == "cuda" else []):
        torch.manual_seed(seed)
        u, v = _singular_vectors(g, r)
        order = torch.randperm(2 * r, device=g.device)
    first, second = torch.arange(r, device=g.device), torch.arange(r, 2 * r, device=g.device)
    for_a, for_b = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (2 * first + 1, 2 * first),
        "random": (order[:r], order[r:]),
    }[direction]
    if scale == "stable":
        factor = n**0.25 / gamma**0.5
    elif scale == "gd":
        factor = 1.0 / scaling
    elif scale == "weight_svd":
        if weight is None:
            raise ValueError("lora_ga: expected the weight for scale='weight_svd', got none")
        factor = (torch.linalg.svdvals(weight.to(g.dtype))[:r].mean() / scaling).sqrt().item()
    else:
        factor = 1.0
    return factor * v[:, for_a].T.contiguous(), factor * u[:, for_b].contiguous()


@torch.no_grad()
def lora_ga_(
    model: nn.Module,
    gradients: Mapping[str, Tensor],
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Start an adapted model's LoRA layers from gradients: A, B as :func:`lora_ga_factors`, and W ← W - s B A.

    Training starts at the pretrained function. It is plain LoRA from there on. What was taken out of W stays known to
    each layer: the report's ``undo()`` puts it back, to within two roundings of W, ``lk.save_adapter`` refuses, and a
    chain merges it with its first link.

    Args:
        model: adapted with :class:`~lowrank_kernels.LoRAConfig`.
        gradients: of :func:`estimate_gradients`, one for each LoRA layer.
        (the others as for :func:`lora_ga_factors`)

    Returns:
        (A₀, B₀) by path, as the layers hold them: what ``lk.save_lora_ga_adapter`` needs for an adapter of rank 2 R
        that fits the untouched base.

    Raises:
        TypeError: not a module, no dict of tensors; and as :func:`lora_ga_factors`.
        ValueError: no LoRA layers, one without a gradient of its shape, one with a frozen factor, merged, whose factors
            hold a correction already (trained, or started by this), or whose weight another module uses; and as
            :func:`lora_ga_factors`. No weight has changed then.
    """
    _check_choices(direction, scale, gamma, seed)
    if not isinstance(model, nn.Module):
        raise TypeError(f"lora_ga: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(gradients, Mapping) or not all(isinstance(g, Tensor) for g in gradients.values()):
        raise TypeError("lora_ga: expected gradients to be a dict of path to tensor")
    layers: dict[str, LoRALinear] = {
        name: m  # type: ignore[misc]
        for name, m in named_modules(model)
        if hasattr(m, "weight_shared_with") and isinstance(getattr(m, "lora_A", None), nn.Linear)
    }
    if not layers:
        raise ValueError(f"lora_ga: expected a model with LoRALinear layers, found none in {type(model).__name__}")
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    for index, (name, layer) in enumerate(layers.items()):
        a, b = layer.lora_A.weight, layer.lora_B.weight
        gradient = gradients.get(name)
        if gradient is None or gradient.shape != layer.matrix.shape:
            got = "none" if gradient is None else f"one of shape {tuple(gradient.shape)}"
            raise ValueError(
                f"lora_ga: expected a gradient of shape (N, K) = {tuple(layer.matrix.shape)} for {name}, got {got}"
            )
        if not isinstance(layer.matrix, Tensor):
            raise ValueError(
                f"lora_ga: expected dense weights, of which the start is taken out, got one stored as "
                f"{layer.matrix.format} in {name}; lk.dequantize_ makes it dense"
            )
        if layer.merged or layer.weight_shared_with or not (a.requires_grad and b.requires_grad):
            raise ValueError(
                f"lora_ga: expected layers of their own weight that are not merged and train both factors, got {name}"
            )
        if a.any() and b.any():
            raise ValueError(
                f"lora_ga: expected factors that hold no correction yet, got trained or started ones in {name}; "
                f"undo() the report of adapt and adapt again"
            )
        try:
            start_a, start_b = lora_ga_factors(
                gradient.to(layer.weight.device),
                layer.r,
                direction=direction,
                scale=scale,
                gamma=gamma,
                scaling=layer.scaling,
                weight=layer.matrix,
                seed=seed + index,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}; layer {name}") from None
        starts[name] = (start_a.to(a.dtype), start_b.to(b.dtype))
    for name, layer in layers.items():
        start_a, start_b = starts[name]
        layer.lora_A.weight.copy_(start_a)
        layer.lora_B.weight.copy_(start_b)
        merge_lora_(layer.matrix, start_a, start_b, scaling=-layer.scaling)
        layer.lora_ga_start = Start(start_a, start_b, layer.scaling)  # type: ignore[assignment]
        layer.weight_changed_by = _CHANGE  # type: ignore[assignment]
    return starts


def _check_choices(direction: str, scale: str, gamma: float, seed: int) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"lora_ga: expected direction to be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if scale not in SCALES:
        raise ValueError(f"lora_ga: expected scale to be one of {', '.join(SCALES)}, got {scale!r}")
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0.0 < gamma < math.inf:
        raise ValueError(f"lora_ga: expected gamma to be a finite number above 0, got {gamma!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"lora_ga: expected seed to be an integer, got {seed!r}")


def _singular_vectors(g: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """U and V, their first 2 R columns at least."""
    if max(g.shape) > EXACT_UP_TO:
        u, _, v = torch.svd_lowrank(g, q=min(4 * r, *g.shape), niter=4)
        return u, v
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    return u, vh.mT
