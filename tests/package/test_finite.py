"""What counts as finite."""

from __future__ import annotations

import pytest
import torch

from lowrank_kernels.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_element_that_is_not_finite_is_seen_wherever_it_is(dtype):
    for shape in ((1,), (7,), (5, 33), (3, 8, 16), (257, 129)):
        tensor = torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()
        assert all_finite(tensor) and all_finite(tensor.T if tensor.dim() == 2 else tensor)
        for value in (float("nan"), float("inf"), float("-inf")):
            for at in (0, tensor.numel() // 2, tensor.numel() - 1):
                broken = tensor.detach().clone()
                broken.view(-1)[at] = value
                assert not all_finite(broken) and not all_finite(broken.T if broken.dim() == 2 else broken)
    assert all_finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype)) and all_finite(torch.empty(0, 3).to(dtype))
