"""A chain of low-rank corrections: train one for a while, merge it, start the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..finite import all_finite
from ..init import INITS, init_factors_
from ..merge import ROUNDINGS, merge_lora_
from ..nn import DoRALinear, LoRALinear


class Chain:
    """After every ``steps_per_link`` optimizer steps: W ← W + s B A, new factors with B A = 0, new optimizer state.

    It rides on the optimizer: it counts ``optimizer.step()`` by itself, and its own state is in the optimizer's
    ``state_dict`` under "chain", so whatever saves and restores the model and the optimizer resumes the chain, bit
    for bit. The learning-rate schedule is the user's and runs on over the links.

    Args:
        model: with LoRALinear layers. Where a layer trains one factor alone, the other is sampled anew each link;
            where it trains both, A is sampled and B starts at zero.
        optimizer: the one that steps their factors.
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
        ValueError: at construction: no LoRALinear layer; one whose weight cannot take a merge (another module's too,
            a bias of B's, quantised, merged already); a rank beyond the matrix for an orthonormal sample; settings out
            of range. At a link: factors that are not finite. No weight has changed then.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_link: int, *, init: str = "orthonormal",
        seed: int = 0, warmup: int = 0, ranks: Sequence[int] | None = None, rounding: str = "nearest",
        master: bool = False, one_sided: bool | None = None, name: str = "Chain",
    ) -> None:  # fmt: skip
        self._name = name
        self.layers = _chained_layers(model, name)
        if steps_per_link < 1 or not 0 <= warmup <= steps_per_link:
            raise ValueError(
                f"{name}: expected steps_per_link of at least 1 and warmup between 0 and that, got {steps_per_link} "
                f"and {warmup}"
            )
        if init not in INITS or init == "zero":
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
        self.optimizer, self.steps_per_link, self.warmup = optimizer, steps_per_link, warmup
        self.init, self.seed, self.rounding = init, seed, rounding
        self._own_ranks, self._ranks = {path: layer.r for path, layer in self.layers.items()}, ranks
        self.link = self.link_step = 0
        self.master: dict[str, Tensor] = {}
        if master:
            for path, layer in self.layers.items():
                if layer.weight.dtype in (torch.bfloat16, torch.float16):
                    self.master[path] = layer.weight.detach().float()
        self._rates: list[float] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(lambda _, state: {**state, "chain": self.state_dict()}),
            optimizer.register_load_state_dict_pre_hook(self._load_from),
        ]
        if ranks is not None:
            self._handles += [
                layer.register_load_state_dict_pre_hook(_take_the_rank_of) for layer in self.layers.values()
            ]
        self._resize()
        self._sample()

    def warmup_factor(self) -> float:
        """What the next step's learning rate is multiplied by."""
        return min(1.0, (self.link_step + 1) / self.warmup) if self.warmup and self.link else 1.0

    def next_link(self) -> None:
        """Merge, sample new factors, drop the factors' optimizer state."""
        self.merge()
        self.link += 1
        self.link_step = 0
        self._resize()
        self._sample()

    @torch.no_grad()
    def merge(self) -> None:
        """W ← W + s B A, and zero the trained factor, so that the function stays what it was.

        Raises:
            ValueError: a factor that is not finite; no weight has changed.
        """
        factors = {path: (layer.lora_A.weight, layer.lora_B.weight) for path, layer in self.layers.items()}
        broken = [path for path, pair in factors.items() if not all(map(all_finite, pair))]
        if broken:
            raise ValueError(
                f"{self._name}: expected finite factors at the end of link {self.link}, found NaN or Inf in "
                f"{', '.join(broken[:5])}; no weight has changed; lower the learning rate"
            )
        for index, (path, layer) in enumerate(self.layers.items()):
            a, b = factors[path]
            target = self.master.get(path, layer.weight)
            merge_lora_(
                target, a, b,
                scaling=layer.scaling, rounding=self.rounding, seed=self._seed(index), check_finite=False,
            )  # fmt: skip
            if target is not layer.weight:
                layer.weight.copy_(target)
            (b if _sampled(layer) == "a" else a).zero_()

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """Where the chain is. The factors and weights are the model's, the moments the optimizer's."""
        return {"link": self.link, "link_step": self.link_step, "seed": self.seed, "master": dict(self.master)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the model's and the optimizer's own states are loaded by themselves."""
        if state["master"].keys() != self.master.keys():
            raise ValueError(f"{self._name}: expected a state of a chain with the same layers and master setting")
        self.link, self.link_step, self.seed = state["link"], state["link_step"], state["seed"]
        for path, weight in state["master"].items():
            self.master[path].copy_(weight)
        self._resize()

    def _load_from(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if "chain" in state:
            self.load_state_dict(state["chain"])

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.warmup_factor()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        self.link_step += 1
        if self.link_step == self.steps_per_link:
            self.next_link()

    def _seed(self, layer: int) -> int:
        """A seed of this link and layer, for the generator that samples and for the bits that round."""
        mixed = torch.Generator().manual_seed(self.seed + (self.link << 20) + layer)
        return int(torch.randint(0, 2**62, (), generator=mixed))

    def _resize(self) -> None:
        """Give the layers this link's ranks."""
        if self._ranks is None:
            return
        rank = self._ranks[min(self.link, len(self._ranks) - 1)]
        for path, layer in self.layers.items():
            if layer.r != min(rank, self._own_ranks[path]):
                layer.resize_(min(rank, self._own_ranks[path]))

    @torch.no_grad()
    def _sample(self) -> None:
        for index, layer in enumerate(self.layers.values()):
            a, b = layer.lora_A.weight, layer.lora_B.weight
            with torch.random.fork_rng(devices=[a.device] if a.device.type == "cuda" else []):
                torch.manual_seed(self._seed(index))
                init_factors_(a, b, self.init, sampled=_sampled(layer))
            for factor in (a, b):
                self.optimizer.state.pop(factor, None)


def _take_the_rank_of(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a layer loads factors of another link: their rank."""
    factor = state.get(prefix + "lora_A.weight")
    if isinstance(layer, LoRALinear) and factor is not None and factor.shape[0] != layer.r:
        layer.resize_(factor.shape[0])


def _sampled(layer: LoRALinear) -> str:
    return "b" if not layer.lora_B.weight.requires_grad else "a"


def _chained_layers(model: nn.Module, name: str) -> dict[str, LoRALinear]:
    layers: dict[str, LoRALinear] = {}
    for path, module in model.named_modules():
        if isinstance(module, DoRALinear):
            raise ValueError(f"{name}: expected LoRA layers, got a DoRALinear in {path}, whose merge scales W's rows")
        if not isinstance(module, LoRALinear):
            if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
                raise ValueError(
                    f"{name}: expected LoRALinear layers, whose weights can take a merge, got a "
                    f"{type(module).__name__} in {path}; adapt the model with lk.adapt"
                )
            continue
        reason = (
            f"its weight of {module.weight.dtype} is quantised" if not module.weight.is_floating_point()
            else f"its weight is also that of {', '.join(module.weight_shared_with)}" if module.weight_shared_with
            else "it is merged; call unmerge_()" if module.merged
            else "B has a bias" if module.lora_B.bias is not None
            else "none of its factors trains"
            if not (module.lora_A.weight.requires_grad or module.lora_B.weight.requires_grad)
            else None
        )  # fmt: skip
        if reason:
            raise ValueError(f"{name}: expected layers that can be merged and restarted, but {path} cannot: {reason}")
        layers[path] = module
    if not layers:
        raise ValueError(f"{name}: expected a model with LoRALinear layers, found none in {type(model).__name__}")
    return layers
