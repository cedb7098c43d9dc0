"""Outputs and gradients of every op on a CPU, bit for bit, this tree against another commit.

    python benchmarks/compare_bits.py COMMIT [--tree BUILT_TREE] [--interpreted]

A case is an op, a backend, a dtype, inference or a step, a number of tokens, and what a call may have besides: bias,
gate, dropout, a column scale. Each build computes all of them in a process of its own. A case whose bits differ is told
with both largest errors against the reference in float64, over the largest value. ``--interpreted`` takes Triton's
kernels, in its interpreter, with the rule's tiles.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS = (1, 3, 16, 70, 600)
ROWS_INTERPRETED = (1, 33)
DTYPES = ("float32", "bfloat16", "float16")


def cases(interpreted: bool) -> Iterator[dict[str, Any]]:
    """Everything that is compared, as JSON."""
    backends = ("triton",) if interpreted else ("reference", "cpu", "auto")
    for backend in backends:
        for dtype in DTYPES:
            for rows in ROWS_INTERPRETED if interpreted else ROWS:
                for rank in (7, 16) if interpreted else (1, 7, 16, 70):
                    for extra in ("", "bias gate", "dropout"):
                        for op in ("lora_linear", "dora_linear", "multi_lora_linear"):
                            for training in (False, True):
                                yield {
                                    "op": op,
                                    "backend": backend,
                                    "dtype": dtype,
                                    "rows": rows,
                                    "rank": rank,
                                    "extra": extra,
                                    "training": training,
                                }
            for rank in (7, 16):
                for op in ("dora_weight_norm", "merge_lora_"):
                    yield {"op": op, "backend": backend, "dtype": dtype, "rows": 1, "rank": rank}
            for rows in (16, 100):
                for training in (False, True):
                    for op in ("block_sparse_linear", "block_sparse_weight_grad")[: 1 + (not training)]:
                        yield {"op": op, "backend": backend, "dtype": dtype, "rows": rows, "training": training}
            yield {"op": "block_adamw_", "backend": backend, "dtype": dtype, "rows": 1}


def tensors_of(case: dict[str, Any], interpreted: bool) -> dict[str, Any]:
    import torch

    K, N, R = (64, 48, case.get("rank", 4)) if interpreted else (192, 160, case.get("rank", 4))
    generator = torch.Generator().manual_seed(case["rows"])
    dtype = getattr(torch, case["dtype"])
    sizes = {"x": (case["rows"], K), "weight": (N, K), "lora_a": (R, K), "lora_b": (N, R), "bias": (N,), "gate": (R,)}
    made = {name: (torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(dtype) for name, size in sizes.items()}
    return made | {"magnitude": torch.rand(N, generator=generator) + 0.5}


def result_of(case: dict[str, Any], t: dict[str, Any], backend: str) -> list[Any]:
    """Output and gradients of one case."""
    import torch

    import lowrank_kernels as lk
    from lowrank_kernels import functional

    op, extra = case["op"], case.get("extra", "").split()
    training = case.get("training", False)
    x, w, a, b, m = (t[name] for name in ("x", "weight", "lora_a", "lora_b", "magnitude"))
    bias, gate = (t[name] if "bias" in extra else None for name in ("bias", "gate"))
    drop = {"dropout_p": 0.3, "dropout_seed": 5} if "dropout" in extra else {}
    trained = [x, a, b] if training else []
    index = torch.tensor([[0, 0], [1, 1], [1, 2]], dtype=torch.int32)
    blocks = torch.ones(3, 16, 16, dtype=w.dtype)
    common: dict[str, Any] = {"backend": backend}
    call: Callable[[], Any]
    if op == "lora_linear":
        call = lambda: lk.lora_linear(x, w, a, b, bias, gate=gate, scaling=0.7, **drop, **common)  # noqa: E731
    elif op == "dora_linear":
        trained += [m] * training
        base = {"dropout_base": case["rows"] % 2 == 0} if drop else {}
        call = lambda: lk.dora_linear(x, w, a, b, m, bias, scaling=0.7, **drop, **base, **common)  # noqa: E731
    elif op == "multi_lora_linear":
        more = [m] if "bias" in extra else []
        stack = lk.LoRAStack.from_factors([(a, b, 0.7, *more), (a[:1], b[:, :1], 0.5)])
        ids = torch.arange(case["rows"]) % 3 - 1
        trained = [x, stack.lora_a, stack.lora_b] if training else []
        call = lambda: lk.multi_lora_linear(x, w, stack, ids, bias, **drop, **common)  # noqa: E731
    elif op == "dora_weight_norm":
        call = lambda: functional.dora_weight_norm(w, a, b, scaling=0.7, **common)  # noqa: E731
    elif op == "merge_lora_":
        call = lambda: lk.merge_lora_(w.clone(), a, b, scaling=0.7, **common)  # noqa: E731
    elif op == "block_sparse_linear":
        trained = [x, blocks] if training else []
        call = lambda: functional.block_sparse_linear(x, w, blocks, index, bias, **common)  # noqa: E731
    elif op == "block_sparse_weight_grad":
        dy = x[:, :48].contiguous()
        call = lambda: functional.block_sparse_weight_grad(x, dy, index, 16, **common)  # noqa: E731
    else:
        wide = torch.promote_types(w.dtype, torch.float32)
        state = [torch.full(blocks.shape, 0.01, dtype=wide) for _ in range(2)]

        def call() -> Any:
            into = w.clone()
            functional.block_adamw_(blocks, blocks * 0.3, *state, into, index, step=2, **common)
            return torch.cat([into.flatten(), blocks.flatten().to(into.dtype)])

    for tensor in trained:
        tensor.requires_grad_()
    with torch.set_grad_enabled(bool(trained)):
        y = call()
    grads = torch.autograd.grad(y, trained, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)) if trained else []
    return [y.detach(), *grads]


def work(interpreted: bool) -> None:
    """Print the hash of every case's results, a line of JSON each; told a case's number, its errors."""
    import torch

    torch.set_num_threads(2)

    def bits(t: Any) -> str:
        return hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    every = list(cases(interpreted))
    for case in every:
        results = result_of(case, tensors_of(case, interpreted), case["backend"])
        print(json.dumps([bits(t) for t in results]), flush=True)
    for line in sys.stdin:
        case = every[int(line)]
        results = result_of(case, tensors_of(case, interpreted), case["backend"])
        exact = result_of(case, {k: t.double() for k, t in tensors_of(case, interpreted).items()}, "reference")
        errors = [
            float((t.double() - e).abs().max() / e.abs().max().clamp(min=1e-300))
            for t, e in zip(results, exact, strict=True)
        ]
        print(json.dumps(errors), flush=True)


def start(tree: Path, interpreted: bool) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(tree)} | ({"TRITON_INTERPRET": "1"} if interpreted else {})
    words = [sys.executable, __file__, "--worker", *(["--interpreted"] if interpreted else [])]
    return subprocess.Popen(
        words, cwd=tree, env=environment, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def compare(tree: Path, interpreted: bool) -> int:
    builds = [start(folder, interpreted) for folder in (tree, ROOT)]
    every, different = list(cases(interpreted)), []
    for number, case in enumerate(every):
        lines = [build.stdout.readline() for build in builds if build.stdout]
        if not all(lines):
            raise SystemExit(f"a build ended at {case}")
        if lines[0] != lines[1]:
            different.append((number, case))
    for number, case in different:
        errors = []
        for build in builds:
            assert build.stdin and build.stdout
            build.stdin.write(f"{number}\n")
            errors.append([f"{e:.2e}" for e in json.loads(build.stdout.readline())])
        print(f"{case}: errors {errors[0]} -> {errors[1]}")
    print(f"{len(every)} cases, {len(different)} with other bits")
    return 1 if different else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="what to compare this tree with")
    parser.add_argument("--tree", type=Path, help="a built tree of the commit, instead of building one")
    parser.add_argument("--interpreted", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.interpreted)
        return 0
    if options.tree is not None:
        return compare(options.tree, options.interpreted)
    if options.commit is None:
        parser.error("which commit?")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "then"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), options.commit], check=True)
        try:
            subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree, check=True)
            return compare(tree, options.interpreted)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


if __name__ == "__main__":
    raise SystemExit(main())
