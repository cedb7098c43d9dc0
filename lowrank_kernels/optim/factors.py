"""What optimizers of whole factor pairs share: finding the pairs, and stepping layers of equal shape together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.sharded import is_dtensor
from .settings import check_betas, check_model, check_number
from .wide import load_wide_state, step_adamw

Pair = tuple[nn.Parameter, nn.Parameter, float]
"""A (R, K), B (N, R) and their scaling s."""

_LARGEST = torch.finfo(torch.float32).max


def factor_pairs(model: nn.Module) -> Iterator[Pair]:
    """(A, B, s) of every layer that has ``lora_A``, ``lora_B`` and ``scaling``: this package's, and PEFT's.

    Not of PEFT's factors for several experts, whose A and B are in different orders and no pair.
    """
    for module in model.modules():
        if getattr(module, "num_experts", 1) > 1:  # of a ParamWrapper, or of experts that have no factors
            continue
        lora_a, lora_b, scaling = (getattr(module, name, None) for name in ("lora_A", "lora_B", "scaling"))
        if isinstance(lora_a, nn.Linear):
            yield _weight(lora_a), _weight(lora_b), float(scaling)  # type: ignore[arg-type]
        elif isinstance(lora_a, nn.ModuleDict):
            for adapter in lora_a:
                yield _weight(lora_a[adapter]), _weight(lora_b[adapter]), float(scaling[adapter])  # type: ignore[index]


def _weight(linear: Any) -> nn.Parameter:
    found: nn.Parameter = linear.weight
    return found


def factor_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of what trains in a model: the factor pairs, then whatever else there is.

    Returns:
        [{"params": [A₁, B₁, A₂, B₂, …], "scaling": [s₁, s₂, …]}, {"params": others}], the second where there are
        others (biases, DoRA's magnitudes); a :class:`FactorOptimizer` gives those AdamW's step.

    Raises:
        TypeError: not a module.
        ValueError: no pair trains, or one whose other factor is frozen; a gate that trains.
    """
    check_model("factor_groups", model)
    params: list[nn.Parameter] = []
    scaling: list[float] = []
    gates = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("lora_gate")]
    if gates:
        raise ValueError(
            f"factor_groups: expected layers whose correction is s B A alone, got {gates[0]}, which trains; adapt with "
            f"gate=False, or freeze it"
        )
    for a, b, s in factor_pairs(model):
        if a.requires_grad != b.requires_grad:
            raise ValueError("factor_groups: expected both factors of a layer to train, found a frozen one")
        if a.requires_grad:
            if is_dtensor(a) or is_dtensor(b):
                raise ValueError(
                    "factor_groups: expected whole factors, got shards (DTensor), whose products A Aᵀ and BᵀB are of "
                    "their own rows alone; train a sharded model with AdamW or lora_plus"
                )
            params += [a, b]
            scaling.append(s)
    if not params:
        raise ValueError(f"factor_groups: expected LoRA layers that train, found none in {type(model).__name__}")
    taken = {id(p) for p in params}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [{"params": params, "scaling": scaling}, *([{"params": others}] if others else [])]


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


