"""Which adapter each row of a layer's input has, when ids are known for sequences.

A layer sees rows, not sequences. Which row belongs to which sequence is read from the shape of its input and from the
calls that led to it, on the Python stack: what the model was called with, which module flattened its input, how many
beams ``generate`` makes of a sequence. Where that does not settle it, :class:`SequenceBatch` raises.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import BatchPlan, plan_batch

SEQUENCES, POSITIONS = "sequences", "positions"
"""What lies together in x: the rows of a sequence, x (B, L, K), or those of a position, x (L, B, K)."""

_TEXT = ("input_ids", "inputs_embeds")
_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")
_MEDIA = ("pixel", "image", "video", "audio", "input_features", "input_values")


class RowsUnknownError(ValueError):
    """Nothing says which rows of x belong to which sequence."""


class _Call(NamedTuple):
    """A call of a module that has not returned yet."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def lead(self) -> torch.Size:
        """Leading shape of its main input: token ids, or vectors; () without any."""
        known = (self.kwargs[key] for key in (*_TEXT, *_DECODED) if key in self.kwargs) if self.kwargs else ()
        for t in (*known, *self.args, *self.kwargs.values()):
            if isinstance(t, Tensor):
                return t.shape[:-1] if t.is_floating_point() else t.shape
        return torch.Size()

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, by the names of the forward's parameters or by their keys in what holds them."""
        try:
            given = inspect.signature(self.module.forward).bind_partial(*self.args, **self.kwargs).arguments
        except (TypeError, ValueError):
            given = dict(self.kwargs)
        inner = {key: t for value in given.values() if isinstance(value, dict) for key, t in value.items()}
        return {key: t for key, t in {**inner, **given}.items() if isinstance(t, Tensor) and t.dim()}


def _calls_above(layer: nn.Module) -> Iterator[_Call]:
    """The calls of modules that led to this one of ``layer``, the innermost first, its own left out."""
    code, frame = nn.Module._call_impl.__code__, sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            local = frame.f_locals
            if local["self"] is not layer:
                yield _Call(local["self"], local["args"], local["kwargs"])
        frame = frame.f_back  # type: ignore[assignment]


def _is_media(name: str) -> bool:
    return any(kind in name for kind in _MEDIA)


class _Inputs(NamedTuple):
    """What a model was called with: a number of sequences, lengths that they have, media of another number beside."""

    sequences: int
    lengths: set[int]
    mixed: bool = False


def _inputs(calls: Sequence[_Call]) -> _Inputs:
    """Of the innermost call whose inputs have names that are known, or else of the outermost call.

    Raises:
        RowsUnknownError: that call is of a tower for pictures or sounds, of which a sequence may have any number.
    """
    named = [call.tensors() for call in calls]
    media = [next((t for key, t in tensors.items() if _is_media(key)), None) for tensors in named]
    text = [next((tensors[key] for key in (*_TEXT, *_DECODED) if key in tensors), None) for tensors in named]
    beside_text = False
    for tensors, of_media, of_text in zip(reversed(named), reversed(media), reversed(text), strict=True):
        if of_media is not None and of_text is None and beside_text:
            raise RowsUnknownError("rows are of pictures or sounds, of which a sequence may have any number")
        beside_text |= any(key in tensors for key in _TEXT)
    for tensors, of_media, of_text in zip(named, media, text, strict=True):
        main = of_media if of_text is None else of_text
        if main is not None:
            mixed = of_media is not None and any(key in tensors for key in _TEXT)
            others = [t for key, t in tensors.items() if t.dim() > 1 and not (mixed and _is_media(key))]
            return _Inputs(main.shape[0], {t.shape[1] for t in others if t.shape[0] == main.shape[0]}, mixed)
    lead = calls[-1].lead()
    return _Inputs(lead[0] if lead else 0, set(lead[1:2]))


