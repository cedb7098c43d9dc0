"""What a figure needs beside it."""

from __future__ import annotations

import sys

import torch


def environment() -> dict[str, str]:
    """What a figure needs beside it: device, versions, commit, date, command."""
    from ..bench.run import conditions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = str(torch.get_num_threads())
    return {**conditions(device, "lrk " + " ".join(sys.argv[1:])), "threads": threads}
