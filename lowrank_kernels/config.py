"""What to adapt, and how: one dataclass a method."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from .init.factors import INITS
from .nn.conv import DoRAConv1d, DoRAConv2d, DoRAConv3d, LoRAConv1d, LoRAConv2d, LoRAConv3d
from .nn.dora import DoRALinear
from .nn.embedding import DoRAEmbedding, LoRAEmbedding
from .nn.experts import LoRAExperts, expert_weights, looks_like_experts, why_not_experts
from .nn.frozen import why_not_frozen
from .nn.lamda import LaMDALinear
from .nn.lora import LoRALayer, LoRALinear, check_lora_settings
from .nn.multi_lora import MultiLoRALinear
from .nn.svft import SVFTLinear, check_pattern, check_pattern_fits
from .nn.velora import VeLoRALinear
from .patterns import FilePattern

ALL_LINEAR = "all-linear"
ALL_EXPERTS = "all-experts"
BIAS_MODES = ("none", "all", "lora_only")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which linears a method takes. A method is a subclass that says what a linear becomes, in :meth:`layer`.

    Args:
        target_modules: names, each of which takes a module of exactly that path or of a path that ends in
            ``.name``; or one regular expression, matched against the whole path; or "all-linear": every
            linear but the output head, with a rank that is lowered where a linear is too small for it.
        exclude_modules: names or a regular expression, matched in the same way; they win.
        bias: which biases of the model train: "none", "all", or "lora_only" (those of the replaced linears).

    Raises:
        TypeError, ValueError: at construction, for a value of the wrong kind.
    """

    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    bias: str = "none"
    _targets_more: ClassVar[bool] = False
    """True of an instance that has targets beside ``target_modules``, which may then be empty."""

    def __post_init__(self) -> None:
        for option in ("target_modules", "exclude_modules"):
            value = getattr(self, option)
            if isinstance(value, str):
                self._compile(option, value)
            elif isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) for v in value):
                ordered = tuple(sorted(value) if isinstance(value, (set, frozenset)) else value)
                object.__setattr__(self, option, ordered)
            else:
                raise TypeError(
                    f"{type(self).__name__}: expected {option} to be names, a regular expression or "
                    f"{ALL_LINEAR!r}, got {value!r}"
                )
        if not self.target_modules and not self._targets_more:
            raise ValueError(
                f"{type(self).__name__}: expected target_modules to name something, got {self.target_modules!r}"
            )
        if self.bias not in BIAS_MODES:
            raise ValueError(
                f"{type(self).__name__}: expected bias to be one of {', '.join(BIAS_MODES)}, got {self.bias!r}"
            )

    def trains_whole(self, name: str) -> bool:
        """True if the module at path ``name`` trains as it is, and takes no adapter."""
        return False

    def why_not(self, module: nn.Module) -> str | None:
        """Why this method has no layer for the module; None where it has one."""
        return why_not_frozen(module)

    def expert_targets(self, name: str, module: nn.Module) -> list[str]:
        """Which weights of the block of experts at path ``name`` get a correction."""
        return []

    def layer(self, name: str, linear: nn.Linear) -> nn.Module:
        """The layer that replaces ``linear``, found at path ``name``. Shares its weight; has ``base_layer``."""
        raise NotImplementedError

    def rank_of(self, name: str) -> int:
        """R of the module at path ``name``."""
        raise NotImplementedError

    def size_of(self, name: str) -> str:
        """How large the correction of the module at path ``name`` is, in the words of a report."""
        return f"rank {self.rank_of(name)}"

    def check_fits(self, name: str, n: int, k: int) -> None:
        """Raise ValueError where the module at path ``name`` cannot be what it should, its weight being (N, K)."""

    def fitted(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[AdapterConfig, tuple[str, ...]]:
        """This config, changed to fit weights of these shapes (N, K), by module, and what has changed, in words."""
        return self, ()

    def unused(self, names: Sequence[str], whole: Sequence[str] = ()) -> list[str]:
        """Settings that none of the replaced modules, and none of those that train whole, uses; in words."""
        return []

    def _compile(self, option: str, pattern: str) -> None:
        if isinstance(pattern, FilePattern):  # known to be one
            return
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{type(self).__name__}: expected {option} to hold a regular expression, got {pattern!r}: {error}"
            ) from None


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Linears become :class:`~lowrank_kernels.nn.LoRALinear`: y = x Wᵀ + bias + s ((drop(x) Aᵀ) ∘ gate) Bᵀ.

    So does transformers' Conv1D. Embeddings and convolutions that ``target_modules`` names become ``LoRAEmbedding``,
    ``LoRAConv1d``, ``LoRAConv2d`` and ``LoRAConv3d``; "all-linear" leaves them alone.

    Args:
        r, alpha, dropout, rslora, lora_bias, gate, init, train, dtype, velora: as for ``LoRALinear``. alpha may be 0,
            which leaves the base as it is, or negative, as in PEFT. Only linears take velora.
        rank_pattern, alpha_pattern: {regular expression: value}, for the modules whose path it matches, whole
            or after a dot; the first that matches wins. As in PEFT.
        modules_to_save: names of modules that train whole and are saved with the adapter, such as a new head; each
            takes every module whose path ends in it. A copy trains, ``undo()`` puts the model's own module back.
        target_parameters: names of stacked weights of experts, such as "experts.gate_up_proj", each of which takes
            those whose path is it or ends in ``.name``, as in PEFT; or "all-experts". Their blocks become
            :class:`~lowrank_kernels.nn.LoRAExperts`, without gate, lora_bias and velora. With it ``target_modules``
            may be empty.
        (and those of :class:`AdapterConfig`)
    """

    _switches: ClassVar[tuple[str, ...]] = ("rslora", "lora_bias", "gate")
    _layers: ClassVar[Mapping[type[nn.Module], type[LoRALayer]]] = {
        nn.Embedding: LoRAEmbedding,
        nn.Conv1d: LoRAConv1d,
        nn.Conv2d: LoRAConv2d,
        nn.Conv3d: LoRAConv3d,
        nn.Module: LoRALinear,
    }

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    lora_bias: bool = False
    gate: bool = False
    init: str = "kaiming"
    train: str = "both"
    dtype: torch.dtype | None = None
    velora: int | None = None
    modules_to_save: Sequence[str] = ()
    target_parameters: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        kind, parameters = type(self).__name__, self.target_parameters
        if parameters != ALL_EXPERTS:
            if not isinstance(parameters, (list, tuple, set, frozenset)) or not all(
                isinstance(name, str) and name for name in parameters
            ):
                raise TypeError(
                    f"{kind}: expected target_parameters to be names or {ALL_EXPERTS!r}, got {parameters!r}"
                )
            object.__setattr__(self, "target_parameters", tuple(dict.fromkeys(parameters)))
        object.__setattr__(self, "_targets_more", bool(parameters))
        super().__post_init__()
        saved = self.modules_to_save
        if not isinstance(saved, (list, tuple, set, frozenset)) or not all(isinstance(m, str) and m for m in saved):
            raise TypeError(f"{kind}: expected modules_to_save to be names of modules, got {saved!r}")
        ordered = sorted(saved) if isinstance(saved, (set, frozenset)) else saved
        object.__setattr__(self, "modules_to_save", tuple(dict.fromkeys(ordered)))
        for option in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, option)
            if not isinstance(patterns, Mapping):
                raise TypeError(f"{kind}: expected {option} to be a dict of pattern to value, got {patterns!r}")
            for pattern in patterns:
                if not isinstance(pattern, str):
                    raise TypeError(f"{kind}: expected the keys of {option} to be strings, got {pattern!r}")
                self._compile(option, pattern)
                if not isinstance(pattern, FilePattern):
                    self._compile(option, _after_any_dot(pattern))
        for option in self._switches:
            if not isinstance(getattr(self, option), bool):
                raise TypeError(f"{kind}: expected {option} to be True or False, got {getattr(self, option)!r}")
        check_lora_settings(
            kind,
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            train=self.train,
            dtype=self.dtype,
            rslora=self.rslora,
        )
        for pattern, r in self.rank_pattern.items():
            check_lora_settings(f"{kind}: rank_pattern[{pattern!r}]", r=r, alpha=0.0, dropout=0.0)
        for pattern, alpha in self.alpha_pattern.items():
            check_lora_settings(f"{kind}: alpha_pattern[{pattern!r}]", r=1, alpha=alpha, dropout=0.0)
        ranks = self.r, *self.rank_pattern.values()
        alphas = [abs(alpha) for alpha in (self.alpha, *self.alpha_pattern.values()) if alpha] or [0.0]
        for r, alpha in ((min(ranks), max(alphas)), (max(ranks), min(alphas))):  # the largest scaling, and the smallest
            check_lora_settings(kind, r=r, alpha=alpha, dropout=0.0, rslora=self.rslora)
        if self.velora is not None:
            _check_velora(kind, self.velora)
        if self.init not in INITS:
            raise ValueError(f"{kind}: expected init to be one of {', '.join(INITS)}, got {self.init!r}")

    def rank_of(self, name: str) -> int:
        return _lookup(self.rank_pattern, name, self.r)

    def trains_whole(self, name: str) -> bool:
        return name.endswith(tuple(self.modules_to_save))

    def alpha_of(self, name: str) -> float:
        """alpha of the module at path ``name``."""
        return _lookup(self.alpha_pattern, name, self.alpha)

    def layer_class(self, module: nn.Module) -> type[LoRALayer]:
        """The class of the layer that replaces the module."""
        return next(layer for kind, layer in self._layers.items() if isinstance(module, kind))

    def why_not(self, module: nn.Module) -> str | None:
        if self.lora_bias and isinstance(module, nn.Embedding):
            return "lora_bias, which an embedding has no place for"
        if self.velora is not None and self.layer_class(module) is not LoRALinear:
            return "velora, which linears alone have"
        return self.layer_class(module).why_not(module)

    def expert_targets(self, name: str, module: nn.Module) -> list[str]:
        if not self.target_parameters or not looks_like_experts(module):
            return []
        every = list(expert_weights(module))
        if self.target_parameters == ALL_EXPERTS:
            return every
        return [own for own in every if names_match(self.target_parameters, f"{name}.{own}")]

    def why_not_experts(self, module: nn.Module) -> str | None:
        """Why this method has no layer for a block of experts; None where it has one."""
        for option in ("gate", "lora_bias", "velora"):
            if getattr(self, option):
                return f"{option}, which experts have not"
        return why_not_experts(module)

    def experts_layer(self, name: str, module: nn.Module) -> LoRAExperts:
        """The layer that replaces the block of experts at path ``name``."""
        own = self.expert_targets(name, module)
        return LoRAExperts(
            module,
            {of: self.rank_of(f"{name}.{of}") for of in own},
            alpha={of: self.alpha_of(f"{name}.{of}") for of in own},
            dropout=self.dropout,
            rslora=self.rslora,
            dora=isinstance(self, DoRAConfig),
            init=self.init,
            train=self.train,
            dtype=self.dtype,
        )

    def layer(self, name: str, linear: nn.Module) -> LoRALayer:
        velora = {} if self.velora is None else {"velora": self.velora}
        settings = self._settings() | velora
        return self.layer_class(linear)(linear, self.rank_of(name), alpha=self.alpha_of(name), **settings)

    def _settings(self) -> dict[str, Any]:
        """Of every layer, beside its rank and alpha."""
        names = ("dropout", "rslora", "lora_bias", "gate", "init", "train", "dtype")
        return {name: getattr(self, name) for name in names}

    def check_fits(self, name: str, n: int, k: int) -> None:
        _check_rank(self.rank_of(name), name, n, k, "lower r, or give it a rank of its own in rank_pattern")
        if self.velora is not None:
            _check_divides(self.velora, name, k)

    def fitted(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[AdapterConfig, tuple[str, ...]]:
        """With a rank of min(N, K) where that is lower than ``r``; alpha stays."""
        lowered = {
            name: min(shape)
            for name, shape in shapes.items()
            if 0 < min(shape) < self.r and _lookup(self.rank_pattern, name, None) is None
        }
        notes = tuple(
            f"rank {self.r} of {name} was lowered to {r}, the smaller side of its weight" for name, r in lowered.items()
        )
        own = {"^" + re.escape(name): r for name, r in lowered.items()}
        return (replace(self, rank_pattern=own | dict(self.rank_pattern)), notes) if own else (self, ())

    def scaling_of(self, name: str) -> float:
        """s of the module at path ``name``."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.rslora else rank)

    def unused(self, names: Sequence[str], whole: Sequence[str] = ()) -> list[str]:
        return [f"modules_to_save[{m!r}]" for m in self.modules_to_save if not any(w.endswith(m) for w in whole)] + [
            f"{option}[{pattern!r}]"
            for option in ("rank_pattern", "alpha_pattern")
            for pattern in getattr(self, option)
            if not any(_lookup({pattern: True}, name, False) for name in names)
        ]


@dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """Linears become :class:`~lowrank_kernels.nn.DoRALinear`: y = g ∘ (x Wᵀ + s (drop(x) Aᵀ) Bᵀ) + bias, g = m / n.

    Args:
        dropout_base, detach_norm: as for ``DoRALinear``.
        (and those of :class:`LoRAConfig`, without ``lora_bias`` and ``velora``)
    """

    _switches: ClassVar[tuple[str, ...]] = ("rslora", "lora_bias", "gate", "dropout_base", "detach_norm")
    _layers: ClassVar[Mapping[type[nn.Module], type[LoRALayer]]] = {
        nn.Embedding: DoRAEmbedding,
        nn.Conv1d: DoRAConv1d,
        nn.Conv2d: DoRAConv2d,
        nn.Conv3d: DoRAConv3d,
        nn.Module: DoRALinear,
    }

    dropout_base: bool = False
    detach_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise ValueError("DoRAConfig: expected lora_bias to be False, got True")
        if self.velora is not None:
            raise ValueError(f"DoRAConfig: expected velora to be None, got {self.velora!r}; LoRAConfig has it")

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"dropout_base": self.dropout_base, "detach_norm": self.detach_norm}

    def why_not_experts(self, module: nn.Module) -> str | None:
        if self.dropout_base and self.dropout:
            return "dropout_base with dropout, which experts have not"
        return super().why_not_experts(module) if self.detach_norm else "detach_norm=False, which experts have not"


