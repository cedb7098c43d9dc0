"""``AdapterBank``: PEFT adapters over one model, loaded, evicted and mixed in a batch while it serves."""

from __future__ import annotations

import copy
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import AdapterFile, read_adapter
from ..adapters.folder import same_values
from ..adapters.load import Expected
from ..config import DoRAConfig
from ..functional import dora_column_scale, fold_gate, multi_lora_linear
from ..names import named_modules, place, submodule
from ..nn.batches import Batch, Batches
from ..nn.frozen import AroundBase, check_weight_may_be_read
from ..nn.matrix import frozen_weight, is_linear
from ..stack import LoRAStack
from ..weights import Weight
from ..weights import rows as rows_of
from .fingerprint import fingerprint

_GROWS_BY = 2  # a stack that is full, by this part of itself: N adapters then cost N copies, not N² / 2


class _Part(NamedTuple):
    """An adapter on one linear: its factors as in a file of PEFT's, and what follows from them and the weight."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    column_scale: Tensor | None = None
    bias: Tensor | None = None  # s · lora_bias

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self if isinstance(t, Tensor))

    def factors(self, device: torch.device) -> Any:
        """(A, B, scaling) and DoRA's magnitude, as a stack takes them."""
        lora_a, lora_b, scaling, magnitude, *_ = self
        tensors = lora_a.to(device), lora_b.to(device), scaling
        return tensors if magnitude is None else (*tensors, magnitude.to(device))

    def split(self, widths: Sequence[int]) -> list[_Part]:
        """The same as an adapter of each slice, A in every one of them."""
        _, lora_b, scaling, *others = self
        each = [[None] * len(widths) if t is None else t.split(list(widths)) for t in (lora_b, *others)]
        return [_Part(self.lora_a, b, scaling, *rest) for b, *rest in zip(*each, strict=True)]

    @property
    def is_dora(self) -> bool:
        return self.norm is not None

    def rescaled(self, weight: Weight) -> _Part:
        """The same over another weight."""
        if self.magnitude is None:
            return self
        factors = (t.to(weight.device) for t in (self.lora_a, self.lora_b, self.magnitude))
        norm, scale, _ = dora_column_scale(weight, *factors, scaling=self.scaling)
        return self._replace(norm=norm.float().cpu(), column_scale=scale.float().cpu())


class _Untouched(_Part):
    """What leaves a slice as it is, beside DoRA's others: B = 0, and a scale of 1 over any weight."""

    @classmethod
    def of(cls, weight: Weight) -> _Untouched:
        n, k = weight.shape
        ones, dtype = torch.ones(n), weight.dtype
        zeros = torch.zeros(1, k, dtype=dtype), torch.zeros(n, 1, dtype=dtype)
        return cls(*zeros, 0.0, ones.to(dtype), ones, ones)

    def rescaled(self, weight: Weight) -> _Part:
        return self


class _SlicedPart(NamedTuple):
    """An adapter on a linear that is several: a part of each slice, None for those that it leaves alone."""

    parts: tuple[_Part | None, ...]
    widths: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        there = [part for part in self.parts if part is not None]
        rank, lora_a = max(part.lora_a.shape[0] for part in there), there[0].lora_a  # what a stack gives every slice
        factors = rank * (len(self.parts) * lora_a.shape[1] + sum(self.widths)) * lora_a.element_size()
        return factors + sum(t.numel() * t.element_size() for part in there for t in part[3:] if t is not None)

    def factors(self, device: torch.device) -> Any:
        return [None if part is None else part.factors(device) for part in self.parts]

    def _joined(self, key: str) -> Tensor | None:
        of = [None if part is None else getattr(part, key) for part in self.parts]
        first = next((t for t in of if t is not None), None)
        if first is None:
            return None
        return torch.cat([first.new_zeros(n) if t is None else t for t, n in zip(of, self.widths, strict=True)])

    @property
    def is_dora(self) -> bool:
        return any(part is not None and part.is_dora for part in self.parts)

    def rescaled(self, weight: Weight) -> _SlicedPart:
        ends = itertools.accumulate(self.widths)
        rows = [rows_of(weight, end - width, end) for end, width in zip(ends, self.widths, strict=True)]
        own = zip(self.parts, rows, strict=True)
        return self._replace(parts=tuple(None if part is None else part.rescaled(of_part) for part, of_part in own))

    @property
    def norm(self) -> Tensor | None:
        return self._joined("norm")

    @property
    def column_scale(self) -> Tensor | None:
        return self._joined("column_scale")

    @property
    def bias(self) -> Tensor | None:
        return self._joined("bias")


