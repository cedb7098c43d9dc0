"""GaLore: Adam on gradients projected to their leading singular directions (Zhao et al., arXiv 2403.03507)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..finite import all_finite
from ..functional import check_flag, galore_adam_
from ..names import named_modules, named_parameters
from .settings import check_betas, check_model, check_number
from .wide import load_wide_state, step_adamw, wide_dtype

MOMENTS = ("rotate", "keep", "reset")
_OVERSAMPLED = 10
_POWER_ITERATIONS = 2


def galore_groups(
    model: nn.Module,
    target_modules: Sequence[str] | str,
    rank: int = 128,
    *,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups of what trains in a model: the weights that GaLore projects, then whatever else there is.

    Args:
        target_modules: names, or ends of names, of linears ("q_proj", "mlp.down_proj"); "all-linear" for every
            nn.Linear whose weight trains, but for one that is also an embedding's.
        rank, update_proj_gap, scale: as of :class:`GaLore`.
        options: of the first group alone: "weight_decay", "lr", ...

    Returns:
        [{"params": weights, "rank": R, "update_proj_gap": T, "scale": α}, {"params": others}], the second where there
        are others (vectors, embeddings, other linears), which get AdamW's step.

    Raises:
        TypeError: not a module, or names that are not strings.
        ValueError: no weight of such a name; one that is frozen, is no matrix, or has a side below ``rank``, by name.
    """
    op = "galore_groups"
    check_model(op, model)
    names = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(n, str) and n for n in names):
        raise TypeError(f"{op}: expected target_modules to be names of modules, got {target_modules!r:.80}")
    _check_whole(op, "rank", rank)
    every = target_modules == "all-linear"
    embeddings = {id(m.weight) for _, m in named_modules(model) if isinstance(m, nn.Embedding)}
    found: dict[int, nn.Parameter] = {}
    missing = set() if every else set(names)
    for name, module in named_modules(model):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if every:
            if isinstance(module, nn.Linear) and weight.requires_grad and id(weight) not in embeddings:
                found[id(weight)] = _fitting(op, name, weight, rank)
            continue
        ends = [end for end in names if name == end or name.endswith("." + end)]
        missing -= set(ends)
        if ends:
            if not weight.requires_grad:
                raise ValueError(f"{op}: expected weights that train, and {name}.weight is frozen")
            found[id(weight)] = _fitting(op, name, weight, rank)
    if missing or not found:
        words = ", ".join(sorted(missing)) or "all-linear"
        raise ValueError(
            f"{op}: expected target_modules with a weight that trains in this {type(model).__name__}, found none for "
            f"{words}"
        )
    own = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, **options}
    others = {id(p): p for _, p in named_parameters(model) if p.requires_grad and id(p) not in found}
    return [{"params": list(found.values()), **own}, *([{"params": list(others.values())}] if others else [])]


def _fitting(op: str, name: str, weight: Any, rank: int) -> nn.Parameter:
    if weight.dim() != 2:
        raise ValueError(f"{op}: expected matrices, and {name}.weight has shape {tuple(weight.shape)}")
    if rank > min(weight.shape):
        raise ValueError(
            f"{op}: expected a rank of at most min(N, K) = {min(weight.shape)} for {name}.weight of shape "
            f"{tuple(weight.shape)}, got {rank}; lower it, or target fewer modules"
        )
    found: nn.Parameter = weight
    return found


