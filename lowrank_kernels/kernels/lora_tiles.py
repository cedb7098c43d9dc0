"""Tile and strategy choices of the LoRA linear: a pure function of shape, dtype and target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch

from .roofline import lora_forward_seconds
from .target import Target

Strategy = Literal["fused", "two_kernel", "library"]
"""One kernel; two; the library's main product between two thin kernels; or the library's thin products too (where
there is no mask to draw). The last is taken only where `lrk tune` found it best: the roofline has no reason for it."""


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class MainTiles:
    """Tiles of a product with the frozen weight: (BLOCK_M, BLOCK_N) of the result, BLOCK_K of the reduction.

    ``num_programs`` None launches one program a tile; a number makes programs persistent. ``tma``: operands and result
    are copied by hardware, through tensor descriptors.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_M: int
    num_warps: int
    num_stages: int
    tma: bool
    flatten: bool
    num_programs: int | None
    max_registers: int | None

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R", "GROUP_M")
        return {name: getattr(self, name) for name in names}

    @property
    def options(self) -> dict[str, int]:
        """What the launch tells the compiler."""
        registers = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **registers}

    def programs(self, rows: int, columns: int) -> int:
        tiles = _cdiv(rows, self.BLOCK_M) * _cdiv(columns, self.BLOCK_N)
        return tiles if self.num_programs is None else min(tiles, self.num_programs)