class NoRoom(ValueError):
    """An adapter does not fit the budget beside those that are pinned or in use."""


@dataclass
class _Adapter:
    """What the bank knows of an adapter. Guarded by the bank's lock."""

    name: str
    folder: Path
    nbytes: int
    content_hash: str
    parts: Mapping[str, _Part | _SlicedPart] | None  # the host's copy
    pinned: bool
    slot: int | None = None  # its id in every stack; None: evicted
    batches: int = 0  # that use it now
    used: int = 0  # when it was last asked for
    retired: bool = False  # unloaded or replaced, and kept for the batches that started with it


class Held:
    """An adapter that stays on the device as it is, until it is given back; or the base alone."""

    def __init__(self, adapter: _Adapter | None) -> None:
        self._adapter = adapter

    @property
    def _slot(self) -> int:
        return -1 if self._adapter is None or self._adapter.slot is None else self._adapter.slot

    @property
    def content_hash(self) -> str:
        """The identity of its factors and scalings; "" for the base alone."""
        return "" if self._adapter is None else self._adapter.content_hash


class _Served(NamedTuple):
    """The adapters of one linear as a batch sees them: never changed, only replaced."""

    stack: LoRAStack
    norm_and_scale: tuple[Tensor, Tensor] | None
    biases: Mapping[int, Tensor]


class _Batch(Batch):
    """A batch in flight: the adapters that it started with."""

    def __init__(self, ids: Sequence[int], cu_seqlens: Any, num_adapters: int, served: Mapping[str, _Served]) -> None:
        super().__init__("AdapterBank.batch", ids, cu_seqlens)
        self.ids, self.num_adapters, self.served = frozenset(i for i in ids if i >= 0), num_adapters, served
        self.bias_tables: dict[tuple[str, torch.dtype], Tensor] = {}

    def linear(self, layer: BankLinear, x: Tensor) -> Tensor:
        name, base = layer.name, layer.base_layer
        served = self.served.get(name)
        if served is None or not any(served.stack.places[i].rank for i in self.ids):
            return base(x)
        check_weight_may_be_read("BankLinear", base)
        plan = self.plan(layer, x, self.num_adapters)
        y = multi_lora_linear(x, layer.matrix, served.stack, plan, base.bias, norm_and_scale=served.norm_and_scale)
        if any(i in served.biases for i in self.ids):
            key = name, y.dtype  # which autocast may change within a batch
            if key not in self.bias_tables:
                rows = [served.biases.get(i) for i in range(self.num_adapters)]
                zero = y.new_zeros(y.shape[-1])
                self.bias_tables[key] = torch.stack([zero if b is None else b.to(y.dtype) for b in (*rows, None)])
            y = y + self.bias_tables[key][plan.adapter_ids[:, 0]].view_as(y)  # id -1 is the last row, of zeros
        return y


