"""``adapt``: replace the targeted modules of a model, in place, and say what was done."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .config import ALL_EXPERTS, ALL_LINEAR, AdapterConfig, endings, names_match
from .names import COMPILED, held, named_modules, named_parameters, place, submodule, unwrapped, wrapped_in
from .nn.experts import expert_weights, looks_like_experts
from .nn.matrix import is_linear, matrix_shape, weight_tensor
from .read_weights import why_not_called
from .report import FirstBackward, Replaced, Report, Skipped, collapse, count_parameters

_CONFIG_ATTRIBUTE = "_lowrank_config"
_TRAINED_ATTRIBUTE = "_lowrank_trained"  # names of the parameters that trained before

# PEFT's tasks with a head of their own, and the names that the head may have in a model.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass(frozen=True)
class Plan:
    """What :func:`adapt` would do: made without touching the model."""

    targets: dict[str, nn.Linear]
    """Linears, and what else the config has a layer for."""
    skipped: tuple[Skipped, ...]
    config: AdapterConfig
    whole: dict[str, nn.Module] = field(default_factory=dict)
    """Modules that train whole, by path."""
    experts: dict[str, nn.Module] = field(default_factory=dict)
    """Blocks of experts, by path."""
    notes: tuple[str, ...] = ()

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every weight that gets a correction: of a linear by its path, of experts by that of the weight."""
        found = {name: matrix_shape(m) for name, m in self.targets.items()}
        for name, module in self.experts.items():
            for own in self.config.expert_targets(name, module):
                _, n, k = expert_weights(module)[own].shape
                found[f"{name}.{own}"] = n, k
        return found


def config_of(model: nn.Module) -> AdapterConfig | None:
    """The config a model was adapted with; None where it was not."""
    return getattr(held(model), _CONFIG_ATTRIBUTE, None)


def replace_config(model: nn.Module, config: AdapterConfig) -> None:
    """Note that an adapted model's layers now are as another config says."""
    setattr(held(model), _CONFIG_ATTRIBUTE, config)


def trained_before(model: nn.Module) -> frozenset[str] | None:
    """Names of the parameters that required a gradient before the model was adapted; None where it was not."""
    return vars(model).get(_TRAINED_ATTRIBUTE)


def forget_adaptation(model: nn.Module) -> None:
    """Forget that a model was adapted, after its layers were put back by hand, so that it can be adapted again."""
    for module in (model, submodule(model, "")):  # torch.compile's wrapper hands on what is set on it
        for attribute in (_CONFIG_ATTRIBUTE, _TRAINED_ATTRIBUTE, "save_pretrained"):
            module.__dict__.pop(attribute, None)


def adapt(model: nn.Module, config: AdapterConfig) -> Report:
    """Replace the modules that ``config`` targets by the config's layers, in place, and freeze everything else.

    The layers share the weights of the modules they replace; outputs do not change. Linears are named by the config's
    ``target_modules``, weights of experts by ``target_parameters``; a report names all of both. What trains
    afterwards is what the layers train, the biases that ``config.bias`` names, copies of the modules that
    ``config.modules_to_save`` names, and what already trained in layers that were adapted before, and in parts of MEFT
    and SHERL beside them. Everything is checked before anything is changed; if a layer cannot be made, the model is put
    back and the error goes on.

    Args:
        model: any module that has linears below it.
        config: a :class:`~lowrank_kernels.LoRAConfig`, or another :class:`~lowrank_kernels.AdapterConfig`.

    Returns:
        A report: what was replaced, with shape and rank; every linear that was not, and why; settings that match
        nothing. ``report.undo()`` puts the model back, biases included.

    Raises:
        TypeError: not a module, not a config, or no class of one that says what a linear becomes.
        ValueError: nothing to replace (the message names the linears there are); a model that is adapted already, or
            under DistributedDataParallel already; a rank over min(N, K) of a linear that is named. Under "all-linear"
            such a rank is lowered to that, and the report's notes say so. modules_to_save that cannot train.

    After the first backward the log names the layers that got no gradient in it: those the model does not call.
    """
    plan = plan_adaptation(model, config)
    return apply_plan(model, plan.config, plan)


