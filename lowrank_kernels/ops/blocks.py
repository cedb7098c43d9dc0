"""``lowrank_kernels::lora_block``: linears of one x, or an MLP of them, as one node: form, backends, fakes, autograd.

A block adds no products of its own: each linear in it is planned and computed as ``lora_linear`` and ``dora_linear``
are. What the block adds is what the linears share. On a CPU, where PyTorch makes the products with W, the thin products
of all linears that read x are made in one, P = x [A_1; A_2; ...]ᵀ, and so are dA and the correction of dX. dX is summed
in place. An MLP keeps what its gate and up projections give, and no product of the activation, which the backward makes
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpp import cpp
from ..reference.blocks import ACTIVATIONS, mlp_hidden_ref
from ..weights import FrozenWeight, Weight, grad_product, product, unpacked
from . import dora, lora
from .backend import why_not
from .dora import DoRALinear, DoRALinearBackward
from .frozen import FrozenLinear, check_frozen_linear, plan_frozen_linear
from .library import NAMESPACE, _library, traced, unseen
from .lora import LoRALinear, LoRALinearBackward
from .operands import as_rows, like_rows_of, scaling_error, under_autocast, unit_columns
from .planning import OWN, Plan


class LoRAPart(NamedTuple):
    """One linear of a block: y = x Wᵀ + bias, with LoRA's correction or, with a magnitude, DoRA's.

    Attributes:
        weight: W (N, K), frozen: x's dtype, or a weight of few bits (``lk.weights``).
        lora_a, lora_b: A (R, K) and B (N, R), any float dtype; both None: the linear is not adapted.
        bias: (N,) or None.
        magnitude: DoRA's m (N,) or None.
        weight_sq_norm: ‖W_i‖² (N,), float32, for DoRA; computed where it is None.
        scaling: s.
    """

    weight: Weight
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    weight_sq_norm: Tensor | None = None
    scaling: float = 1.0


_OPTIONAL = "lora_a", "lora_b", "bias", "magnitude", "weight_sq_norm"


class PartForm(NamedTuple):
    """What a part consists of, beside its tensors. ``fields``: those of ``_OPTIONAL`` that it has; ``trained``: those
    of them whose gradients are recorded."""

    weight_format: str
    weight_parts: int
    fields: tuple[str, ...]
    trained: tuple[str, ...]
    scaling: float

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of what the part keeps for the backward."""
        if "magnitude" in self.fields:
            names = "p" * ("lora_b" in self.trained), "u" * ("magnitude" in self.trained), "norm", "column_scale"
            return tuple(name for name in names if name)
        return ("p",) * ("lora_b" in self.trained)


class Form(NamedTuple):
    """A block beside its tensors. ``activation``: None for linears of one x; of an MLP the last part is the down
    projection. ``split``: gate and up are the halves of one part's output. ``records``: gradients are recorded."""

    parts: tuple[PartForm, ...]
    activation: str | None
    split: bool
    records: bool
    dropout_p: float
    backend: str


def form_of(
    parts: Sequence[LoRAPart], activation: str | None, split: bool, records: bool, dropout_p: float, backend: str
) -> str:
    """The form as the dispatcher carries it; see :func:`form_from`."""
    lines = [f"{activation or ''}\t{int(split)}\t{int(records)}\t{float(dropout_p)!r}\t{backend}"]
    for part in parts:
        weight = part.weight
        name, count = ("", 1) if isinstance(weight, Tensor) else (_name_of(weight), len(weight.parts()))
        letters = ""
        for letter, t in zip("abimn", part[1:6], strict=True):
            if t is not None:
                letters += letter.upper() if records and t.requires_grad else letter
        lines.append(f"{name}\t{count}\t{letters}\t{float(part.scaling)!r}")
    return "\n".join(lines)


def _name_of(weight: FrozenWeight) -> str:
    return f"{weight.format} {weight.settings()}"


@lru_cache(maxsize=1024)
def form_from(form: str) -> Form:
    first, *lines = form.split("\n")
    activation, split, records, dropout_p, backend = first.split("\t")
    names, parts = dict(zip("abimn", _OPTIONAL, strict=True)), []
    for line in lines:
        weight_format, count, letters, scaling = line.split("\t")
        fields = tuple(names[letter.lower()] for letter in letters)
        trained = tuple(names[letter.lower()] for letter in letters if letter.isupper())
        parts.append(PartForm(weight_format, int(count), fields, trained, float(scaling)))
    return Form(tuple(parts), activation or None, split == "1", records == "1", float(dropout_p), backend)