class Bucket:
    """The pairs of one group that have gradients and equal shapes, L of them, as stacked tensors.

    Optimizer state lives in stacked tensors too; each parameter's own state holds views into them, so that a state
    dict is the usual one and a step makes no copies of it.
    """

    def __init__(self, optimizer: FactorOptimizer, pairs: list[Pair]) -> None:
        self.sides = ([a for a, _, _ in pairs], [b for _, b, _ in pairs])
        self._states = tuple([optimizer.state[p] for p in params] for params in self.sides)
        self._stacks: dict[tuple[int, str], Tensor] = {}
        first = pairs[0][0]
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self.rounding = torch.finfo(first.dtype).eps
        """Below this share of a factor's or a gradient's largest direction lie rounding errors."""
        scales = torch.tensor([s for _, _, s in pairs], dtype=self.dtype)
        self.scaling = scales.to(first.device, non_blocking=True)[:, None, None]

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A (L, R, K), B (L, N, R) and their gradients, in float32 (float64 for float64 factors)."""
        a, b = (torch.stack([p.detach() for p in params]).to(self.dtype) for params in self.sides)
        grad_a, grad_b = (torch.stack([_grad(p) for p in params]).to(self.dtype) for params in self.sides)
        return a, b, grad_a, grad_b

    def state(self, side: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """State (L, *shape) of all A (side 0) or all B (side 1), zeros at first; to be updated in place."""
        stack = self._stacks.get((side, name))
        if stack is None:
            states = self._states[side]
            zero = torch.zeros(shape, dtype=self.dtype, device=self.scaling.device)
            stack = self._stacks[side, name] = torch.stack([state.get(name, zero) for state in states])
            for state, view in zip(states, stack.unbind(), strict=True):
                state[name] = view
        return stack

    def next_step(self) -> Tensor:
        """Count a step; (L, 1, 1): how many each pair has had with this one."""
        return self.state(0, "step", (1, 1)).add_(1)

    def apply(self, grams: Grams, updates_a: Tensor, updates_b: Tensor, lr: float, weight_decay: float) -> None:
        """p ← (1 - lr · decay) p - lr · update, for every factor, the updates :func:`within_first_order`."""
        for side, updates in enumerate(within_first_order(grams, updates_a, updates_b, lr)):
            params: list[Tensor] = list(self.sides[side])
            if weight_decay:
                torch._foreach_mul_(params, 1.0 - lr * weight_decay)
            torch._foreach_add_(params, list(updates.unbind()), alpha=-lr)


class Grams(NamedTuple):
    """A Aᵀ and BᵀB, (L, R, R), which the length of every product with A or B comes from."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Grams:
        return cls(a @ a.mT, b.mT @ b)


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """‖X Y‖, Frobenius's, (L, 1, 1), from left = XᵀX and right = Y Yᵀ, (L, R, R)."""
    return (left * right).sum((-2, -1), keepdim=True).clamp_min(0.0).sqrt()


def within_first_order(grams: Grams, updates_a: Tensor, updates_b: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """The updates, the longer of the two cut so that lr ‖ΔB ΔA‖ is at most ‖ΔB A‖ + ‖B ΔA‖.

    A step moves B A by lr (ΔB A + B ΔA), which a method reckons with, and by lr² ΔB ΔA, which it does not: where B A
    has next to nothing in a direction and both factors step there, that is the greater by orders of magnitude. Nothing
    is cut as long as B A is large beside a step. Norms are Frobenius's.
    """
    steps = Grams.of(updates_a, updates_b)
    first = product_norm(steps.b, grams.a) + product_norm(grams.b, steps.a)
    second = lr * product_norm(steps.b, steps.a)
    cut = torch.where(second > first, first / second, 1.0)
    squares = (gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] for gram in steps)
    a_is_longer = torch.gt(*squares)
    return torch.where(a_is_longer, cut, 1.0) * updates_a, torch.where(a_is_longer, 1.0, cut) * updates_b


