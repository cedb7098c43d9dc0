"""Runs many seeds in several processes, and prints the misses as tests."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time

from .check import CHUNK, faults_of_chunk


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    firsts = range(options.first, options.first + options.cases, CHUNK)
    missed, started = 0, time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for done, found in enumerate(pool.imap(faults_of_chunk, firsts), 1):
            for fault in found:
                missed += 1
                print(
                    f"{fault}\n\n    @pytest.mark.parametrize('seed', [..., {fault.split(':')[0].split()[1]}])\n",
                    flush=True,
                )
            if done % 100 == 0:
                print(f"{done * CHUNK} cases, {missed} missed, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{len(firsts) * CHUNK} cases from seed {options.first}: {missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
