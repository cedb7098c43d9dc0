"""The block-sparse ops: messages, gradients as slices of the dense one, what is saved, every instruction set, AdamW."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import _extension
from lowrank_kernels.functional import block_adamw_, block_columns, read_blocks, write_blocks_
from lowrank_kernels.reference import block_sparse_linear_backward_ref, block_sparse_weight_grad_ref
from lowrank_kernels.reference.block_sparse import stochastic_bfloat16_ref
from tests.problems.block_sparse import block_tensors, random_index
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def index_of(*blocks: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int32).reshape(-1, 2)


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("size", [(16, 16), (48, 32), (64, 128)])
def test_the_oracle_is_the_slice_of_the_dense_gradient(size: tuple[int, int]) -> None:
    x, weight = torch.randn(3, 11, 150).double(), torch.randn(100, 150).double().requires_grad_()
    y = torch.nn.functional.linear(x, weight)
    grad_y = torch.randn_like(y)
    (dense,) = torch.autograd.grad(y, weight, grad_y)
    index = random_index(100, 150, size, 0.6)
    grads = block_sparse_linear_backward_ref(grad_y, x, weight.detach(), index, size)
    torch.testing.assert_close(grads.blocks, read_blocks(dense, index, size), rtol=1e-12, atol=1e-12)


def run_all_cases(backend: str = "cpu") -> None:
    """Shapes that reach each branch of the C++ path: tails of slices and panels, groups, token splits, no token."""
    for dtype in (F32, BF16, F16):
        for M, K, N, size, share in (
            (64, 64, 64, (16, 16), 1.0),
            (129, 70, 90, (32, 48), 0.5),
            (1, 33, 17, (16, 16), 0.5),
            (1153, 130, 200, (64, 32), 0.4),
            (700, 700, 600, (16, 16), 0.2),
            (0, 64, 64, (32, 32), 0.5),
            (31, 300, 260, (256, 272), 1.0),
        ):
            torch.manual_seed(M)
            x, grad_y = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
            index = random_index(N, K, size, share)
            ours = lk.block_sparse_weight_grad(x, grad_y, index, size, backend=backend)
            exact = block_sparse_weight_grad_ref(x.double(), grad_y.double(), index, size)
            eager = read_blocks(grad_y.T @ x, index, size)
            assert_as_exact_as_eager(ours, eager, exact, factor=GRADIENT_FACTOR, what=f"{dtype} {M, K, N} {size}")


@pytest.mark.skipif(not _extension.available(), reason="no compiled extension")
def test_core_shapes_and_sizes() -> None:
    run_all_cases()


def test_a_result_does_not_depend_on_threads_or_on_the_other_blocks() -> None:
    x, grad_y = torch.randn(1100, 200), torch.randn(1100, 150)
    index = random_index(150, 200, (16, 16), 0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = lk.block_sparse_weight_grad(x, grad_y, index, 16)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, lk.block_sparse_weight_grad(x, grad_y, index, 16))
    order = torch.randperm(len(index))
    assert torch.equal(one[order], lk.block_sparse_weight_grad(x, grad_y, index[order], 16))


def test_no_block_at_all() -> None:
    none = torch.zeros(0, 2, dtype=torch.int32)
    assert lk.block_sparse_weight_grad(torch.randn(3, 32), torch.randn(3, 48), none, 16).shape == (0, 16, 16)


# ------------------------------------------------------------------------------------------------- what is kept of x


KEPT = [([(0, 1), (2, 1), (1, 3)], 2), ([(0, 4), (1, 0)], 1 + 6 / 16), ([], None)]


@pytest.mark.parametrize(("blocks", "kept"), KEPT)
def test_saved_bytes_are_those_of_the_columns_in_need(blocks: list[tuple[int, int]], kept: float | None) -> None:
    """M · |columns| · itemsize, in a storage of its own; x itself where that is more than half of it."""
    M, K, N = 12, 70, 48
    index = index_of(*blocks) if kept is not None else random_index(N, K, (16, 16), 1.0)
    x = torch.randn(M, K, dtype=BF16)
    weight = torch.randn(N, K, dtype=BF16)
    packed = read_blocks(weight, index, (16, 16)).requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lk.block_sparse_linear(x, weight, packed, index)
    rows = [t for t in saved if t.dtype == BF16 and t.shape[0] == M]
    (of_x,) = rows
    if kept is None:
        assert of_x.data_ptr() == x.data_ptr()
    else:
        assert of_x.untyped_storage().nbytes() == M * int(16 * kept) * 2
        assert of_x.data_ptr() != x.data_ptr()


def test_nothing_of_x_is_kept_for_frozen_blocks() -> None:
    t = block_tensors(5, 64, 32, (16, 16), F32)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        lk.block_sparse_linear(t["x"], t["weight"], t["blocks"].detach(), t["block_index"])
    assert all(s.shape[0] != 5 for s in saved)


def test_columns_are_the_distinct_ones() -> None:
    found = block_columns(index_of((0, 4), (1, 0), (2, 4)), 16, 70)
    assert found is not None and found.blocks.tolist() == [0, 4] and found.width == 16 + 6
    assert block_columns(index_of((0, 0), (0, 1), (0, 2)), 16, 70) is None


# ------------------------------------------------------------------------------------------------- a citizen of torch


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("columns", [True, False])
def test_opcheck(backend: str, columns: bool) -> None:
    t = block_tensors(10, 96, 48, (16, 16), F32, bias=True, share=0.1)
    found = block_columns(t["block_index"], 16, 96)
    assert found is not None
    index, width = found if columns else (None, 0)
    forward = torch.ops.lowrank_kernels.block_sparse_linear.default
    torch.library.opcheck(forward, (*t.values(), index, width, True, False, backend))
    x = torch.randn(10, width) if columns else t["x"].detach()
    backward = torch.ops.lowrank_kernels.block_sparse_linear_backward.default
    arguments = (torch.randn(10, 48), x, t["weight"], t["block_index"], index, 16, 16, F32, [True] * 3, backend)
    torch.library.opcheck(backward, arguments)
    grad = torch.ops.lowrank_kernels.block_sparse_weight_grad.default
    torch.library.opcheck(grad, (t["x"].detach(), torch.randn(10, 48), t["block_index"], 16, 16, F32, backend))


def test_compile_and_autocast() -> None:
    t = block_tensors(10, 96, 48, (16, 16), F32, share=0.1)

    def loss(x, weight, blocks, block_index):
        return lk.block_sparse_linear(x, weight, blocks, block_index).square().sum()

    wanted = [t["x"], t["blocks"]]
    eager = torch.autograd.grad(loss(**t), wanted)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(**t), wanted)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", BF16):
        y = lk.block_sparse_linear(**t)
    assert y.dtype == BF16
    (grad,) = torch.autograd.grad(y.sum(), t["blocks"])
    assert grad.dtype == F32


def test_gradients_of_gradients_say_so() -> None:
    t = block_tensors(4, 64, 32, (16, 16), F32)
    (grad,) = torch.autograd.grad(lk.block_sparse_linear(**t).square().sum(), t["blocks"], create_graph=True)
    with pytest.raises(RuntimeError, match="block_sparse_linear: gradients of gradients are not implemented"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------------- messages


def linear_operands(**changes):
    operands = {
        "x": torch.zeros(3, 32),
        "weight": torch.zeros(48, 32),
        "blocks": torch.zeros(2, 16, 16),
        "block_index": index_of((0, 0), (2, 1)),
    }
    return {**operands, **changes}


LINEAR = [
    ({"x": torch.zeros(3, 31)}, ValueError, r"expected x of shape \(\.\.\., K\) = \(\.\.\., 32\), got \(3, 31\)"),
    ({"x": torch.zeros(3, 32, dtype=torch.int64)}, TypeError, r"expected x of a floating dtype, got torch.int64"),
    ({"x": torch.zeros(3, 32, dtype=BF16)}, TypeError, r"expected x and weight of one dtype, got .*bfloat16"),
    ({"weight": torch.zeros(48, 32, 1)}, ValueError, r"expected weight of shape \(N, K\), got \(48, 32, 1\)"),
    ({"weight": torch.zeros(48, 32, requires_grad=True)}, ValueError, r"expected a frozen weight"),
    ({"blocks": torch.zeros(2, 256)}, ValueError, r"expected blocks of shape \(n_blocks, bm, bn\)"),
    ({"blocks": torch.zeros(2, 16, 24)}, ValueError, r"expected blocks of shape .* multiples of 16, got \(2, 16, 24\)"),
    ({"blocks": torch.zeros(3, 16, 16)}, ValueError, r"expected block_index of shape \(n_blocks, 2\) = \(3, 2\)"),
    ({"block_index": index_of((0, 0), (3, 0))}, ValueError, r"expected block_index within the 3 × 2 .* \(3, 0\)"),
    ({"block_index": index_of((0, -1), (1, 0))}, ValueError, r"expected block_index within .*got block \(0, -1\)"),
    ({"block_index": index_of((1, 1), (1, 1))}, ValueError, r"expected block_index with every block once.* \(1, 1\)"),
    ({"block_index": torch.zeros(2, 2)}, TypeError, r"expected block_index of dtype torch.int32, got torch.float32"),
    ({"block_index": [[0, 0]]}, TypeError, r"expected block_index to be a tensor, got list"),
    ({"bias": torch.zeros(32)}, ValueError, r"expected bias of shape \(N,\) = \(48,\), got \(32,\)"),
    ({"backend": "rocket"}, ValueError, r"expected backend to be one of"),
    ({"backend": "triton"}, ValueError, r"backend 'triton' cannot run here"),
]


@pytest.mark.parametrize(("changes", "error", "message"), LINEAR)
def test_messages_of_the_linear(changes, error, message) -> None:
    with pytest.raises(error, match=rf"^block_sparse_linear: {message}"):
        lk.block_sparse_linear(**linear_operands(**changes))


GRAD = [
    ({"grad_y": torch.zeros(4, 48)}, ValueError, r"expected x and grad_y of the same leading shape"),
    ({"grad_y": torch.zeros(3, 48, dtype=BF16)}, TypeError, r"expected x and grad_y of one dtype"),
    ({"block_size": 24}, ValueError, r"expected block_size to be a positive multiple of 16, or a pair of them, got 24"),
    ({"block_size": (16, 0)}, ValueError, r"expected block_size"),
    ({"block_size": "16"}, ValueError, r"expected block_size"),
    ({"block_index": index_of((0, 2))}, ValueError, r"expected block_index within"),
]


@pytest.mark.parametrize(("changes", "error", "message"), GRAD)
def test_messages_of_the_gradient(changes, error, message) -> None:
    operands = {"x": torch.zeros(3, 32), "grad_y": torch.zeros(3, 48), "block_index": index_of((0, 0))}
    operands["block_size"] = 16
    with pytest.raises(error, match=rf"^block_sparse_weight_grad: {message}"):
        lk.block_sparse_weight_grad(**{**operands, **changes})


@pytest.mark.skipif(not _extension.available(), reason="no compiled extension")
def test_the_extension_itself_refuses_blocks_outside_of_the_weight() -> None:
    with pytest.raises(RuntimeError, match=r"expected blocks within a weight of shape \(48, 32\), got block \(0, 2\)"):
        torch.ops.lowrank_kernels.block_grad_(
            torch.zeros(1, 16, 16), torch.zeros(3, 32), torch.zeros(3, 48), index_of((0, 2))
        )


# ------------------------------------------------------------------------------------------------------------- AdamW


def check_adamw(backend: str) -> None:
    """Blocks, moments and W after three steps, against torch's AdamW on the packed blocks in float32."""
    cases = ((F32, F32, (16, 32)), (F32, BF16, (32, 16)), (BF16, BF16, (16, 16)), (F16, F32, (16, 16)))
    for dtype, weight_dtype, size in cases:
        torch.manual_seed(3)
        weight = torch.randn(70, 50).to(weight_dtype)
        before, index = weight.clone(), random_index(70, 50, size, 0.5)
        blocks = read_blocks(weight, index, size).to(dtype)
        exact = blocks.float().clone().requires_grad_()
        theirs = torch.optim.AdamW([exact], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-6)
        moments = [torch.zeros_like(blocks, dtype=F32) for _ in range(2)]
        for step in range(1, 4):
            grad = read_blocks(torch.randn(70, 50), index, size).to(dtype)
            versions = blocks._version, weight._version
            block_adamw_(
                blocks,
                grad,
                *moments,
                weight,
                index,
                step=step,
                lr=0.01,
                betas=(0.9, 0.95),
                weight_decay=0.1,
                eps=1e-6,
                backend=backend,
            )
            assert blocks._version > versions[0] and weight._version > versions[1]
            with torch.no_grad():
                exact.copy_(exact.to(dtype))  # as the blocks are rounded between steps
            exact.grad = grad.float()
            theirs.step()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(blocks.float(), exact.detach(), rtol=2 * eps + 1e-6, atol=1e-6)
        state = theirs.state[exact]
        for ours, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
            torch.testing.assert_close(ours, state[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(weight, write_blocks_(before.clone(), blocks, index))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_adamw_is_torchs_and_writes_the_blocks_alone(backend: str) -> None:
    check_adamw(backend)


def test_stochastic_rounding_is_unbiased_and_the_same_in_every_backend() -> None:
    """A step of a hundredth of a bfloat16 unit: to nearest it is lost, at random it is kept on average."""
    index = torch.tensor([(i, j) for i in range(8) for j in range(8)], dtype=torch.int32)
    runs = {}
    for backend in ("reference", "cpu"):
        weight = torch.ones(256, 256, dtype=BF16)
        blocks = read_blocks(weight, index, (32, 32))
        moments = [torch.zeros_like(blocks, dtype=F32) for _ in range(2)]
        grad = torch.ones_like(blocks)
        rate = 2.0**-8 / 100  # below 1 a unit is 2⁻⁸
        block_adamw_(blocks, grad, *moments, weight, index, step=1, lr=rate, seed=torch.tensor(5), backend=backend)
        runs[backend] = blocks
        assert torch.equal(read_blocks(weight, index, (32, 32)), blocks)
        moved = (1.0 - blocks.double().mean()) / rate
        assert abs(moved - 1.0) < 0.15  # 65536 draws at 1 in 100: the standard deviation is 0.04
    assert (runs["reference"] != runs["cpu"]).float().mean() < 1e-3
    special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0]])
    rounded = stochastic_bfloat16_ref(special, torch.tensor(1))
    assert rounded[0, 0].isnan() and rounded[0, 1:].tolist() == [float("inf"), -float("inf"), 0.0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"grad": torch.zeros(1, 16, 32)}, ValueError, r"expected grad of shape \(1, 16, 16\)"),
        ({"exp_avg": torch.zeros(1, 16, 16, dtype=BF16)}, TypeError, r"expected exp_avg of dtype torch.float32"),
        ({"exp_avg": torch.zeros(1, 16, 16).mT}, ValueError, r"expected exp_avg to be contiguous"),
        ({"blocks": torch.zeros(16, 16)}, ValueError, r"expected blocks of shape"),
        ({"block_index": index_of((0, 0), (0, 1))}, ValueError, r"expected block_index of shape"),
        ({"seed": torch.tensor(1)}, TypeError, r"expected bfloat16 blocks for stochastic rounding"),
    ],
)
def test_messages_of_adamw(changes, error, message) -> None:
    operands = {name: torch.zeros(1, 16, 16) for name in ("blocks", "grad", "exp_avg", "exp_avg_sq")}
    operands |= {"weight": torch.zeros(32, 32), "block_index": index_of((0, 0))}
    with pytest.raises(error, match=rf"^block_adamw_: {message}"):
        block_adamw_(**{**operands, **changes}, step=1)
