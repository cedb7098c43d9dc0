"""A chain of low-rank corrections: train one for a while, merge it, start the next."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..finite import all_finite
from ..init import INITS, init_factors_
from ..merge import ROUNDINGS, merge_lora_
from ..names import named_modules
from ..nn import DoRALinear, LoRAExperts, LoRALinear
from ..nn.sharded import is_dtensor, why_not_written
from ..rider import Rider


class Chain(Rider):
    """After every ``steps_per_link`` optimizer steps: W ← W + s B A, new factors with B A = 0, new optimizer state.

    It is a :class:`Rider` on the optimizer: it counts the steps that were taken by itself, and whatever saves and
    restores the model and the optimizer resumes the chain, bit for bit; also where the chain is made after they were
    loaded. The learning-rate schedule is the user's and runs on over the links.

    The first link starts from a fresh sample, or, where the factors hold a correction already (B A is not zero: a
    trained adapter, LoRA-GA's start), from that, which then is the first to be merged.

    Args:
        model: with LoRALinear layers. Where a layer trains one factor alone, the other is sampled anew each link;
            where it trains both, A is sampled and B starts at zero.
        optimizer: the one that steps their factors, all of them; of one chain, and not LBFGS, whose state is of all
            parameters at once.
        steps_per_link: optimizer steps from one merge to the next.
        init: how the sampled factor is drawn: "orthonormal", "gaussian" or "kaiming" (``lowrank_kernels.init``).
        seed: of all draws, with the link and the layer; torch's own generators are not touched.
        warmup: over the first so many steps of each later link the rate rises linearly to the schedule's.
        ranks: of the links, the last one's also of all that follow; a layer of a lower rank keeps its own. None: every
            link has the layers' ranks. s follows the rank, alpha stays. Not under DistributedDataParallel, which
            remembers the first shapes.
        rounding: of W's update: "nearest", or "stochastic" for bfloat16 weights.
        master: keep W in float32 beside a half-precision W, 4 N K bytes a layer, and merge into that.
        one_sided: refuse layers that train both factors (True), or one (False).
        name: who an error is of.

    Attributes:
        link: how many merges there were.
        link_step: optimizer steps since the last.

    Raises:
        TypeError: at construction: a setting of the wrong kind.
        ValueError: at construction: no LoRALinear layer; one whose weight cannot take a merge (another module's too,
            a bias of B's, quantised, merged already); a rank beyond the matrix for an orthonormal sample; settings out
            of range; an optimizer that lacks a factor or has a chain already; ranks that do not fit what the factors
            hold. At a link: factors that are not finite, a layer that is merged. No weight has changed then.
    """

    key: ClassVar[str] = "chain"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_link: int,
        *,
        init: str = "orthonormal",
        seed: int = 0,
        warmup: int = 0,
        ranks: Sequence[int] | None = None,
        rounding: str = "nearest",
        master: bool = False,
        one_sided: bool | None = None,
        name: str = "Chain",
    ) -> None:
        for option, value, least in (("steps_per_link", steps_per_link, 1), ("warmup", warmup, 0)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected {option} to be an integer of at least {least}, got {value!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"{name}: expected seed to be an integer, got {seed!r}")
        if not isinstance(master, bool):
            raise TypeError(f"{name}: expected master to be True or False, got {master!r}")
        if one_sided is not None and not isinstance(one_sided, bool):
            raise TypeError(f"{name}: expected one_sided to be True, False or None, got {one_sided!r}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}: expected model to be a torch.nn.Module, got {type(model).__name__}")
        self.layers = _chained_layers(model, name)
        if steps_per_link < 1 or not 0 <= warmup <= steps_per_link:
            raise ValueError(
                f"{name}: expected steps_per_link of at least 1 and warmup between 0 and that, got {steps_per_link} "
                f"and {warmup}"
            )
        if ranks is not None:
            if isinstance(ranks, str) or not isinstance(ranks, Sequence):
                raise TypeError(f"{name}: expected ranks to be a sequence of integers, one a link, got {ranks!r}")
            if any(isinstance(rank, bool) or not isinstance(rank, int) for rank in ranks):
                raise TypeError(f"{name}: expected ranks to be integers, got {list(ranks)}")
        if not isinstance(init, str) or init not in INITS or init == "zero":
            raise ValueError(f"{name}: expected init to be one of kaiming, gaussian, orthonormal, got {init!r}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"{name}: expected rounding to be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        if master and rounding != "nearest":
            raise ValueError(f"{name}: expected rounding='nearest' with master=True, which is rounded from alone")
        highest = max(layer.r for layer in self.layers.values())
        if ranks is not None and not (ranks and all(1 <= rank <= highest for rank in ranks)):
            raise ValueError(
                f"{name}: expected ranks from 1 to the layers' own of {highest}, one a link, got {list(ranks)}"
            )
        for path, layer in self.layers.items():
            one = not (layer.lora_A.weight.requires_grad and layer.lora_B.weight.requires_grad)
            if one_sided is not None and one is not one_sided:
                wanted = "one factor; adapt with LoRAConfig(train='b')" if one_sided else "both factors"
                raise ValueError(f"{name}: expected layers that train {wanted}, got another in {path}")
            side = layer.in_features if _sampled(layer) == "a" else layer.out_features
            if init == "orthonormal" and layer.r > side:
                raise ValueError(
                    f"{name}: expected a rank of at most {side} for orthonormal samples, got {layer.r} in {path}"
                )
            if rounding == "stochastic" and layer.weight.dtype != torch.bfloat16:
                raise ValueError(
                    f"{name}: expected bfloat16 weights for stochastic rounding, got {layer.weight.dtype} in {path}"
                )
        super().__init__(optimizer, name)
        _check_steps_all(optimizer, self.layers, name)
        self.steps_per_link, self.warmup = steps_per_link, warmup
        self.init, self.seed, self.rounding = init, seed, rounding
        self._own_ranks, self._ranks = {path: layer.r for path, layer in self.layers.items()}, ranks
        self.link = self.link_step = 0
        self.master: dict[str, Tensor] = {}
        if master:
            for path, layer in self.layers.items():
                if layer.weight.dtype in (torch.bfloat16, torch.float16):
                    self.master[path] = layer.matrix.detach().float()
        found = self.found_state()
        if found is not None:
            self.link = found["link"]
        held = [path for path, layer in self.layers.items() if _holds_a_correction(layer)]
        misfits = [path for path in held if self.layers[path].r != self._rank_of(path)]
        if misfits:
            raise ValueError(
                f"{name}: expected factors that hold a correction to have link {self.link}'s rank of "
                f"{self._rank_of(misfits[0])}, got {self.layers[misfits[0]].r} in {misfits[0]}; merge them first, or "
                f"leave ranks out"
            )
        self._rates: list[tuple[dict[str, Any], Any]] = []
        if not self.attach():
            self._begin()
            if not held:
                self._sample()

    def attach(self) -> bool:
        if self._ranks is not None:
            hooks = [layer.register_load_state_dict_pre_hook(_take_the_rank_of) for layer in self.layers.values()]
            self._detach += [hook.remove for hook in hooks]
        return super().attach()

    def warmup_factor(self) -> float:
        """What the next step's learning rate is multiplied by."""
        return min(1.0, (self.link_step + 1) / self.warmup) if self.warmup and self.link else 1.0

    def trained(self) -> Collection[str]:
        """The layers that train in this link: all of them."""
        return self.layers.keys()

    def next_link(self) -> None:
        """Merge, sample new factors, drop the factors' optimizer state."""
        self.merge()
        self.link += 1
        self.link_step = 0
        self._begin()
        self._sample()

    def finish(self) -> None:
        self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + s B A where B A is not zero, and zero the trained factor: the function stays what it was.

        Raises:
            ValueError: a factor that is not finite; no weight has changed.
        """
        merged = [path for path, layer in self.layers.items() if layer.merged]
        if merged:
            raise ValueError(
                f"{self._name}: expected layers that are not merged at the end of link {self.link}, got "
                f"{', '.join(merged[:5])}, whose weight would get the correction twice; call unmerge_()"
            )
        factors = {path: (layer.lora_A.weight, layer.lora_B.weight) for path, layer in self.layers.items()}
        broken = [path for path, pair in factors.items() if not all(map(all_finite, pair))]
        if broken:
            raise ValueError(
                f"{self._name}: expected finite factors at the end of link {self.link}, found NaN or Inf in "
                f"{', '.join(broken[:5])}; no weight has changed; lower the learning rate"
            )
        for index, (path, layer) in enumerate(self.layers.items()):
            if not _holds_a_correction(layer):
                continue
            a, b = factors[path]
            weight = layer.matrix
            target = self.master.get(path, weight)
            merge_lora_(
                target,
                *(factor.detach() for factor in layer.factors()),
                scaling=layer.scaling,
                rounding=self.rounding,
                seed=self._seed(index),
                check_finite=False,
            )
            if target is not weight:
                weight.copy_(target)
            (b if _sampled(layer) == "a" else a).zero_()
            _mark_changed(layer)

    def state_dict(self) -> dict[str, Any]:
        """The chain's place, for a checkpoint; factors and weights are the model's, moments the optimizer's."""
        return {"link": self.link, "link_step": self.link_step, "seed": self.seed, "master": dict(self.master)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.link, self.link_step, self.seed = state["link"], state["link_step"], state["seed"]
        for path, weight in state["master"].items():
            self.master[path].copy_(weight)
        self._begin()
        if self.link:
            for layer in self.layers.values():
                _mark_changed(layer)

    def check_state(self, state: dict[str, Any]) -> None:
        if state["master"].keys() != self.master.keys():
            raise ValueError(f"{self._name}: expected a state of a chain with the same layers and master setting")

    def before_step(self) -> None:
        factor = self.warmup_factor()
        if factor != 1.0:
            self._rates = [(group, group["lr"]) for group in self.optimizer.param_groups]
            for group, rate in self._rates:
                group["lr"] = rate * factor

    def restore(self) -> None:
        while self._rates:
            group, rate = self._rates.pop()
            group["lr"] = rate

    def after_step(self) -> None:
        self.link_step += 1
        if self.link_step == self.steps_per_link:
            self.next_link()

    def _seed(self, layer: int, link: int | None = None) -> int:
        """A seed of a layer in a link (None: this one), for the generator that samples and for the bits that round."""
        mixed = torch.Generator().manual_seed(self.seed + ((self.link if link is None else link) << 20) + layer)
        return int(torch.randint(0, 2**62, (), generator=mixed))

    def _begin(self) -> None:
        """Make the layers ready for this link: give them its ranks."""
        for path, layer in self.layers.items():
            if layer.r != self._rank_of(path):
                layer.resize_(self._rank_of(path))

    def _rank_of(self, path: str) -> int:
        """A layer's rank in this link."""
        own = self._own_ranks[path]
        return own if self._ranks is None else min(self._ranks[min(self.link, len(self._ranks) - 1)], own)

    @torch.no_grad()
    def _sample(self) -> None:
        trained = self.trained()
        for index, (path, layer) in enumerate(self.layers.items()):
            a, b = layer.lora_A.weight, layer.lora_B.weight
            if path in trained:
                with torch.random.fork_rng(devices=[a.device] if a.device.type == "cuda" else []):
                    torch.manual_seed(self._seed(index))
                    init_factors_(a, b, self.init, sampled=_sampled(layer))
            if layer.lora_gate is not None:
                layer.lora_gate.fill_(1.0)
            for p in (a, b, layer.lora_gate):
                self.optimizer.state.pop(p, None)


def _take_the_rank_of(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Resize a layer to the rank of the factors that it is about to load, which may be those of another link."""
    factor = state.get(prefix + "lora_A.weight")
    if isinstance(layer, LoRALinear) and factor is not None and factor.shape[0] != layer.r:
        layer.resize_(factor.shape[0])


def _sampled(layer: LoRALinear) -> str:
    return "b" if not layer.lora_B.weight.requires_grad else "a"


def _holds_a_correction(layer: LoRALinear) -> bool:
    return bool(layer.lora_A.weight.any()) and bool(layer.lora_B.weight.any())


def _mark_changed(layer: LoRALinear) -> None:
    """Record that W is no longer the base's, so that ``save_adapter`` refuses; LoRA-GA's start is part of W again."""
    layer.weight_changed_by = "a chain, whose links are in it; save the model instead"  # type: ignore[assignment]
    layer.lora_ga_start = None  # type: ignore[assignment]


def _check_steps_all(optimizer: torch.optim.Optimizer, layers: dict[str, LoRALinear], name: str) -> None:
    """Raise ValueError for an optimizer that lacks a factor that trains."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for path, layer in layers.items():
        for factor in (layer.lora_A.weight, layer.lora_B.weight):
            if factor.requires_grad and id(factor) not in stepped:
                raise ValueError(
                    f"{name}: expected an optimizer of all factors that train, got one without those of {path}; make "
                    f"it after lk.adapt, over the parameters that require grad"
                )


def _chained_layers(model: nn.Module, name: str) -> dict[str, LoRALinear]:
    layers: dict[str, LoRALinear] = {}
    for path, module in named_modules(model):
        if isinstance(module, DoRALinear):
            raise ValueError(f"{name}: expected LoRA layers, got a DoRALinear in {path}, whose merge scales W's rows")
        if not isinstance(module, LoRALinear):
            if (hasattr(module, "lora_A") and hasattr(module, "base_layer")) or isinstance(module, LoRAExperts):
                raise ValueError(
                    f"{name}: expected LoRALinear layers, whose weights can take a merge, got a "
                    f"{type(module).__name__} in {path}; adapt the model with lk.adapt"
                )
            continue
        reason = _why_not_chained(module)
        if reason:
            raise ValueError(f"{name}: expected layers that can be merged and restarted, but {path} cannot: {reason}")
        layers[path] = module
    if not layers:
        raise ValueError(f"{name}: expected a model with LoRALinear layers, found none in {type(model).__name__}")
    return layers


def _why_not_chained(layer: LoRALinear) -> str | None:
    """Why a layer cannot be merged and restarted; None if it can."""
    if not layer.weight.is_floating_point():
        return f"its weight of {layer.weight.dtype} is quantised"
    if layer.weight_shared_with:
        return f"its weight is also that of {', '.join(layer.weight_shared_with)}"
    if layer.merged:
        return "it is merged; call unmerge_()"
    if is_dtensor(layer.weight) or why_not_written(layer.base_layer):
        return "its weight is sharded or not at hand; gather the model first"
    if layer.lora_B.bias is not None:
        return "B has a bias"
    if not (layer.lora_A.weight.requires_grad or layer.lora_B.weight.requires_grad):
        return "none of its factors trains"
    return None
