"""``parallelize``: the linears of a model, adapted or not, cut over the ranks of a mesh (tensor parallelism)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..names import held, named_modules
from ..nn.dora import DoRALinear
from ..nn.frozen import has_hooks
from ..nn.lora import LoRALinear
from ..nn.matrix import weight_shape
from ..nn.sharded import is_dtensor, whole
from ..report import Replaced, Report, Skipped, count_parameters

_OP = "parallelize"


class _Style(NamedTuple):
    """``columns``: y is cut, W by its rows; else x is, W by its columns. ``cut_input``, ``cut_output``: x arrives, and
    y leaves, as a rank's own columns."""

    columns: bool
    cut_input: bool
    cut_output: bool


_STYLES = {
    "colwise": _Style(True, False, True),
    "colwise_gather_output": _Style(True, False, False),
    "rowwise": _Style(False, True, False),
    "rowwise_split_input": _Style(False, False, False),
}
_LEFT_WHOLE = ("replicate", "replicated_with_grad_allreduce", "embedding_rowwise", "embedding_colwise")
_CUT = {  # by name of the parameter: the dimension that is cut where y is, and where x is
    "weight": (0, 1),
    "bias": (0, None),
    "base_layer.weight": (0, 1),
    "base_layer.bias": (0, None),
    "lora_A.weight": (None, 1),
    "lora_B.weight": (0, None),
    "lora_B.bias": (0, None),
    "lora_gate": (None, None),
    "lora_magnitude_vector": (0, None),
}


def parallelize(model: nn.Module, mesh: Any, plan: Mapping[str, str] | None = None) -> Report:
    """Cut the linears of a model over the ranks of a mesh, in place: each rank holds and multiplies its part.

    - "colwise": y's columns are cut: W (N, K) and B (N, R) by rows, with bias and magnitude; A is whole on every rank.
      Forward moves nothing; backward sums dX and dA over the ranks.
    - "rowwise": x's columns are cut: W and A (R, K) by columns; B is whole. Forward sums y once, in which base and
      correction are added up already; backward sums dB. DoRA's norm is one sum of N numbers more: n_i² is the sum over
      ranks of ‖W_i + s B_i A‖² of their columns.
    - "colwise_gather_output" and "rowwise_split_input": the same, for a y that is wanted whole, an x that is.

    Parameters become DTensors; between layers activations are plain tensors, each rank's own columns where they are
    cut. A layer that is given a DTensor, as by torch's ``SequenceParallel``, returns one. Every rank has to call this,
    and holds rank 0's values afterwards.

    Args:
        model: adapted by LoRA or DoRA, or not, on every rank; a model of transformers', or any with a ``plan``.
        mesh: a one-dimensional DeviceMesh; of a larger one, a slice such as ``mesh["tp"]``.
        plan: paths of linears, with * for a number, and how each is cut. None: the model's own
            (``config.base_model_tp_plan``). Embeddings, norms and the output head stay whole.

    Returns:
        A report of every linear cut, and what of the plan was left whole. ``undo()``, which every rank has to call,
        gathers the weights again.

    Outputs and gradients are those of one process but for the order of sums. With dropout so are the masks: the seed is
    rank 0's; where x is cut, x and W are gathered for it, since the mask is a function of a column's number.

    Make optimizers afterwards. ``lk.save_adapter`` gathers factors; ``merge_()`` takes layers whose y is cut.

    Raises:
        ValueError: no plan; a plan that names no linear; sizes or attention heads that the mesh does not divide;
            layers that cannot be cut (of other methods, of few bits, sharded already, with hooks), styles of other
            kinds (mixtures of experts), a mesh of several dimensions. Nothing has changed then.
    """
    if getattr(mesh, "ndim", None) != 1:
        raise ValueError(f"{_OP}: expected a DeviceMesh of one dimension, such as mesh['tp'], got {mesh!r:.80}")
    model, size = held(model), mesh.size()
    plan = _own_plan(model) if plan is None else plan
    found: dict[str, tuple[nn.Module, _Style]] = {}
    skipped: list[Skipped] = []
    for name, module in named_modules(model):
        named = next((s for pattern, s in plan.items() if _names(pattern, name)), None)
        if named in _STYLES:
            found[name] = module, _STYLES[named]
        elif named in _LEFT_WHOLE and not any(p.requires_grad for p in module.parameters()):
            skipped.append(Skipped(name, "stays whole on every rank"))
        elif named is not None:
            raise ValueError(
                f"{_OP}: {name}: expected one of {', '.join(_STYLES)}, got {named!r}"
                f"{', of a module that trains' if named in _LEFT_WHOLE else ''}; nothing has changed"
            )
    if not found:
        raise ValueError(f"{_OP}: expected a plan that names linears of the model, got {dict(plan)!r:.200}")
    _check_heads(model, size)
    for name, (module, style) in found.items():
        reason = _why_not(module, style, size)
        if reason is not None:
            raise ValueError(f"{_OP}: {name}: {reason}; nothing has changed")
    undo: list[Callable[[], None]] = []
    replaced = []
    for name, (module, style) in found.items():
        base: Any = getattr(module, "base_layer", module)
        n, k = weight_shape(base)
        what = f"{'columns of y' if style.columns else 'columns of x'} over {size} ranks"
        replaced.append(Replaced(name, type(module).__name__, (n, k), getattr(module, "r", 0), what))
        undo += _cut(module, style, mesh)
    return Report(_OP, tuple(replaced), tuple(skipped), *count_parameters(model), _undo=undo)