def operands_of(parts: Sequence[LoRAPart]) -> list[Tensor]:
    """The tensors of the parts, one after another, as the dispatcher carries them."""
    operands: list[Tensor] = []
    for part in parts:
        operands += [part.weight] if isinstance(part.weight, Tensor) else part.weight.parts()
        operands += [t for t in part[1:6] if t is not None]
    return operands


def _parts_of(form: Form, operands: Sequence[Tensor]) -> list[LoRAPart]:
    parts, rest = [], iter(operands)
    for of in form.parts:
        stored = [next(rest) for _ in range(of.weight_parts)]
        weight = unpacked(of.weight_format, stored) if of.weight_format else stored[0]
        parts.append(LoRAPart(weight, **{field: next(rest) for field in of.fields}, scaling=of.scaling))
    return parts


def _groups(form: Form) -> list[range]:
    """The parts that read the same input: of an MLP those before the activation, and the one after it."""
    count = len(form.parts)
    return [range(count)] if form.activation is None else [range(count - 1), range(count - 1, count)]


# ------------------------------------------------------------------------------------------------- calls of the parts


def lora_call(x: Tensor, part: LoRAPart, dropout_p: float, seed: Tensor | None, save: bool, backend: str) -> Any:
    """The record of a part's own op; None where the part is not adapted."""
    a, b = part.lora_a, part.lora_b
    if a is None or b is None:
        return None
    if part.magnitude is None:
        return LoRALinear(x, part.weight, a, b, part.bias, None, part.scaling, dropout_p, seed, save, backend)
    return DoRALinear(
        x,
        part.weight,
        a,
        b,
        part.magnitude,
        part.weight_sq_norm,
        None,
        None,
        part.bias,
        part.scaling,
        dropout_p,
        seed,
        False,
        True,
        save,
        backend,
    )


def check_part(where: str, x: Tensor, part: LoRAPart, dropout_p: float, seed: Tensor | None, backend: str) -> None:
    """Raise the error of a part that does not fit x, in the words of its own op; ``where`` stands in the op's place."""
    if (part.lora_a is None) != (part.lora_b is None):
        raise ValueError(f"{where}: expected lora_a and lora_b, or neither")
    if part.lora_a is None and part.magnitude is not None:
        raise ValueError(f"{where}: expected lora_a and lora_b with a magnitude")
    scaling = scaling_error(where, part.scaling, getattr(x, "dtype", torch.float32))
    if scaling is not None:
        raise scaling
    call = lora_call(x, part, dropout_p, seed, False, backend)
    call = FrozenLinear(x, part.weight, part.bias, backend) if call is None else call
    check, plan = _CHECKED[type(call)]
    error: Exception | None = None
    try:
        if traced():
            error = check(call)
        else:
            plan(call)
    except (ValueError, TypeError) as raised:
        error = raised
    if error is not None:
        raise type(error)(f"{where}: {str(error).partition(': ')[2]}") from None


_CHECKED: dict[Any, Any] = {
    LoRALinear: (lora.check_lora_linear, lora.plan_lora_linear),
    DoRALinear: (dora.check_dora_linear, dora.plan_dora_linear),
    FrozenLinear: (check_frozen_linear, plan_frozen_linear),
}


_Kept = dict[str, Tensor | None]


def _linears(x: Tensor, parts: list[LoRAPart], forms: Sequence[PartForm], form: Form, seed: Tensor | None) -> Any:
    """(y of each part, what each keeps) of the parts that read x (M, K)."""
    calls = [
        lora_call(x, part, form.dropout_p, seed, form.records and bool(of.kept), form.backend)
        for part, of in zip(parts, forms, strict=True)
    ]
    plans = [None if call is None else _CHECKED[type(call)][1](call) for call in calls]
    ys: list[Any] = [None] * len(parts)
    kept: list[_Kept] = [{} for _ in parts]
    together = [i for i, plan in enumerate(plans) if plan and _by_library(calls[i], plan)]
    if len(together) > 1 and len({calls[i].lora_a.dtype for i in together}) == 1:
        stacked, at = torch.cat([calls[i].lora_a for i in together]), 0
        p = lora.cpu_down(_plan(plans[together[0]]), x, stacked, False, form.dropout_p, seed)
        for i in together:
            of = calls[i]
            rank = len(of.lora_a)
            kept[i] = {"p": p[:, at : at + rank]}
            ys[i] = product(x, of.weight, of.bias)
            lora.cpu_up_(_plan(plans[i]), ys[i], p[:, at : at + rank], of.lora_b, True, of.scaling)
            at += rank
    for i, (part, call) in enumerate(zip(parts, calls, strict=True)):
        if ys[i] is not None:
            continue
        if call is None:
            ys[i] = product(x, part.weight, part.bias)
            continue
        found = lora._forward(call, plans[i]) if isinstance(call, LoRALinear) else dora._forward(call, plans[i])
        ys[i], kept[i] = found.y, found._asdict()
    return ys, kept


