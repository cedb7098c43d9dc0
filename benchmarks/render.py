"""Write the measured figures into the README and docs, from the files under benchmarks/results.

    python benchmarks/render.py

Text between `<!-- figures:NAME -->` and `<!-- /figures:NAME -->` is replaced.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lowrank_kernels.bench.plot import draw
from lowrank_kernels.bench.run import Row, read_csv

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("ours", "peft-like", "dora", "peft-like dora")


def cost_over_frozen() -> str:
    """The table of `benchmarks/cost_over_frozen.py`."""
    found = json.loads((RESULTS / "cpu_cost_over_frozen.json").read_text())
    c, rows = found["conditions"], found["rows"]
    shape = f"K = N = {rows[0]['K']}, R = {rows[0]['R']}"
    lines = [
        f"Time over that of the frozen `nn.Linear` alone (1.00: the correction is free); {shape}, medians; each call",
        f"takes turns with the frozen linear. {c['device']}; torch {c['torch']}, Python {c['python']}, ",
        f"commit {c['commit']}, {c['date']}.",
        "Repeat: `python benchmarks/cost_over_frozen.py`.",
        "",
        "| dtype, tokens, mode | LoRA, ours | LoRA, PEFT's calls | DoRA, ours | DoRA, PEFT's calls |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        dropout = f", dropout {row['dropout_p']}" if row["dropout_p"] else ""
        cells = [f"{row['over_frozen'][c]:.2f}" if c in row["over_frozen"] else "" for c in COLUMNS]
        lines.append(f"| {row['dtype']}, {row['tokens']}, {row['mode']}{dropout} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def demo() -> str:
    """The table of `make demo`."""
    found = json.loads((RESULTS / "demo.json").read_text())
    s, e = found["settings"], found["environment"]
    lines = [
        f"`make demo`: rank {s['rank']}, {s['steps']} steps of {s['batch_size']} functions, seed {s['seed']}, float32 "
        f"on {e['threads']} CPU threads; torch {e['torch']}{', commit ' + e['commit'] if 'commit' in e else ''}.",
        "Losses in nats a target token on held-out functions; memory is the most one forward and backward allocates.",
        "",
        "| | held-out before | after | seconds a step | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        lines.append(
            f"| {run['name']} | {run['held_out_before']:.3f} | {run['held_out_after']:.3f} | "
            f"{run['seconds_per_step']:.2f} | {run['peak_bytes'] / 2**20:.0f} |"
        )
    lines.append("")
    logits = f"logits within {found['logit_difference']:.0e}" if found["logit_difference"] else "the same logits"
    lines.append(
        f"The two LoRA loss curves differ by at most {found['curve_difference']:.0e}; PEFT, loading our adapter, gives "
        f"{logits}."
    )
    return "\n".join(lines)


def smt_gradient() -> str:
    """The table of `benchmarks/smt_gradient.py`."""
    found = json.loads((RESULTS / "cpu_smt_gradient.json").read_text())
    c, rows = found["conditions"], found["rows"]
    lines = [
        f"Time of the gradients of chosen blocks over that of the dense weight gradient, "
        f"{rows[0]['tokens']} tokens, K = N = {rows[0]['K']},",
        f"x and dY given; medians, interleaved. {c['device']}; torch {c['torch']}, commit {c['commit']}, {c['date']}.",
        "Repeat: `python benchmarks/smt_gradient.py`.",
        "",
        "| dtype | blocks | dense | ours | gather and `bmm` |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ours, other = (100 * row["over_dense"][name] for name in ("ours", "gather and bmm"))
        blocks = f"{row['blocks']} of {row['block']}×{row['block']}"
        lines.append(f"| {row['dtype']} | {blocks} | {row['dense_ms']:.0f} ms | {ours:.1f}% | {other:.1f}% |")
    return "\n".join(lines)


def smt_training() -> str:
    """The table of `benchmarks/smt_training.py`, memory and time."""
    memory, times = (json.loads((RESULTS / f"cpu_smt_{what}.json").read_text()) for what in ("memory", "time"))
    c, s = memory["conditions"], memory["settings"]
    seconds = {row["method"]: f"{row['seconds']:.2f}" for row in times["rows"]}
    lines = [
        f"SmolLM2-135M, float32, sequence {s['sequence']}, batch {s['batch']}, gradient checkpointing in all; "
        f"SMT with {100 * s['budget']:.2f}% of all",
        f"parameters in blocks of {s['block_size']}. The peak is torch's allocator's: model, optimizer and what a step "
        f"allocates beyond; the",
        "resident set holds Python and the libraries as well, and what loading the model took. Seconds a step are "
        "medians, taking turns.",
        f"{c['device']}; torch {c['torch']}, commit {c['commit']}, {c['date']}. Repeat: `python "
        f"benchmarks/smt_training.py memory`, and `time`.",
        "",
        "| | trainable | optimizer MiB | peak MiB | of full | resident MiB | of full | s a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in memory["rows"]:
        optimizer, peak, resident = (row[f"{name}_bytes"] / 2**20 for name in ("optimizer", "peak", "resident"))
        lines.append(
            f"| {row['method']} | {row['trainable']:,} | {optimizer:.1f} | {peak:.0f} | {row['peak_over_full']:.2f} | "
            f"{resident:.0f} | {row['resident_over_full']:.2f} | {seconds.get(row['method'], '')} |"
        )
    return "\n".join(lines)


def smt_demo_task() -> str:
    """The table of `benchmarks/smt_demo_task.py`."""
    path = RESULTS / "cpu_smt_demo_task.json"
    if not path.exists():
        return "Losses of SMT, LoRA, DoRA and full fine-tuning side by side: `python benchmarks/smt_demo_task.py`."
    found = json.loads(path.read_text())
    c, s = found["conditions"], found["settings"]
    lines = [
        f"The demo's task, {s['steps']} steps of {s['batch_size']} functions, LoRA and DoRA of rank {s['rank']}, "
        f"SMT with as many parameters in blocks of {s['block_size']}",
        f"(chosen by {s['warmup_steps']} batches without updates); loss in nats a target token on "
        f"{s['held_out']} held-out functions, {found['before']:.3f} before, mean and",
        f"standard deviation of {s['seeds']} seeds. {c['device']}; torch {c['torch']}, "
        f"commit {c['commit']}, {c['date']}. Repeat:",
        f"`python benchmarks/smt_demo_task.py --steps {s['steps']} --batch-size {s['batch_size']} --warmup-steps "
        f"{s['warmup_steps']} --held-out {s['held_out']} --seeds {s['seeds']}`.",
        "",
        "| | trainable | rate | held-out loss | each seed |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        each = ", ".join(f"{loss:.3f}" for loss in row["losses"])
        lines.append(
            f"| {row['method']} | {row['trainable']:,} | {row['rate']:g} | {row['mean']:.3f} ± "
            f"{row['standard_deviation']:.3f} | {each} |"
        )
    return "\n".join(lines)


def many_adapters() -> str:
    """The rows of `benchmarks/many_adapters.py` with the most rows, and the plot of all."""
    found = json.loads((RESULTS / "many_adapters.json").read_text())
    c, rows = found["conditions"], found["rows"]
    most = max(row["rows"] for row in rows)
    lines = [
        f"Time over that of the base product alone; {most} rows, K = N = {rows[0]['K']}, R = {rows[0]['R']}, medians,",
        f"caches swept before each. {c['device']}; torch {c['torch']}, Python {c['python']}, commit {c['commit']}, "
        f"{c['date']}.",
        "Repeat: `python benchmarks/many_adapters.py`.",
        "",
        "| dtype, population | ours | gathered `bmm` | loop | PEFT's mixed batch |",
        "|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["rows"] == most):
        cells = [f"{row['over_base'][name]:.2f}" for name in ("ours", "bmm", "loop", "peft")]
        lines.append(f"| {row['dtype']}, {row['population']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "![all batch sizes](images/many_adapters.png)"])


def train_many_adapters() -> str:
    """The table of `benchmarks/train_many_adapters.py`."""
    found = json.loads((RESULTS / "train_many_adapters.json").read_text())
    c, rows = found["conditions"], found["rows"]
    lines = [
        f"SmolLM2-135M, float32, {rows[0]['adapters']} adapters of rank {rows[0]['R']} on every linear, one sequence "
        f"each; seconds a step of all of them.",
        f"{c['device']}; torch {c['torch']}, commit {c['commit']}, {c['date']}. "
        f"Repeat: `python benchmarks/train_many_adapters.py`.",
        "",
        "| tokens an adapter | in one batch | one after another | ratio | losses differ by |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["tokens"]):
        s = row["seconds"]
        lines.append(
            f"| {row['tokens']} | {s['together']:.2f} | {s['apart']:.2f} | {row['ratio']:.2f} | "
            f"{row['largest_relative_loss_difference']:.0e} |"
        )
    return "\n".join(lines)


def compare_serving_references() -> str:
    """The table of `benchmarks/compare_serving_references.py`."""
    found = json.loads((RESULTS / "compare_serving_references.json").read_text())
    c = found["conditions"]
    lines = [
        "Largest errors against float64, and the largest difference between the two, over the largest value of a case.",
        f"{c['device']}; torch {c['torch']}, commit {c['commit']}, {c['date']}.",
        "",
        "| reference | shapes | dtype | agree | our error | theirs | apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for package, result in found["packages"].items():
        for row in result["rows"]:
            lines.append(
                f"| {package} {result['version']}, `{row['function']}` | {row['shapes']} | {row['dtype']} | "
                f"{row['cases'] - row['apart']} of {row['cases']} | {row['our_error']:.0e} | "
                f"{row['their_error']:.0e} | {row['largest_difference']:.0e} |"
            )
    return "\n".join(lines)


def soak_serving() -> str:
    """The result of `benchmarks/soak_serving.py`."""
    found = json.loads((RESULTS / "soak_serving.json").read_text())
    c, n, memory = found["conditions"], found["counts"], found["memory"]
    early, late = (memory[part] / 2**20 for part in ("second_quarter", "last_quarter"))
    lines = [
        f"{found['seconds'] / 60:.0f} minutes on a tiny Llama; {found['adapters']} adapters of ranks 1 to 16, LoRA and "
        f"DoRA, a budget of {found['budget_bytes'] / 1024:.0f} KiB,",
        "20 of the largest, and no copies on the host; four clients, two operators.",
        f"{n['asked']} rows asked for: {n['right']} as their merged model says, {n.get('wrong', 0)} not, "
        f"{n['cancelled']} cancelled, {n.get('unloaded', 0)} refused since",
        f"their adapter had just been unloaded, {n.get('failed', 0)} failed, "
        f"{n.get('lost', 0) + found['unaccounted']} lost. {n['loads'] + n['unloads']} loads, {n['unloads']} unloads, "
        f"{n['corrupt refused']} corrupt folders refused.",
        f"Resident memory {early:.0f} MiB in the second quarter of the time, {late:.0f} MiB in the last.",
        f"{c['device'].replace('1 threads', 'one thread')}, shared with other work; torch {c['torch']}, "
        f"Python {c['python']}, commit {c['commit']}, {c['date']}.",
        "Repeat: `python benchmarks/soak_serving.py --minutes 20 --threads 1`.",
    ]
    return "\n".join(lines)


def dora_demo_task() -> str:
    """The result of `benchmarks/dora_demo_task.py`."""
    found = json.loads((RESULTS / "dora_demo_task.json").read_text())
    c, after = found["conditions"], found["after"]
    return "\n".join(
        [
            f"The demo's task (SmolLM2-135M, float32, rank {found['rank']}), {found['steps']} steps of "
            f"{found['batch_size']} functions from the same factors: held-out loss",
            f"{found['before']:.4f} before, {after['ours']:.4f} after with ours, {after['PEFT']:.4f} with PEFT's "
            f"DoRA; the training losses differ by at most {found['curve_difference']:.0e}.",
            f"{c['device']}; torch {c['torch']}, commit {c['commit']}, {c['date']}. "
            f"Repeat: `python benchmarks/dora_demo_task.py`.",
        ]
    )


def _ratio_and_spread(row: Row) -> str:
    if row.over_floor is None or row.spread is None:
        return row.reason
    return f"{row.over_floor:.2f} ± {row.over_floor * row.spread:.2f}"


def bench() -> str:
    """The table and the plot of `lrk bench`, from its CSV."""
    rows, c = read_csv(RESULTS / "cpu_bench.csv")
    draw(ROOT / "docs" / "images" / "bench.png", rows, c)
    others = ("plain", "peft", "ours")
    lines = [
        "Time over the floor (over plain PyTorch where the op has none), ± spread. "
        f"{c['device']}; torch {c['torch']}, Python {c['python']},",
        f"commit {c['commit']}, {c['date']}. Repeat: `{c['command']}`.",
        "",
        "![the same as bars](images/bench.png)",
        "",
        "| op, shape | dtype | mode | floor, µs | " + " | ".join(others) + " |",
        "|---|---|---|---|" + "---|" * len(others),
    ]
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.op, row.shape, row.dtype, row.mode), {})[row.provider] = row
    for (op, shape, dtype, mode), found in cases.items():
        cells = [_ratio_and_spread(found[name]) if name in found else "" for name in others]
        floor = f"{found['floor'].median_us:.0f}" if "floor" in found else ""
        lines.append(f"| `{op}` {shape} | {dtype} | {mode} | {floor} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = (
    cost_over_frozen, demo, bench, dora_demo_task, smt_gradient, smt_training, smt_demo_task, many_adapters,
    train_many_adapters, compare_serving_references, soak_serving,
)  # fmt: skip


def main() -> None:
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        for render in TABLES:
            name = render.__name__
            pattern = rf"(<!-- figures:{name} -->\n).*?(<!-- /figures:{name} -->)"
            if re.search(pattern, text, re.S):
                table = render()
                text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        path.write_text(text)


if __name__ == "__main__":
    main()