@dataclass(frozen=True, kw_only=True)
class LaMDAConfig(LoRAConfig):
    """Linears become :class:`~lowrank_kernels.nn.LaMDALinear`: y = x Wᵀ + bias + s (drop(x) Aᵀ) (B S - B₀ S₀)ᵀ.

    Args:
        (those of :class:`LoRAConfig`, without ``lora_bias``, ``gate``, ``init``, ``train``, ``velora`` and
            ``target_parameters``)
    """

    _layers: ClassVar[Mapping[type[nn.Module], type[LoRALayer]]] = {nn.Module: LaMDALinear}

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {"lora_bias": False, "gate": False, "init": "kaiming", "train": "both", "velora": None}
        defaults["target_parameters"] = ()
        for option, only in defaults.items():
            if getattr(self, option) != only:
                raise ValueError(f"LaMDAConfig: expected {option} to be left out, got {getattr(self, option)!r}")

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("dropout", "rslora", "dtype")}


@dataclass(frozen=True, kw_only=True)
class MultiLoRAConfig(AdapterConfig):
    """Linears become :class:`~lowrank_kernels.nn.MultiLoRALinear`: an adapter of each rank, trained in one batch.

    ``with lk.nn.use_adapters(ids)`` says which adapter each sequence has; ``lk.save_adapter(model, folder, adapter=i)``
    writes one of them.

    Args:
        ranks: R of each adapter.
        alpha, rslora, dora, init, dtype: as for ``LoRALinear``, of all adapters.
        dropout: of all adapters, or one each.
        (and those of :class:`AdapterConfig`; ``bias`` is "none": the adapters would share it)
    """

    ranks: Sequence[int]
    alpha: float = 16.0
    dropout: float | Sequence[float] = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ranks", tuple(self.ranks))
        each = [self.dropout] * len(self.ranks) if isinstance(self.dropout, (int, float)) else list(self.dropout)
        if not self.ranks or len(each) != len(self.ranks):
            raise ValueError(
                f"MultiLoRAConfig: expected a rank, and a dropout, an adapter, got {len(self.ranks)} and {len(each)}"
            )
        if self.bias != "none":
            raise ValueError(f"MultiLoRAConfig: expected bias to be 'none', got {self.bias!r}")
        for i in range(len(self.ranks)):
            self.of_adapter(i)

    def of_adapter(self, adapter: int) -> LoRAConfig:
        """The settings of one adapter by itself."""
        dropout = self.dropout if isinstance(self.dropout, (int, float)) else self.dropout[adapter]
        kind = DoRAConfig if self.dora else LoRAConfig
        return kind(
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            r=self.ranks[adapter],
            alpha=self.alpha,
            dropout=dropout,
            rslora=self.rslora,
            init=self.init,
            dtype=self.dtype,
        )

    def rank_of(self, name: str) -> int:
        return sum(self.ranks)

    def check_fits(self, name: str, n: int, k: int) -> None:
        _check_rank(max(self.ranks), name, n, k, "lower ranks, or leave it out by exclude_modules")

    def layer(self, name: str, linear: nn.Linear) -> MultiLoRALinear:
        return MultiLoRALinear.from_linear(
            linear,
            self.ranks,
            alpha=self.alpha,
            rslora=self.rslora,
            dora=self.dora,
            dropout=self.dropout,
            init=self.init,
            dtype=self.dtype,
        )