def _copies(number: int) -> weakref.ref[Any] | None:
    """A reference that lives as long as the running ``generate`` that makes ``number`` beams or samples of a sequence.

    They lie together; None where no such generation runs.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and "generation_config" in frame.f_locals:
            config = frame.f_locals["generation_config"]
            beams, samples = (getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences"))
            return weakref.ref(config) if max(beams, samples) == number else None
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _flattened(calls: Iterable[_Call]) -> torch.Size:
    """Leading shape of what rows (M, K) were made of: the input of the nearest module that had more, or ()."""
    return next((lead for call in calls if len(lead := call.lead()) > 1), torch.Size())


def _refuse_selected(layer: nn.Module, calls: Iterable[_Call]) -> None:
    """Raise RowsUnknownError where rows (M, K) may be a selection of the model's, or no rows of its text.

    That is what a router gives to one of several modules, and what a model makes of pictures or sounds.
    """
    inner = layer
    for call in calls:
        name = next((name for name, module in call.module.named_modules() if module is inner), "")
        many = len(call.lead()) > 1
        if ("expert" in name and "shared" not in name) or (many and "." in name):
            raise RowsUnknownError(f"{name} is one of several modules, each of which may get a selection of the rows")
        if many:
            if any(_is_media(name) for name in call.tensors()):
                raise RowsUnknownError("rows may be of pictures or sounds")
            break
        inner = call.module


def _refuse_labelled(made_of: torch.Size, calls: Iterable[_Call]) -> None:
    """Raise RowsUnknownError where the call that rows (M, K) were taken in has labels of all its rows.

    ModernBERT's head, for one, gets the rows that have labels alone, which may be as many as there are sequences.
    """
    call = next((call for call in calls if call.lead() == made_of), None)
    if call is not None and any("label" in key and t.shape == made_of for key, t in call.tensors().items()):
        raise RowsUnknownError("rows may be those that have labels")


def _find(calls: Sequence[_Call], made_of: torch.Size) -> tuple[str, int]:
    """(order, number of sequences) of a leading shape, from what the model was called with."""
    inputs = _inputs(calls)
    first, second = (made_of[i : i + 1] == (inputs.sequences,) for i in (0, 1))
    if first and second:
        raise RowsUnknownError("its first two dimensions are both as long as the batch")
    if inputs.mixed and len(made_of) > 1 and made_of[1] not in inputs.lengths:
        raise RowsUnknownError("rows may be of pictures or sounds, of which a sequence may have any number")
    if not first and not (second and made_of[0] in inputs.lengths):
        raise RowsUnknownError(f"the model was called with {inputs.sequences} sequences")
    return SEQUENCES if first else POSITIONS, inputs.sequences


def _untraced(function: Any) -> Any:
    """``function`` out of the sight of torch.compile, where that is in use: torch 2.10 fails to trace what reads
    modules from frames. (The decorator would import all of the compiler with this package.)"""
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


class SequenceBatch:
    """Adapters of a batch's sequences, or of its rows, and the plans of the rows, made once for all linears.

    Args:
        op: whose batch it is, in messages.
        adapter_ids: integers from -1, for none: (B,), one a sequence; of more dimensions: one a row, as x has them.
        cu_seqlens: (B + 1,), where each sequence starts among rows that hold them one after another, and the end.

    Layers have two attributes. ``row_order``, None unless the user says what lies together in x, is trusted.
    ``found_order`` is what the calls have shown so far; where it could be either, it stays None and a call raises.

    Raises:
        TypeError: ids or positions that are not integers.
        ValueError: ids below -1; positions that do not ascend from 0, or not one more than ids.
    """

    def __init__(self, op: str, adapter_ids: Any, cu_seqlens: Any = None) -> None:
        self.op = op
        ids = _integers(op, "adapter_ids", adapter_ids)
        low, high = (int(v) for v in ids.aminmax()) if ids.numel() else (-1, -1)
        if low < -1:
            raise ValueError(f"{op}: expected adapter_ids from -1, for the base alone, got {low}")
        if cu_seqlens is not None:
            ids = ids.repeat_interleave(_lengths(op, ids, _integers(op, "cu_seqlens", cu_seqlens)))
        self.each_row = cu_seqlens is not None or ids.dim() > 1
        self._range, self._alike = (low, high), ids.numel() > 0 and low == high
        self.adapter_ids = ids.to(torch.int32)
        self._made: dict[Any, BatchPlan] = {}
        # Plans that need no further look: those of copies hold for one generation, those of rows (M, K) are not here.
        self._settled: dict[Any, tuple[BatchPlan, weakref.ref[Any] | None]] = {}

    def plan(self, layer: Any, x: Tensor, num_adapters: int) -> BatchPlan:
        """The plan of the rows of x (..., K), the input of ``layer``.

        Raises:
            RowsUnknownError: nothing says which row belongs to which sequence.
            ValueError: an id that no adapter has.
        """
        lead = x.shape[:-1]
        settled = self._settled.get((lead, layer.row_order, layer.found_order, num_adapters, x.device))
        if settled is not None and (settled[1] is None or settled[1]() is not None):
            return settled[0]
        if self._range[1] >= num_adapters:
            raise ValueError(
                "{}: expected adapter_ids from -1 to {}, got {} to {}".format(self.op, num_adapters - 1, *self._range)
            )
        order, sequences, held, rows = None, 0, None, lead.numel()
        if rows and not self._alike:
            try:
                order, sequences = self._order(layer, lead)
                held = self._held(sequences)
            except RowsUnknownError as why:
                raise self._refusal(lead, str(why)) from None
        key = (lead, order, sequences, num_adapters, x.device)
        plan = self._made.get(key)
        if plan is None:
            # Plans may take part in autograd later, which inference tensors cannot.
            with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
                plan = plan_batch(self._ids(rows, order, sequences).to(x.device), num_adapters)
            self._made[key] = plan
        if len(lead) != 1 or layer.row_order is not None or order is None:
            self._settled[lead, layer.row_order, layer.found_order, num_adapters, x.device] = plan, held
        return plan

    def forget_plans(self) -> None:
        self._made, self._settled = {}, {}

    def _ids(self, rows: int, order: str | None, sequences: int) -> Tensor:
        """Ids of that many rows, of so many sequences, copies of one side by side; without an order they are alike."""
        ids = self.adapter_ids.reshape(-1)
        if order is None:
            return ids[:1].expand(rows) if rows else ids[:0]
        ids = ids.repeat_interleave(sequences // len(ids))
        return ids.repeat(rows // sequences) if order == POSITIONS else ids.repeat_interleave(rows // sequences)

    def _held(self, sequences: int) -> weakref.ref[Any] | None:
        """What must live for a plan of so many sequences to hold: nothing, or the generation that makes copies."""
        size = self.adapter_ids.numel()
        if sequences == size:
            return None
        held = None if sequences % size else _copies(sequences // size)
        if held is None:
            raise RowsUnknownError(f"there are {size} ids for {sequences} sequences")
        return held

    def _order(self, layer: Any, lead: torch.Size) -> tuple[str, int]:
        """(what lies together in x (*lead, K), how many sequences there are)"""
        size, rows = self.adapter_ids.numel(), lead.numel()
        if size == 0 or not lead:
            raise RowsUnknownError
        if layer.row_order is not None:
            if layer.row_order not in (SEQUENCES, POSITIONS):
                raise ValueError(
                    f"{self.op}: expected row_order to be {SEQUENCES!r}, {POSITIONS!r} or None, got {layer.row_order!r}"
                )
            if rows % size or (rows != size and self.each_row) or (layer.row_order == POSITIONS and len(lead) > 2):
                raise RowsUnknownError
            return layer.row_order, size
        if torch.compiler.is_compiling():  # there is no stack to read
            return self._order_by_shape(layer.found_order, lead), size
        made_of = lead
        if len(lead) == 1:
            made_of = _flattened(_calls_above(layer)) or lead
            if layer.found_order is None:
                _refuse_selected(layer, _calls_above(layer))
            if rows != made_of.numel():
                _refuse_labelled(made_of, _calls_above(layer))
        if self.each_row:
            if rows != size or _without_ones(made_of) != _without_ones(self.adapter_ids.shape):
                raise RowsUnknownError(f"made of {tuple(made_of)}" if made_of != lead else "")
            return SEQUENCES, size
        order, calls = layer.found_order, []
        if order is None and (calls := list(_calls_above(layer))):
            order, sequences = _untraced(_find)(calls, made_of)
        elif order is None:  # x is the user's own
            order, sequences = SEQUENCES, lead[0]
        else:
            sequences = made_of[order == POSITIONS and len(made_of) > 1]
        all_or_pooled = rows in (made_of.numel(), sequences)  # pooled: one of each sequence
        if not all_or_pooled or (order == POSITIONS and len(made_of) > 2):
            raise RowsUnknownError
        if calls:
            layer.found_order = order
        return order, sequences

    def _order_by_shape(self, found: str | None, lead: torch.Size) -> str:
        size = self.adapter_ids.shape
        if self.each_row and _without_ones(lead) == _without_ones(size):
            return SEQUENCES
        if self.each_row or (lead[:1] != size and lead[1:2] != size):
            raise RowsUnknownError
        if found is None and lead[:2] != (*size, *size) and lead[:1] == size:
            found = SEQUENCES
        if found is None or lead[found == POSITIONS and len(lead) > 1] != size[0]:
            raise RowsUnknownError("call the model once before it is compiled")
        return found

    def _refusal(self, lead: torch.Size, why: str) -> RowsUnknownError:
        given, got = tuple(self.adapter_ids.shape), f"got one of leading shape {tuple(lead)}" + (why and f": {why}")
        if self.each_row:
            return RowsUnknownError(f"{self.op}: expected x of leading shape {given}, as ids are of rows, {got}")
        return RowsUnknownError(
            f"{self.op}: expected x with the rows of {given[0]} sequences in an order that is known, {got}; "
            f"give an id for each sequence that the model sees (ids.repeat_interleave(c) for c copies side by side, "
            f"torch.cat([ids, ids]) for a batch put twice), or for each row, or set row_order of the layer"
        )


def _integers(op: str, name: str, given: Any) -> Tensor:
    """(B,) or more dimensions, int64 on the host: kept, so no inference tensor."""
    try:
        with torch.inference_mode(False):
            found = torch.as_tensor(given)
            found = found.to(torch.int64) if found.numel() == 0 and not isinstance(given, Tensor) else found
            if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.dim() == 0:
                raise TypeError
            return torch.tensor(found.tolist(), dtype=torch.int64, device="cpu").reshape(found.shape)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise TypeError(f"{op}: expected {name} to be integers, one a sequence or one a row, got {got}") from None


def _lengths(op: str, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    shape, ends = (ids.numel() + 1,), cu_seqlens
    if ids.dim() != 1 or ends.shape != shape or int(ends[0]) or bool((ends.diff() < 0).any()):
        raise ValueError(
            f"{op}: expected cu_seqlens of shape (B + 1,) = {shape} that ascend from 0, and ids of shape (B,), "
            f"got {ends.tolist()} and {tuple(ids.shape)}"
        )
    return ends.diff()


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