def plan_adaptation(model: nn.Module, config: AdapterConfig) -> Plan:
    """What ``config`` targets in ``model``, and why the rest is left alone. Raises as :func:`adapt` does."""
    plan = match_targets(model, config)
    if config.target_modules == ALL_LINEAR:
        fitted, notes = config.fitted({name: matrix_shape(m) for name, m in plan.targets.items()})
        plan = replace(plan, config=fitted, notes=notes)
    for name, shape in plan.matrices().items():
        plan.config.check_fits(name, *shape)
    return plan


def apply_plan(model: nn.Module, config: AdapterConfig, plan: Plan) -> Report:
    """Replace the modules that a plan of ``config`` names and freeze the rest: the second half of :func:`adapt`."""
    if _is_under_ddp(model):
        raise ValueError(
            "adapt: expected a model before DistributedDataParallel, got one that it holds already: it would not "
            "synchronise the layers' parameters, so that the ranks would drift apart; adapt the model, then wrap it"
        )
    model = held(model)
    undo: list[Callable[[], None]] = []
    try:
        layers = _replace(model, config, plan, undo)
    except BaseException:
        while undo:
            undo.pop()()
        raise
    watch = FirstBackward(layers)
    undo += [watch.stop, lambda: _check_still_there(model, layers, undo)]  # the check is the first thing that runs
    trainable, total = count_parameters(model)
    replaced = tuple(
        Replaced(name, type(layers[name]).__name__, matrix_shape(m), config.rank_of(name), config.size_of(name))
        for name, m in plan.targets.items()
    ) + tuple(
        Replaced(
            f"{name}.{own}",
            type(layers[name]).__name__,
            (of.out_features, of.in_features),
            of.r,
            f"{of.experts} experts, rank {of.r}",
        )
        for name in plan.experts
        for own, of in layers[name].adapters.items()  # type: ignore[union-attr, operator]
    )
    notes = (*plan.notes, *(f"{name} trains whole, by modules_to_save" for name in plan.whole))
    return Report(type(config).__name__, replaced, plan.skipped, trainable, total, notes, _undo=undo)


def match_targets(model: nn.Module, config: AdapterConfig) -> Plan:
    """A plan with ranks of any size, which a file of PEFT's may have."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, AdapterConfig):
        raise TypeError(
            f"adapt: expected config to be an AdapterConfig such as LoRAConfig, got {type(config).__name__}"
        )
    if config_of(model) is not None:
        raise ValueError("adapt: this model is adapted already; call undo() on its report first")
    model = held(model)
    wanted, head = config.target_modules, output_head(model)
    whole, task_heads = whole_modules(model, config), _task_heads(model)
    check_can_train_whole(model, whole)
    everything = wanted == ALL_LINEAR

    def why_skipped(name: str, module: nn.Module, above: dict[str, nn.Module], targeted: bool) -> str | None:
        """The first reason, in this order, to leave a module as it is; None for a target."""
        if not targeted:
            return "not in target_modules"
        if config.exclude_modules and names_match(config.exclude_modules, name):
            return "in exclude_modules"
        if not whole.keys().isdisjoint((name, *above)):
            return "in modules_to_save, which trains it whole"
        if everything and module is head:
            return "the output head; name it in target_modules to adapt it"
        if name in above and COMPILED in above[name]._modules:
            return "compiled by itself, and would go on without the layer; adapt the model, then compile"
        if everything and not task_heads.isdisjoint((name, *above)):
            return _OF_A_TASK_HEAD
        return why_not_called(module, name, above) or config.why_not(module)

    targets: dict[str, nn.Linear] = {}
    skipped: list[Skipped] = []
    unmatched = set() if isinstance(wanted, str) else set(wanted)
    for name, module, above in _outside_adapters(model):
        unmatched.difference_update(endings(name))
        linear_like = _looks_linear(module)
        targeted = linear_like if everything else names_match(wanted, name)
        if not targeted and not linear_like:
            continue
        reason = why_skipped(name, module, above, targeted)
        if reason is None:
            targets[name] = module  # type: ignore[assignment]
        else:
            skipped.append(Skipped(name, reason))
    experts, left = _match_experts(model, config, whole)
    skipped += left
    skipped += [Skipped(f"target_modules[{w!r}]", "matches no module") for w in sorted(unmatched)]
    plan = Plan(targets, (), config, whole, experts)
    skipped += [Skipped(s, "matches no replaced module") for s in config.unused(list(plan.matrices()), list(whole))]
    if not targets and not experts:
        raise ValueError(_nothing_to_replace(model, config, skipped))
    return replace(plan, skipped=tuple(skipped))


def _match_experts(
    model: nn.Module, config: AdapterConfig, whole: dict[str, nn.Module]
) -> tuple[dict[str, nn.Module], list[Skipped]]:
    """The blocks of experts that a config targets, by path, and every stacked weight that is left, with the reason."""
    found: dict[str, nn.Module] = {}
    skipped: list[Skipped] = []
    names = getattr(config, "target_parameters", ())
    unmatched = set() if names == ALL_EXPERTS else set(names)
    for name, module, above in _outside_adapters(model):
        own = config.expert_targets(name, module)
        if own and whole.keys().isdisjoint((name, *above)):
            reason = config.why_not_experts(module)  # type: ignore[attr-defined]
        else:
            reason = "in modules_to_save, which trains it whole" if own else None
        if own and reason is None:
            found[name] = module
        for weight in _stacked(module):
            path = f"{name}.{weight}"
            if weight in own:
                unmatched.difference_update(endings(path))
            if not looks_like_experts(module):
                skipped.append(
                    Skipped(path, "a 3-D parameter, as experts have, of a module whose formula is not known")
                )
            elif weight not in own:
                skipped.append(Skipped(path, "a weight of experts that is not in target_parameters"))
            elif reason is not None:
                skipped.append(Skipped(path, reason))
    skipped += [Skipped(f"target_parameters[{w!r}]", "matches no weight of experts") for w in sorted(unmatched)]
    return found, skipped


def whole_modules(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The modules that ``config`` trains whole, by path; none that is inside another of them, or inside an adapter."""
    found: dict[str, nn.Module] = {}

    def walk(path: str, module: nn.Module) -> None:
        wrapper = wrapped_in(module) is not None
        if path and not wrapper and config.trains_whole(path):
            found[path] = module
        elif wrapper or not hasattr(module, "base_layer"):
            for name, child in module.named_children():
                walk(unwrapped(f"{path}.{name}" if path else name), child)

    walk("", held(model))
    return found