class BankLinear(AroundBase):
    """A linear of a model with a bank: ``base_layer``, and in a batch of the bank each row's adapter."""

    row_order: str | None = None
    found_order: str | None = None

    def __init__(self, base_layer: nn.Linear, batches: Batches[_Batch], name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._batches, self.name = batches, name
        self.register_state_dict_post_hook(_describe_plain)
        self.training = base_layer.training

    def forward(self, x: Tensor) -> Tensor:
        batch = self._batches.current()
        return self.base_layer(x) if batch is None else batch.linear(self, x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in ("weight", "bias"):
            if prefix + key in state_dict:
                state_dict[f"{prefix}base_layer.{key}"] = state_dict.pop(prefix + key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _describe_plain(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Give the parameters the names that they have without a bank."""
    for key in [key for key in state if key.startswith(f"{prefix}base_layer.")]:
        state[prefix + key.removeprefix(f"{prefix}base_layer.")] = state.pop(key)


class AdapterBank:
    """Many PEFT adapters on one frozen model, mixed freely in a batch.

    ``bank.load("a", folder)``, then ``with bank.batch(["a", None, "b"]): model.generate(...)``: sequence 0 with adapter
    a, sequence 1 with the base alone, sequence 2 with b. Outside of a batch the model is the base model.

    Args:
        model: any module with linears (nn.Linear, or transformers' Conv1D); changed in place: linears that an adapter
            targets become :class:`BankLinear`, whose weight is the linear's own. ``close`` puts them back.
        budget_bytes: of adapters on the model's device; None: no limit. The least recently used ones without a batch
            are evicted to stay within it, and come back when a batch names them.
        host_bytes: of copies on the host, from which evicted adapters come back; None: no limit. Beyond it the least
            recently used copies are dropped, and such an adapter is read from its folder again.
        fused: nn.Linears that are several in one, by the last part of their path: the parts' names and widths in order,
            ``{"qkv_proj": {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}}``. Adapters may then target the whole, or
            parts by these names beside it, as if they were there; one base product serves both kinds.

    Adapters may be LoRA, rsLoRA and DoRA of any ranks, with rank and alpha patterns and lora_bias, on different linears
    each. A folder is checked whole before anything changes; see ``lk.load_adapter`` for what is refused, and how.
    Factors take the dtype of the weight they belong to. Wrapped linears are frozen.

    Every method may be called from any thread, while batches run. A batch keeps the adapters it started with, whatever
    is loaded, replaced, evicted or unloaded meanwhile; their memory is freed after its end. Reading and checking a
    folder blocks no batch: only the copy of its factors into the stacks does.
    """

    def __init__(
        self,
        model: nn.Module,
        budget_bytes: int | None = None,
        *,
        host_bytes: int | None = None,
        fused: Mapping[str, Mapping[str, int]] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"AdapterBank: expected model to be a torch.nn.Module, got {type(model).__name__}")
        for name, limit in (("budget_bytes", budget_bytes), ("host_bytes", host_bytes)):
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
                raise ValueError(f"AdapterBank: expected {name} to be 0 or more, or None, got {limit!r}")
        self.model, self.budget_bytes, self.host_bytes = model, budget_bytes, host_bytes
        # The module tree as adapters' settings name it; parameters and buffers are the model's own.
        kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._plain = copy.deepcopy(model, kept)
        self._fused = {name: dict(parts) for name, parts in _fused_linears(self._plain, fused or {})}
        self._batches = Batches[_Batch]("AdapterBank.batch", "bank.batch([None])")
        self._lock = threading.RLock()
        self._clock = itertools.count(1)
        self._adapters: dict[str, _Adapter] = {}
        self._slots: list[_Adapter | None] = []
        self._stacks: dict[str, LoRAStack] = {}
        self._served: Mapping[str, _Served] = MappingProxyType({})
        self._wrapped: dict[str, BankLinear] = {}
        self._required_grad: dict[str, list[nn.Parameter]] = {}
        self._loader: ThreadPoolExecutor | None = None
        self._parts_of: dict[str, tuple[str, slice]] = {}  # linears and rows of them
        for whole, widths in self._fused.items():
            for (part, width), end in zip(widths.items(), itertools.accumulate(widths.values()), strict=True):
                self._parts_of[part] = whole, slice(end - width, end)
        self._fingerprints: dict[str, Tensor] = {}  # of the weights that DoRA's norms are over
        self._rescalings = 0
        self._biased: set[str] = set()  # linears to which an adapter has added a bias
        self._known_settings: list[Expected] = []

    # ------------------------------------------------------------------------------------------------- adapters

    def load(
        self, name: str, folder: str | os.PathLike[str], *, pin: bool = False, wait: bool = True
    ) -> Future[None] | None:
        """Read a PEFT folder and serve it as ``name``; an adapter of that name is replaced, in one step.

        Adapters of the same content, by :meth:`Adapter.content_hash`, share one copy on the host.

        Args:
            folder: of PEFT's, or an adapter in another format that ``lk.adapters.convert`` reads.
            pin: never evict it.
            wait: False returns a future at once, and a thread of the bank's own loads the adapter.

        Raises (or the future does):
            ValueError, TypeError: as ``lk.load_adapter`` for a folder that cannot be served here; a name that is not a
                string with something in it; an adapter larger than the budget, or than what pins and running batches
                leave of it. The bank is then as it was.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"AdapterBank.load: expected a name, got {name!r}")
        if not wait:
            with self._lock:
                if self._loader is None:
                    self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapter-bank")
                return self._loader.submit(self._load, name, Path(folder), pin)
        self._load(name, Path(folder), pin)
        return None

    def _load(self, name: str, folder: Path, pin: bool) -> None:
        rescalings = self._rescalings
        parts, content = self._read(folder)
        adapter = _Adapter(name, folder, sum(part.nbytes for part in parts.values()), content, parts, pin)
        with self._lock:
            if self._rescalings != rescalings:  # a weight has changed since the norms were computed
                adapter.parts = parts = self._rescaled(parts, parts)
            old = self._adapters.get(name)
            self._bring_in(adapter, parts, instead_of=old)
            self._adapters[name] = adapter
            if old is not None:
                self._retire(old)
            self._trim_host()

    def unload(self, name: str) -> None:
        """Forget an adapter. Batches that started with it finish with it.

        Raises:
            ValueError: there is none of that name.
        """
        with self._lock:
            self._retire(self._known(name))
            del self._adapters[name]

    def names(self) -> list[str]:
        """Of all adapters, on the device or evicted, in the order of loading."""
        with self._lock:
            return list(self._adapters)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter on the device, bringing it back if it was evicted; or let it be evicted again."""
        with self._lock:
            adapter = self._known(name)
            if pinned:
                self._make_resident(adapter)
            adapter.pinned = pinned

    def content_hash(self, name: str) -> str:
        """The identity of an adapter's factors and scalings, whatever file they came from."""
        with self._lock:
            return self._known(name).content_hash

    def resident(self) -> list[str]:
        """Names of the adapters on the device, the least recently used first."""
        with self._lock:
            there = [a for a in self._adapters.values() if a.slot is not None]
            return [a.name for a in sorted(there, key=lambda a: a.used)]

    @property
    def nbytes(self) -> int:
        """Of the adapters on the device, those included that only a running batch still uses."""
        with self._lock:
            return sum(a.nbytes for a in self._slots if a is not None)

    # --------------------------------------------------------------------------------------------------- batches

    @contextmanager
    def batch(self, names: Sequence[str | None], *, cu_seqlens: Tensor | Sequence[int] | None = None) -> Iterator[None]:
        """Context in which sequence b of the model's batch runs with adapter ``names[b]``, None for the base alone.

        Names are one for each sequence that the model sees; ``model.generate`` may make beams or samples of each. With
        ``cu_seqlens`` they lie one after another, without padding. See :func:`lowrank_kernels.nn.use_adapters`, also
        for threads, backward, and the rows of a layer. Contexts of one bank may nest; the inner one counts.

        Raises:
            ValueError: a name that the bank does not know; adapters that together do not fit the budget. From a layer:
                rows of which it is not known whose they are.
            RuntimeError: from a layer outside of any batch while one is open in another thread; open
                ``bank.batch([None])`` there for the base alone.
        """
        held = self.hold([names] if isinstance(names, str) else list(names))
        try:
            with self.run(held, cu_seqlens=cu_seqlens):
                yield
        finally:
            self.release(held)

    def hold(self, names: Sequence[str | None]) -> list[Held]:
        """Keep adapters on the device as they are now, whatever is loaded, replaced or unloaded, until ``release``.

        Raises:
            ValueError: a name that the bank does not know.
            NoRoom: adapters that, with others that are pinned or held, do not fit the budget.
        """
        with self._lock:
            wanted = [None if name is None else self._known(name) for name in names]
            adapters = [a for a in wanted if a is not None]
            for adapter in adapters:  # counted first, so that bringing one in does not evict another
                adapter.batches += 1
        try:
            with self._lock:
                for adapter in adapters:
                    self._make_resident(adapter)
                    adapter.used = next(self._clock)
            self._follow_weights(adapters)
        except BaseException:
            with self._lock:
                self._leave(adapters)
            raise
        return [Held(a) for a in wanted]

    def release(self, held: Sequence[Held]) -> None:
        """Let go of what ``hold`` gave, once."""
        with self._lock:
            self._leave([h._adapter for h in held if h._adapter is not None])

    @contextmanager
    def run(self, held: Sequence[Held], *, cu_seqlens: Tensor | Sequence[int] | None = None) -> Iterator[None]:
        """As ``batch``, with adapters that are held."""
        with self._lock:
            batch = _Batch([h._slot for h in held], cu_seqlens, len(self._slots), self._served)
        with self._batches.open(batch):
            yield

    def _leave(self, adapters: Sequence[_Adapter]) -> None:
        for adapter in adapters:
            adapter.batches -= 1
            if adapter.retired and not adapter.batches:
                self._take_out(adapter)

    def close(self) -> None:
        """Put the model back as it was, and forget every adapter. Waits for loading, not for batches."""
        if self._loader is not None:
            self._loader.shutdown(cancel_futures=True)
        with self._lock:
            for name, wrapped in self._wrapped.items():
                owner, key = place(self.model, name)
                wrapped.base_layer.train(wrapped.training)
                owner._modules[key] = wrapped.base_layer
                for p in self._required_grad[name]:
                    p.requires_grad_()
            self._wrapped, self._adapters, self._slots, self._stacks = {}, {}, [], {}
            self._served, self._loader = MappingProxyType({}), None

    def __enter__(self) -> AdapterBank:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        with self._lock:
            return (
                f"AdapterBank({type(self.model).__name__}, adapters={len(self._adapters)}, "
                f"resident={len(self.resident())}, bytes={self.nbytes}, budget_bytes={self.budget_bytes})"
            )

    # ------------------------------------------------------------------------------------------------- off the lock

    @torch.inference_mode(False)
    @torch.no_grad()
    def _read(self, folder: Path) -> tuple[Mapping[str, _Part | _SlicedPart], str]:
        """An adapter's parts by linear, on the host, and its content hash: everything that can fail, before anything
        changes. Of the same content there is one copy, whatever its names and files are."""
        file = read_adapter(self._plain, folder, self._known_settings)
        content = file.adapter().content_hash()
        with self._lock:
            copies = (a.parts for a in self._adapters.values() if a.content_hash == content and a.parts is not None)
            if (there := next(copies, None)) is not None:
                return there, content
        if file.config.bias != "none":
            raise ValueError(
                f"load_adapter: {folder} trains biases of the base (bias={file.config.bias!r}), which the sequences of "
                f"a batch share; a bank cannot serve it"
            )
        if file.plan.experts:
            raise ValueError(
                f"load_adapter: {folder} has target_parameters, weights of experts in {', '.join(file.plan.experts)}; "
                f"a bank mixes the adapters of a batch in linears alone; use lk.load_adapter on a model of its own"
            )
        for name, module in file.plan.targets.items():
            if not is_linear(module):
                raise ValueError(
                    f"load_adapter: {folder} targets {name}, a {type(module).__name__}; a bank mixes the adapters of a "
                    f"batch in linears alone; merge this adapter into a model of its own, or train one without {name}"
                )
        changed = [name for name, module in file.plan.whole.items() if not _holds(module, name, file.tensors)]
        if changed:
            raise ValueError(
                f"load_adapter: {folder} has weights of its own for {', '.join(changed)} (modules_to_save, a task's "
                f"head, or resized embeddings), which the sequences of a batch share; a bank cannot serve it; use "
                f"lk.load_adapter on a model of its own"
            )
        if isinstance(file.config, DoRAConfig):
            for name in file.plan.targets:  # before the norms: a weight that changes meanwhile is then seen as changed
                whole = self._parts_of.get(name, (name, slice(0)))[0]
                if whole not in self._fingerprints:
                    self._fingerprints[whole] = fingerprint(self._weight(whole))
        parts: dict[str, Any] = {name: _part(name, self._weight(name), file) for name in file.plan.targets}
        for name, widths in self._fused.items():
            whole, own = parts.pop(name, None), [parts.pop(part, None) for part in widths]
            if whole is not None and any(own):
                raise ValueError(f"load_adapter: {folder} targets {name} and parts of it at once")
            own = own if whole is None else whole.split(tuple(widths.values()))
            if any(own):
                if any(part is not None and part.magnitude is not None for part in own):
                    own = [part or _Untouched.of(self._weight(n)) for n, part in zip(widths, own, strict=True)]
                parts[name] = _SlicedPart(tuple(own), tuple(widths.values()))
        return parts, content

    def _weight(self, name: str) -> Weight:
        """Of a linear as the model has it now, or of a part of one."""
        whole, rows = self._parts_of.get(name, (name, slice(None)))
        module: Any = submodule(self.model, whole)
        linear = getattr(module, "base_layer", module)
        weight = frozen_weight(linear).detach()
        return weight if rows.stop is None else rows_of(weight, rows.start, rows.stop)

    def _follow_weights(self, adapters: Sequence[_Adapter]) -> None:
        """Compute the norms of DoRA adapters again over weights that are not what they were computed from."""
        names = {name for a in adapters for name, part in (a.parts or {}).items() if part.is_dora}
        now = {name: fingerprint(self._weight(name)) for name in names}
        changed = {name: found for name, found in now.items() if not torch.equal(found, self._fingerprints[name])}
        if not changed:
            return
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._rescalings += 1
            for adapter in {id(a): a for a in (*self._adapters.values(), *self._slots) if a is not None}.values():
                adapter.parts = None if adapter.parts is None else self._rescaled(adapter.parts, changed)
            self._fingerprints |= changed
            self._publish(changed)

    def _rescaled(self, parts: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        return {name: p.rescaled(self._weight(name)) if name in names else p for name, p in parts.items()}

    # ---------------------------------------------------------------------------------------------- under the lock

    def _known(self, name: str) -> _Adapter:
        if name not in self._adapters:
            there = ", ".join(list(self._adapters)[:8]) or "none"
            raise ValueError(f"AdapterBank: expected the name of an adapter, got {name!r}; there are: {there}")
        return self._adapters[name]

    def _make_resident(self, adapter: _Adapter) -> None:
        if adapter.slot is None:
            if adapter.parts is None:
                parts, content = self._read(adapter.folder)
                if content != adapter.content_hash:
                    raise ValueError(
                        f"AdapterBank: expected {adapter.folder} as it was when {adapter.name!r} was loaded, and it "
                        f"has changed since; load it again"
                    )
                adapter.parts = parts
            self._bring_in(adapter, adapter.parts)
            self._trim_host()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _bring_in(
        self, adapter: _Adapter, parts: Mapping[str, _Part | _SlicedPart], instead_of: _Adapter | None = None
    ) -> None:
        """Give an adapter a slot and copy its parts into the stacks; evicts others for it. Raises before it changes."""
        self._make_room(adapter, instead_of)
        for name, part in parts.items():
            self._wrap(name)
            if part.bias is not None:
                self._biased.add(name)
        slot = next((i for i, a in enumerate(self._slots) if a is None), len(self._slots))
        if slot == len(self._slots):
            self._slots.append(None)
        adapter.slot, adapter.used = slot, next(self._clock)
        self._slots[slot] = adapter
        try:
            for name, part in parts.items():
                self._stack(name, part, slot)
        except BaseException:
            self._take_out(adapter)
            raise
        self._publish(parts)

    def _stack(self, name: str, part: _Part | _SlicedPart, slot: int) -> None:
        weight, factors = self._wrapped[name].matrix, part.factors(self._wrapped[name].matrix.device)
        slices = part.widths if isinstance(part, _SlicedPart) else None
        if name not in self._stacks:
            n, k = weight.shape
            self._stacks[name] = LoRAStack.empty(k, n, slices=slices, dtype=weight.dtype, device=weight.device)
        stack = self._stacks[name]
        rank = max(each[0].shape[0] for each in (factors if slices else [factors]) if each is not None)
        rows = stack.lora_b.shape[0]
        if stack.first_gap(rank) + rank > rows:  # new tensors: running batches keep theirs
            if rows - stack.rows_used >= rank:
                stack.compact()
            else:
                stack.reserve(max(stack.first_gap(rank) + rank, rows + rows // _GROWS_BY))
        if slices:
            stack.add_sliced(factors, at=slot)
        else:
            stack.add(*factors, at=slot)

    def _make_room(self, adapter: _Adapter, instead_of: _Adapter | None) -> None:
        """Evict the least recently used until ``adapter`` fits; nothing is evicted where it cannot."""
        if self.budget_bytes is None:
            return
        over = self.nbytes + adapter.nbytes - self.budget_bytes
        idle = [a for a in self._slots if a is not None and not (a.pinned or a.batches or a.retired)]
        idle.sort(key=lambda a: (a is not instead_of, a.used))
        if over > sum(a.nbytes for a in idle):
            raise NoRoom(
                f"AdapterBank: expected room for {adapter.name!r} of {adapter.nbytes} bytes within the budget of "
                f"{self.budget_bytes}, but adapters that are pinned or in a running batch leave "
                f"{self.budget_bytes - self.nbytes + sum(a.nbytes for a in idle)}"
            )
        for victim in idle:
            if over <= 0:
                break
            over -= victim.nbytes
            self._take_out(victim)

    def _take_out(self, adapter: _Adapter) -> None:
        """Free an adapter's slot and its rows of the stacks; no batch uses it."""
        if adapter.slot is None:
            return
        slot, adapter.slot = adapter.slot, None
        changed = [name for name, stack in self._stacks.items() if slot < len(stack) and stack.ranks[slot]]
        for name in changed:
            self._stacks[name].remove(slot)
        self._slots[slot] = None
        self._publish(changed)

    def _retire(self, adapter: _Adapter) -> None:
        adapter.retired = True
        if not adapter.batches:
            self._take_out(adapter)

    def _wrap(self, name: str) -> None:
        if name not in self._wrapped:
            owner, key = place(self.model, name)
            linear: Any = owner._modules[key]
            self._required_grad[name] = [p for p in linear.parameters() if p.requires_grad]
            self._wrapped[name] = BankLinear(linear.requires_grad_(False), self._batches, name)
            owner._modules[key] = self._wrapped[name]

    def _publish(self, changed: Sequence[str] | Mapping[str, Any]) -> None:
        """Show new batches the stacks as they are now: one assignment."""
        served = dict(self._served)
        for name, stack in self._stacks.items():
            if name in changed or len(stack) < len(self._slots):
                stack.extend(len(self._slots))
                served[name] = self._snapshot(name, stack)
        self._served = MappingProxyType(served)

    def _snapshot(self, name: str, stack: LoRAStack) -> _Served:
        parts: dict[int, _Part | _SlicedPart] = {}
        if stack.has_dora or name in self._biased:
            parts = {i: a.parts[name] for i, a in enumerate(self._slots) if a and a.parts and name in a.parts}
        norm_and_scale = None
        if stack.has_dora:
            assert stack.magnitude is not None
            norm = torch.zeros(stack.magnitude.shape, dtype=torch.float32, device=stack.magnitude.device)
            norm_and_scale = norm, torch.zeros_like(norm)
            for i, part in parts.items():
                if part.norm is not None and part.column_scale is not None:
                    row = stack.places[i].magnitude
                    norm_and_scale[0][row], norm_and_scale[1][row] = part.norm, part.column_scale
        biases = {i: part.bias.to(stack.lora_b.device) for i, part in parts.items() if part.bias is not None}
        return _Served(stack.snapshot(), norm_and_scale, MappingProxyType(biases))

    def _trim_host(self) -> None:
        """Drop the least recently used host copies of evicted adapters beyond ``host_bytes``."""
        if self.host_bytes is None:
            return
        held = sorted((a for a in self._adapters.values() if a.parts and a.slot is None), key=lambda a: a.used)
        over = sum(a.nbytes for a in held) - self.host_bytes
        for adapter in held:
            if over <= 0:
                break
            over -= adapter.nbytes
            adapter.parts = None


def _holds(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a module that an adapter's file holds whole is the model's own."""
    state = module.state_dict()
    return all(same_values(tensors[f"{name}.{key}"], t) for key, t in state.items() if isinstance(t, Tensor))


def _part(name: str, weight: Weight, file: AdapterFile) -> _Part:
    """An adapter on one linear, in its weight's dtype; DoRA's norm from the tensors as they were saved."""
    config, tensors, dtype = file.config, file.tensors, weight.dtype
    lora_a, lora_b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
    if config.gate:
        lora_b = fold_gate(lora_b, tensors[f"{name}.lora_gate"])
    scaling = config.scaling_of(name)
    bias = tensors.get(f"{name}.lora_B.bias")
    part = _Part(lora_a.to(dtype), lora_b.to(dtype), scaling, bias=None if bias is None else scaling * bias)
    if not isinstance(config, DoRAConfig):
        return part
    magnitude = tensors[f"{name}.lora_magnitude_vector"]
    saved = part._replace(lora_a=lora_a, lora_b=lora_b, magnitude=magnitude).rescaled(weight)
    return part._replace(magnitude=magnitude.to(dtype), norm=saved.norm, column_scale=saved.column_scale)


def _fused_linears(model: nn.Module, fused: Mapping[str, Mapping[str, int]]) -> list[tuple[str, list[tuple[str, int]]]]:
    """(path, (path, width) of each part) of the fused linears; the parts are put beside them, as views.

    Raises:
        ValueError: widths that do not add up, a name that nothing has, a part's name that something has.
    """
    found = []
    for key, widths in fused.items():
        paths = [
            path
            for path, module in named_modules(model)
            if path.rpartition(".")[2] == key and isinstance(module, nn.Linear)
        ]
        if not paths:
            raise ValueError(f"AdapterBank: expected fused to name linears of the model, and {key!r} names none")
        for path in paths:
            parent, linear = submodule(model, path.rpartition(".")[0]), submodule(model, path)
            assert isinstance(linear, nn.Linear)
            if sum(widths.values()) != linear.out_features or any(hasattr(parent, name) for name in widths):
                raise ValueError(
                    f"AdapterBank: expected the parts of {path} to have names of their own and widths that add up to "
                    f"{linear.out_features}, got {dict(widths)}"
                )
            begin, parts = 0, []
            for name, width in widths.items():
                part = nn.Linear(linear.in_features, width, linear.bias is not None, device="meta")
                part.weight = nn.Parameter(linear.weight.detach()[begin : begin + width], requires_grad=False)
                if linear.bias is not None:
                    part.bias = nn.Parameter(linear.bias.detach()[begin : begin + width], requires_grad=False)
                parent.add_module(name, part)
                parts.append((f"{path.removesuffix(key)}{name}", width))
                begin += width
            found.append((path, parts))
    return found


__all__ = ["AdapterBank", "BankLinear", "Held", "NoRoom"]