def _by_library(call: Any, plan: Plan) -> bool:
    """True where PyTorch makes the product with W, and the extension or PyTorch the thin ones, each by itself."""
    return isinstance(call, LoRALinear) and plan.backend == "cpu" and plan.base != OWN and plan.ready


def _plan(plan: Plan | None) -> Plan:
    assert plan is not None
    return plan


def _backward_linears(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    parts: list[LoRAPart],
    kept: list[_Kept],
    needs: list[set[str]],
    need_x: bool,
    form: Form,
    seed: Tensor | None,
) -> tuple[Tensor | None, list[dict[str, Tensor | None]]]:
    """(dX, the gradients of each part) of the parts that read x; ``needs``: the fields wanted of each part."""
    grads: list[dict[str, Tensor | None]] = [{} for _ in parts]
    total: Tensor | None = None
    stack: list[tuple[int, Tensor, Plan]] = []  # parts whose Q is known, and what they share is still to be made
    for i, (dy, part, need) in enumerate(zip(dys, parts, needs, strict=True)):
        if dy is None or not (need_x or need):
            continue
        call = _backward_call(dy, x, part, kept[i], need, need_x, form, seed)
        if "bias" in need:
            grads[i]["bias"] = dy.sum(0)
        if call is None:
            total = _plus(total, dy, part.weight) if need_x else None
        elif isinstance(call, DoRALinearBackward):
            found = dora._backward(call, None)
            grads[i] |= {"lora_a": found.lora_a, "lora_b": found.lora_b, "magnitude": found.magnitude}
            total = _sum(total, found.x)
        else:
            plan = lora._plan_backward.known(call)
            if plan.backend == "cpu" and plan.base != OWN and plan.ready:
                q, grads[i]["lora_b"] = _q_and_grad_b(call, plan) if any(call.needs) else (None, None)
                if need_x:
                    total = _plus(total, dy, part.weight)
                if q is not None:
                    stack.append((i, q, plan))
            else:
                grad = lora._backward(call, plan)
                grads[i] |= {"lora_a": grad.lora_a, "lora_b": grad.lora_b}
                total = _sum(total, grad.x)
    for members in _alike(stack, parts, needs):
        total = _shared_gradients(members, x, parts, grads, needs, total, form, seed)
    return total, grads


def _backward_call(
    dy: Tensor, x: Tensor | None, part: LoRAPart, kept: _Kept, need: set[str], need_x: bool, form: Form, seed: Any
) -> Any:
    """The record of the backward of a part's op; the bias is the caller's."""
    a, b, m = part.lora_a, part.lora_b, part.magnitude
    if a is None or b is None:
        return None
    wanted = need_x, "lora_a" in need, "lora_b" in need
    if m is None:
        return LoRALinearBackward(
            dy,
            x,
            part.weight,
            a,
            b,
            None,
            kept.get("p"),
            part.scaling,
            form.dropout_p,
            seed,
            (*wanted, False, False),
            form.backend,
        )
    norm, scale = kept["norm"], kept["column_scale"]
    assert norm is not None and scale is not None
    return DoRALinearBackward(
        dy,
        x,
        part.weight,
        a,
        b,
        norm,
        scale,
        kept.get("p"),
        kept.get("u"),
        part.scaling,
        form.dropout_p,
        seed,
        False,
        True,
        (*wanted, "magnitude" in need, False),
        m.dtype,
        form.backend,
    )


