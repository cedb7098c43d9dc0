"""LoRAPrune: structures cut by what LoRA's gradients say of them (Zhang et al., arXiv 2305.18403)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import lora_importance
from ..names import named_modules
from ..nn import DoRALinear, LoRALinear
from ..nn.frozen import drop_compiled
from ..nn.matrix import frozen_weight
from ..rider import Rider, check_integer, history_of, note
from ..unload import merge_and_unload
from .structure import Group, allowed_heads, decoder_groups, keep_structures_, write_sizes_


def cubic(step: int, warmup: int, steps: int) -> float:
    """Share of the target that is cut after a step: 0 until ``warmup``, then 1 - (1 - t)³, and 1 from ``steps`` on."""
    t = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    return 1.0 - (1.0 - t) ** 3


class LoRAPrune(Rider):
    """Trains a decoder's LoRA, and masks its least important heads and channels meanwhile; :meth:`cut` takes them out.

    The importance of a structure is the sum, over the rows and columns of the linears it lies in, of
    Î = ((∇B A + B ∇A - ∇B ∇A) ∘ (W + s B A))², from the factors' gradients alone: no gradient of W is made, and no
    matrix of its size (``lk.lora_importance``). It is averaged over steps. Gradients are taken as backward leaves them,
    before any clipping, accumulated ones as their sum.

    A structure is a KV head with its query heads, or a channel of the MLP. Every layer loses as many of each, because a
    config of transformers has one number for all: which ones is each layer's own, and how many heads and how many
    channels is told by their importance a parameter, over all layers. Masks follow a cubic schedule, and hold the
    inputs of o_proj and down_proj at zero, which is the same function as that of the cut model.

    Args:
        model: a decoder of transformers, adapted with ``LoRAConfig``; see :func:`decoder_groups`.
        optimizer: the one that steps the factors.
        ratio: share of the prunable parameters, those of the linears in attention and MLP, that is cut at the end;
            reached to the nearest channel.
        steps: step at which all of it is masked.
        warmup: steps before the first is.
        every: steps from one choice of masks to the next; importance is computed in each step.
        decay: of the moving average.
        scaler: the GradScaler that loss goes through, if any, whose scale is taken out of the gradients.

    Attributes:
        taken: steps that were taken.
        history: share of a layer's importance that is masked, for a picture.

    Raises:
        TypeError, ValueError: a model whose structure is not recognised; layers that are not LoRALinear, that have a
            gate, or a factor that does not train; a group none of whose linears is adapted; a ratio that is not above
            0, or leaves nothing of a layer; and as :class:`~lowrank_kernels.rider.Rider`. In training: importance that
            is not finite.

    Source: Zhang et al., "LoRAPrune", arXiv 2305.18403. What differs from the authors' code: docs/methods/loraprune.md.
    """

    key = "loraprune"
    history: dict[str, Any]
    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ratio: float,
        steps: int,
        warmup: int = 0,
        every: int = 1,
        decay: float = 0.9,
        scaler: Any = None,
    ) -> None:
        name = "LoRAPrune"
        super().__init__(optimizer, name)
        for option, value, least in (("steps", steps, 1), ("warmup", warmup, 0), ("every", every, 1)):
            check_integer(name, option, value, least)
        for option, number in (("ratio", ratio), ("decay", decay)):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0.0 <= number < 1.0:
                raise ValueError(f"{name}: expected {option} to be a number below 1, got {number!r}")
        if not ratio or warmup >= steps:
            raise ValueError(f"{name}: expected ratio above 0 and warmup below steps, got {ratio}, {warmup}, {steps}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: expected model to be a torch.nn.Module, got {type(model).__name__}")
        if scaler is not None and not hasattr(scaler, "get_scale"):
            raise TypeError(f"{name}: expected scaler to be a torch.amp.GradScaler, got {type(scaler).__name__}")
        self.model, self.ratio, self.steps, self.warmup = model, ratio, steps, warmup
        self._scaler = scaler
        self.every, self.decay, self.taken = every, decay, 0
        self.groups = {group.path: group for group in decoder_groups(model, name)}
        self.layers = _adapted(model, self.groups, name)
        self._importance: dict[str, Tensor] = {}
        self._heads = allowed_heads(model.config, self._of_kind("heads")[0].count)
        self.masks: dict[str, Tensor] = {}
        """1 for what is kept, 0 for what is masked, by group."""
        for path, group in self.groups.items():
            linear: Any = model.get_submodule(group.gate.path)
            self.masks[path] = torch.ones(group.count, device=linear.weight.device)
        if not self._fits(ratio):
            raise ValueError(
                f"{name}: expected a ratio that heads and channels can make and that leaves one of each in every "
                f"layer, got {ratio:.3g}"
            )
        self._gradients: dict[int, Tensor] = {}
        self._waiting: list[Tensor] = []
        self._backward = -1
        self.history = history_of("share of the importance that is masked", self.groups)
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._reached)
            for layer in self.layers.values()
            for p in (layer.lora_A.weight, layer.lora_B.weight)
        ]
        self._mask()
        self.attach()

    @property
    def prunable(self) -> int:
        """Parameters that structures consist of, of all layers."""
        return sum(group.count * group.size for group in self.groups.values())

    @property
    def masked(self) -> int:
        """How many of them are masked."""
        return sum(int((mask == 0).sum()) * self.groups[path].size for path, mask in self.masks.items())

    def _reached(self, p: Tensor) -> None:
        """A factor has its gradient, which DistributedDataParallel sums over ranks at the end of backward."""
        self._waiting.append(p)
        if torch._C._current_graph_task_id() != self._backward:
            self._backward = torch._C._current_graph_task_id()
            _at_end_of_backward(self._at_end)

    def _at_end(self) -> None:
        """After a backward, or after a part of one that reentrant checkpointing runs by itself."""
        if torch._C._current_autograd_node() is None:
            _at_end_of_backward(self._keep_gradients)  # behind what others do at the end
        else:
            self._keep_gradients()

    def _keep_gradients(self) -> None:
        while self._waiting:
            p = self._waiting.pop()
            if p.grad is not None:
                self._gradients[id(p)] = p.grad.detach().clone()

    def _mask(self) -> None:
        self._masking = [
            self.model.get_submodule(group.gate.path).register_forward_pre_hook(
                _Mask(self.masks[path], group.gate.width)
            )
            for path, group in self.groups.items()
        ]
        drop_compiled()

    def _unmask(self) -> None:
        if self._masking:
            drop_compiled()
        while self._masking:
            self._masking.pop().remove()

    def before_step(self) -> None:
        if not self._gradients:
            return
        scale = self.gradient_scale() if self._scaler is None else self._scaler.get_scale()
        for path, found in self._scores(scale).items():
            kept = self._importance.get(path)
            self._importance[path] = found if kept is None else self.decay * kept + (1.0 - self.decay) * found
        self._gradients.clear()

    @torch.no_grad()
    def _scores(self, scale: Tensor | float) -> dict[str, Tensor]:
        """The importance of every structure by this step's gradients, by group."""
        scores: dict[str, Tensor] = {}
        for path, group in self.groups.items():
            for part in group.parts:
                layer = self.layers.get(part.path)
                if layer is None:
                    continue
                a, b = layer.lora_A.weight, layer.lora_B.weight
                grad_a, grad_b = self._gradients.get(id(a)), self._gradients.get(id(b))
                if grad_a is None or grad_b is None:
                    continue
                of_lines = lora_importance(
                    layer.matrix,
                    a.detach(),
                    b.detach(),
                    grad_a / scale,
                    grad_b / scale,
                    scaling=layer.scaling,
                    dim="rows" if part.rows else "columns",
                )
                of_parts = of_lines.view(group.count, part.width).sum(1)
                scores[path] = of_parts + scores[path] if path in scores else of_parts
        return scores

    def after_step(self) -> None:
        self.taken += 1
        if self.taken % self.every == 0 or self.taken == self.steps:
            self.choose(self.ratio * cubic(self.taken, self.warmup, self.steps))

    @torch.no_grad()
    def choose(self, ratio: float) -> None:
        """Mask the least important structures that together are ``ratio`` of the prunable parameters."""
        if not ratio or not self._importance:
            return
        for path in self.groups:
            found = self._importance.get(path)
            if found is None or not bool(found.isfinite().all()):
                raise ValueError(
                    f"LoRAPrune: expected finite importance, found {'none' if found is None else 'NaN or Inf'} for "
                    f"{path}; no mask has changed"
                )
        cut = self._counts(ratio, self._importance)
        shares = {}
        for path, group in self.groups.items():
            found = self._importance[path]
            lowest = found.argsort(stable=True)[: cut[group.kind]]
            self.masks[path].fill_(1.0)[lowest] = 0.0
            shares[path] = float(found[lowest].sum() / found.sum().clamp_min(1e-30))
        note(self.history, self.taken + 1, shares)

    def _counts(self, ratio: float, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """How many heads and channels each layer loses, so that ``ratio`` of the parameters go, to the nearest channel.

        As many heads as cutting the structures of least importance a parameter, of all layers, would take on average.
        """
        target = ratio * self.prunable
        every = torch.cat([scores[path] / group.size for path, group in self.groups.items()]).cpu()
        of_head = torch.cat([torch.full((g.count,), g.kind == "heads") for g in self.groups.values()])
        size = torch.cat([torch.full((g.count,), g.size) for g in self.groups.values()])
        order = every.argsort(stable=True)
        inside = size[order].cumsum(0) <= target
        wanted = int((of_head[order] & inside).sum()) / len(self._of_kind("heads"))
        fits = self._fits(ratio) or {0: 0}  # on the way to a target that fits
        heads = min(fits, key=lambda number: abs(number - wanted))
        return {"heads": heads, "channels": fits[heads]}

    def _of_kind(self, kind: str) -> list[Group]:
        return [group for group in self.groups.values() if group.kind == kind]

    def _fits(self, ratio: float) -> dict[int, int]:
        """Numbers of heads and of channels, both of each layer, that together are ``ratio`` of the parameters."""
        heads, channels = self._of_kind("heads"), self._of_kind("channels")
        of_heads, of_channels = (sum(group.size for group in groups) for groups in (heads, channels))
        fewer = sorted(heads[0].count - left for left in self._heads)
        found = {h: round((ratio * self.prunable - h * of_heads) / of_channels) for h in fewer}
        return {h: c for h, c in found.items() if 0 <= c < channels[0].count}

    def finish(self) -> None:
        self.cut()

    def cut(self) -> nn.Module:
        """Merge the layers, take masked structures out, and return the model: a plain one of transformers.

        The model is changed in place; its config says the new numbers, and ``save_pretrained`` and ``from_pretrained``
        take it. Detaches: nothing further is masked or scored.

        Raises:
            ValueError: a weight that is not dense; and as :func:`merge_and_unload`. Nothing has changed then.
        """
        for part in (part for group in self.groups.values() for part in group.parts):
            linear: Any = self.model.get_submodule(part.path)
            weight = frozen_weight(getattr(linear, "base_layer", linear))
            if not isinstance(weight, Tensor):
                raise ValueError(
                    f"LoRAPrune.cut: expected dense weights to cut, got one stored as {weight.format} in {part.path}; "
                    f"make the model dense (lk.dequantize_); nothing has changed"
                )
        self._unmask()  # a layer with a hook is not merged
        try:
            merge_and_unload(self.model)
        except ValueError:
            self._mask()
            raise
        self.detach()
        left = {}
        for path, group in self.groups.items():
            keep = self.masks[path].nonzero().flatten()
            keep_structures_(self.model, group, keep)
            left[group.kind] = len(keep)
        write_sizes_(self.model.config, **left)
        return self.model

    def detach(self) -> None:
        super().detach()
        self._unmask()
        while self._hooks:
            self._hooks.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken": self.taken,
            "importance": {path: t.clone() for path, t in self._importance.items()},
            "masks": {path: t.clone() for path, t in self.masks.items()},
            "history": copy.deepcopy(self.history),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        shapes = {path: (group.count,) for path, group in self.groups.items()}
        if {path: tuple(mask.shape) for path, mask in state["masks"].items()} != shapes:
            raise ValueError("LoRAPrune: expected a state of a model with the same layers and structures")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_state(state)
        self.taken, self.history = state["taken"], copy.deepcopy(state["history"])
        for path, mask in state["masks"].items():
            self.masks[path].copy_(mask)
        self._importance = {path: t.to(self.masks[path].device, copy=True) for path, t in state["importance"].items()}


class _Mask:
    """Before a linear is called: its input, times the mask of each of its structures. Copied and pickled with it."""

    def __init__(self, mask: Tensor, width: int) -> None:
        self.mask, self.width = mask, width

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x, *rest = args
        return x * self.mask.to(x.device, x.dtype).repeat_interleave(self.width), *rest


def _at_end_of_backward(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def _adapted(model: nn.Module, groups: Mapping[str, Group], op: str) -> dict[str, LoRALinear]:
    """The LoRA layers among the linears of some groups, by path."""
    layers: dict[str, LoRALinear] = {}
    for path, module in named_modules(model):
        if hasattr(module, "base_layer"):
            if not isinstance(module, LoRALinear) or isinstance(module, DoRALinear) or module.lora_gate is not None:
                raise ValueError(
                    f"{op}: expected LoRALinear layers without a gate, for which the importance is defined, got a "
                    f"{type(module).__name__} in {path}"
                )
            if not (module.lora_A.weight.requires_grad and module.lora_B.weight.requires_grad):
                raise ValueError(
                    f"{op}: expected layers whose factors both train, as the importance needs the gradients of both, "
                    f"got another in {path}"
                )
            layers[path] = module
    inside = {part.path for group in groups.values() for part in group.parts}
    layers = {path: layer for path, layer in layers.items() if path in inside}
    for path, group in groups.items():
        if not any(part.path in layers for part in group.parts):
            raise ValueError(f"{op}: expected adapted linears in {path}, whose importance nothing else tells, got none")
    return layers
