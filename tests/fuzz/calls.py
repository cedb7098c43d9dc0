"""Calls of every op family on random operands, and how far their results may be from float64's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.functional import fold_gate, read_blocks, write_blocks_
from lowrank_kernels.stack import LoRAStack
from lowrank_kernels.tuned import Fields

from .draw import F32, F64, Draw

Tensors = dict[str, Tensor]
EPS32 = torch.finfo(F32).eps


@dataclass
class Call:
    """One call of a public function.

    Attributes:
        words: what it is, for people.
        tensors: operands by name, in their layouts.
        run: the function on such operands, by the backend asked for; in float64 by "reference" it is the oracle.
        size: what the absolute values of the terms of "y", or of a gradient, add up to, from its name and dY's norm.
        trained: operands that it can differentiate.
        relative: an error that the result has beside roundings to its dtype, such as that of a norm.
        backends: what may be asked for.
        dtype: of x and W.
        tuned: the op whose plans may be told what to do, and ``choices`` what they may be told.
    """

    words: str
    tensors: Tensors
    run: Callable[[Tensors, str], Tensor]
    size: Callable[[str, float], float]
    dtype: torch.dtype
    trained: tuple[str, ...] = ()
    relative: float = 0.0
    backends: tuple[str, ...] = ("auto", "cpu", "reference", "triton")
    tuned: str | None = None
    choices: tuple[Fields, ...] = field(default=({"base": "own"}, {"base": "library"}))


def _norm(t: Tensor | None) -> float:
    return 0.0 if t is None else float(t.detach().to(F64).norm())


def _largest(t: Tensor | None, default: float = 0.0) -> float:
    return default if t is None or not t.numel() else float(t.detach().to(F64).abs().max())


def _longest(t: Tensor) -> float:
    """The largest norm of a row."""
    return 0.0 if not t.numel() else float(t.detach().to(F64).norm(dim=-1).max())


def _leading(d: Draw, x: Tensor) -> Tensor:
    """x (M, C) with as many leading dimensions as may be."""
    m = x.shape[0]
    if m == 1 and d.chance(0.3):
        return x[0]
    if m and m % 2 == 0 and d.chance(0.3):
        return x.unflatten(0, (2, m // 2))
    return x.unsqueeze(0) if d.chance(0.1) else x


def _linear(d: Draw) -> tuple[Tensors, torch.dtype]:
    """x, W, A, B, and perhaps a bias."""
    m, k, n, r, dtype = d.tokens(), d.width(), d.width(), d.rank(), d.dtype()
    of = d.any_dtype(dtype)
    tensors = {
        "x": _leading(d, d.laid_out(d.normal(m, k, of=dtype))),
        "weight": d.laid_out(d.normal(n, k, of=dtype, scale=max(k, 1) ** -0.5)),
        "lora_a": d.laid_out(d.normal(r, k, of=of, scale=max(k, 1) ** -0.5)),
        "lora_b": d.laid_out(d.normal(n, r, of=d.one_of(of, of, d.any_dtype(dtype)), scale=r**-0.5)),
    }
    if d.chance(0.5):
        tensors["bias"] = d.laid_out(d.normal(n, of=d.any_dtype(dtype)))
    return tensors, dtype


def _dropout(d: Draw) -> dict[str, Any]:
    if d.chance(0.7):
        return {}
    return {"dropout_p": d.one_of(0.1, 0.5, 0.9), "dropout_seed": d.random.randint(0, 2**63 - 1)}


class _Sizes:
    """Of y and the gradients of a linear with a correction, from the operands' norms."""

    def __init__(self, t: Tensors, scaling: float, dropout_p: float = 0.0, g: float = 1.0) -> None:
        drop = 1.0 / (1.0 - dropout_p)
        self.x, self.all_x = drop * _longest(t["x"]), drop * _norm(t["x"])
        self.w, self.all_w = _longest(t["weight"]), _norm(t["weight"])
        self.a, self.all_b, self.b = _norm(t["lora_a"]), _norm(t["lora_b"]), _longest(t["lora_b"])
        self.s, self.drop, self.g = abs(scaling) * _largest(t.get("gate"), 1.0), drop, g
        self.bias, self.rows, self.s_alone = _largest(t.get("bias")), max(1, t["x"].numel()), abs(scaling)

    def __call__(self, name: str, dy: float) -> float:
        u = self.x * (self.w + self.s * self.a * self.b)
        du, q = max(self.g, 1.0) * dy, max(self.g, 1.0) * dy * self.all_b
        return {
            "y": max(self.g, 1.0) * 2 * u + self.bias,
            "x": 2 * du * self.all_w + self.drop * self.s * q * self.a,
            "lora_a": self.s * q * self.all_x,
            "lora_b": self.s * du * self.all_x * self.a,
            "bias": self.rows**0.5 * dy,
            "gate": self.s_alone * q * self.all_x * self.a,
        }[name]


