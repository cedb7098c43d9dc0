"""Differential fuzzing of every op against float64.

A seed is a call: an op, its sizes, dtypes and strides, which gradients are asked for, a backend and a way. The result
and every gradient must lie within a bound that follows from the formula: some units in the last place of the product of
the operands' norms. What no tensor holds (gaps between rows, memory before it is written) holds NaN.

    python -m tests.fuzz --cases 1000000      # `make nightly`; prints every miss as a test

Misses of the past stand in ``test_fuzz.py``.
"""
