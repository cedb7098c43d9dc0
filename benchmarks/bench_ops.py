"""Regression rows of every op on a CPU, under pytest-benchmark: `make bench`.

A row is the time of an op over that of a reference in the same run (the frozen layer; plain PyTorch where there is
none), round by round, beside the same ratio in the last committed results. What moved beyond both spreads is printed; a
row fails where its ratio less its spread is more than FACTOR times the committed one and its spread, and those results
are of such a device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lowrank_kernels.bench import OPS, Row, Sample, keep_freed_memory
from lowrank_kernels.bench.run import call_of, conditions, read_csv

FACTOR = 1.5
SECONDS, LEAST, MOST = 0.3, 9, 300
"""Of timing a row, and how many rounds that is at least and at most."""
CPU = torch.device("cpu")
RESULTS = Path(__file__).parent / "results" / "cpu_bench.csv"
ROWS, WHERE = read_csv(RESULTS)
COMMITTED = {(r.op, r.shape, r.dtype, r.mode): r for r in ROWS if r.provider == "ours" and r.over_floor is not None}
CASES = [
    pytest.param(op, shape, dtype, training, id=" ".join((op, *(f"{k}={v}" for k, v in shape.items()), name, mode)))
    for op, bench in OPS.items()
    for shape in bench.shapes
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    for mode, training in (("inference", False), ("training", True))
    if bench.trained or not training
]


@pytest.fixture(scope="session")
def moved(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What moved, printed at the end."""
    torch.set_num_threads(2)
    keep_freed_memory()
    lines: list[str] = []
    yield lines
    here = conditions(CPU, "")["device"]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\nratios against commit {WHERE['commit']} of {WHERE['date']}, {WHERE['device']}; this is {here}")
        print("\n".join(lines or ["nothing moved beyond its spread"]))


@pytest.mark.parametrize(("op", "shape", "dtype", "training"), CASES)
def test_op(benchmark, moved, op, shape, dtype, training):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    bench = OPS[op]
    base = "floor" if "floor" in bench.providers else "plain"
    inputs, trained = bench.make(shape, dtype, CPU), bench.trained if training else ()
    ours = call_of(bench.providers["ours"], inputs, trained)
    reference = call_of(bench.providers[base], inputs, tuple(k for k in trained if base == "plain" or k == "x"))
    reference_times: list[float] = []

    def before() -> None:
        start = time.perf_counter()
        reference()
        reference_times.append(time.perf_counter() - start)

    before()
    ours()
    start = time.perf_counter()
    before()
    ours()
    rounds = max(LEAST, min(MOST, int(SECONDS / (time.perf_counter() - start))))
    benchmark.pedantic(ours, setup=before, rounds=rounds, iterations=1, warmup_rounds=1)
    ratio, spread = Sample(tuple(benchmark.stats.stats.data)).over(Sample(tuple(reference_times[-rounds:])))
    words = " ".join(f"{k}={v}" for k, v in shape.items())
    key = (op, words, str(dtype).removeprefix("torch."), "training" if training else "inference")
    benchmark.extra_info |= {"reference": base, "ratio": ratio, "spread": spread}
    judge(moved, key, COMMITTED.get(key), ratio, spread, WHERE["device"] == conditions(CPU, "")["device"])


def judge(
    moved: list[str], key: tuple[str, ...], then: Row | None, ratio: float, spread: float, same_device: bool
) -> None:
    """Tell what moved, and fail where it is too much."""
    line = f"{' '.join(key)}: {ratio:.2f} ± {ratio * spread:.2f}"
    if then is None or then.over_floor is None:
        moved.append(f"{line}, new")
        return
    noise = ratio * spread, then.over_floor * (then.spread or 0.0)
    line += f", was {then.over_floor:.2f} ({ratio / then.over_floor - 1:+.0%})"
    if abs(ratio - then.over_floor) > max(noise):
        moved.append(line)
    if same_device and ratio - noise[0] > FACTOR * (then.over_floor + noise[1]):
        pytest.fail(line, pytrace=False)