def check_can_train_whole(model: nn.Module, whole: dict[str, nn.Module]) -> None:
    """Raise ValueError where one of these modules cannot train whole."""
    for name, module in whole.items():
        why = _why_not_trained(module)
        if place(model, name)[1] == COMPILED:
            why = "it is compiled by itself, and would go on without the copy; adapt the model, then compile"
        if why:
            raise ValueError(f"adapt: expected modules_to_save to name modules that can train, got {name}: {why}")


def _why_not_trained(module: nn.Module) -> str | None:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
        return f"a {type(module).__name__} is never called; name the modules in it"
    others = [f"{name} of {p.dtype}" for name, p in module.named_parameters() if not p.is_floating_point()]
    return f"it holds {others[0]}, which takes no gradient; load that module unquantised" if others else None


def _stacked(module: nn.Module) -> Iterator[str]:
    """A module's own parameters (E, N, K) that hold several matrices, as experts do; not weights of convolutions."""
    if not isinstance(module, (nn.modules.conv._ConvNd, nn.Bilinear)) and not hasattr(module, "base_layer"):
        for name, p in module._parameters.items():
            if p is None or is_lazy(p) or p.dim() != 3 or not p.is_floating_point():
                continue
            if min(p.shape) > 1 or looks_like_experts(module):
                yield name


def _outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Module]]]:
    """(path, module, {path: module} of all above it) of every module below the model, each once; nothing that is inside
    an adapter."""
    seen: set[int] = set()

    def walk(prefix: str, above: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module, dict[str, nn.Module]]]:
        for name, module in above[prefix].named_children():
            if id(module) in seen:
                continue
            seen.add(id(module))
            path = unwrapped(f"{prefix}.{name}" if prefix else name)
            wrapper = wrapped_in(module) is not None  # which may hand on what it holds as attributes of its own
            if path and not wrapper:
                yield path, module, above
            if wrapper or not hasattr(module, "base_layer"):
                yield from walk(path, {**above, path: module})

    yield from walk("", {"": model})


