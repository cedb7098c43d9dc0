"""Write the measured figures into the README and docs, from the files under benchmarks/results.

    python benchmarks/render.py

Text between `<!-- figures:NAME -->` and `<!-- /figures:NAME -->` is replaced.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("ours", "peft-like", "dora", "peft-like dora")


def cost_over_frozen() -> str:
    """The table of `benchmarks/cost_over_frozen.py`."""
    found = json.loads((RESULTS / "cpu_cost_over_frozen.json").read_text())
    c, rows = found["conditions"], found["rows"]
    shape = f"K = N = {rows[0]['K']}, R = {rows[0]['R']}"
    lines = [
        f"Time over that of the frozen `nn.Linear` alone (1.00: the correction is free); {shape}, medians, all columns",
        f"interleaved in one run. {c['device']}; torch {c['torch']}, Python {c['python']}, commit {c['commit']}, "
        f"{c['date']}.",
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
        f"on {e['threads']} CPU threads; torch {e['torch']}.",
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


def main() -> None:
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        for name, render in (("cost_over_frozen", cost_over_frozen), ("demo", demo)):
            pattern = rf"(<!-- figures:{name} -->\n).*?(<!-- /figures:{name} -->)"
            if re.search(pattern, text, re.S):
                table = render()
                text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        path.write_text(text)


if __name__ == "__main__":
    main()
