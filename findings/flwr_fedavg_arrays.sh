#!/usr/bin/env bash
# Flower's FedAvg averages arrays of different shapes, and in the dtype that they came in.
#
# Replies are added up with NumPy's `+=`, name by name, and no shape or dtype is compared. LoRA factors of a client of
# rank 1 are spread over all ranks of the others' if its reply comes second, and end the run if it comes first: which
# of the two depends on who is faster. Integers become float64, which has no place for the last bits of a 64-bit one.
# float16 is rounded after each client, so that an average of ones is not one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile flwr==1.42.0 numpy==2.4.6

"$work/venv/bin/python" - <<'PYTHON'
import logging
import sys

import flwr
import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.serverapp.strategy import FedAvg

logging.disable(logging.CRITICAL)
print(f"flwr {flwr.__version__}, numpy {np.__version__}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


def average(*arrays):
    """What FedAvg makes of one array from each of some clients, of one example each."""
    replies = []
    for node, array in enumerate(arrays, 1):
        content = RecordDict({"arrays": ArrayRecord({"w": Array(array)}), "metrics": MetricRecord({"num-examples": 1})})
        metadata = Metadata(1, str(node), node, 0, f"to {node}", "", 0.0, 3600.0, "train")
        replies.append(Message(content=content, metadata=metadata))
    found, _ = FedAvg().aggregate_train(1, replies)
    return found["w"].numpy()


print("\nExpected: arrays of different shapes are refused, or the client that differs is left out.")
many, one = np.ones((4, 8), np.float32), np.full((1, 8), 3, np.float32)
found = average(many, one)
print(f"Seen: A of rank 4 (ones), then A of rank 1 (threes): shape {found.shape}, every row {found[:, 0].tolist()}")
check(found.shape == (4, 8) and (found == 2).all(), "the one row was spread over all four ranks, and nothing was said")
try:
    average(one, many)
    raised = None
except ValueError as error:
    raised = error
print(f"Seen: the same two replies in the other order: {type(raised).__name__}: {raised}")
check(raised is not None, "it raises, which ends the run")

print("\nExpected: an average of equal values is that value, in its dtype.")
count = 2**53 + 1
found = average(np.array(count), np.array(count))
print(f"Seen: two clients with the integer 2**53 + 1: {found.dtype}, {int(found) - count:+d}")
check(found.dtype == np.float64 and int(found) != count, "it comes back as a float64 that is another number")
found = average(*[np.ones(1, np.float16)] * 100)
print(f"Seen: a hundred clients with 1 in float16: {found.dtype}, {found[0]}")
check(found.dtype == np.float16 and found[0] != 1, "it comes back as float16, and is not 1")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