def _is_under_ddp(model: nn.Module) -> bool:
    """True if the model is, contains or is held by a DistributedDataParallel, which leaves no mark on what it holds."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.nn.parallel import DistributedDataParallel

    wrappers = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    own = set(map(id, model.modules()))
    return any(id(module) in own for wrapper in wrappers for module in wrapper.modules())


def _looks_linear(module: nn.Module) -> bool:
    kind = type(module).__name__
    return isinstance(module, nn.Linear) or "Linear" in kind or kind == "Conv1D"


def output_head(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


_OF_A_TASK_HEAD = (
    "the task's head, which starts at random; name it in modules_to_save to train it whole and save it with the "
    "adapter, or in target_modules to adapt it"
)


def _task_heads(model: nn.Module) -> set[str]:
    """Paths of the head of a transformers model without an output embedding: one for classification, or answers."""
    if not hasattr(model, "get_output_embeddings") or output_head(model) is not None:
        return set()
    there = submodule(model, "")._modules
    return {name for names in TASK_HEADS.values() for name in names if name in there}


def _nothing_to_replace(model: nn.Module, config: AdapterConfig, skipped: list[Skipped]) -> str:
    linears = dict.fromkeys(collapse(n) for n, m, _ in _outside_adapters(model) if is_linear(m))
    said = dict.fromkeys(f"{collapse(s.name)} ({s.reason})" for s in skipped if s.reason != "not in target_modules")
    names = ", ".join(list(linears)[:40]) or "none"
    return (
        f"adapt: target_modules={config.target_modules!r} replaces nothing in this {type(model).__name__}; "
        f"its linears: "
        f"{names}{', …' if len(linears) > 40 else ''}" + (f"; skipped: {', '.join(list(said)[:20])}" if said else "")
    )


def _replace(
    model: nn.Module, config: AdapterConfig, plan: Plan, undo: list[Callable[[], None]]
) -> dict[str, nn.Module]:
    """Replace the modules of the plan. Each step appends what reverses it to ``undo`` before it is taken."""
    # By their places: a state that is loaded with assign=True puts others there.
    places = [
        (m, key, p) for m in model.modules() for key, p in m.named_parameters(recurse=False, remove_duplicate=False)
    ]
    requires_grad = [(m, key, p.requires_grad) for m, key, p in places]
    trained = frozenset(name for name, p in named_parameters(model) if p.requires_grad)
    undo.append(lambda: _restore_requires_grad(requires_grad))
    copies = _copy_whole(model, plan, undo)
    biases = {id(p) for p in _trained_biases(model, config, plan)}
    values = [(m, key, p.detach().clone()) for m, key, p in places if id(p) in biases]
    undo.append(lambda: _restore_values(values))
    adapted = [
        m
        for m in model.modules()
        if hasattr(m, "base_layer") or _CONFIG_ATTRIBUTE in vars(m) or getattr(m, "stands_beside_layers", False)
    ]
    kept = {id(p) for m in adapted for p in m.parameters() if p.requires_grad}
    owners = weight_owners(model)
    layers: dict[str, nn.Module] = {}
    for name, linear in plan.targets.items():
        try:
            layers[name] = config.layer(name, linear)
        except (TypeError, ValueError) as error:
            raise type(error)(f"adapt: {name}: {error}") from None

    for name, experts in plan.experts.items():
        layers[name] = config.experts_layer(name, experts)  # type: ignore[attr-defined]

    replacement = {id(m): layers[name] for name, m in {**plan.targets, **plan.experts}.items()}
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and id(module) in replacement:
                undo.append(lambda p=parent, c=child, m=module: _put_back(p, c, m))  # type: ignore[misc]
                parent._modules[child] = replacement[id(module)]
    for name, target in plan.targets.items():
        others = tuple(o for o in owners.get(id(weight_tensor(target)), ()) if o != f"{name}.weight")
        if others:
            layers[name].weight_shared_with = others  # type: ignore[assignment]

    trains = kept | biases | {id(p) for module in copies for p in module.parameters()}
    trains |= {id(p) for layer in layers.values() for p in layer.parameters() if p.requires_grad}
    for p in model.parameters():
        p.requires_grad = id(p) in trains  # of a lazy one too, which has no method yet
    undo.append(lambda: forget_adaptation(model))
    setattr(model, _CONFIG_ATTRIBUTE, config)
    setattr(model, _TRAINED_ATTRIBUTE, trained)
    if hasattr(type(model), "save_pretrained"):
        # Not a method, which pickle would look up by its name, in the class.
        vars(model)["save_pretrained"] = partial(save_pretrained, model)
    return layers


def _copy_whole(model: nn.Module, plan: Plan, undo: list[Callable[[], None]]) -> list[nn.Module]:
    """Replace the modules that train whole by copies, so that what shares their weights stays frozen."""
    copies: list[nn.Module] = []
    for path, module in plan.whole.items():
        parent, child = place(model, path)
        if parent._modules[child] is module:  # not yet, by another path
            undo.append(lambda p=parent, c=child, m=module: _put_back(p, c, m))  # type: ignore[misc]
            parent._modules[child] = copied = copy.deepcopy(module)
            copied.trains_whole = {key: tuple(p.shape) for key, p in copied.named_parameters()}  # type: ignore[assignment]
            copies.append(copied)
    return copies


def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained`` of an adapted transformers model: refuses merged layers, and runs the model's own.

    What it writes has the names of the adapted model, which a Trainer that resumes expects. ``from_pretrained`` does
    not know them, and would start those weights at random.
    """
    merged = [
        name
        for name, module in named_modules(model)
        if hasattr(module, "base_layer") and getattr(module, "merged", False)
    ]
    if merged:
        raise ValueError(
            f"save_pretrained: expected a plain model or unmerged layers, got merged ones, in {', '.join(merged[:3])}"
            f"{', ...' if len(merged) > 3 else ''}, under names that from_pretrained does not know; call "
            f"lk.merge_and_unload(model) first"
        )
    return type(model).save_pretrained(model, *args, **kwargs)