@dataclass(frozen=True, kw_only=True)
class SVFTConfig(AdapterConfig):
    """Linears become :class:`~lowrank_kernels.nn.SVFTLinear`: y = x Wᵀ + bias + ((x V) Mᵀ) Uᵀ, W = U Σ Vᵀ.

    Args:
        pattern: which places of M train: "plain", "banded", "random" or "top", as for ``SVFTLinear.from_linear``; or
            {path: places (E, 2)}, for just the modules of these paths.
        band, k, dtype: as for ``SVFTLinear.from_linear``.
        seed: of "random"; each module has places of its own, by its path.
        (and those of :class:`AdapterConfig`)
    """

    pattern: str | Mapping[str, torch.Tensor] = "plain"
    band: int | None = None
    k: int | None = None
    seed: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, (str, Mapping)):
            raise TypeError(f"SVFTConfig: expected pattern to be a word or a dict, got {type(self.pattern).__name__}")
        check_pattern("SVFTConfig", self.pattern, self.band, self.k, self.seed)
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"SVFTConfig: expected dtype to be a floating dtype, got {self.dtype!r}")
        if isinstance(self.pattern, Mapping):
            object.__setattr__(self, "target_modules", "|".join(re.escape(name) for name in self.pattern))
        super().__post_init__()

    def layer(self, name: str, linear: nn.Linear) -> SVFTLinear:
        pattern = self.pattern if isinstance(self.pattern, str) else self.pattern[name]
        seed = zlib.crc32(name.encode()) + self.seed
        return SVFTLinear.from_linear(linear, pattern, band=self.band, k=self.k, seed=seed, dtype=self.dtype)

    def check_fits(self, name: str, n: int, k: int) -> None:
        check_pattern_fits(f"adapt: {name}", min(n, k), self.pattern, self.band, self.k)

    def rank_of(self, name: str) -> int:
        """0: a sparse M has no rank of its own."""
        return 0

    def size_of(self, name: str) -> str:
        if not isinstance(self.pattern, str):
            return f"{len(self.pattern[name])} places of M"
        words = {"banded": f", {self.band} on each side", "random": f", {self.k}", "top": f", {self.k}"}
        return f"M {self.pattern}{words.get(self.pattern, '')}"

    def unused(self, names: Sequence[str], whole: Sequence[str] = ()) -> list[str]:
        missing = [name for name in self.pattern if name not in names] if isinstance(self.pattern, Mapping) else []
        if missing:
            raise ValueError(
                f"adapt: expected every module of pattern to be a plain nn.Linear of this model, which {len(missing)} "
                f"are not, first {missing[0]}"
            )
        return []


