"""Our corrections beside those of vLLM's and SGLang's own reference functions, on the shapes of their tests.

    pip download --no-deps -d wheels vllm sglang
    python benchmarks/compare_serving_references.py wheels/*.whl [--json FILE]

Takes wheels, or folders that they were unpacked to, and reads two or three files of each (`vllm/lora/ops/torch_ops`,
`sglang/srt/lora/torch_ops`), which import torch alone; nothing of either package is installed or imported. The frozen
weight is 0, so that what is compared is the correction. Both are measured against the same sum in float64: a case
agrees if our error is at most twice theirs plus four units in the last place of the largest value, and the two differ
by no more than vLLM's tests allow their kernels (6% in half precision, 1% in float32). Ends with 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cost_over_frozen import conditions
from torch import Tensor

import lowrank_kernels as lk

FILES = {
    "vllm": ("vllm/lora/ops/torch_ops/lora_ops.py",),
    "sglang": ("sglang/srt/lora/torch_ops/lora_ops.py", "sglang/srt/lora/torch_ops/graph_lora_ops.py"),
}
ALLOWED = {torch.float16: 6e-2, torch.bfloat16: 6e-2, torch.float32: 1e-2}

# vLLM's tests/lora/test_punica_ops.py: 2049 columns, and hidden sizes of models over 1 to 64 devices, of which these.
RANKS = (1, 4, 8, 16, 32, 64, 128, 256)
BATCHES = ((1, 1), (4, 8), (16, 32))  # sequences of four tokens, adapters; of 128 tokens and up to 128 in theirs
HIDDEN = (14, 19, 37, 43, 86, 107, 152, 296, 428, 896, 1216, 1376, 2004, 2752, 4736, 8016, 11008, 29568, 43264, 128256)
# SGLang's tests of the same functions, float32, and its Q, K and V in float16.
SGLANG_SCALINGS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Case(NamedTuple):
    """``ranks`` and ``scalings`` an adapter; ``ids`` one a row; each slice has the adapter's rank."""

    name: str
    dtype: torch.dtype
    K: int
    slices: tuple[int, ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    ids: Tensor


def sources(path: Path) -> tuple[str, str, list[str]]:
    """(package, version, texts of its files) of a wheel or an unpacked one."""
    root: Any = path if path.is_dir() else zipfile.Path(path)
    for package, files in FILES.items():
        if all((root / name).is_file() for name in files):
            metadata = [child / "METADATA" for child in root.iterdir() if child.name.endswith(".dist-info")]
            lines = metadata[0].read_text().splitlines() if metadata else []
            version = next((line.split(": ")[1] for line in lines if line.startswith("Version: ")), "unknown")
            return package, version, [(root / name).read_text() for name in files]
    raise SystemExit(f"{path}: expected {' or '.join(files[0] for files in FILES.values())} in it")


def load(package: str, texts: Sequence[str]) -> types.ModuleType:
    module = types.ModuleType(f"{package}_reference")
    for text in texts:
        exec(compile(text, package, "exec"), module.__dict__)
    return module


# ------------------------------------------------------------------------------------------------ theirs, by one name


def vllm_reference(module: Any, case: Case, x: Tensor, a: list[list[Tensor]], b: list[list[Tensor]]) -> Iterator[Any]:
    """As `PunicaWrapperCPU` calls them: shrink into float32, then expand into a slice of the output."""
    y = torch.zeros(x.shape[0], sum(case.slices), dtype=x.dtype)
    begin = 0
    for s, width in enumerate(case.slices):
        p = torch.zeros(x.shape[0], case.ranks[0], dtype=torch.float32)
        module.bgmv_shrink(x, torch.stack([of[s] for of in a]), p, case.ids, case.scalings[0])
        module.bgmv_expand_slice(p, torch.stack([of[s] for of in b]), y, case.ids, begin, width, True)
        begin += width
    yield "bgmv", y


def sglang_reference(module: Any, case: Case, x: Tensor, a: list[list[Tensor]], b: list[list[Tensor]]) -> Iterator[Any]:
    """As its `TorchNativeLoRABackend` calls them, with and without a graph, every row a segment."""
    most, count = max(case.ranks), len(case.slices)
    all_a = torch.zeros(len(a), count * most, case.K, dtype=x.dtype)
    all_b = torch.zeros(len(b), sum(case.slices), most, dtype=x.dtype)
    graph_a = all_a.clone()
    for i, rank in enumerate(case.ranks):
        all_a[i, : count * rank] = torch.cat(a[i])
        all_b[i, :, :rank] = torch.cat(b[i])
        for s in range(count):
            graph_a[i, s * most : s * most + rank] = a[i][s]
    ones = torch.ones(x.shape[0], dtype=torch.int32)
    offsets = torch.tensor([sum(case.slices[:s]) for s in range(count + 1)])
    ranks, scalings = torch.tensor(case.ranks), torch.tensor(case.scalings)
    p = module.sgemm_lora_a_fwd(x, all_a, case.ids, ones, ranks, scalings, count)
    yield "sgemm", module.sgemm_lora_b_fwd(p, all_b, case.ids, ones, ranks, offsets)
    p = module.sgemm_lora_a_graph_fwd(x, graph_a, case.ids, ones, scalings, count).to(x.dtype)
    yield "sgemm_graph", module.sgemm_lora_b_graph_fwd(p, all_b, case.ids, ones, offsets)


# ------------------------------------------------------------------------------------------------------------- shapes


def vllm_cases() -> Iterator[Case]:
    for dtype in (torch.float16, torch.bfloat16):
        for slices in (1, 2, 3):
            for batches, adapters in BATCHES:
                for rank in RANKS:
                    ids = torch.randint(-1, adapters, (batches,)).repeat_interleave(4)
                    settings = (rank,) * adapters, (0.5,) * adapters, ids
                    yield Case("2049 columns", dtype, 2049, (2049,) * slices, *settings)
            for hidden in HIDDEN:
                ids = torch.randint(-1, 4, (4,)).repeat_interleave(4)
                settings = (32,) * 4, (0.5,) * 4, ids
                yield Case("hidden sizes, in", dtype, hidden, (64,) * slices, *settings)
                yield Case("hidden sizes, out", dtype, 64, (hidden,) * slices, *settings)


def sglang_cases() -> Iterator[Case]:
    draw = torch.Generator().manual_seed(0)

    def pick(values: Sequence[Any], count: int) -> tuple[Any, ...]:
        return tuple(values[int(i)] for i in torch.randint(len(values), (count,), generator=draw))

    for rows in (1, 2, 7, 64):
        for slices in (1, 2, 3):
            for _ in range(4):
                ids = torch.randint(3, (rows,), generator=draw)
                ranks = pick((8, 16, 32, 64, 128, 256), 3)
                yield Case("1024 columns", torch.float32, 1024, (1024,) * slices, ranks, pick(SGLANG_SCALINGS, 3), ids)
    for rows in (8, 300):
        for ranks in ((8, 16, 32), (8, 8, 16)):
            ids = torch.randint(3, (rows,), generator=draw)
            yield Case("Q, K and V", torch.float16, 2560, (4096, 1024, 1024), ranks, (1.0, 1.0, 1.0), ids)


# --------------------------------------------------------------------------------------------------------- comparison


def compare(module: Any, reference: Callable[..., Any], case: Case) -> Iterator[tuple[str, float, float, float, bool]]:
    """(function, our error, theirs, difference, agreed), over the largest value, for each of their functions."""
    x = torch.randn(len(case.ids), case.K).to(case.dtype)
    a = [[(torch.randn(r, case.K) / case.K**0.5).to(case.dtype) for _ in case.slices] for r in case.ranks]
    b = [[(torch.randn(n, r) / r**0.5).to(case.dtype) for n in case.slices] for r in case.ranks]
    exact = torch.zeros(len(case.ids), sum(case.slices), dtype=torch.float64)
    for i, scaling in enumerate(case.scalings):
        mine = case.ids == i
        parts = [x[mine].double() @ a_s.double().T @ b_s.double().T for a_s, b_s in zip(a[i], b[i], strict=True)]
        exact[mine] = scaling * torch.cat(parts, dim=1)
    sliced = [list(zip(a[i], b[i], [s] * len(a[i]), strict=True)) for i, s in enumerate(case.scalings)]
    several = len(case.slices) > 1
    stack = lk.LoRAStack.from_factors(
        sliced if several else [parts[0] for parts in sliced], slices=case.slices if several else None
    )
    ours = lk.multi_lora_linear(x, x.new_zeros(sum(case.slices), case.K), stack, case.ids)
    largest = float(exact.abs().max()) or 1.0
    error = float((ours.double() - exact).abs().max()) / largest
    for name, theirs in reference(module, case, x, a, b):
        their_error = float((theirs.double() - exact).abs().max()) / largest
        apart = float((ours.double() - theirs.double()).abs().max()) / largest
        agreed = error <= 2 * their_error + 4 * torch.finfo(case.dtype).eps and apart <= ALLOWED[case.dtype]
        yield name, error, their_error, apart, agreed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"conditions": conditions(), "packages": {}}
    failed = 0
    for path in args.wheels:
        package, version, texts = sources(path)
        module = load(package, texts)
        reference, cases = {"vllm": (vllm_reference, vllm_cases), "sglang": (sglang_reference, sglang_cases)}[package]
        torch.manual_seed(0)
        rows: dict[tuple[str, ...], list[tuple[float, float, float, bool]]] = defaultdict(list)
        for case in cases():
            for name, *figures in compare(module, reference, case):
                rows[case.name, name, str(case.dtype).removeprefix("torch.")].append(tuple(figures))  # type: ignore[arg-type]
        print(f"{package} {version}")
        table = []
        for (shapes, name, dtype), figures in rows.items():
            ours, theirs, apart = (max(f[i] for f in figures) for i in range(3))
            wrong = sum(not agreed for *_, agreed in figures)
            failed += wrong
            table.append(
                {
                    "shapes": shapes,
                    "function": name,
                    "dtype": dtype,
                    "cases": len(figures),
                    "apart": wrong,
                    "our_error": ours,
                    "their_error": theirs,
                    "largest_difference": apart,
                }
            )
            print(
                f"  {shapes:18} {name:12} {dtype:9} {len(figures) - wrong} of {len(figures)} agree; largest error "
                f"{ours:.1e}, theirs {theirs:.1e}, apart {apart:.1e}"
            )
        found["packages"][package] = {"version": version, "rows": table}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
