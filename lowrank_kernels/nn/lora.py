"""``LoRALinear``: a frozen linear and its trained low-rank correction; and what it shares with layers like it."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import LoRAPart
from ..finite import all_finite
from ..functional import check_flag, fold_gate, lora_linear, under_autocast
from ..init.factors import INITS, init_factors_
from ..merge import merge_lora_
from ..weights import ROUNDINGS, FrozenWeight
from .base_only import runs_base_alone
from .coded import CodedLinear
from .frozen import AroundBase, is_tracked_view, must_be_called, why_not_frozen, why_not_plain
from .matrix import as_matrix, frozen_weight, is_conv1d, matrix_shape, write_matrix_
from .sharded import fill_, is_dtensor, own_part, whole, why_not_written
from .velora import Projecting

logger = logging.getLogger("lowrank_kernels")
TRAIN = {"both": (True, True), "a": (True, False), "b": (False, True)}


class _Merged(NamedTuple):
    """What a merge added to the weight: unmerging takes out this, even if the factors have changed since.

    Of a sharded weight, B and the bias are those of this rank's rows.
    """

    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scaling: float


class LoRALayer(AroundBase):
    """A frozen module with a weight W and its correction s B A: what all layers of this kind have in common.

    A kind says in :meth:`why_not` which modules it wraps, in :meth:`shapes` which tensors its correction has, in
    :meth:`make_factors` and :meth:`factors` where they are, and in ``forward`` what it computes. Merging is the same
    for all: W ← W + s B A, where W is the weight as a matrix (``matrix``).
    """

    wraps: ClassVar[str]
    """What ``base_layer`` is, in words."""
    lora_A: Any
    lora_B: Any
    init: str
    """How the factors start."""
    sampled: str
    """The factor that is sampled at the start, "a" or "b"; the other is zero."""

    def __init__(
        self,
        base_layer: Any,
        r: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
        gate: bool = False,
        init: str = "kaiming",
        train: str = "both",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        reason = self.why_not(base_layer)
        if reason is not None:
            raise TypeError(f"{kind}: expected a plain {self.wraps}, but this one cannot be wrapped: {reason}")
        check_lora_settings(kind, r=r, alpha=alpha, dropout=dropout, train=train, dtype=dtype, rslora=rslora, init=init)
        check_flag(kind, "lora_bias", lora_bias)
        check_flag(kind, "gate", gate)
        weight = frozen_weight(base_layer)
        dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.weight_shared_with: tuple[str, ...] = ()
        self._merged: Any = None
        self.base_layer = base_layer
        self.register_parameter("lora_gate", None)
        self.init, self.sampled = init, self.sampled_of(train)
        self.make_factors(init, train, lora_bias, device=weight.device, dtype=dtype)
        if gate:
            self.lora_gate = nn.Parameter(torch.ones(r, device=weight.device, dtype=dtype))
        base_layer.requires_grad_(False)
        self.train(base_layer.training)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why this layer cannot wrap the module; None where it can."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, base_layer: nn.Module, r: int, lora_bias: bool = False) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the correction, as in a file of PEFT's, A and B first."""
        raise NotImplementedError

    def make_factors(self, init: str, train: str, lora_bias: bool, **options: Any) -> None:
        """Give the layer the parameters that :meth:`shapes` names, on the device and of the dtype in ``options``."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, K) and B (N, R), or with a gate B ∘ gate, as matrices over :attr:`matrix`."""
        raise NotImplementedError

    @classmethod
    def tensors(
        cls, base_layer: nn.Module, r: int, lora_bias: bool = False, gate: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """:meth:`shapes`, and the gate's, for which PEFT has no name."""
        return cls.shapes(base_layer, r, lora_bias) | ({"lora_gate": (r,)} if gate else {})

    @classmethod
    def sampled_of(cls, train: str) -> str:
        """Which factor is sampled where ``train`` says what trains: the one that the trained one is zero beside."""
        return "b" if train == "a" else "a"

    def gated(self, lora_b: Tensor) -> Tensor:
        """B ∘ gate, where there is one."""
        return lora_b if self.lora_gate is None else fold_gate(lora_b, self.lora_gate)

    def reset_parameters(self) -> None:
        """Start the correction as at construction, over the weight as it is now: the factors are sampled anew, gates
        are 1, and DoRA's magnitudes the norms of the rows.

        For a model that was adapted on the meta device, and got its weights afterwards. Of shards (FSDP2) every rank
        has to call this; they hold what rank 0 has drawn.

        Raises:
            ValueError: a layer that is merged, or whose weights are on the meta device.
        """
        if self.merged or any(p.is_meta for p in self.parameters()):
            raise ValueError(
                f"{type(self).__name__}.reset_parameters: expected an unmerged layer with its weights at hand; call "
                f"unmerge_(), or to_empty(device=...) and load the base model's weights first"
            )
        a, b = self.factor_parameters()
        drawn = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (a, b)]
        self.start_factors_(*drawn)
        for p, values in zip((a, b), drawn, strict=True):
            fill_(p, values)
        if self.lora_bias is not None:
            fill_(self.lora_bias, torch.zeros(self.out_features))
        if self.lora_gate is not None:
            fill_(self.lora_gate, torch.ones(self.r))

    def start_factors_(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Sample one factor and set the other to zero; both have the shapes of their parameters."""
        init_factors_(lora_a.flatten(1), lora_b.flatten(1), self.init, sampled=self.sampled)

    def factor_parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters of A (R, ...) and B (N, R, ...)."""
        name_a, name_b, *_ = self.shapes(self.base_layer, self.r)
        return attrgetter(name_a)(self), attrgetter(name_b)(self)

    @torch.no_grad()
    def change_ranks_(self, keep: Sequence[int], added: int = 0, *, scaling: float | None = None) -> None:
        """Keep some ranks, in this order, and add others that change nothing: A sampled as by PEFT, B 0, gate 1; where
        only A trains, B sampled and A 0.

        The parameters stay the same objects, with other shapes and no gradients. s stays, so that alpha changes.

        Args:
            keep: which of the R ranks, each once.
            added: how many to add.
            scaling: s, where it is known better than from alpha, which has been rounded.

        Raises:
            ValueError: no rank left, or one that there is not; a layer that is merged, or sharded.
        """
        op, scaling = f"{type(self).__name__}.change_ranks_", self.scaling if scaling is None else scaling
        if self.merged:
            raise ValueError(f"{op}: expected an unmerged layer; call unmerge_()")
        a, b = self.factor_parameters()
        if is_dtensor(a) or is_dtensor(b) or a.shape[0] != self.r:
            raise ValueError(f"{op}: expected whole factors, got shards; allocate ranks before sharding")
        if sorted(set(keep)) != sorted(keep) or not all(0 <= i < self.r for i in keep):
            raise ValueError(f"{op}: expected ranks from 0 to {self.r - 1}, each once, got {list(keep)}")
        if added < 0 or not len(keep) + added:
            raise ValueError(f"{op}: expected a rank to be left, and added of at least 0, got {len(keep)} and {added}")
        index = torch.as_tensor(list(keep), dtype=torch.long, device=a.device)
        new_a, new_b = a.new_zeros(added, *a.shape[1:]), b.new_zeros(b.shape[0], added, *b.shape[2:])
        if a.requires_grad and not b.requires_grad:
            bound = 1.0 / math.sqrt(len(keep) + added)  # as start_ has it, over the columns of all B
            new_b.uniform_(-bound, bound)
        elif new_a.numel():
            nn.init.kaiming_uniform_(new_a.flatten(1), a=math.sqrt(5))
        gate = self.lora_gate
        self._take(
            torch.cat([a[index], new_a]),
            torch.cat([b[:, index], new_b], dim=1),
            None if gate is None else torch.cat([gate[index], gate.new_ones(added)]),
        )
        self.alpha = scaling * (math.sqrt(self.r) if self.rslora else self.r)

    def _take(self, lora_a: Tensor, lora_b: Tensor, gate: Tensor | None) -> None:
        """Give the parameters values of another rank."""
        self.r = r = len(lora_a)
        a, b = self.factor_parameters()
        for p, values in ((a, lora_a), (b, lora_b), (self.lora_gate, gate)):
            if p is not None and values is not None:
                _reshape_(p, values)
        for owner, side in ((getattr(self, "lora_A", None), "out"), (getattr(self, "lora_B", None), "in")):
            for what in ("features", "channels"):
                if hasattr(owner, f"{side}_{what}"):
                    setattr(owner, f"{side}_{what}", r)

    @property
    def lora_bias(self) -> Tensor | None:
        """B's own bias (N,), where it has one."""
        return None

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def merged(self) -> bool:
        """Whether the weight holds the correction."""
        return self._merged is not None

    def _call_submodules(self, x: Tensor) -> Tensor:
        """y = base_layer(x) + s lora_B(lora_A(drop(x))), so that whatever is attached to the three runs."""
        y, correction = self.base_layer(x), self._correct(nn.functional.dropout(x, self.dropout, self.training))
        if y.shape != correction.shape or is_dtensor(y) != is_dtensor(correction):
            raise ValueError(
                f"{type(self).__name__}: expected base_layer and lora_B to be split alike, got outputs of "
                f"{type(y).__name__} {tuple(y.shape)} and {type(correction).__name__} {tuple(correction.shape)}; where "
                f"base_layer is split by ColwiseParallel, lora_B has to be, too"
            )
        return (y + correction).to(y.dtype)

    def _correct(self, x: Tensor) -> Tensor:
        """s lora_B(lora_A(x)), by calling both, in the factors' dtype where there is no autocast."""
        if not under_autocast(x):
            x = x.to(self.lora_A.weight.dtype)
        p = self.lora_A(x)
        if self.lora_gate is not None:
            p = (p * self.over_ranks(self.lora_gate)).to(p.dtype)
        return self.scaling * self.lora_B(p)

    def over_ranks(self, vector: Tensor) -> Tensor:
        """A vector (R,) in a shape that scales what lora_A returns."""
        return vector

    def merge_(self, *, requantize: str | None = None) -> Any:
        """W ← W + s B A, in float32, rounded once; forward is then the wrapped module's. Nothing when merged.

        The merged factors are remembered, (N + K) R elements, so that ``unmerge_`` takes out what was put in
        even when the factors have changed since. Of a weight that FSDP2 shards every rank merges its own rows; all
        of them have to call this.

        Args:
            requantize: how a weight that ``lk.quantize_`` stored in few bits is rounded to them again, "nearest" or
                "stochastic" (to one of the two values around, so that the mean is exact). Most updates are smaller
                than the distance of two values, and rounding to the nearest loses them nearly whole: what is kept and
                what is lost is logged, and in :attr:`requantized`. The codes are remembered, and ``unmerge_`` puts them
                back. ``lk.dequantize_`` and then a plain merge keep everything.

        Raises:
            ValueError: a weight that another module uses as well, or that cannot be written just now (offloaded,
                FSDP's gathered copy); one of few bits and no ``requantize``, or of another package's module; a bias to
                merge and none to take it; factors that are not finite. The layer is then as it was.
        """
        if not self.merged:
            self.put_in_(self.prepare_merge(requantize=requantize))
            if self.requantized is not None:
                logger.warning("%s.merge_: %s", type(self).__name__, self.requantized)
        return self

    def prepare_merge(self, *, requantize: str | None = None) -> Any:
        """What ``put_in_`` takes to merge the layer. Raises what ``merge_`` raises; nothing is changed."""
        op, base = f"{type(self).__name__}.merge_", self.base_layer
        check_requantize(op, base, requantize)
        if self.weight_shared_with:
            raise ValueError(
                f"{op}: this weight is also that of {', '.join(self.weight_shared_with)}, which "
                f"would change with it; give the layer a weight of its own and clear weight_shared_with"
            )
        if self.lora_bias is not None and self.bias is None:
            raise ValueError(f"{op}: expected a base layer with a bias to take lora_B.bias, got none")
        if requantize is None:
            _check_written(op, base)
        for name, p, shape in self.correction_parameters():
            if p.is_meta or tuple(p.shape) != shape:
                raise ValueError(f"{op}: expected {name} of shape {shape} at hand, got {tuple(p.shape)} on {p.device}")
            if is_dtensor(base.weight) and shape[0] == self.out_features and not split_alike(base.weight, p):
                raise ValueError(f"{op}: expected {name} to be sharded by rows as the base weight is; it is not")
        for name, p, _ in self.correction_parameters():
            if name != "lora_magnitude_vector" and not all_finite(whole(p.detach())):
                raise ValueError(f"{op}: expected finite factors, and {name} holds NaN or Inf")
        state = self._merge_state()
        return state if requantize is None else self._requantized(state, requantize)

    @torch.no_grad()
    def _requantized(self, state: Any, rounding: str) -> _Stored:
        """The merged weight in the codes of W's format."""
        stored: Any = self.matrix
        old = stored.to(torch.float32).dense()
        merged, bias = old.clone(), self.bias
        self._put_in(merged, None if bias is None else bias.detach().clone(), state)
        new = stored.encoded_again(merged, rounding)
        update, error = merged - old, new.to(torch.float32).dense() - merged
        size = float(update.square().sum())
        kept = 1.0 + float((error * update).sum()) / size if size else 1.0
        lost = float(error.norm()) / size**0.5 if size else 0.0
        report = Requantized(stored.format, rounding, kept, lost)
        return _Stored(state, list(new.parts()), [part.clone() for part in stored.parts()], report)

    @property
    def requantized(self) -> Requantized | None:
        """What a merge into few bits kept, while the layer is merged so."""
        return self._merged.report if isinstance(self._merged, _Stored) else None

    def correction_parameters(self) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        """(name, parameter, its whole shape) of all that the correction consists of."""
        shapes = self.tensors(self.base_layer, self.r, self.lora_bias is not None, self.lora_gate is not None)
        return [(name.removesuffix(".weight"), attrgetter(name)(self), shape) for name, shape in shapes.items()]

    def put_in_(self, state: Any) -> None:
        """Merge what ``prepare_merge`` returned."""
        if isinstance(state, _Stored):
            self.base_layer.store_(state.new)  # type: ignore[operator]
            add_merged_bias(self.bias, state.correction, 1.0)
        else:
            self._put_in(self.base_layer.weight, self.bias, state)
        self._merged = state

    def _merge_state(self) -> Any:
        (lora_a, lora_b), lora_bias = self.factors(), self.lora_bias
        return _Merged(
            whole(lora_a.detach()).clone(),
            self._rows_of_weight(lora_b.detach()).clone(),
            None if lora_bias is None else self._rows_of_weight(lora_bias.detach()).clone(),
            self.scaling,
        )

    def _rows_of_weight(self, tensor: Tensor) -> Tensor:
        """Of a tensor (N, ...), the rows that belong to the rows of W that are here."""
        return own_part(tensor) if is_dtensor(self.base_layer.weight) else whole(tensor)

    def unmerge_(self) -> Any:
        """Take out what ``merge_`` put in: W to within one rounding of the merged weight, which is coarser than W's own
        where the correction is larger than W. Nothing when not merged.

        Raises:
            ValueError: a weight that cannot be written just now, as for ``merge_``.
        """
        if self._merged is not None:
            if isinstance(self._merged, _Stored):
                self.base_layer.store_(self._merged.old)  # type: ignore[operator]
                add_merged_bias(self.bias, self._merged.correction, -1.0)
            else:
                _check_written(f"{type(self).__name__}.unmerge_", self.base_layer)
                self._take_out(self.base_layer.weight, self.bias, self._merged)
            self._merged = None
        return self

    def _put_in(self, weight: Tensor, bias: Tensor | None, state: Any) -> None:
        self._add_to(weight, bias, state, 1.0)

    def _take_out(self, weight: Tensor, bias: Tensor | None, state: Any) -> None:
        self._add_to(weight, bias, state, -1.0)

    @torch.no_grad()
    def _add_to(self, weight: Tensor, bias: Tensor | None, state: _Merged, sign: float) -> None:
        if len(state.lora_b):
            part = own_part(weight)
            matrix, factors = as_matrix(self.base_layer, part), (state.lora_a, state.lora_b)
            if matrix.stride(1) == 1 or not matrix.numel():
                merge_lora_(matrix, *factors, scaling=sign * state.scaling, check_finite=False)
            else:  # Wᵀ ← Wᵀ + s Aᵀ Bᵀ, where the rows of Wᵀ are what is adjacent
                lora_b, lora_a = (factor.T for factor in factors)
                merge_lora_(matrix.T, lora_a, lora_b, scaling=sign * state.scaling, check_finite=False)
            write_matrix_(part, matrix)
        add_merged_bias(bias, state, sign)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As of any module; while merged, the base weight and bias in it are unmerged copies."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if isinstance(self._merged, _Stored):
            base_layer: Any = self.base_layer
            for name, part in zip(base_layer.part_names, self._merged.old, strict=True):
                state[f"{prefix}base_layer.{name}"] = part.clone()
            key = prefix + "base_layer.bias"
            if key in state:
                state[key] = state[key].detach().clone()
                add_merged_bias(state[key], self._merged.correction, -1.0)
        elif self._merged is not None:
            base = {name: prefix + "base_layer." + name for name in ("weight", "bias")}
            copies = {name: state[key].detach().clone() for name, key in base.items() if key in state}
            self._take_out(copies["weight"], copies.get("bias"), self._merged)
            state.update({base[name]: copy for name, copy in copies.items()})
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + "base_layer." + name in state_dict for name in ("weight", "bias")):
            # What is about to arrive is unmerged; what does not arrive has to be, too. On the meta device nothing is.
            if self._merged is not None and self.base_layer.weight.is_meta:
                self._merged = None
            self.unmerge_()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, alpha={self.alpha}, scaling={self.scaling:.6g}, "
            f"{'' if self.lora_gate is None else 'gate=True, '}dropout={self.dropout}, merged={self.merged}"
        )