def _check_whole(op: str, name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: expected {name} to be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{op}: expected {name} of at least {least}, got {value}")


def leading_basis(grad: Tensor, rank: int, seed: int, *, exact: bool = False) -> Tensor:
    """The ``rank`` leading left singular vectors of G (N, K), as the columns of P (N, R). N <= K.

    By subspace iteration from R + 10 random columns (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and
    5.1), twice, orthonormalised after each product; ``exact``: by a whole SVD. A rank of N has nothing to leave out:
    P = I, and the step is AdamW's.

    The random numbers come from a generator of its own on the CPU: from ``seed`` alone, whatever the device.
    """
    n, k = grad.shape
    wide = grad.to(wide_dtype(grad))
    if rank == n:
        return torch.eye(n, dtype=wide.dtype, device=grad.device)
    width = rank + _OVERSAMPLED
    if exact or width >= n:
        return torch.linalg.svd(wide, full_matrices=False).U[:, :rank].contiguous()
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(k, width, generator=generator, dtype=wide.dtype).to(grad.device)
    found = torch.linalg.qr(wide @ sketch).Q
    for _ in range(_POWER_ITERATIONS):
        found = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ found).Q).Q
    inside = torch.linalg.svd(found.T @ wide, full_matrices=False).U[:, :rank]
    return (found @ inside).contiguous()