def _check_still_there(model: nn.Module, layers: dict[str, nn.Module], undo: list[Callable[[], None]]) -> None:
    own = set(map(id, layers.values()))
    if not any(id(module) in own for module in model.modules()):
        undo.clear()
        raise ValueError(
            "undo: expected a model that is still adapted; its layers were merged and unloaded since, and the weights "
            "as they were are gone"
        )


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its ``id``: more than one where modules share it."""
    owners: dict[int, list[str]] = {}
    for name, module in named_modules(model):
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(p), []).append(f"{name}.{key}" if name else key)
    return owners


def _trained_biases(model: nn.Module, config: AdapterConfig, plan: Plan) -> Iterator[nn.Parameter]:
    if config.bias == "all":
        yield from (p for name, p in model.named_parameters() if f".{name}".endswith(".bias"))
    elif config.bias == "lora_only":
        biases = (getattr(module, "bias", None) for module in plan.targets.values())
        yield from (bias for bias in biases if bias is not None)


def _put_back(parent: nn.Module, child: str, module: nn.Module) -> None:
    layer = parent._modules[child]
    if layer is not None and getattr(layer, "trains_whole", None) is not None:
        _follow(module, layer)
    if layer is not module and layer is not None:
        if hasattr(layer, "unmerge_"):
            layer.unmerge_()  # type: ignore[operator]
        if getattr(layer, "lora_ga_start", None) is not None:
            layer.lora_ga_start.put_back_(layer)  # type: ignore[operator, union-attr]
        module.train(layer.training)
    parent._modules[child] = module


@torch.no_grad()
def _follow(module: nn.Module, copied: nn.Module) -> None:
    """Move a module's tensors to the devices and dtypes that its copy's tensors have."""
    there = dict(itertools.chain(copied.named_parameters(), copied.named_buffers()))
    for name, t in itertools.chain(module.named_parameters(), module.named_buffers()):
        if name in there:
            t.data = t.data.to(there[name].device, there[name].dtype)


def _restore_requires_grad(states: list[tuple[nn.Module, str, bool]]) -> None:
    for module, key, requires_grad in states:
        p = module._parameters.get(key)  # not where a wrapper has taken it away
        if p is not None:
            p.requires_grad = requires_grad


@torch.no_grad()
def _restore_values(values: list[tuple[nn.Module, str, torch.Tensor]]) -> None:
    for module, key, value in values:
        p = module._parameters.get(key)
        if p is not None:
            p.copy_(value)
