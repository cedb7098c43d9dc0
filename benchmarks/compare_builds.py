"""Times and bits of the rows of `lrk bench` on a CPU, this tree against another commit, each in a process of its own.

    python benchmarks/compare_builds.py COMMIT [--rows REGEX] [--seconds 1] [--csv FILE]

The processes take turns, and only one works at a time. A row's ratio is the median over turns of this tree's time over
the commit's, each the fastest call of its turn; its spread is half the range between the ratios' quartiles over that.
Rows whose outputs or gradients differ in a bit are told with both errors against float64, in units of rounding of the
largest value. The commit is checked out and built in a temporary folder; this tree must be built already.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEAST_TURNS, TURN_SECONDS = 5, 0.02


def work() -> None:
    """Answer requests, a line of JSON each, with the package that PYTHONPATH names."""
    import torch

    from lowrank_kernels.bench import OPS, keep_freed_memory
    from lowrank_kernels.bench.run import _errors, _results, _widened, call_of

    torch.set_num_threads(int(os.environ["THREADS"]))
    keep_freed_memory()
    call: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if "row" in request:
            op, shape, dtype_name, training = request["row"]
            bench, dtype = OPS[op], getattr(torch, dtype_name)
            torch.manual_seed(0)
            inputs = bench.make(shape, dtype, torch.device("cpu"))
            trained = bench.trained if training else ()
            results = _results(bench.providers["ours"], inputs, trained)
            call = call_of(bench.providers["ours"], inputs, trained)
            call()
            start = time.perf_counter()
            call()
            answer: Any = {
                "bits": [
                    hashlib.sha256(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
                    for t in results
                ],
                "seconds": time.perf_counter() - start,
            }
        elif "errors" in request:
            exact = _results(bench.exact, _widened(inputs), trained)
            units = [max(torch.finfo(dtype).eps * float(t.abs().max()), 1e-300) for t in exact]
            answer = [e / u for e, u in zip(_errors(results, exact), units, strict=True)]
        else:
            call()
            times = []
            for _ in range(request["calls"]):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            answer = min(times)
        print(json.dumps(answer), flush=True)


class Build:
    """A process that works with one tree's package."""

    def __init__(self, tree: Path, threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree), "THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            cwd=tree,
            env=environment,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of one build ended at {request}")
        return json.loads(line)


def _words(shape: dict[str, int]) -> str:
    return " ".join(f"{k}={v}" for k, v in shape.items())


def compare(then: Build, now: Build, row: list[Any], seconds: float) -> dict[str, Any]:
    """One row of the table."""
    from lowrank_kernels.bench import Sample

    first, second = then.ask(row=row), now.ask(row=row)
    slowest = max(first["seconds"], second["seconds"])
    calls = max(1, math.ceil(TURN_SECONDS / slowest))
    times: tuple[list[float], list[float]] = [], []
    end = time.perf_counter() + seconds
    while len(times[0]) < LEAST_TURNS or time.perf_counter() < end:
        order = (0, 1) if len(times[0]) % 2 else (1, 0)
        for k in order:
            times[k].append((then, now)[k].ask(calls=calls))
    ratio, spread = Sample(tuple(times[1])).over(Sample(tuple(times[0])))
    same = first["bits"] == second["bits"]
    result = {
        "op": row[0],
        "shape": _words(row[1]),
        "dtype": row[2],
        "mode": "training" if row[3] else "inference",
        "then_us": Sample(tuple(times[0])).median * 1e6,
        "ratio": ratio,
        "spread": spread,
        "same_bits": same,
        "errors_then": "",
        "errors_now": "",
    }
    if not same:
        for name, build in (("errors_then", then), ("errors_now", now)):
            result[name] = " ".join(f"{e:.2f}" for e in build.ask(errors=True))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="what to compare this tree with")
    parser.add_argument("--rows", default="", help="only rows whose words match")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a row")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tree", type=Path, help="a built tree of the commit, instead of building one")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    if options.commit is None:
        parser.error("which commit?")
    with tempfile.TemporaryDirectory() as folder:
        tree = options.tree
        if tree is None:
            tree = Path(folder) / "then"
            subprocess.run(
                ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), options.commit], check=True
            )
            subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree, check=True)
        try:
            return _table(options, tree)
        finally:
            if options.tree is None:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)


def _table(options: argparse.Namespace, tree: Path) -> int:
    sys.path.insert(0, str(ROOT))
    from lowrank_kernels.bench import OPS

    rows = [
        [op, shape, dtype, training]
        for op, bench in OPS.items()
        for shape in bench.shapes
        for dtype in ("float32", "bfloat16")
        for training in (False, True)
        if bench.trained or not training
    ]
    then, now = Build(tree, options.threads), Build(ROOT, options.threads)
    results = []
    for row in rows:
        words = " ".join((row[0], _words(row[1]), row[2], "training" if row[3] else "inference"))
        if not re.search(options.rows, words):
            continue
        result = compare(then, now, row, options.seconds)
        results.append(result)
        bits = "" if result["same_bits"] else f"  bits differ: {result['errors_then']} -> {result['errors_now']}"
        print(f"{words}: {result['ratio']:.3f} ± {result['ratio'] * result['spread']:.3f}{bits}", flush=True)
    if not results:
        raise SystemExit(f"no row matches {options.rows!r}")
    mean = math.exp(sum(math.log(r["ratio"]) for r in results) / len(results))
    print(f"{len(results)} rows, geometric mean {mean:.3f}, {sum(r['same_bits'] for r in results)} with the same bits")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, results[0])
            writer.writeheader()
            writer.writerows(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
