"""Whether two runs of `lrk bench` on one machine agree: rows whose ratios, each with its spread, overlap.

lrk bench --csv one.csv; lrk bench --csv two.csv; python benchmarks/agreement.py one.csv two.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lowrank_kernels.bench.run import read_csv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs=2)
    args = parser.parse_args()
    one, two = (
        {(r.op, r.shape, r.dtype, r.mode, r.provider): r for r in read_csv(file)[0] if r.over_floor not in (None, 1.0)}
        for file in args.files
    )
    apart = []
    for key in one.keys() & two.keys():
        (a, spread_a), (b, spread_b) = ((rows[key].over_floor, rows[key].spread) for rows in (one, two))
        if abs(a - b) > a * spread_a + b * spread_b:
            apart.append(f"{' '.join(key)}: {a:.2f} ± {a * spread_a:.2f}, {b:.2f} ± {b * spread_b:.2f}")
    both = len(one.keys() & two.keys())
    print(f"{both - len(apart)} of {both} rows agree ({(both - len(apart)) / both:.0%}); the others:")
    print("\n".join(sorted(apart)))


if __name__ == "__main__":
    main()