@dataclass(frozen=True, kw_only=True)
class VeLoRAConfig(AdapterConfig):
    """Linears become :class:`~lowrank_kernels.nn.VeLoRALinear`: all of W and their biases train, and z is saved of x.

    For the factors of LoRA take ``LoRAConfig(velora=...)``.

    Args:
        velora: sub-tokens of a token, a divisor of each linear's K.
        (and those of :class:`AdapterConfig`)
    """

    velora: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_velora("VeLoRAConfig", self.velora)

    def why_not(self, module: nn.Module) -> str | None:
        if not isinstance(module, nn.Linear):
            return f"not a dense nn.Linear but a {type(module).__name__}, which does not train"
        return super().why_not(module)

    def layer(self, name: str, linear: nn.Linear) -> VeLoRALinear:
        return VeLoRALinear(linear, self.velora)

    def rank_of(self, name: str) -> int:
        """0: all of W trains."""
        return 0

    def size_of(self, name: str) -> str:
        return f"all of W, {self.velora} sub-tokens"

    def check_fits(self, name: str, n: int, k: int) -> None:
        _check_divides(self.velora, name, k)


def names_match(wanted: str | Sequence[str], name: str) -> bool:
    """Whether a module's path is meant: a regular expression for all of it, or one of the names it is or ends in."""
    if isinstance(wanted, str):
        return _matches(wanted, name)
    return any(ending in wanted for ending in endings(name))


