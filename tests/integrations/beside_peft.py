"""Two models that are to be the same: PEFT's own, and its copy on our ops."""

from unittest import mock

import torch

from lowrank_kernels.integrations import peft as integration

TARGETS = ["q_proj", "v_proj", "down_proj"]


def run(model, tokens, **kwargs):
    """Logits and the gradients of everything that trains, of a loss that sees all of them."""
    model.zero_grad()
    logits = model(tokens, **kwargs).logits
    (logits.float().sin().sum() * 0.1).backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_agrees(ours, theirs, tokens, **kwargs):
    """Outputs to 2e-6 and gradients to 2e-5, and the outputs without gradients too."""
    logits, grads = run(ours, tokens, **kwargs)
    expected_logits, expected = run(theirs, tokens, **kwargs)
    assert_close(logits, expected_logits, 2e-6)
    assert grads.keys() == expected.keys() and grads
    for name, g in expected.items():
        assert_close(grads[name], g, 2e-5, name)
    with torch.no_grad():
        assert_close(ours(tokens, **kwargs).logits, theirs(tokens, **kwargs).logits, 2e-6)


def assert_close(got, expected, tolerance, name=""):
    """Within a tolerance of the largest element: float32 sums in another order differ by their scale."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    scale = max(1.0, expected.abs().max().item())
    assert (got - expected).abs().max() <= tolerance * scale, name


def calls_of(op):
    """Counts how often accelerated layers call ``op``."""
    return mock.patch.object(integration, op, wraps=getattr(integration, op))