class GaLore(torch.optim.Optimizer):
    """AdamW in R leading singular directions of each weight's gradient: full weights train, moments are thin.

    For G (N, K) with N <= K, every T steps P = the R leading left singular vectors of G, and at each step
    L = Pᵀ G, m and v as Adam's of L, W ← (1 - lr λ) W - lr α P (m̂ / (√v̂ + ε)). For N > K the same of Wᵀ and Gᵀ.
    Groups without a "rank" get AdamW's step.

    Args:
        groups: of :func:`galore_groups`, or such as galore-torch takes: {"params", "rank", "update_proj_gap", "scale"}
            for what is projected. At least one has a rank.
        lr, betas, eps, weight_decay: of AdamW; decay is decoupled, by the whole rate lr.
        update_proj_gap: T. scale: α. Both of groups that do not say them.
        moments: what becomes of m and v when P changes.
            "rotate": m ← C m, v ← (C ∘ C) v, C = P_newᵀ P_old: the same gradients, as the new basis sees them.
            "keep": as the authors' code: numbers of the old directions stand for the new ones.
            "reset": zeros, and the bias correction begins anew.
        exact_svd: take whole singular value decompositions in place of randomised ones.
        seed: of the randomised ones; with the parameter's place and its step it gives every random number.
        per_layer: step each parameter within backward, as soon as its gradient is complete, and free the gradient:
            about one gradient is alive at a time. ``step()`` then steps what backward has not. Gradients cannot be
            clipped by a norm over all of them, nor unscaled by a GradScaler.
        accumulate: with ``per_layer``: backward passes whose gradients are added up to one step.

    State, all of it tensors: "basis" P (short side, R), "exp_avg", "exp_avg_sq" (R, long side), in float32 (float64
    beside float64), R · short + 2 R · long numbers a matrix. In a state dict moments of a tall weight are (long, R).

    A step first reads all gradients: one that is not finite is refused by the place of its parameter, before anything
    is written. With ``per_layer`` that is asked of each parameter alone, and earlier ones have been stepped.

    Replicas of a model that have the same gradients (DistributedDataParallel) take the same steps; ``per_layer`` hooks
    run before they are averaged, and are refused there.

    Raises:
        TypeError, ValueError: a setting of the wrong kind or out of its range; a projected parameter that is frozen, no
            matrix, a DTensor or sparse, or smaller than the rank. A group that is refused is not added.

    Source: Zhao et al., arXiv 2403.03507, algorithm 2.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        moments: str = "rotate",
        exact_svd: bool = False,
        seed: int = 0,
        per_layer: bool = False,
        accumulate: int = 1,
    ) -> None:
        op = "GaLore"
        check_flag(op, "exact_svd", exact_svd)
        check_flag(op, "per_layer", per_layer)
        _check_whole(op, "accumulate", accumulate)
        if accumulate > 1 and not per_layer:
            raise ValueError(f"{op}: expected accumulate=1 without per_layer, whose hooks it is for, got {accumulate}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{op}: expected seed to be an integer, got {seed!r}")
        if per_layer and _processes() > 1:
            raise ValueError(
                f"{op}: expected per_layer=False among several processes: its hooks run before gradients are averaged"
            )
        self.per_layer, self.accumulate = per_layer, accumulate
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._passes: dict[Tensor, int] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}
        groups = [groups] if isinstance(groups, dict) else list(groups)
        if not any(isinstance(group, dict) and group.get("rank") is not None for group in groups):
            raise ValueError(f"{op}: expected a group with a rank, got none; use galore_groups(model, ...)")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "moments": moments,
            "exact_svd": exact_svd,
            "seed": seed,
        }
        self._check_settings(defaults)
        super().__init__(groups, defaults)

    @staticmethod
    def _check_settings(group: dict[str, Any]) -> None:
        op = "GaLore"
        for name in ("lr", "eps", "weight_decay", "scale"):
            if name in group:
                check_number(op, name, group[name])
        if "betas" in group:
            check_betas(op, group["betas"])
        if "update_proj_gap" in group:
            _check_whole(op, "update_proj_gap", group["update_proj_gap"])
        if group.get("rank") is not None:
            _check_whole(op, "rank", group["rank"])
        if group.get("moments", MOMENTS[0]) not in MOMENTS:
            raise ValueError(f"{op}: expected moments to be one of {', '.join(MOMENTS)}, got {group['moments']!r}")
        if group.get("proj_type", "std") != "std":
            raise ValueError(
                f"{op}: expected proj_type 'std', the shorter side of each weight, got {group['proj_type']!r}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check_settings(param_group)
        params = param_group["params"]
        params = param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        if param_group.get("rank") is not None:
            for place, p in enumerate(params):
                self._check_projected(place, p, param_group["rank"])
        super().add_param_group(param_group)
        self._number_parameters()
        if self.per_layer:
            reference = weakref.ref(self)
            for p in params:
                self._hooks.append(p.register_post_accumulate_grad_hook(_stepping(reference)))

    def _number_parameters(self) -> None:
        """Where each parameter is: its group, and its number among all."""
        number = 0
        self._places = {}
        for place, group in enumerate(self.param_groups):
            for p in group["params"]:
                self._places[p] = place, number
                number += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, too, which has no hooks: it steps in ``step()`` alone."""
        super().__setstate__(state)
        for name, value in (("per_layer", False), ("accumulate", 1), ("_hooks", []), ("_passes", {})):
            self.__dict__.setdefault(name, value)
        self._number_parameters()

    @staticmethod
    def _check_projected(place: int, p: Any, rank: int) -> None:
        op, what = "GaLore", f"parameter {place} of the group with rank {rank}"
        if not isinstance(p, Tensor):
            raise TypeError(f"{op}: expected params to be tensors, got {type(p).__name__}")
        if hasattr(p, "device_mesh"):
            raise TypeError(f"{op}: expected whole tensors, and {what} is a DTensor: P would be of a shard alone")
        if p.dim() != 2 or not p.is_floating_point():
            raise ValueError(f"{op}: expected matrices of floats, and {what} is {p.dtype} of shape {tuple(p.shape)}")
        if not p.requires_grad:
            raise ValueError(f"{op}: expected weights that train, and {what}, of shape {tuple(p.shape)}, is frozen")
        if rank > min(p.shape):
            raise ValueError(
                f"{op}: expected a rank of at most min(N, K) = {min(p.shape)}, and {what} has shape {tuple(p.shape)}"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbered = [
            [(self._places[p][1], p) for p in group["params"] if p.grad is not None] for group in self.param_groups
        ]
        _check_gradients([pair for own in numbered for pair in own])
        for group, own in zip(self.param_groups, numbered, strict=True):
            if group["rank"] is None:
                step_adamw(self, group, [p for _, p in own])
                continue
            for number, p in own:
                self._step_projected(group, number, p)
        return loss

    def _step_projected(self, group: dict[str, Any], number: int, p: Tensor) -> None:
        """Step one projected parameter, ``number`` among all of the optimizer's."""
        assert p.grad is not None
        # The shorter side comes first: a tall weight is stepped as its transpose.
        tall = p.shape[0] > p.shape[1]
        weight, grad = (p.T, p.grad.T) if tall else (p, p.grad)
        state = self.state[p]
        if not state:
            shape = (weight.shape[1], group["rank"]) if tall else (group["rank"], weight.shape[1])
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros(shape, dtype=wide_dtype(p), device=p.device) for _ in range(2)
            )
        moments = [state[name].T if tall else state[name] for name in ("exp_avg", "exp_avg_sq")]
        taken = int(state["step"])
        if taken % group["update_proj_gap"] == 0:
            seed = _mixed(group["seed"], number, taken)
            basis = leading_basis(grad, group["rank"], seed, exact=group["exact_svd"])
            if "basis" in state:
                self._change_basis(group["moments"], state, moments, basis)
            state["basis"] = basis
        state["step"] += 1
        galore_adam_(
            weight,
            grad,
            state["basis"],
            *moments,
            step=int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            scale=group["scale"],
        )

    @staticmethod
    def _change_basis(way: str, state: dict[str, Any], moments: list[Tensor], basis: Tensor) -> None:
        mean, square = moments
        if way == "rotate":
            turn = basis.T @ state["basis"]
            mean.copy_(turn @ mean)
            square.copy_(turn.square() @ square)
        elif way == "reset":
            mean.zero_()
            square.zero_()
            state["step"].zero_()

    def detach(self) -> None:
        """Take the hooks of ``per_layer`` off the parameters."""
        while self._hooks:
            self._hooks.pop().remove()

    def _step_in_backward(self, p: Tensor) -> None:
        passes = self._passes.get(p, 0) + 1
        self._passes[p] = passes % self.accumulate
        if passes < self.accumulate:
            return
        place, number = self._places[p]
        group = self.param_groups[place]
        _check_gradients([(number, p)])
        if group["rank"] is None:
            step_adamw(self, group, [p])
        else:
            self._step_projected(group, number, p)
        p.grad = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of any optimizer; state stays in its own dtype instead of taking the parameters'."""
        super().load_state_dict(state_dict)
        load_wide_state(self, state_dict)


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _stepping(reference: weakref.ref[GaLore]) -> Callable[[Tensor], None]:
    """A hook that steps a parameter, and does not keep the optimizer alive."""

    def hook(p: Tensor) -> None:
        optimizer = reference()
        if optimizer is not None:
            with torch.no_grad():
                optimizer._step_in_backward(p)

    return hook


def _check_gradients(numbered: list[tuple[int, Tensor]]) -> None:
    """Raise unless the gradients of these (number, parameter) are dense and finite. Waits once for each GPU."""
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for number, p in numbered:
        assert p.grad is not None
        if p.grad.is_sparse:
            raise TypeError(f"GaLore: expected dense gradients, and that of parameter {number} is sparse")
        by_device.setdefault(p.device, []).append((number, p))
    for device, own in by_device.items():
        grads = [p.grad for _, p in own if p.grad is not None]
        if device.type == "cpu":
            finite = [all_finite(grad) for grad in grads]
        else:
            largest = torch.stack([norm.float() for norm in torch._foreach_norm(grads, float("inf"))])
            finite = largest.isfinite().tolist()
        for (number, p), good in zip(own, finite, strict=True):
            if not good:
                raise ValueError(
                    f"GaLore: expected finite gradients, and that of parameter {number}, of shape {tuple(p.shape)}, "
                    f"holds NaN or infinity; it was not stepped; lower the learning rate, or skip such steps"
                )


def _mixed(seed: int, number: int, age: int) -> int:
    return ((seed * 1_000_003 + number) * 1_000_003 + age) % 2**63
