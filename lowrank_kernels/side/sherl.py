"""SHERL: frozen early layers without gradients, whose hidden states a narrow side path gathers for the late ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ..layer_stack import WholeStack, check_plain, find_stack, first, record_calls
from ..names import named_modules
from ..nn.frozen import AroundBase
from ..report import Replaced, Report, count_parameters

TEMPERATURE = 0.1


@dataclass(frozen=True)
class SHERLConfig:
    """How :func:`sherl` divides a stack of layers.

    Attributes:
        late_layers: layers that are back-propagated, from the last on. At least one stays below them.
        width: R, of the side features.

    Raises:
        ValueError: a number below 1.
    """

    late_layers: int = 4
    width: int = 64

    def __post_init__(self) -> None:
        for name in ("late_layers", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SHERLConfig: expected {name} to be an integer of at least 1, got {value!r}")


class SideFeature(nn.Module):
    """u = ReLU(D h), then (E u + u) ∘ σ(F u): h (..., K) to u (..., R).

    ``down`` D (R, K), ``mix`` E and ``gate`` F (R, R), each drawn as an ``nn.Linear`` draws its weight.
    """

    stands_beside_layers = True

    def __init__(self, inputs: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.down = _drawn(width, inputs, dtype, device)
        self.mix = _drawn(width, width, dtype, device)
        self.gate = _drawn(width, width, dtype, device)

    def forward(self, h: Tensor) -> Tensor:
        u = linear(h.to(self.down.dtype), self.down).relu()
        return (linear(u, self.mix) + u) * linear(u, self.gate).sigmoid()


class SideMerge(nn.Module):
    """h' = O ReLU(Σ_j weight_j u_j + u_deep) + tanh(g / 0.1) h_last, token by token.

    weight_j = a_j / Σ_i a_i with a_j = ReLU(w · (u_j ∘ u_deep)) / ρ_j and ρ_j = Σ_i ReLU(cos(u_j, u_i)), over all but
    the last of the side features (..., S, R), which is u_deep. The cosine with a zero vector is 0. ρ_j is at least 1,
    that of u_j with itself, but for a zero u_j, whose a_j is 0 / 0 and counts as 0; where all a_j are 0 so are all
    weights, and their gradients.

    ``score`` w (R,), drawn as an ``nn.Linear`` draws it; ``out`` O (K, R) of zeros and ``g`` a scalar of 1, so that at
    the start h' = h_last: tanh(10) is 1 in float32.
    """

    stands_beside_layers = True

    def __init__(self, inputs: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.score = nn.Parameter(_drawn(1, width, dtype, device).detach()[0])
        self.out = nn.Parameter(torch.zeros(inputs, width, dtype=dtype, device=device))
        self.g = nn.Parameter(torch.ones((), dtype=dtype, device=device))

    def forward(self, features: Tensor, last: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            z = self._mixed(features.to(torch.promote_types(features.dtype, torch.float32)))
        merged = linear(z.relu().to(self.out.dtype), self.out) + (self.g / TEMPERATURE).tanh() * last.to(self.out.dtype)
        return merged.to(last.dtype)

    def _mixed(self, features: Tensor) -> Tensor:
        """Σ_j weight_j u_j + u_deep, in float32 or wider: what keeps zeros from dividing is 0 in float16."""
        shallow, deep = features[..., :-1, :], features[..., -1, :]
        units = normalize(shallow, dim=-1)
        redundancy = (units @ units.mT).relu().sum(-1).clamp(min=0.5)  # below 1 for a zero u_j alone
        amounts = linear(shallow * deep[..., None, :], self.score.to(features.dtype)).relu() / redundancy
        weights = normalize(amounts, p=1.0, dim=-1)
        return (weights[..., None] * shallow).sum(-2) + deep


def _drawn(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    bound = 1 / math.sqrt(columns)
    return nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device).uniform_(-bound, bound))


class SideStack(WholeStack):
    """Layers whose early ones run without gradients: the late ones get what a side path makes of all their outputs.

    An early layer has a ``sherl`` of :class:`SideFeature`, the first late one of :class:`SideMerge`. The side path is
    token-wise, so that caches of keys and values work as without it.

    Args:
        layers: of the model; shared, not copied.
        late_layers: how many are back-propagated.
    """

    def __init__(self, layers: nn.ModuleList, late_layers: int) -> None:
        super().__init__(layers)
        self.late_layers = late_layers

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layers: list[Any] = list(self.children())
        early, late = layers[: -self.late_layers], layers[-self.late_layers :]
        features = []
        for layer in early:
            with torch.no_grad():
                hidden = first(layer(hidden, *args, **kwargs))
            features.append(layer.sherl(hidden))
        hidden = late[0].sherl(torch.stack(features, -2), hidden)
        for layer in late:
            hidden = first(layer(hidden, *args, **kwargs))
        return hidden


def sherl(model: nn.Module, config: SHERLConfig | None = None) -> Report:
    """Give a transformers model SHERL's side path, in place (Diao et al., arXiv 2407.07523).

    The early layers are frozen, and nothing of them is kept for backward but their outputs, which the side path reads.
    The side path trains, and of the late layers and above what trained before: adapt the late layers first
    (:func:`~lowrank_kernels.adapt`, :func:`late_targets`). At the start the model computes what it did. Gradients reach
    neither the embeddings nor the early layers. The side path is of float32 over half precision. The model is run once,
    on three tokens, to see how it calls its layers.

    Returns:
        A report. Its ``undo()`` puts the list of layers back, without the side path: the model that was.

    Raises:
        TypeError: not a module, or not a SHERLConfig.
        ValueError: a model whose layers are not recognised, or that has a side path; layers that are not called alike,
            one after another; no early layer; LoRA or another method's layers in an early one. The model is then as it
            was.
    """
    config = SHERLConfig() if config is None else config
    if not isinstance(config, SHERLConfig):
        raise TypeError(f"sherl: expected config to be a SHERLConfig, got {type(config).__name__}")
    if isinstance(model, nn.Module) and any(isinstance(m, SideStack) for _, m in named_modules(model)):
        raise ValueError("sherl: this model has a side path already; call undo() on its report first")
    found = find_stack(model, "sherl")
    check_plain(found, "sherl")
    layers = list(found.layers.children())
    number = len(layers) - config.late_layers
    if number < 1:
        raise ValueError(
            f"sherl: expected late_layers to leave one or more of {len(layers)} layers below, got {config.late_layers}"
        )
    adapted = [name for name, m in found.layers[:number].named_modules() if isinstance(m, AroundBase)]
    adapted += [name for name, _ in found.layers[:number].named_parameters() if ".lora_" in name]  # PEFT's
    if adapted:
        raise ValueError(
            f"sherl: expected no adapted layers below the last {config.late_layers} layers, where no gradient comes, "
            f"got {found.path}.{adapted[0]}; adapt the modules of lk.side.late_targets alone"
        )
    hidden = record_calls(model, found, "sherl")[0].hidden
    width = hidden.shape[-1]
    wide = torch.float32 if hidden.dtype in (torch.bfloat16, torch.float16) else hidden.dtype
    trained = [p for layer in layers[:number] for p in layer.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    parts = [SideFeature(width, config.width, wide, hidden.device) for _ in range(number)]
    for layer, part in zip(layers, [*parts, SideMerge(width, config.width, wide, hidden.device)], strict=False):
        layer.sherl = part.train(layer.training)
    put_back = found.replace(SideStack(found.layers, config.late_layers), "sherl")

    def undo() -> None:
        put_back()
        for p in trained:
            p.requires_grad_(True)

    kinds = [f"side feature of {config.width}"] * number + [f"merge of {number} side features"]
    replaced = tuple(
        Replaced(f"{found.path}.{i}", "SHERL", (width, width), config.width, kind) for i, kind in enumerate(kinds)
    )
    trainable, total = count_parameters(model)
    return Report("SHERL", replaced, (), trainable, total, _undo=[undo])


def late_targets(model: nn.Module, config: SHERLConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Paths of the modules of these names in the late layers, for ``LoRAConfig(target_modules=...)``.

    Raises:
        TypeError: one word in place of names.
        ValueError: none, or layers that are not recognised.
    """
    if isinstance(names, str):
        raise TypeError(f"sherl: expected names to be a tuple of names, got {names!r}; write ({names!r},)")
    stack = find_stack(model, "sherl")
    start = len(stack.layers) - config.late_layers
    found = tuple(
        f"{stack.path}.{i}.{path}"
        for i, layer in enumerate(stack.layers.children())
        for path, _ in named_modules(layer)
        if i >= start and path.rpartition(".")[2] in names
    )
    if not found:
        raise ValueError(f"sherl: expected modules of {', '.join(names)} in {stack.path}, found none")
    return found


def config_of_sherl(model: nn.Module, op: str) -> SHERLConfig:
    """The config of a model that :func:`sherl` made. Raises ValueError of any other."""
    found = [m for _, m in named_modules(model) if isinstance(m, SideStack)]
    if len(found) != 1:
        raise ValueError(f"{op}: expected a model that lk.side.sherl made, got a {type(model).__name__}")
    return SHERLConfig(found[0].late_layers, len(found[0][0].sherl.down))