def _own_plan(model: nn.Module) -> dict[str, str]:
    config = getattr(model, "config", None)
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"{_OP}: expected a plan, or a model whose config has one (base_model_tp_plan), got a "
            f"{type(model).__name__}"
        )
    prefix = getattr(model, "base_model_prefix", "")
    inside = f"{prefix}." if prefix and prefix in model._modules else ""
    return {inside + pattern: style for pattern, style in plan.items()}


def _names(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _check_heads(model: nn.Module, size: int) -> None:
    config: Any = getattr(model, "config", None)
    for of in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, of, None)
        if isinstance(heads, int) and heads % size:
            raise ValueError(f"{_OP}: expected {of} to be a multiple of {size} ranks, got {heads}; nothing has changed")


def _why_not(module: Any, style: _Style, size: int) -> str | None:
    """Why a module cannot be cut; None where it can."""
    base = getattr(module, "base_layer", module)
    if type(module) not in (nn.Linear, LoRALinear, DoRALinear):
        return f"expected an nn.Linear, a LoRALinear or a DoRALinear, got a {type(module).__name__}"
    if type(base) is not nn.Linear:
        return f"expected a dense nn.Linear inside, got a {type(base).__name__}"
    if getattr(module, "velora", None) is not None:
        return "expected a layer without VeLoRA, whose vector would be of a part of x"
    if getattr(module, "merged", False):
        return "expected an unmerged layer; call unmerge_()"
    if getattr(module, "weight_shared_with", ()):
        return f"its weight is also that of {', '.join(module.weight_shared_with)}"
    if any(is_dtensor(p) or p.is_meta for p in module.parameters()) or hasattr(base, "_is_fsdp_managed_module"):
        return "its weights are sharded already, or on the meta device"
    if any(has_hooks(m) for m in module.modules()):
        return "it carries hooks or a replaced forward"
    n, k = weight_shape(base)
    if (n if style.columns else k) % size:
        return (
            f"expected {'N' if style.columns else 'K'} = {n if style.columns else k} to be a multiple of {size} ranks"
        )
    return None


def _cut(module: nn.Module, style: _Style, mesh: Any) -> list[Callable[[], None]]:
    """Cut a linear's parameters, and let it take and give activations of its style. Returns what undoes that."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    undo: list[Callable[[], None]] = []
    for name, p in list(module.named_parameters()):
        dim = _CUT[name][0 if style.columns else 1]
        placements = [Replicate() if dim is None else Shard(dim)]
        owner, _, key = name.rpartition(".")
        part = nn.Parameter(distribute_tensor(p.detach(), mesh, placements), requires_grad=p.requires_grad)
        if p.requires_grad:
            part.register_hook(partial(_summed, placements=placements))
        _set(module.get_submodule(owner), key, part)
        undo.append(partial(_gather, module.get_submodule(owner), key))
    hooks = [
        module.register_forward_pre_hook(partial(_take, style=style, mesh=mesh)),
        module.register_forward_hook(partial(_give, style=style)),
    ]
    return undo + [hook.remove for hook in hooks]


def _set(owner: nn.Module, key: str, p: nn.Parameter) -> None:
    owner._parameters[key] = p


def _gather(owner: nn.Module, key: str) -> None:
    p: Any = owner._parameters[key]
    _set(owner, key, nn.Parameter(whole(p.detach()), requires_grad=p.requires_grad))


def _summed(grad: Any, placements: Any) -> Tensor:
    """A gradient with the placements of its parameter: what ranks hold summands of is added up."""
    placed: Tensor = grad.redistribute(placements=placements)
    return placed


def _take(module: nn.Module, args: tuple[Any, ...], style: _Style, mesh: Any) -> Any:
    from torch.distributed.tensor import Shard

    x, *others = args
    if is_dtensor(x):
        return None
    x = distributed_input(x, mesh, style.cut_input)
    if not style.columns and not style.cut_input:
        x = x.redistribute(placements=[Shard(x.dim() - 1)])
    x.plain = True  # so that y is given back as it was asked for
    return (x, *others)


def _give(module: nn.Module, args: tuple[Any, ...], y: Any, style: _Style) -> Any:
    return local_output(y, style.cut_output) if getattr(args[0], "plain", False) else None


def distributed_input(x: Any, mesh: Any, cut: bool) -> Any:
    """x as a DTensor: each rank's own columns where it is cut, else the same on all ranks. Its gradient is summed."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if is_dtensor(x):
        return x.redistribute(placements=[Shard(x.dim() - 1) if cut else Replicate()])
    return DTensor.from_local(x, mesh, [Shard(x.dim() - 1) if cut else Replicate()], run_check=False)


def local_output(y: Any, cut: bool) -> Tensor:
    """This rank's columns of y where it is cut, else all of it; the gradient arrives alike."""
    from torch.distributed.tensor import Replicate, Shard

    placement = Shard(y.dim() - 1) if cut else Replicate()
    local: Tensor = y.redistribute(placements=[placement]).to_local(grad_placements=[placement])
    return local
