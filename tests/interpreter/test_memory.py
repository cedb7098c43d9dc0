"""The instrument that counts memory traffic finds what it is there to find."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from lowrank_kernels.inspect.memory import AccessFault, record_memory
from lowrank_kernels.inspect.triton_internals import without_driver

# Faults inside a kernel reach the caller as the interpreter's own error, with ours in its text.
FAULTS = (AccessFault, InterpreterError)


@triton.jit
def _copy_kernel(source, target, count, shift, step, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offs * step + shift, mask=offs < count, other=0.0)
    tl.store(target + offs, values, mask=offs < count)


@triton.jit
def _atomic_kernel(target, BLOCK: tl.constexpr):
    tl.atomic_add(target + tl.arange(0, BLOCK), 1.0)


@triton.jit
def _two_dimensional_copy_kernel(source, target):
    target.store([0, 0], source.load([0, 0]))


def test_distinct_bytes_without_masked_lanes() -> None:
    source, target = torch.randn(100), torch.zeros(128)
    with record_memory() as record:
        _copy_kernel[(2,)](source, target, 100, 0, 1, BLOCK=64)
    (launch,) = record.launches
    assert launch.name == "copy_kernel"
    assert (launch.tensors["source"].read, launch.tensors["source"].written) == (400, 0)
    assert (launch.tensors["target"].read, launch.tensors["target"].written) == (0, 400)
    assert torch.equal(target[:100], source)


def test_a_byte_counts_once_a_launch() -> None:
    source, target = torch.randn(4), torch.zeros(64)
    with record_memory() as record:
        _copy_kernel[(1,)](source, target, 64, 0, 0, BLOCK=64)
        _copy_kernel[(1,)](source, target, 64, 0, 0, BLOCK=64)
    assert [launch.tensors["source"].read for launch in record.launches] == [4, 4]


def test_descriptors_are_counted() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    source, target = torch.randn(8, 12), torch.zeros(8, 12)
    arguments = [TensorDescriptor(t, list(t.shape), list(t.stride()), [16, 16]) for t in (source, target)]
    with record_memory() as record:
        _two_dimensional_copy_kernel[(1,)](*arguments)
    assert record.nbytes == 2 * 8 * 12 * 4
    assert torch.equal(source, target)


@pytest.mark.parametrize(
    ("count", "shift", "words"),
    [(64, 37, "read outside of every argument"), (64, -1, "read outside of every argument")],
)
def test_planted_access_out_of_bounds(count: int, shift: int, words: str) -> None:
    source, target = torch.randn(100), torch.zeros(64)
    with pytest.raises(FAULTS, match=words), record_memory():
        _copy_kernel[(1,)](source, target, count, shift, 1, BLOCK=64)


def test_planted_write_out_of_bounds() -> None:
    memory = torch.zeros(128)
    with pytest.raises(FAULTS, match="write outside of every argument"), record_memory():
        _copy_kernel[(1,)](torch.randn(64), memory[:63], 64, 0, 1, BLOCK=64)
    assert not memory[63:].any()


def test_planted_access_between_the_rows_of_a_view() -> None:
    wide = torch.randn(64, 2)
    with pytest.raises(FAULTS, match="between the rows of source"), record_memory():
        _copy_kernel[(1,)](wide[:, 0], torch.zeros(64), 64, 0, 1, BLOCK=64)


def test_planted_atomic() -> None:
    with pytest.raises(FAULTS, match="atomic"), record_memory():
        _atomic_kernel[(1,)](torch.zeros(64), BLOCK=64)


def test_plain_pytorch_is_counted_by_the_same_instrument() -> None:
    x, weight = torch.randn(8, 16), torch.randn(4, 16, requires_grad=True)
    with record_memory() as record:
        y = torch.nn.functional.linear(x, weight).relu_()
        y.view(2, 16).t()
        torch.empty(1000)
    assert [launch.name for launch in record.launches] == ["mm", "relu_"]
    assert record.launches[0].nbytes == 4 * (8 * 16 + 4 * 16 + 8 * 4)
    assert record.launches[1].nbytes == 4 * (8 * 4 + 8 * 4)
    assert record.saved_bytes() == 4 * (8 * 16 + 8 * 4)
    assert record.saved_bytes(beyond=[x]) == 4 * 8 * 4


def test_without_driver_refuses_one() -> None:
    with without_driver(), pytest.raises(RuntimeError, match="without a driver"):
        triton.runtime.driver.active.get_current_device()