class LoRALinear(Projecting, LoRALayer):
    """y = x Wᵀ + bias + s ((drop(x) Aᵀ) ∘ gate) Bᵀ, with s = alpha / R, or alpha / sqrt(R) with ``rslora``.

    Parameters, named as in a file of PEFT's: ``base_layer.weight`` (N, K), ``base_layer.bias`` (N,), both the
    ones of the wrapped layer itself, frozen and not copied; ``lora_A.weight`` (R, K); ``lora_B.weight`` (N,
    R); with ``lora_bias`` also ``lora_B.bias`` (N,), which enters as s · bias; with ``gate`` also ``lora_gate`` (R,),
    which PEFT does not have. ``weight`` and ``bias`` read the wrapped layer's.

    Args:
        base_layer: a plain nn.Linear of float32, bfloat16, float16 or float64; or transformers' Conv1D (GPT-2), whose
            weight (K, N) is read as it lies.
        r: rank R.
        alpha: numerator of s.
        dropout: probability of zeroing an element of the correction's input; active in training alone.
        rslora: divide alpha by sqrt(R) instead of R (Kalajdzievski, arXiv 2312.03732).
        lora_bias: give B a bias.
        gate: a trained factor for each rank, 1 at the start (Ding et al., "SoRA", arXiv 2311.11696).
        init: "kaiming" (PEFT's default), "gaussian", "orthonormal" or "zero"; see ``lowrank_kernels.init``.
        train: "both", or only "a" or "b"; the other factor is then sampled and frozen.
        dtype: of the factors; default float32, or float64 over a float64 weight.
        velora: None, or the number of sub-tokens that a token of x is divided into, a divisor of K: for A's gradient,
            one number of each is saved in place of x (VeLoRA, arXiv 2405.17991; see ``lk.nn.Projecting``).

    x (..., K) has W's dtype, or runs under autocast. Factors are rounded to x's dtype inside the product;
    their gradients have their own dtype. ``state_dict`` always describes the unmerged layer.

    Where ``base_layer``, ``lora_A`` or ``lora_B`` carries hooks or is wrapped, the layer calls all three, as PEFT's
    does: x is then widened to the factors' dtype, and dropout is torch's, with other masks.

    Raises:
        TypeError: a base layer that cannot be wrapped, with the reason; a dtype that is not a float.
        ValueError: a rank below 1, an alpha that is not finite, a dropout outside [0, 1), an unknown
            ``train``/``init``, a ``velora`` that does not divide K.

    Source: Hu et al., arXiv 2106.09685.
    """

    wraps = "nn.Linear"
    rests: bool = False
    """True: A and B take part in forward, and no gradient is made for them, though they require grad. Where the layer
    calls ``lora_A`` and ``lora_B``, one is made all the same."""

    def __init__(self, base_layer: Any, r: int = 8, *, velora: int | None = None, **settings: Any) -> None:
        super().__init__(base_layer, r, **settings)
        if velora is not None:
            self.make_velora_(velora)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int = 8, **settings: Any) -> Any:
        """Wrap ``linear``, sharing and freezing its weight and bias. Settings are those of the class."""
        return cls(linear, r, **settings)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        return why_not_plain(module, type(module)) if is_conv1d(module) else why_not_frozen(module)

    @classmethod
    def shapes(cls, base_layer: nn.Module, r: int, lora_bias: bool = False) -> dict[str, tuple[int, ...]]:
        n, k = matrix_shape(base_layer)
        found: dict[str, tuple[int, ...]] = {"lora_A.weight": (r, k), "lora_B.weight": (n, r)}
        return found | {"lora_B.bias": (n,)} if lora_bias else found

    def make_factors(self, init: str, train: str, lora_bias: bool, **options: Any) -> None:
        empty = torch.nn.utils.skip_init
        self.lora_A = empty(nn.Linear, self.in_features, self.r, bias=False, **options)
        self.lora_B = empty(nn.Linear, self.r, self.out_features, bias=lora_bias, **options)
        start_(self, train)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.weight, self.gated(self.lora_B.weight)

    @property
    def lora_bias(self) -> Tensor | None:
        return self.lora_B.bias

    def forward(self, x: Tensor) -> Tensor:
        base, lora_a, lora_b = self.base_layer, self.lora_A, self.lora_B
        if self._merged is not None or (self.base_only_depth is not None and runs_base_alone(self)):
            return base(x)
        weight = frozen_weight(base)
        if must_be_called(base, lora_a, lora_b) or is_tracked_view(weight):
            return self._call_submodules(x)
        a, b = lora_a.weight, lora_b.weight
        gate: Tensor | None = self.lora_gate
        if self.rests:
            a, b, gate = a.detach(), b.detach(), None if gate is None else gate.detach()
        return lora_linear(
            x,
            weight,
            a,
            b,
            add_bias(base.bias, lora_b.bias, self.scaling, weight.dtype if isinstance(weight, Tensor) else x.dtype),
            scaling=self.scaling,
            gate=gate,
            dropout_p=self.dropout if self.training else 0.0,
            velora_vector=None if self.velora is None else self.velora_vector_for(x),
        )

    def as_part(self, x: Tensor) -> tuple[LoRAPart, float] | None:
        """(the layer as a part of a block, its dropout) for this x, as things stand now; None where the layer has to be
        called: it is merged or runs its base alone, has a gate or VeLoRA, or carries hooks inside."""
        base, lora_a, lora_b = self.base_layer, self.lora_A, self.lora_B
        if self._merged is not None or (self.base_only_depth is not None and runs_base_alone(self)):
            return None
        weight = frozen_weight(base)
        if must_be_called(base, lora_a, lora_b) or is_tracked_view(weight):
            return None
        if self.lora_gate is not None or self.velora is not None or self.rests:
            return None
        dtype = weight.dtype if isinstance(weight, Tensor) else x.dtype
        bias = add_bias(base.bias, lora_b.bias, self.scaling, dtype)
        part = LoRAPart(weight, lora_a.weight, lora_b.weight, bias, scaling=self.scaling)
        return part, self.dropout if self.training else 0.0

    def _call_submodules(self, x: Tensor) -> Tensor:
        if not is_dtensor(self.lora_A.weight) and x.shape[-1] != self.in_features:
            raise ValueError(
                f"LoRALinear: expected x with {self.in_features} columns, got {x.shape[-1]}; where base_layer is split "
                f"by RowwiseParallel, lora_A has to be, too"
            )
        return super()._call_submodules(x)

    @torch.no_grad()
    def resize_(self, r: int) -> LoRALinear:
        """Give A and B the rank r, and zeros, and a gate ones: the same parameters with other shapes, no gradients.

        Their optimizer state is of the old shapes; drop it.

        Raises:
            ValueError: a rank below 1; a merged layer.
        """
        check_lora_settings("LoRALinear.resize_", r=r, alpha=self.alpha, dropout=self.dropout)
        if self.merged:
            raise ValueError("LoRALinear.resize_: expected an unmerged layer; call unmerge_()")
        a, b = self.factor_parameters()
        gate = None if self.lora_gate is None else self.lora_gate.new_ones(r)
        self._take(a.new_zeros(r, self.in_features), b.new_zeros(self.out_features, r), gate)
        return self