def _q_and_grad_b(call: LoRALinearBackward, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """(Q, dB), each None where it is not needed."""
    need_x, need_a, need_b = call.needs[:3]
    if need_b and (need_x or need_a):
        q, grad_b = cpp.lora_down_grad(call.grad_y, call.lora_b, call.p, None, call.scaling, call.lora_b.dtype)
        return q, grad_b
    if need_b:
        return None, cpp.lora_grad(call.grad_y, call.p, None, call.scaling, True, None, 0.0, call.lora_b.dtype)
    return lora.cpu_down(plan, call.grad_y, call.lora_b, True), None


def _alike(stack: list[Any], parts: list[LoRAPart], needs: list[set[str]]) -> list[list[Any]]:
    """The members whose products with x and of dX are one: of one scaling, one dtype of A, and one need of dA."""
    found: dict[Any, list[Any]] = {}
    for member in stack:
        part, need = parts[member[0]], needs[member[0]]
        assert part.lora_a is not None
        found.setdefault((part.scaling, part.lora_a.dtype, "lora_a" in need), []).append(member)
    return list(found.values())


def _shared_gradients(
    members: list[Any],
    x: Tensor | None,
    parts: list[LoRAPart],
    grads: list[dict[str, Tensor | None]],
    needs: list[set[str]],
    total: Tensor | None,
    form: Form,
    seed: Tensor | None,
) -> Tensor | None:
    """dA = s [Q_1 Q_2 ...]ᵀ drop(x), cut into the members' own, and dX += drop'(s [Q_1 Q_2 ...] [A_1; A_2; ...])."""
    first, _, plan = members[0]
    factors = [parts[i].lora_a for i, _, _ in members]
    ranks, scaling = [len(a) for a in factors], parts[first].scaling
    alone = len(members) == 1
    q = members[0][1] if alone else torch.cat([q for _, q, _ in members], 1)
    if total is not None:
        a = factors[0] if alone else torch.cat(factors)
        lora.cpu_up_(plan, total, q, a, False, scaling, dropout_p=form.dropout_p, seed=seed)
    if "lora_a" in needs[first]:
        assert x is not None
        grad = lora.cpu_grad_a(plan, x, q, scaling, factors[0].dtype, dropout_p=form.dropout_p, seed=seed)
        for (i, _, _), part in zip(members, grad.split(ranks), strict=True):
            grads[i]["lora_a"] = part
    return total


def _plus(total: Tensor | None, dy: Tensor, weight: Weight) -> Tensor:
    """total + dY W, in total where there is one: in one product where PyTorch adds up in full precision."""
    if total is None:
        return grad_product(dy, weight)
    if isinstance(weight, Tensor) and dy.dtype in (torch.float32, torch.float64):
        return total.addmm_(dy, weight)
    return total.add_(grad_product(dy, weight))


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return total if grad is None else grad if total is None else total.add_(grad)


# ---------------------------------------------------------------------------------------------------------- the block


def _halves(y: Tensor) -> tuple[Tensor, Tensor]:
    middle = y.shape[1] // 2
    return y[:, :middle], y[:, middle:]


def _gate_and_up(ys: Sequence[Tensor], split: bool) -> tuple[Tensor, Tensor | None]:
    """What the activation takes: (gate, up), or (the one output, None)."""
    if split:
        return _halves(ys[0])
    return ys[0], ys[1] if len(ys) > 1 else None


_IN_ONE_PASS = ("silu", "gelu_tanh", "relu_squared")
"""Activations that the extension knows."""


def _in_one_pass(form: Form, t: Tensor) -> bool:
    """Whether the extension makes h, and the gradients of gate and up."""
    if form.activation not in _IN_ONE_PASS or form.backend not in ("auto", "cpu"):
        return False
    return why_not("lora_linear", "cpu", t.device.type, t.dtype) is None


def _hidden(form: Form, ys: Sequence[Tensor]) -> Tensor:
    """h = f(gate) ∘ up, or f(gate)."""
    gate, up = _gate_and_up(ys, form.split)
    if _in_one_pass(form, gate):
        made: Tensor = cpp.glu(gate, up, form.activation)
        return made
    return mlp_hidden_ref(str(form.activation), gate, up)


def _hidden_gradients(form: Form, dh: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of ys: dh ∘ up ∘ f'(gate), and dh ∘ f(gate); dh is written over."""
    gate, up = _gate_and_up(ys, form.split)
    d_both = torch.empty_like(ys[0]) if form.split else None
    d_gate, d_up = (dh, None if up is None else torch.empty_like(up)) if d_both is None else _halves(d_both)
    if _in_one_pass(form, gate):
        cpp.glu_grad_(d_gate, d_up, dh, gate, up, form.activation)
    else:
        f = ACTIVATIONS[str(form.activation)]
        if d_up is not None:
            torch.mul(dh, f.value(gate), out=d_up)
        d_gate.copy_(f.gradient(dh if up is None else dh * up, gate))
    if d_both is not None:
        return [d_both]
    return [d_gate] if d_up is None else [d_gate, d_up]


def _forward(x: Tensor, seed: Tensor | None, operands: Sequence[Tensor], form_text: str) -> list[Tensor]:
    """[the outputs, and what is kept for the backward]: of an MLP what the gate and up projections gave, and then what
    each part keeps."""
    form = form_from(form_text)
    parts, kept, between = _parts_of(form, operands), [], []
    rows, ys = unit_columns(as_rows(x)), list[Tensor]()
    for number, group in enumerate(_groups(form)):
        if number:
            rows, between = _hidden(form, ys), ys
        forms = form.parts[group.start : group.stop]
        ys, of_parts = _linears(rows, parts[group.start : group.stop], forms, form, _seed_of(seed, number))
        kept += [found[name] for of, found in zip(forms, of_parts, strict=True) for name in of.kept]
    outputs = [like_rows_of(x, y) for y in ys]
    return [*outputs, *between, *kept] if form.records else outputs


def _seed_of(seed: Tensor | None, group: int) -> Tensor | None:
    """The masks of an MLP's two inputs differ."""
    return seed if seed is None or group == 0 else seed + group


def _backward(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    seed: Tensor | None,
    operands: Sequence[Tensor],
    saved: Sequence[Tensor],
    form_text: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of (x, *operands), None where not needed. ``saved``: what ``_forward`` kept."""
    form, rest = form_from(form_text), iter(saved)
    parts, groups = _parts_of(form, operands), _groups(form)
    between = [next(rest) for _ in groups[0]] if form.activation else []
    kept: list[_Kept] = [{name: next(rest) for name in of.kept} for of in form.parts]
    places = _places(form)
    wanted: list[set[str]] = [set() for _ in parts]
    for (part, field), need in zip(places, needs[1:], strict=True):
        if need:
            wanted[part].add(field)
    leading = next(dy.shape[:-1] for dy in dys if dy is not None)
    upper = [None if dy is None else unit_columns(as_rows(dy)) for dy in dys]
    grads: list[dict[str, Tensor | None]] = []
    if between:
        last = len(parts) - 1
        h = _hidden(form, between) if "lora_a" in wanted[last] else None
        below = needs[0] or any(wanted[:last])
        dh, grads = _backward_linears(
            upper, h, parts[last:], kept[last:], wanted[last:], below, form, _seed_of(seed, 1)
        )
        upper = [None] * last if dh is None else [*_hidden_gradients(form, dh, between)]
    of_x = groups[0].stop
    rows = None if x is None else unit_columns(as_rows(x))
    dx, first = _backward_linears(upper, rows, parts[:of_x], kept[:of_x], wanted[:of_x], needs[0], form, seed)
    grads = first + grads
    found = [dx if dx is None else dx.reshape(*leading, dx.shape[-1])]
    found += [grads[part].get(field) if need else None for (part, field), need in zip(places, needs[1:], strict=True)]
    return [found[0], *map(lora.gradient_of, operands, found[1:])]


def _places(form: Form) -> list[tuple[int, str]]:
    """(part, field) of each operand; weights, which have no gradient, are "weight"."""
    return [
        (number, field) for number, of in enumerate(form.parts) for field in (*["weight"] * of.weight_parts, *of.fields)
    ]


# ------------------------------------------------------------------------------------------- registration with torch


def _forward_fake(x: Tensor, seed: Tensor | None, operands: Sequence[Tensor], form_text: str) -> list[Tensor]:
    form = form_from(form_text)
    parts, m = _parts_of(form, operands), lora.rows_in(x)
    ys = [x.new_empty(m, part.weight.shape[0]) for part in parts]
    of_x = len(parts) if form.activation is None else len(parts) - 1
    outputs = [x.new_empty(*x.shape[:-1], y.shape[1]) for y in (ys if form.activation is None else ys[of_x:])]
    if not form.records:
        return outputs
    kept = [_kept_fake(name, part, y) for part, of, y in zip(parts, form.parts, ys, strict=True) for name in of.kept]
    return [*outputs, *(ys[:of_x] if form.activation else ()), *kept]


def _kept_fake(name: str, part: LoRAPart, y: Tensor) -> Tensor:
    if name == "u":
        return torch.empty_like(y)
    if name == "p":
        assert part.lora_a is not None
        return y.new_empty(y.shape[0], part.lora_a.shape[0])
    return y.new_empty(y.shape[1], dtype=torch.promote_types(part.weight.dtype, torch.float32))


def _backward_fake(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    seed: Tensor | None,
    operands: Sequence[Tensor],
    saved: Sequence[Tensor],
    form_text: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    dy = next(dy for dy in dys if dy is not None)
    k = _parts_of(form_from(form_text), operands)[0].weight.shape[1]
    shapes = [dy.new_empty(*dy.shape[:-1], k), *(lora.empty_factor(t) for t in operands)]
    return [shape if need else None for shape, need in zip(shapes, needs, strict=True)]


_library.define(
    "lora_block(Tensor x, Tensor? dropout_seed, Tensor[] operands, str form) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.define(
    "lora_block_backward(Tensor?[] grad_ys, Tensor? x, Tensor? dropout_seed, Tensor[] operands, Tensor[] saved, "
    "str form, bool[] needs) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _apart(found: list[Tensor]) -> list[Tensor]:
    """Results that share no memory: the dispatcher takes no others."""
    return [t.clone() if t.untyped_storage().nbytes() > t.nbytes else t for t in found]


def _filled(found: list[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if t is None else t for t in found]


_library.impl("lora_block", lambda *args: _apart(_forward(*args)), "CompositeExplicitAutograd")
_library.impl(
    "lora_block_backward",
    lambda dys, *args: _apart(_filled(_backward(dys, *args), next(dy for dy in dys if dy is not None))),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(f"{NAMESPACE}::lora_block", _forward_fake, lib=_library)
torch.library.register_fake(
    f"{NAMESPACE}::lora_block_backward",
    lambda dys, *args: _filled(_backward_fake(dys, *args), next(dy for dy in dys if dy is not None)),
    lib=_library,
)


class _Block(torch.autograd.Function):
    """The outputs, so many, of (form, outputs, whether the backward reads x, x, seed, *operands)."""

    @staticmethod
    def forward(
        ctx: Any, form: str, outputs: int, reads_x: bool, x: Tensor, seed: Tensor | None, *operands: Tensor
    ) -> tuple[Tensor, ...]:
        found = call_lora_block(x, seed, operands, form)
        ctx.save_for_backward(x if reads_x else None, seed, *operands, *found[outputs:])
        ctx.form, ctx.operands = form, len(operands)
        ctx.set_materialize_grads(False)
        return tuple(found[:outputs])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = [ctx.needs_input_grad[3], *ctx.needs_input_grad[5:]]
        if all(dy is None for dy in dys):
            return (None,) * (len(needs) + 4)
        form = form_from(ctx.form)
        if form.activation is None:  # a linear whose output nobody used has no gradients
            used = [dys[part] is not None for part, _ in _places(form)]
            needs[1:] = [need and of_used for need, of_used in zip(needs[1:], used, strict=True)]
        x, seed, *rest = ctx.saved_tensors
        operands, saved = rest[: ctx.operands], rest[ctx.operands :]
        args = dys, x, seed, operands, saved, ctx.form, needs
        dy = next(dy for dy in dys if dy is not None)
        with torch.autocast(dy.device.type, enabled=False) if under_autocast(dy) else nullcontext():
            if unseen():
                found = _backward(*args)
            else:
                made = torch.ops.lowrank_kernels.lora_block_backward(*args)
                found = [grad if need else None for grad, need in zip(made, needs, strict=True)]
        return None, None, None, found[0], None, *found[1:]


def call_lora_block(x: Tensor, seed: Tensor | None, operands: Sequence[Tensor], form: str) -> list[Tensor]:
    """What ``_forward`` returns, past torch's dispatcher where nobody listens there."""
    if unseen():
        return _forward(x, seed, operands, form)
    found: list[Tensor] = torch.ops.lowrank_kernels.lora_block(x, seed, list(operands), form)
    return found


def lora_block(
    x: Tensor,
    parts: Sequence[LoRAPart],
    *,
    activation: str | None,
    split: bool,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """The outputs of the linears of x, or of an MLP; one autograd node where a gradient is recorded."""
    operands = operands_of(parts)
    records = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in operands))
    form = form_of(parts, activation, split, records, dropout_p, backend)
    if records:
        of_x = parts if activation is None else parts[:-1]
        reads_x = any(part.lora_a is not None and part.lora_a.requires_grad for part in of_x)
        outputs = len(parts) if activation is None else 1
        found: tuple[Tensor, ...] = _Block.apply(form, outputs, reads_x, x, seed, *operands)
        return found
    return tuple(call_lora_block(x, seed, operands, form))
