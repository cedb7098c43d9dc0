"""One problem, all providers: right first, then timed."""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tuned import cpu_model
from .cases import Bench, Inputs, Problem, Provider
from .timing import Roofs, Sample, interleaved

PROVIDERS = ("floor", "plain", "peft", "compile", "ours")
COMPILED = "compile"
"""The provider that is torch.compile of "plain"; asked for by name, since compiling takes longer than measuring."""


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in microseconds; what could not be measured is empty and ``reason`` says why.

    Attributes:
        over_floor: the time over that of "floor", or of "plain" where the op has no floor: the median over rounds.
        spread: half the range between the quartiles over the median, of ``over_floor``; of the time, for the floor.
        over_roof: the median over what the measured roofs give the forward's bytes and FLOPs; inference only.
        error: largest error over that of "plain" in the same dtype, both against float64.
    """

    op: str
    shape: str
    dtype: str
    mode: str
    provider: str
    median_us: float | None = None
    spread: float | None = None
    over_floor: float | None = None
    over_roof: float | None = None
    error: float | None = None
    reason: str = ""


def _widened(inputs: Inputs) -> Inputs:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _results(provider: Provider, inputs: Inputs, trained: tuple[str, ...]) -> list[Tensor]:
    """The output and, in training, the gradients for the inputs named."""
    leaves = {k: v.detach().requires_grad_() if k in trained else v for k, v in inputs.items()}
    with torch.set_grad_enabled(bool(trained)):
        y = provider(leaves)
    if not trained:
        return [y]
    grad_y = torch.linspace(-1.0, 1.0, y.numel(), device=y.device).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaves[k] for k in trained], grad_y, allow_unused=True)]


def _errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        float("inf") if mine is None or not bool(mine.isfinite().all()) else float((mine.double() - right).abs().max())
        for mine, right in zip(results, exact, strict=True)
    ]


def call_of(provider: Provider, inputs: Inputs, trained: tuple[str, ...]) -> Callable[[], object]:
    """The call that is timed: forward alone in inference, forward and backward in training."""
    if not trained:

        def inference() -> object:
            with torch.no_grad():
                return provider(inputs)

        return inference
    leaves = {k: v.detach().requires_grad_() if k in trained else v for k, v in inputs.items()}
    wanted = [leaves[k] for k in trained]
    grad_y = torch.ones_like(provider(leaves))
    return lambda: torch.autograd.grad(provider(leaves), wanted, grad_y, allow_unused=True)


def _compiled(provider: Provider) -> Provider:
    """Compiled for one problem's shapes alone: what was compiled for others counts against a limit otherwise."""
    torch.compiler.reset()
    compiled: Provider = torch.compile(provider, dynamic=False)
    return compiled


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def measure(
    bench: Bench,
    problem: Problem,
    names: Iterable[str],
    seconds: float,
    device: torch.device,
    roofs: Roofs | None = None,
) -> list[Row]:
    """Measure a problem: one row for each provider, with a reason instead of figures if it fails or is wrong.

    A result is wrong where its error is above 3 times that of "plain" plus 8 units of rounding of the largest value.
    """
    torch.manual_seed(0)
    trained = bench.trained if problem.training else ()
    dtype = str(problem.dtype).removeprefix("torch.")
    words = " ".join(f"{k}={v}" for k, v in problem.shape.items())
    mode = "training" if problem.training else "inference"

    def row(name: str, **values: Any) -> Row:
        return Row(bench.name, words, dtype, mode, name, **values)

    inputs = bench.make(problem.shape, problem.dtype, device)
    exact = _results(bench.exact, _widened(inputs), trained)
    plain = _errors(_results(bench.providers["plain"], inputs, trained), exact)
    units = [torch.finfo(problem.dtype).eps * float(t.abs().max()) for t in exact]
    calls: dict[str, Callable[[], object]] = {}
    failed: dict[str, Row] = {}
    errors: dict[str, float | None] = {}
    for name in names:
        provider = _compiled(bench.providers["plain"]) if name == COMPILED else bench.providers.get(name)
        if provider is None:
            continue
        try:
            errors[name] = None
            if name != "floor":
                mine = _errors(_results(provider, inputs, trained), exact)
                errors[name] = max(e / (p + u) for e, p, u in zip(mine, plain, units, strict=True))
                if any(not e <= 3 * p + 8 * u for e, p, u in zip(mine, plain, units, strict=True)):
                    failed[name] = row(name, error=errors[name], reason="wrong: not timed")
                    continue
            wanted = tuple(k for k in trained if k == "x") if name == "floor" else trained
            calls[name] = call_of(provider, inputs, wanted)
            calls[name]()
        except Exception as error:  # of a peer, a backend, a compiler: a row, not the end
            calls.pop(name, None)
            failed[name] = row(name, reason=_reason(error))
    # Each takes turns with the base alone: a third party that fills the caches would be at the others' cost.
    base = "floor" if "floor" in calls else "plain"
    pairs = {
        name: interleaved({name: call, base: calls.get(base, call)}, seconds, device)
        for name, call in calls.items()
        if name != base or len(calls) == 1
    }
    if base in calls:
        pairs[base] = {base: min((pair[base] for pair in pairs.values()), key=lambda sample: sample.median)}
    least = None
    if roofs is not None and not problem.training:
        least = roofs.seconds(bench.nbytes(problem.shape, problem.dtype.itemsize), bench.flops(problem.shape))
    rows = []
    for name in names:
        if name in failed:
            rows.append(failed[name])
        elif name in pairs:
            rows.append(row(name, error=errors[name], **_figures(pairs[name][name], pairs[name].get(base), least)))
    return rows


def _figures(sample: Sample, base: Sample | None, least: float | None) -> dict[str, float | None]:
    ratio, spread = (
        (1.0, sample.spread) if base is sample else (None, sample.spread) if base is None else sample.over(base)
    )
    return {
        "median_us": sample.median * 1e6,
        "spread": spread,
        "over_floor": ratio,
        "over_roof": None if least is None else sample.median / least,
    }


def conditions(device: torch.device, command: str) -> dict[str, str]:
    """Device, versions, commit, date and command: what a figure needs beside it."""

    def output(*words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        name, driver = f"{cpu_model()}, {torch.get_num_threads()} threads", ""
    from importlib import metadata

    package = str(Path(__file__).parents[1])
    commit = output("git", "-C", package, "describe", "--always")
    if commit and output("git", "-C", package, "status", "--porcelain", "--", ".", "../csrc"):
        commit += "-dirty"  # the code, that is: a figure may be written beside others that are not committed yet
    return {
        "device": name,
        "driver": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }


def write_csv(path: Path, rows: Iterable[Row], where: dict[str, str], append: bool = False) -> None:
    """Every row with its conditions; four significant digits. ``append``: after those that the file holds already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [*Row.__dataclass_fields__, *where]
    more = append and path.exists()
    with path.open("a" if more else "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if not more:
            writer.writeheader()
        for row in rows:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(values | where)


def read_csv(path: Path) -> tuple[list[Row], dict[str, str]]:
    """(rows, conditions of the first row) of a file that :func:`write_csv` wrote."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    words = {"op", "shape", "dtype", "mode", "provider", "reason"}
    own = Row.__dataclass_fields__
    rows = [
        Row(**{k: v if k in words else float(v) if v else None for k, v in line.items() if k in own})  # type: ignore[arg-type]
        for line in lines
    ]
    return rows, {k: v for k, v in lines[0].items() if k not in own}