def _reshape_(p: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another shape, and no gradient.

    A graph that is still alive, by the last step's loss for one, holds the accumulator of its gradient, which expects
    the old shape and would be used again. torch lets go of it where the dtype changes, and so it does, in between.
    """
    p.grad = None
    p.data = p.data.new_empty(0, dtype=torch.float32 if p.dtype == torch.float64 else torch.float64)
    p.data = values


def start_(layer: Any, train: str) -> None:
    """Sample or zero the factors ``lora_A`` and ``lora_B`` of a layer, and let those train that shall."""
    layer.start_factors_(*(p.detach() for p in layer.factor_parameters()))
    if layer.lora_bias is not None:
        nn.init.zeros_(layer.lora_bias)
    for factor, trains in zip((layer.lora_A, layer.lora_B), TRAIN[train], strict=True):
        factor.requires_grad_(trains)


class Requantized(NamedTuple):
    """What a merge into few bits did to the update.

    Attributes:
        format, rounding: of the weight.
        kept: ⟨new - old, update⟩ / ‖update‖²: 1 where all of it is there, 0 where none is.
        error: ‖new - merged‖ / ‖update‖.
    """

    format: str
    rounding: str
    kept: float
    error: float

    def __str__(self) -> str:
        return (
            f"rounded to {self.format} again ({self.rounding}), the weight keeps {self.kept:.1%} of the update, with "
            f"an error of {self.error:.2f} times its size"
        )


class _Stored(NamedTuple):
    """A merge into few bits: the correction's state, the weight's tensors after and before, what was kept."""

    correction: Any
    new: list[Tensor]
    old: list[Tensor]
    report: Requantized


def check_requantize(op: str, base: nn.Module, requantize: str | None) -> None:
    """Raise for a weight that cannot be merged into as asked."""
    weight = frozen_weight(base)
    if not isinstance(weight, FrozenWeight):
        if requantize is not None:
            raise ValueError(f"{op}: expected requantize=None for a dense weight, got {requantize!r}")
        return
    if requantize is None:
        raise ValueError(
            f"{op}: expected a dense weight to merge into, got one stored as {weight.format}; make it dense "
            f"(lk.dequantize_), or have it rounded to its few bits again (requantize='stochastic' or 'nearest')"
        )
    if not isinstance(base, CodedLinear):
        raise ValueError(
            f"{op}: expected requantize=None for a {type(base).__name__}, whose weight is never written; make it dense "
            f"(lk.dequantize_)"
        )
    if is_dtensor(base.weight):
        raise ValueError(f"{op}: expected a whole weight to round again, got a shard; gather the model first")
    if requantize not in ROUNDINGS:
        raise ValueError(f"{op}: expected requantize to be one of {', '.join(ROUNDINGS)}, got {requantize!r}")


@torch.no_grad()
def add_merged_bias(bias: Any, state: Any, sign: float) -> None:
    """bias += ± s · lora_B.bias, where the merged state has one."""
    if getattr(state, "bias", None) is not None:
        bias = own_part(bias)
        wide = torch.promote_types(bias.dtype, torch.float32)
        bias.copy_(bias.to(wide) + sign * state.scaling * state.bias.to(bias.device, wide))


def _check_written(op: str, base: nn.Module) -> None:
    reason = why_not_written(base)
    if reason is not None:
        raise ValueError(f"{op}: expected a weight that can be changed in place, but {reason}")


def split_alike(weight: Any, other: Any) -> bool:
    """Whether ``other`` is sharded over the same ranks and in the same way as the DTensor ``weight``."""
    return is_dtensor(other) and (weight.device_mesh, weight.placements) == (other.device_mesh, other.placements)


def add_bias(bias: Tensor | None, lora_bias: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor | None:
    """bias + s · lora_bias in the wider of their dtypes, rounded once to ``dtype``; None where both are."""
    if lora_bias is None:
        return bias
    scaled = scaling * lora_bias
    return (scaled if bias is None else bias + scaled).to(dtype)


_MAX_RANK = 2**31 - 1


def check_lora_settings(
    op: str,
    *,
    r: int,
    alpha: float,
    dropout: float,
    train: str = "both",
    dtype: torch.dtype | None = None,
    rslora: bool = False,
    init: str = "kaiming",
) -> None:
    """Raise ValueError or TypeError, in the op's name, for settings no LoRA layer can have."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"{op}: expected r to be an integer of at least 1, got {r!r}")
    if r > _MAX_RANK:
        raise ValueError(f"{op}: expected r to be at most {_MAX_RANK}, got {r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
        raise ValueError(f"{op}: expected alpha to be a finite number, got {alpha!r}")
    check_flag(op, "rslora", rslora)
    scaling, root = abs(alpha) / (math.sqrt(r) if rslora else r), "sqrt(r)" if rslora else "r"
    if scaling > torch.finfo(torch.float32).max or 0.0 < scaling < torch.finfo(torch.float32).tiny:
        raise ValueError(
            f"{op}: expected alpha / {root} to be a number that float32 can hold, got {alpha!r} with r={r}"
        )
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: expected 0 <= dropout < 1, got {dropout!r}")
    if train not in TRAIN:
        raise ValueError(f"{op}: expected train to be one of {', '.join(TRAIN)}, got {train!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{op}: expected dtype to be a floating dtype, got {dtype!r}")
    if not isinstance(init, str) or init not in INITS:
        raise ValueError(f"{op}: expected init to be one of {', '.join(INITS)}, got {init!r}")