def endings(name: str) -> list[str]:
    """The path, and what of it follows each dot: "a.b.c", "b.c" and "c"."""
    return [name] + [name[at + 1 :] for at, c in enumerate(name) if c == "."]


def disagreement(patterns: Mapping[str, Any], name: str) -> tuple[str, str] | None:
    """Two patterns that match the module at path ``name`` and have different values; None where all agree."""
    matching = [p for p in patterns if _matches_ending(p, name)]
    return next(((matching[0], p) for p in matching[1:] if patterns[p] != patterns[matching[0]]), None)


def _matches(pattern: str, name: str) -> bool:
    if isinstance(pattern, FilePattern):
        return pattern.fullmatch(name)
    return re.fullmatch(pattern, name) is not None


def _matches_ending(pattern: str, name: str) -> bool:
    """Whether a pattern of rank_pattern or alpha_pattern matches the path, or what follows one of its dots."""
    if isinstance(pattern, FilePattern):
        return pattern.matches_ending(name)
    return re.fullmatch(_after_any_dot(pattern), name) is not None


def _after_any_dot(pattern: str) -> str:
    return rf"(?:.*\.)?(?:{pattern})"


def _check_rank(r: int, name: str, n: int, k: int, cure: str) -> None:
    if r > min(n, k):
        raise ValueError(
            f"adapt: expected a rank of at most min(N, K) = {min(n, k)} for {name} of shape (N, K) = ({n}, {k}), "
            f"got {r}; {cure}"
        )


def _check_velora(kind: str, velora: int) -> None:
    if isinstance(velora, bool) or not isinstance(velora, int) or velora < 1:
        raise ValueError(f"{kind}: expected velora to be an integer of at least 1, got {velora!r}")


def _check_divides(velora: int, name: str, k: int) -> None:
    if k % velora:
        raise ValueError(
            f"adapt: expected velora, a number of sub-tokens, to divide K = {k} of {name}, got {velora}; take another "
            f"divisor, or leave the module out by exclude_modules"
        )


def _lookup(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for p, value in patterns.items() if _matches_ending(p, name)), default)
