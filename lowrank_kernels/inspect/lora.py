"""The LoRA linear, as the tools see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..kernels import lora as launchers
from ..kernels.coded import CodedOperand, Correction, coded_product
from ..kernels.lora_tiles import Strategy, choose_strategy, coded_strategy, fused_fits, lora_tiles, predicted_seconds
from ..kernels.target import Target
from ..weights import FORMATS, CodedWeight, NF4Weight
from ..weights.coded import Codes, Scales
from .registry import KernelWork, LaunchCase, OpFamily, Traced

_BF16, _F32 = torch.bfloat16, torch.float32
_DTYPES = {"bf16": (_BF16, _BF16), "bf16/f32": (_BF16, _F32), "f32": (_F32, _F32)}
_EVERYTHING = (True, True, True)


def _case(
    strategy: Strategy,
    M: int,
    R: int,
    dtypes: str,
    dropout_p: float = 0.0,
    *,
    width: int = 4096,
    extras: bool = False,
    store_p: bool = True,
    needs: tuple[bool, bool, bool] = _EVERYTHING,
) -> LaunchCase:
    """Forward, and backward for ``needs`` of (x, A, B); ``extras``: with a bias and a gate."""
    dtype, factor_dtype = _DTYPES[dtypes]

    def run(target: Target) -> None:
        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        K = N = width
        tiles = lora_tiles(target, M, K, N, R, dtype, dropout_p > 0.0, strategy=strategy, aligned=width % 8 == 0)
        x, weight = empty(M, K), empty(N, K)
        lora_a, lora_b = empty(R, K, of=factor_dtype), empty(N, R, of=factor_dtype)
        bias, gate = (empty(N), empty(R, of=factor_dtype)) if extras else (None, None)
        seed = empty(of=torch.int64) if dropout_p else None
        common: dict[str, Any] = {"scaling": 0.5, "gate": gate, "dropout_p": dropout_p, "dropout_seed": seed}
        _, p = launchers.lora_linear_fwd(x, weight, lora_a, lora_b, tiles, bias=bias, store_p=store_p, **common)
        if any(needs):
            launchers.lora_linear_bwd(empty(M, N), x, weight, lora_a, lora_b, p, tiles, needs=needs, **common)

    words = [
        strategy,
        f"M={M}",
        f"R={R}",
        dtypes,
        *(["dropout"] if dropout_p else []),
        *(["bias gate"] if extras else []),
        *([f"width={width}"] if width != 4096 else []),
        *([] if store_p else ["no P"]),
        *([] if needs == _EVERYTHING else ["for " + "".join(n for n, need in zip("xAB", needs, strict=True) if need)]),
    ]
    return LaunchCase(" ".join(words).removesuffix(" for "), run)


def _cases() -> Iterator[LaunchCase]:
    strategies: tuple[Strategy, ...] = ("fused", "two_kernel", "library")
    for strategy in strategies:
        for M in (2048, 16):
            for R in (16, 64, 256):
                for name, (dtype, _) in _DTYPES.items():
                    for dropout_p in (0.0, 0.1):
                        if strategy != "fused" or fused_fits(M, R, dtype, dropout_p > 0.0):
                            yield _case(strategy, M, R, name, dropout_p)
        yield _case(strategy, 2048, 16, "bf16", extras=True)
        # Rows that are not a multiple of 16 bytes: no descriptors, no wide loads.
        yield _case(strategy, 2048, 16, "bf16", width=4097)
        yield _case(strategy, 16, 16, "bf16", store_p=False, needs=(False, False, False))
    yield _case("two_kernel", 2048, 16, "bf16", 0.1, extras=True)
    yield _case("two_kernel", 2048, 16, "bf16", 0.1, needs=(True, True, False))
    yield _case("two_kernel", 2048, 16, "bf16", needs=(False, False, True))


_RUNS = {"nf4": 64, "q8_0": 32, "q4_k": 32}
_BLOCKS = {"fp8": (128, 128), "mxfp4": (1, 32), "gptq": (1, 128), "awq": (1, 128)}


def _coded_case(
    format_: str,
    M: int,
    dtype: torch.dtype,
    *,
    grad: bool,
    nested: bool = False,
    order: bool = False,
    R: int = 0,
    dropout_p: float = 0.0,
    scaled: bool = False,
    K: int = 4096,
) -> LaunchCase:
    """The product with a weight of codes, or dX; ``order``: with columns in groups out of order; ``R``: with the
    correction; ``scaled``: with DoRA's column scale."""

    def run(target: Target) -> None:
        N = 4096
        kind = FORMATS[format_]
        assert issubclass(kind, CodedWeight)
        code, scale = kind.code, Scales.NESTED if nested else kind.scale

        def empty(*shape: int, of: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        run_, block = _RUNS.get(format_, 0), _BLOCKS.get(format_, (1, K))
        blocks = -(-N * K // run_) if run_ else -(-N // block[0]) * -(-K // block[1])
        words, records = code.item == 4, code >= Codes.Q8_0
        operand = CodedOperand(
            empty(code.items(N * K), of=torch.int32 if words else torch.uint8),
            None if records else empty(blocks, of=_F32 if scale == Scales.FLOAT32 else torch.uint8),
            empty(16, of=_F32) if code <= Codes.LOW_NIBBLE_FIRST else None,
            (empty(256, of=_F32), empty(-(-blocks // 256), of=_F32)) if nested else None,
            empty(blocks, of=torch.uint8) if words else None,
            empty(K, of=torch.int32) if order else None,
            (N, K),
            int(code),
            int(scale),
            0.0,
            run_,
            block,
            256 if nested else 0,
        )
        x = empty(M, N if grad else K, of=dtype)
        correction = u = None
        if R:
            strategy = coded_strategy(target, M, R, dtype, dropout_p > 0.0)
            fused = strategy == "fused" and not grad
            tiles = lora_tiles(target, M, K, N, R, dtype, dropout_p > 0.0, strategy=strategy, scaled=scaled)
            a, b, p = empty(R, K, of=dtype), empty(N, R, of=dtype), empty(M, R, of=dtype)
            block_r = (tiles.main_dx if grad else tiles.main).BLOCK_R
            correction = Correction(p, a if grad else b, block_r, 2.0, empty(R, of=dtype))
            if fused:
                correction = correction._replace(down=a, store_p=True)
            if fused or grad:
                seed = torch.empty((), dtype=torch.int64, device="meta")
                correction = correction._replace(dropout_p=dropout_p, dropout_seed=seed)
        column_scale = empty(N, of=_F32) if scaled else None
        if scaled and not grad:
            u = empty(M, N, of=dtype)
        coded_product(x, operand, None, grad=grad, correction=correction, column_scale=column_scale, u=u)

    words = ["codes", format_, "nested" if nested else "", "ordered" if order else "", f"M={M}", f"R={R}" if R else ""]
    words += ["dropout" if dropout_p else "", "dora" if scaled else ""]
    words += ["f32" if dtype == _F32 else "bf16", "dX" if grad else "", f"K={K}" if K != 4096 else ""]
    return LaunchCase(" ".join(word for word in words if word), run)


def _coded_cases() -> Iterator[LaunchCase]:
    for grad in (False, True):
        for format_ in ("nf4", "int8", "fp8", "mxfp4"):
            for M in (16, 2048):
                yield _coded_case(format_, M, _BF16, grad=grad)
        for format_ in ("gptq", "awq", "q8_0", "q4_k"):
            yield _coded_case(format_, 2048, _BF16, grad=grad)
        yield _coded_case("gptq", 2048, _BF16, grad=grad, order=True)
        for M, R, dropout_p in ((16, 16, 0.0), (2048, 16, 0.0), (2048, 64, 0.0), (2048, 16, 0.1), (16, 16, 0.1)):
            yield _coded_case("nf4", M, _BF16, grad=grad, nested=True, R=R, dropout_p=dropout_p)
        yield _coded_case("nf4", 2048, _BF16, grad=grad, R=16, scaled=True)
        yield _coded_case("fp8", 2048, _BF16, grad=grad, R=16)
        yield _coded_case("nf4", 2048, _F32, grad=grad, R=16)
        yield _coded_case("nf4", 2048, _BF16, grad=grad, nested=True)
        yield _coded_case("nf4", 2048, _BF16, grad=grad, K=4304)  # scales change within a row of a tile
        yield _coded_case("nf4", 2048, _F32, grad=grad)


def _main_flops(a: Mapping[str, Any]) -> float:
    down = a["K"] if a.get("FUSE_DOWN") else 0
    up = a["K"] if "dx" in a else a["N"]
    return 2.0 * a["M"] * (a["N"] * a["K"] + a["R"] * (down + up))


def _traced_tensors(dtype: torch.dtype, factor_dtype: torch.dtype) -> Any:
    def tensors(device: str) -> tuple[Tensor, ...]:
        x = torch.randn(2, 24, 64, dtype=dtype, device=device, requires_grad=True)
        weight = torch.randn(48, 64, dtype=dtype, device=device)
        lora_a = torch.randn(8, 64, dtype=factor_dtype, device=device, requires_grad=True)
        lora_b = torch.randn(48, 8, dtype=factor_dtype, device=device, requires_grad=True)
        bias = torch.randn(48, dtype=dtype, device=device, requires_grad=True)
        gate = torch.randn(8, dtype=factor_dtype, device=device, requires_grad=True)
        seed = torch.full((), 7, dtype=torch.int64, device=device)
        return x, weight, lora_a, lora_b, bias, gate, seed

    return tensors


def _plain(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, *_: Tensor) -> Tensor:
    return functional.lora_linear(x, weight, lora_a, lora_b, scaling=2.0)


def _with_everything(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor, gate: Tensor, seed: Tensor
) -> Tensor:
    return functional.lora_linear(
        x, weight, lora_a, lora_b, bias, scaling=2.0, gate=gate, dropout_p=0.1, dropout_seed=seed
    )


def _over_codes(x: Tensor, lora_a: Tensor, lora_b: Tensor, codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    weight = NF4Weight(torch.Size((48, 64)), x.dtype, codes, scales, values, run=64)
    return functional.lora_linear(x, weight, lora_a, lora_b, scaling=2.0)


def _tensors_over_codes(device: str) -> tuple[Tensor, ...]:
    x, _, lora_a, lora_b, *_ = _traced_tensors(_BF16, _F32)(device)
    codes = torch.zeros(48 * 32, dtype=torch.uint8, device=device)
    return x, lora_a, lora_b, codes, torch.ones(48, device=device), torch.linspace(-1, 1, 16, device=device)


def _choices(target: Target) -> Iterator[tuple[str, str]]:
    K = N = 4096
    for M in (1, 16, 2048, 8192):
        for R in (16, 64):
            for dropout_p in (0.0, 0.1):
                seconds = predicted_seconds(target, M, K, N, R, _BF16, dropout_p > 0.0)
                choice = choose_strategy(target, M, K, N, R, _BF16, dropout_p > 0.0)
                words = ", ".join(f"{strategy} {1e6 * s:.0f} µs" for strategy, s in seconds.items())
                shape = f"M={M}, K=N={K}, R={R}, bfloat16" + (", dropout" if dropout_p else "")
                yield shape, f"{choice}: {words}"


FAMILY = OpFamily(
    name="lora",
    cases=lambda: chain(_cases(), _coded_cases()),
    choices=_choices,
    work={
        "_lora_linear_fwd_kernel": KernelWork(_main_flops, main=True),
        "_lora_linear_bwd_dx_kernel": KernelWork(_main_flops, main=True),
        "_lora_down_kernel": KernelWork(lambda a: 2.0 * a["M"] * a["K"] * a["R"]),
        "_lora_up_add_kernel": KernelWork(lambda a: 2.0 * a["M"] * a["C"] * a["R"], in_place=("y_ptr",)),
        "_lora_grad_kernel": KernelWork(lambda a: 2.0 * a["M"] * a["C"] * a["R"]),
        "_lora_bwd_q_grad_b_kernel": KernelWork(lambda a: 4.0 * a["M"] * a["N"] * a["R"]),
        "_coded_product_kernel": KernelWork(lambda a: 2.0 * a["M"] * a["N"] * a["K"]),
        "_ordered_sum_kernel": KernelWork(lambda a: 1.0 * a["count"] * a["numel"], matrix=False),
    },
    traced=(
        Traced("bfloat16", _plain, _traced_tensors(_BF16, _BF16)),
        Traced("bfloat16, float32 factors, bias, gate, dropout", _with_everything, _traced_tensors(_BF16, _F32)),
        Traced("over NF4 codes", _over_codes, _tensors_over_codes),
    ),
)