def lora(d: Draw) -> Call:
    tensors, dtype = _linear(d)
    if d.chance(0.4):
        tensors["gate"] = d.laid_out(d.normal(tensors["lora_a"].shape[0], of=d.any_dtype(dtype)))
    scaling, options = d.scaling(), _dropout(d)
    return Call(
        f"lora_linear(scaling={scaling}, {options})",
        tensors,
        lambda t, backend: lk.lora_linear(**t, scaling=scaling, **options, backend=backend),
        _Sizes(tensors, scaling, options.get("dropout_p", 0.0)),
        dtype,
        ("x", "lora_a", "lora_b", "bias", "gate"),
        tuned="lora_linear",
        choices=({"base": "own"}, {"base": "library"}, {"eager": True}, {"backend": "reference"}),
    )


def _norm_terms(t: Tensors, scaling: float) -> tuple[Tensor, Tensor]:
    """(n, what n² would be without cancellation), each (N,)."""
    w, a, b = (t[name].detach().to(F64) for name in ("weight", "lora_a", "lora_b"))
    b = b * t["gate"].detach().to(F64) if "gate" in t else b
    most = (w.norm(dim=1) + abs(scaling) * (b.abs() @ a.norm(dim=1))).square()
    return (w + scaling * (b @ a)).norm(dim=1), most