class FactorOptimizer(torch.optim.Optimizer):
    """Steps whole (A, B) pairs, layers of equal shape as one batch; other parameters get AdamW's step.

    Args:
        groups: of :func:`factor_groups`. A group with ``scaling`` holds pairs, A before B; one without holds others.
        defaults: the options of a group; ``lr``, ``betas``, ``eps`` and ``weight_decay`` among them.

    State is float32 over half-precision factors (float64 over float64), and stays so when it is loaded. A step asks
    nothing of the device: no synchronisation, so gradients that are not finite are not noticed here either; use
    ``torch.nn.utils.clip_grad_norm_(..., error_if_nonfinite=True)`` for that. A pair of which one factor has no
    gradient is left out of the step.

    Raises:
        TypeError, ValueError: a setting of the wrong kind or out of its range; pairs whose shapes, dtypes or devices do
            not fit together; a scaling that is not finite in float32. A group that is refused is not added.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        self._layout: tuple[Any, ...] = ()
        self._buckets: list[list[Bucket]] = []
        op = type(self).__name__
        groups = list(groups)
        if not any(isinstance(group, dict) and group.get("scaling") is not None for group in groups):
            raise ValueError(f"{op}: expected groups with pairs of factors; use factor_groups(model)")
        super().__init__(groups, {"scaling": None, **defaults})

    def add_param_group(self, group: dict[str, Any]) -> None:
        op = type(self).__name__
        for name, value in group.items():
            if name == "betas":
                check_betas(op, value)
            elif name == "momentum":
                check_number(op, name, value, below=1.0, wanted="of at least 0 and below 1")
            elif name in ("lr", "eps", "damping", "weight_decay"):
                check_number(op, name, value)
        params = group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if group.get("scaling") is not None:
            self._check_pairs(params, group["scaling"])
        super().add_param_group(group)

    def _check_pairs(self, params: list[Any], scaling: Any) -> None:
        op = type(self).__name__
        if not isinstance(scaling, (list, tuple)) or len(params) != 2 * len(scaling):
            raise ValueError(
                f"{op}: expected params as A, B, A, B, … with one scaling a pair, got {len(params)} parameters "
                f"and scaling={scaling!r}; use factor_groups(model)"
            )
        for s in scaling:
            if isinstance(s, bool) or not isinstance(s, (int, float)) or not abs(s) <= _LARGEST:
                raise ValueError(f"{op}: expected scaling to hold numbers that are finite in float32, got {s!r}")
        for a, b in zip(params[::2], params[1::2], strict=True):
            if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
                raise TypeError(
                    f"{op}: expected params to be tensors, got {type(a).__name__} and {type(b).__name__}; "
                    f"use factor_groups(model)"
                )
            fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1]
            if not fits or a.dtype != b.dtype or a.device != b.device:
                raise ValueError(
                    f"{op}: expected pairs A (R, K), B (N, R) of one dtype and device, got {tuple(a.shape)} "
                    f"{a.dtype} on {a.device} and {tuple(b.shape)} {b.dtype} on {b.device}"
                )
            if a.shape[0] > min(a.shape[1], b.shape[0]):
                raise ValueError(
                    f"{op}: expected a rank of at most min(N, K) = {min(a.shape[1], b.shape[0])}, got {a.shape[0]}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, buckets in zip(self.param_groups, self._current_buckets(), strict=True):
            for bucket in buckets:
                self.step_bucket(group, bucket)
            if group["scaling"] is None:
                step_adamw(self, group, group["params"])
        return loss

    def step_bucket(self, group: dict[str, Any], bucket: Bucket) -> None:
        """Step the pairs of one bucket. This is what a subclass defines."""
        raise NotImplementedError

    def _current_buckets(self) -> list[list[Bucket]]:
        """The buckets of each group; those of the last step while the same pairs have gradients."""
        found: list[list[Pair]] = []
        for group in self.param_groups:
            every = zip(group["params"][::2], group["params"][1::2], group["scaling"] or (), strict=False)
            found.append([(a, b, s) for a, b, s in every if a.grad is not None and b.grad is not None])
        # With the states' own identity, so that state which was dropped or loaded is noticed.
        layout = tuple(tuple((id(self.state[a]), id(self.state[b])) for a, b, _ in pairs) for pairs in found)
        if layout != self._layout:
            self._layout, self._buckets = layout, []
            for each in found:
                alike: dict[Any, list[Pair]] = {}
                for a, b, s in each:
                    alike.setdefault((a.shape, b.shape, a.dtype, a.device), []).append((a, b, s))
                self._buckets.append([Bucket(self, same) for same in alike.values()])
        return self._buckets

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        load_wide_state(self, state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._layout, self._buckets = (), []


def damped_inverse(gram: Tensor, eps: float) -> Tensor:
    """(gram + δ I)⁻¹, batched, δ = eps · mean eigenvalue, and tiny where the gram is zero. No synchronisation."""
    return torch.linalg.inv_ex(damped(gram, eps), check_errors=False).inverse


def damped(gram: Tensor, eps: float) -> Tensor:
    """gram + δ I with δ = eps · mean eigenvalue, at least 1e-30."""
    delta = (eps * gram.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(1e-30)
    return gram + torch.diag_embed(delta[..., None].expand(gram.shape[:-1]))