@dataclass(frozen=True)
class ThinTiles:
    """Tiles of a product with a factor: BLOCK_M rows and BLOCK_C columns of the large operand, BLOCK_R of the rank."""

    BLOCK_M: int
    BLOCK_C: int
    BLOCK_R: int
    num_warps: int
    num_stages: int
    wanted_programs: int = 0

    def splits(self, rows: int, columns: int, rank: int) -> int:
        """How many parts to cut the reduction over rows into, so that ``wanted_programs`` run.

        The parts' sums, in float32, written and read again, stay below a sixteenth of the large operand's bytes.
        """
        programs = _cdiv(columns, self.BLOCK_C) * _cdiv(rank, self.BLOCK_R)
        return max(1, min(_cdiv(rows, self.BLOCK_M), self.wanted_programs // programs, rows // (64 * rank)))


@dataclass(frozen=True)
class FusedGradTiles:
    """Tiles of the kernel that reads dY once for Q and dB."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    columns_per_split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LoRATiles:
    """Everything that the launchers of ``kernels/lora.py`` need to know."""

    strategy: Strategy
    main: MainTiles
    main_dx: MainTiles
    down: ThinTiles
    up_add: ThinTiles
    grad: ThinTiles
    q_grad_b: FusedGradTiles


# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) of a product in half precision: many tokens, and DECODE_ROWS or fewer.
# BLOCK_K is the same in both, and so is the matrix instruction: a row's sum has one order whatever its batch.
_LARGE = {
    "sm_80": (128, 128, 64, 8, 3),
    "sm_86": (128, 128, 32, 8, 3),
    "sm_89": (128, 128, 32, 8, 3),
    "sm_90": (128, 256, 64, 8, 3),
    "sm_100": (128, 256, 64, 8, 3),
    "sm_120": (128, 128, 32, 8, 3),
    "gfx942": (128, 128, 64, 8, 2),
    "interpreter": (128, 256, 64, 8, 3),
}
_DECODE = {
    "sm_80": (64, 32, 64, 4, 5),
    "sm_86": (64, 32, 32, 4, 5),
    "sm_89": (64, 32, 32, 4, 5),
    "sm_90": (64, 32, 64, 4, 6),
    "sm_100": (64, 32, 64, 4, 6),
    "sm_120": (64, 32, 32, 4, 6),
    "gfx942": (64, 32, 64, 4, 2),
    "interpreter": (64, 32, 64, 4, 6),
}
DECODE_ROWS = 64
"""Up to here the weight is read once whatever the tile: small tiles put every processor to work on it."""
_PERSISTENT = ("sm_90", "sm_100", "sm_120")
_NARROW_WHEN_FUSED = ("sm_100",)
"""P's accumulator is in tensor memory too, and two wide ones are all of it: Triton 3.5 and 3.6 make a trap of more."""
_NARROW_REGISTERS = ("sm_86", "sm_89", "sm_120")
"""What is decoded, P's accumulator and the main one spill beside a large tile's operands, without wgmma or tcgen05."""
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_FUSED_MAX_RANK_DECODE = 64
_FUSED_MAX_RANK = 16
"""Above it P costs more in every column of programs than a second read of x does."""


def fused_fits(M: int, R: int, dtype: torch.dtype, dropout: bool) -> bool:
    """Whether the one-kernel strategy is one: P fits beside the main accumulator, and a mask is drawn about once."""
    if M <= DECODE_ROWS:
        return R <= (_FUSED_MAX_RANK if dtype == torch.float32 else _FUSED_MAX_RANK_DECODE)
    return R <= _FUSED_MAX_RANK and not dropout


def coded_strategy(target: Target, M: int, R: int, dtype: torch.dtype, dropout: bool) -> Strategy:
    """One kernel or two over a weight of codes (``kernels/coded.py``)."""
    spills = target.arch in _NARROW_REGISTERS and M > DECODE_ROWS
    return "fused" if fused_fits(M, R, dtype, dropout) and not spills else "two_kernel"


def main_tiles(target: Target, M: int, block_r: int, dtype: torch.dtype, aligned: bool, widest: int) -> MainTiles:
    """Tiles of a product of M rows with the weight.

    ``widest``: columns of a large tile at most, for what else its program has to hold.
    """
    few = M <= DECODE_ROWS
    block_m, block_n, block_k, warps, stages = (_DECODE if few else _LARGE)[target.arch]
    if dtype == torch.float32:
        # No matrix unit at full float32 precision: a thread holds its share of both operands in registers.
        block_m, block_n, block_k, warps, stages = 64, 32, 16, 4, 2 if target.arch == "gfx942" else 3
    elif not aligned:
        # Elements are loaded one by one, through registers: small tiles keep within them.
        block_m, block_n, block_k, warps, stages = 64, min(block_n, 64), 32, 4, 2
    elif few and block_r > 32 and not target.tma:
        warps = 8  # twice the threads share the pointers, the mask and P
    elif not few:
        block_n = min(block_n, widest)
    persistent = target.arch in _PERSISTENT and aligned and not few and dtype != torch.float32
    return MainTiles(
        block_m,
        block_n,
        block_k,
        block_r,
        GROUP_M=8,
        num_warps=warps,
        num_stages=stages,
        tma=target.tma and aligned,
        flatten=persistent and target.arch == "sm_90",
        num_programs=target.num_sms if persistent else None,
        # Left to itself the compiler spills for an occupancy that shared memory does not allow.
        max_registers=255 if target.arch.startswith("sm_") else None,
    )


def predicted_seconds(
    target: Target, M: int, K: int, N: int, R: int, dtype: torch.dtype, dropout: bool
) -> dict[Strategy, float]:
    """What the roofline (``roofline.lora_forward_seconds``) gives each strategy that fits."""
    candidates: tuple[Strategy, ...] = ("fused", "two_kernel", "library")
    if not fused_fits(M, R, dtype, dropout):
        candidates = ("two_kernel", "library")
    columns = _cdiv(
        N, main_tiles(target, M, 16, dtype, True, 128 if target.arch in _NARROW_WHEN_FUSED else 256).BLOCK_N
    )
    return {s: lora_forward_seconds(target, s, M, K, N, R, dtype, columns) for s in candidates}


def choose_strategy(
    target: Target, M: int, K: int, N: int, R: int, dtype: torch.dtype, dropout: bool, aligned: bool = True
) -> Strategy:
    """The strategy with the least predicted time; large products of unaligned rows go to the library."""
    if not aligned and M > DECODE_ROWS:
        return "library"
    seconds = predicted_seconds(target, M, K, N, R, dtype, dropout)
    return min(seconds, key=lambda s: seconds[s])


def lora_tiles(
    target: Target, M: int, K: int, N: int, R: int, dtype: torch.dtype, dropout: bool, *,
    strategy: Strategy | None = None, aligned: bool = True, scaled: bool = False, settled: Mapping[str, Any] = _NOTHING,
) -> LoRATiles:  # fmt: skip
    """Tiles for one shape. Reductions are cut by K, N and R alone, never by M, so that a row does not feel its batch.

    Args:
        strategy: take this one; None: the one that ``choose_strategy`` predicts to be fastest.
        aligned: rows of x and of the weight start at multiples of 16 bytes, with unit column stride.
        scaled: the sum is kept beside the result that is scaled (DoRA).
        settled: by `lrk tune`, {"strategy": "two_kernel", "BLOCK_M": 64}; not taken where it does not fit.
    """
    settled = dict(settled)
    name = settled.pop("strategy", None)
    if name not in get_args(Strategy) or not aligned or (name == "fused" and not fused_fits(M, R, dtype, dropout)):
        name, settled = None, {}
    changes = {field: value for field, value in settled.items() if field in MainTiles.__dataclass_fields__}
    strategy = strategy or name or choose_strategy(target, M, K, N, R, dtype, dropout, aligned)
    wide = dtype == torch.float32
    rank = min(max(16, _power_of_two(R)), 32 if wide else 64)
    appended = min(rank, 16 if wide else 32)
    fused = strategy == "fused"
    # P beside the accumulator, u beside y, and the targets where neither fits beside 256 columns: halve for each two.
    burdens = fused + scaled + (target.arch in _NARROW_WHEN_FUSED)
    # Fewer rows a program mean more partial sums of dB: for u beside dY a small rank gives up columns instead.
    burdened = rank > 32 or not aligned
    main = main_tiles(target, M, rank if fused else appended, dtype, aligned, widest=256 >> max(0, burdens - 1))
    # The mask of a wider tile would not fit into registers beside its accumulator.
    main_dx = main_tiles(target, M, appended, dtype, aligned, widest=128 if dropout else 256)
    return LoRATiles(
        strategy=strategy,
        main=replace(main, **changes),
        main_dx=main_dx if dropout else replace(main_dx, **changes),
        down=ThinTiles(
            16 if rank <= 16 else 32, 32 if wide else 64, rank, num_warps=4 if rank <= 16 else 8, num_stages=4
        ),
        up_add=ThinTiles(64, 64 if wide or not aligned else 128, appended, num_warps=4, num_stages=2),
        grad=ThinTiles(16 if wide else 64, 64, rank, num_warps=4, num_stages=3, wanted_programs=2 * target.num_sms),
        q_grad_b=FusedGradTiles(
            32 if wide else 256 >> burdened * (1 + scaled),
            32 if wide or (scaled and not burdened) else 64,
            rank,
            columns_per_split=512,
            num_warps=8,
            num_stages=2,
        ),
    )