def _norm_error(t: Tensors, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(n, how far a kernel's may be from it), each (N,)."""
    norm, most = _norm_terms(t, scaling)
    square = (16 + t["weight"].shape[1] ** 0.5) * torch.finfo(_accumulation(dtype)).eps * most
    return norm, square / torch.maximum(norm, square.sqrt()).clamp_min(1e-300)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, F32)


def _with_a_zero_row(d: Draw, tensors: Tensors) -> None:
    n = tensors["weight"].shape[0]
    if n and d.chance(0.1):
        for name in ("weight", "lora_b"):
            tensors[name] = tensors[name].clone()
            tensors[name][n // 2] = 0


def dora(d: Draw) -> Call:
    tensors, dtype = _linear(d)
    _with_a_zero_row(d, tensors)
    tensors["magnitude"] = d.laid_out(d.positive(tensors["weight"].shape[0], of=d.any_dtype(dtype)))
    if d.chance(0.2):
        tensors["gate"] = d.laid_out(d.normal(tensors["lora_a"].shape[0], of=d.any_dtype(dtype)))
    scaling, options = d.scaling(), _dropout(d)
    if options:
        options["dropout_base"] = d.chance(0.5)
    detach_norm = d.chance(0.7)
    if d.chance(0.3):
        squares = tensors["weight"].to(F64).square().sum(1)
        options["weight_sq_norm"] = d.laid_out_as_it_is(squares.to(_accumulation(dtype)))
    elif d.chance(0.4) and detach_norm:
        w, a, b, m = (tensors[k] for k in ("weight", "lora_a", "lora_b", "magnitude"))
        kept = lk.dora_column_scale(
            w, a, fold_gate(b, tensors["gate"], F64) if "gate" in tensors else b, m, scaling=scaling
        )
        options["norm_and_scale"] = tuple(d.laid_out_as_it_is(t) for t in kept[:2])

    def run(t: Tensors, backend: str) -> Tensor:
        given = {
            k: v
            for k, v in options.items()
            if t["x"].dtype == dtype or k in ("dropout_p", "dropout_seed", "dropout_base")
        }
        return lk.dora_linear(**t, scaling=scaling, **given, detach_norm=detach_norm, backend=backend)

    norm, error = _norm_error(tensors, scaling, dtype)
    live = norm > 0
    g = torch.where(live, tensors["magnitude"].to(F64) / torch.where(live, norm, 1.0), 0.0)
    least = float(norm[live].min()) if live.any() else 1.0
    relative = float((error / norm)[live].max()) if live.any() else 0.0
    sizes = _Sizes(tensors, scaling, options.get("dropout_p", 0.0), _largest(g, 1.0))

    def size(name: str, dy: float) -> float:
        u = sizes.all_x * (sizes.all_w + sizes.s * sizes.a * sizes.all_b)
        through = (
            0.0 if detach_norm else dy * u * _largest(g) / least**2 * (sizes.all_w + sizes.s * sizes.a * sizes.all_b)
        )
        if name == "magnitude":
            return dy * u / least
        more = {
            "lora_a": sizes.s * sizes.all_b * through,
            "lora_b": sizes.s * sizes.a * through,
            "gate": sizes.s_alone * sizes.all_b * sizes.a * through,
        }.get(name, 0.0)
        return sizes(name, dy) + more

    return Call(
        f"dora_linear(scaling={scaling}, detach_norm={detach_norm}, {list(options)})",
        tensors,
        run,
        size,
        dtype,
        ("x", "lora_a", "lora_b", "magnitude", "bias", "gate"),
        min(2 * relative, 1e6),
        tuned="dora_linear",
    )


def dora_norm(d: Draw) -> Call:
    tensors, dtype = _linear(d)
    _with_a_zero_row(d, tensors)
    tensors = {name: tensors[name] for name in ("weight", "lora_a", "lora_b")}
    scaling = d.scaling()
    norm, error = _norm_error(tensors, scaling, dtype)
    # What is compared is n, whose error is not relative to it: as a size, at one unit in the last place.
    size = _largest(error) / torch.finfo(_accumulation(dtype)).eps + _largest(norm)
    return Call(
        f"dora_weight_norm(scaling={scaling})",
        tensors,
        lambda t, backend: lk.dora_weight_norm(**t, scaling=scaling, backend=backend),
        lambda name, dy: size,
        _accumulation(dtype),
    )


def block_sparse(d: Draw) -> Call:
    m, k, n, dtype = d.tokens(), d.width(), d.width(), d.dtype()
    bm, bn = d.one_of(16, 16, 32, 48), d.one_of(16, 16, 32, 48)
    every = [(i, j) for i in range(-(-n // bm)) for j in range(-(-k // bn))]
    index = torch.tensor(d.random.sample(every, d.random.randint(0, len(every))), dtype=torch.int32).reshape(-1, 2)
    weight = d.laid_out(d.normal(n, k, of=dtype, scale=max(k, 1) ** -0.5))
    blocks = d.normal(len(index), bm, bn, of=d.any_dtype(dtype))
    if weight.numel():
        weight = weight.clone() if 0 in weight.stride() else weight
        write_blocks_(weight, blocks, index)
        blocks = read_blocks(weight, index, (bm, bn)).to(blocks.dtype)
    tensors = {"x": _leading(d, d.laid_out(d.normal(m, k, of=dtype))), "weight": weight, "blocks": blocks}
    if d.chance(0.5):
        tensors["bias"] = d.laid_out(d.normal(n, of=d.any_dtype(dtype)))
    index = d.laid_out_as_it_is(index)
    x, all_x, w, all_w = _longest(tensors["x"]), _norm(tensors["x"]), _longest(weight), _norm(weight)

    def size(name: str, dy: float) -> float:
        return {
            "y": x * w + _largest(tensors.get("bias")),
            "x": dy * all_w,
            "blocks": dy * all_x,
            "bias": max(1, m) ** 0.5 * dy,
        }[name]

    return Call(
        f"block_sparse_linear({len(index)} of {bm}×{bn})",
        tensors,
        lambda t, backend: lk.block_sparse_linear(**t, block_index=index, backend=backend),
        size,
        dtype,
        ("x", "blocks", "bias"),
    )


def block_grad(d: Draw) -> Call:
    m, k, n, dtype = d.tokens(), d.width(), d.width(), d.dtype()
    bm, bn = d.one_of(16, 16, 32, 48), d.one_of(16, 16, 32, 48)
    every = [(i, j) for i in range(-(-n // bm)) for j in range(-(-k // bn))]
    index = torch.tensor(d.random.sample(every, d.random.randint(0, len(every))), dtype=torch.int32).reshape(-1, 2)
    tensors = {"x": d.laid_out(d.normal(m, k, of=dtype)), "grad_y": d.laid_out(d.normal(m, n, of=dtype))}
    size = _norm(tensors["x"]) * _norm(tensors["grad_y"])
    return Call(
        f"block_sparse_weight_grad({len(index)} of {bm}×{bn})",
        tensors,
        lambda t, backend: lk.block_sparse_weight_grad(**t, block_index=index, block_size=(bm, bn), backend=backend),
        lambda name, dy: size,
        dtype,
    )


def multi_lora(d: Draw) -> Call:
    m, k, n, dtype = d.tokens(), d.width(), d.width(), d.dtype()
    of, adapters, choices = d.any_dtype(dtype), d.random.randint(1, 5), d.one_of(1, 1, 1, 2)
    widths = (n,) if n < 2 or d.chance(0.7) else (n // 2, n - n // 2)
    with_dora = choices == 1 and d.chance(0.4)
    given: list[Any] = []
    for _ in range(adapters):
        r, s = d.rank(), d.scaling()
        is_dora, parts = with_dora and d.chance(0.6), []
        for width in widths:
            factors = (d.normal(r, k, of=of, scale=max(k, 1) ** -0.5), d.normal(width, r, of=of, scale=r**-0.5), s)
            parts.append((*factors, d.positive(width, of=of)) if is_dora else factors)
        given.append(parts if len(widths) > 1 else parts[0])
    stack = LoRAStack.from_factors(given, slices=widths if len(widths) > 1 else None)
    for i in range(adapters):
        if d.chance(0.2):
            stack.remove(i)
    if d.chance(0.2):
        stack.compact()
    rows = torch.randint(-1, adapters, (m, choices), generator=d.generator)
    ids = rows if choices > 1 or d.chance(0.3) else rows[:, 0]
    ids = d.laid_out_as_it_is(ids.to(d.one_of(torch.int64, torch.int32, torch.int16)))
    tensors = {
        "x": d.laid_out(d.normal(m, k, of=dtype)),
        "weight": d.laid_out(d.normal(n, k, of=dtype, scale=max(k, 1) ** -0.5)),
        "lora_a": stack.lora_a,
        "lora_b": stack.lora_b,
    }
    if stack.magnitude is not None:
        tensors["magnitude"] = stack.magnitude
    if d.chance(0.5):
        tensors["bias"] = d.laid_out(d.normal(n, of=d.any_dtype(dtype)))
    options = _dropout(d)
    if not stack.has_dora and d.chance(0.2):
        options["weights"] = d.laid_out_as_it_is(d.normal(m, choices, of=d.one_of(F32, dtype)))

    def with_tensors(t: Tensors) -> LoRAStack:
        slices = stack.slices if stack.is_sliced else None
        return LoRAStack(t["lora_a"], t["lora_b"], stack.places, t.get("magnitude"), slices=slices)

    def run(t: Tensors, backend: str) -> Tensor:
        operands = {"bias": t.get("bias"), **options, "backend": backend}
        return lk.multi_lora_linear(t["x"], t["weight"], with_tensors(t), ids, **operands)

    g, least, relative = 1.0, 1.0, 0.0
    for i, place in enumerate(stack.places):
        for s in range(len(stack.slices) if place.rank and place.magnitude >= 0 else 0):
            lora_a, lora_b, scaling, magnitude = stack.factors(i, s)
            part = {"weight": tensors["weight"][stack.columns(s)], "lora_a": lora_a, "lora_b": lora_b}
            norm, error = _norm_error(part, scaling, dtype)
            assert magnitude is not None
            if norm.numel() and float(norm.min()) > 0:
                least = min(least, float(norm.min()))
                g, relative = (
                    max(g, float((magnitude.to(F64) / norm).max())),
                    max(relative, float((error / norm).max())),
                )
            elif norm.numel():
                relative = 1e6
    most = max((abs(s) for p in stack.places for s in (p.scaling, *(x for _, x in p.slices))), default=0.0)
    most *= choices * max(1.0, _largest(options.get("weights")))
    sized = {**tensors, "lora_b": stack.lora_b.T}
    sizes = _Sizes(sized, most, options.get("dropout_p", 0.0), g)

    def size(name: str, dy: float) -> float:
        if name == "magnitude":
            return dy * sizes.all_x * (sizes.all_w + sizes.s * sizes.a * sizes.all_b) / least
        return sizes(name, dy)

    return Call(
        f"multi_lora_linear(ranks={stack.ranks}, slices={widths}, J={choices}, dora={stack.has_dora}, {list(options)})",
        tensors,
        run,
        size,
        dtype,
        ("x", "lora_a", "lora_b", *(("magnitude",) if stack.has_dora else ()), "bias"),
        min(2 * relative, 1e6),
        tuned="multi_lora_linear",
    )


def importance(d: Draw) -> Call:
    k, n, r, dtype = d.width(), d.width(), d.rank(), d.dtype()
    tensors = {"weight": d.laid_out(d.normal(n, k, of=dtype))}
    for name, shape in (("lora_a", (r, k)), ("lora_b", (n, r)), ("grad_a", (r, k)), ("grad_b", (n, r))):
        tensors[name] = d.laid_out(d.normal(*shape, of=d.any_dtype(dtype), scale=r**-0.25))
    scaling, dim = d.scaling(), d.one_of("rows", "columns")
    # The sums if nothing cancelled; the error of a square is twice that of its root.
    w, a, b, grad_a, grad_b = (t.to(F64).abs() for t in tensors.values())
    most = ((grad_b @ a + b @ grad_a + grad_b @ grad_a) * (w + abs(scaling) * (b @ a))).square()
    size = 2 * _largest(most.sum(1 if dim == "rows" else 0))
    return Call(
        f"lora_importance(scaling={scaling}, dim={dim})",
        tensors,
        lambda t, backend: lk.lora_importance(**t, scaling=scaling, dim=dim, backend=backend),
        lambda name, dy: size,
        _accumulation(dtype),
    )


def galore(d: Draw) -> Call:
    k, n, dtype = d.width(), d.width(), d.dtype()
    r = min(d.rank(), max(n, 1))
    state = F64 if dtype == F64 else F32
    turned = d.chance(0.4)

    def written(t: Tensor) -> Tensor:
        """In some layout, of its own memory."""
        t = t.mT.contiguous().mT if turned else d.laid_out_as_it_is(t)
        return t.clone() if 0 in t.stride() else t

    tensors = {
        "weight": written(d.normal(n, k, of=dtype)),
        "grad": d.laid_out(d.normal(n, k, of=d.any_dtype(dtype))),
        "basis": d.laid_out(d.normal(n, r, of=d.any_dtype(dtype), scale=max(n, 1) ** -0.5)),
        "exp_avg": written(d.normal(r, k, of=state)),
        "exp_avg_sq": written(d.positive(r, k, of=state)),
    }
    settings = {
        "step": d.one_of(1, 2, 1000),
        "lr": d.one_of(0.0, 1e-3, 0.5),
        "weight_decay": d.one_of(0.0, 0.1),
        "scale": d.one_of(0.25, 1.0),
        "eps": d.one_of(1e-8, 1e-3),
    }
    what = d.one_of("weight", "exp_avg", "exp_avg_sq")

    def run(t: Tensors, backend: str) -> Tensor:
        own = {}
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            own[name] = torch.empty_strided(t[name].shape, t[name].stride(), dtype=t[name].dtype).copy_(t[name])
        lk.galore_adam_(**{**t, **own}, **settings, backend=backend)
        return own[what]

    # |L| <= ‖P‖ ‖G‖ by column and row; the step divides by at least the root of what is left of v.
    low = _norm(tensors["basis"]) * _norm(tensors["grad"])
    mean = _largest(tensors["exp_avg"]) + low
    rate = settings["lr"] * settings["scale"] / (1 - 0.9 ** settings["step"])
    change = rate * _longest(tensors["basis"]) * r**0.5 * mean / 0.45
    sizes = {
        "weight": _largest(tensors["weight"]) + 4 * change,
        "exp_avg": mean,
        "exp_avg_sq": _largest(tensors["exp_avg_sq"]) + 2 * low**2,
    }
    words = f"galore_adam_({settings}, {what})"
    return Call(words, tensors, run, lambda name, dy: 4 * sizes[what], dtype if what == "weight" else state)


def magnitude(d: Draw) -> Call:
    dtype = d.dtype()
    of = F64 if dtype == F64 else F32
    values = d.laid_out(d.normal(d.width(), d.width(), of=dtype))
    digit = d.one_of(0, 1, 2)
    leading = d.one_of(*((0,), (2016, 2032, 0), (2016 << 10, 2032 << 10))[digit])
    return Call(
        f"magnitude_histogram(digit={digit}, leading={leading})",
        {"values": values},
        lambda t, backend: lk.magnitude_histogram(t["values"], digit=digit, leading=leading, backend=backend).to(of),
        lambda name, dy: 1e-3,  # counts are exact
        of,
    )


def svft(d: Draw) -> Call:
    m, k, n, dtype = d.tokens(), d.width(), d.width(), d.dtype()
    i, j, of = d.rank(), d.rank(), d.any_dtype(dtype)
    places = sorted(d.random.sample(range(i * j), d.random.randint(1, i * j)))
    pattern = lk.svft_pattern(torch.tensor([[p // j for p in places], [p % j for p in places]]), i, j)
    tensors = {
        "x": _leading(d, d.laid_out(d.normal(m, k, of=dtype))),
        "weight": d.laid_out(d.normal(n, k, of=dtype, scale=max(k, 1) ** -0.5)),
        "u": d.laid_out(d.normal(n, i, of=of, scale=max(n, 1) ** -0.5)),
        "vh": d.laid_out(d.normal(j, k, of=of, scale=max(k, 1) ** -0.5)),
        "values": d.laid_out(d.normal(len(places), of=d.any_dtype(dtype))),
    }
    if d.chance(0.5):
        tensors["bias"] = d.laid_out(d.normal(n, of=d.any_dtype(dtype)))
    x, w, u = (_longest(tensors[name]) for name in ("x", "weight", "u"))
    all_x, all_w, all_u = (_norm(tensors[name]) for name in ("x", "weight", "u"))
    all_v, s, rows = _norm(tensors["vh"]), _norm(tensors["values"]), max(1, tensors["x"].numel())

    def size(name: str, dy: float) -> float:
        return {
            "y": 2 * x * (w + all_v * s * u) + _largest(tensors.get("bias")),
            "x": 2 * dy * (all_w + all_u * s * all_v),
            "values": dy * all_u * all_x * all_v,
            "bias": rows**0.5 * dy,
        }[name]

    def run(t: Tensors, backend: str) -> Tensor:
        operands = (t[name] for name in ("x", "weight", "u", "vh", "values"))
        return lk.svft_linear(*operands, pattern, t.get("bias"), backend=backend)

    return Call(
        f"svft_linear(I={i}, J={j}, E={len(places)})",
        tensors,
        run,
        size,
        dtype,
        ("x", "values", "bias"),
        tuned="svft_linear",
        choices=({"backend": "reference"},),
    )


def merge(d: Draw) -> Call:
    k, n, r, dtype = d.width(), d.width(), d.rank(), d.dtype()
    tensors = {
        "weight": d.laid_out(d.normal(n, k, of=dtype)),
        "lora_a": d.laid_out(d.normal(r, k, of=d.any_dtype(dtype))),
        "lora_b": d.laid_out(d.normal(n, r, of=d.any_dtype(dtype), scale=r**-0.5)),
    }
    if 0 in tensors["weight"].stride():
        tensors["weight"] = tensors["weight"].clone()
    scaling, way = d.scaling(), d.one_of("merge_lora_", "merge_dora_", "unmerge_dora_")
    scale = None
    if way != "merge_lora_":
        scale = d.laid_out_as_it_is(d.positive(n, of=d.any_dtype(dtype)))

    def run(t: Tensors, backend: str) -> Tensor:
        factors = (t["lora_a"], t["lora_b"])
        # In place, into a weight of the same layout.
        weight = torch.empty_strided(t["weight"].shape, t["weight"].stride(), dtype=t["weight"].dtype).copy_(
            t["weight"]
        )
        if scale is None:
            return lk.merge_lora_(weight, *factors, scaling=scaling, backend=backend)
        return getattr(lk, way)(weight, *factors, scale, scaling=scaling, backend=backend)

    size = _largest(tensors["weight"]) + abs(scaling) * _longest(tensors["lora_b"]) * _norm(tensors["lora_a"])
    return Call(f"{way}(scaling={scaling})", tensors, run, lambda name, dy: 4 * size, dtype, tuned="merge_lora_")


FAMILIES: dict[str, tuple[int, Callable[[Draw], Call]]] = {
    "lora": (6, lora),
    "dora": (5, dora),
    "multi_lora": (5, multi_lora),
    "block_sparse": (3, block_sparse),
    "block_grad": (2, block_grad),
    "dora_norm": (2, dora_norm),
    "importance": (2, importance),
    "galore": (2, galore),
    "magnitude": (1, magnitude),
    "merge": (2, merge),
    "svft": (2, svft),
}
"""How often each is drawn, and by what."""
