"""Text that keeps to a grammar, whatever the model would rather say."""

import json
import re

import pytest
import torch

from lowrank_kernels.serving.engine import Constraint, Generation
from lowrank_kernels.serving.engine.sampling import Sampler
from tests.serving.engine.test_text import bytes_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    made = bytes_tokenizer()
    made.add_special_tokens({"eos_token": "<end>"})
    return made


def write(tokenizer, constraint, most=200, seed=0, bias=()):
    """Random text under a constraint, until it may end."""
    end = tokenizer.eos_token_id
    job = Generation(None, [1], constraint=constraint, temperature=1.0, seed=seed, logit_bias=dict(bias))
    sampler, tokens = Sampler(job, [end]), []
    generator = torch.Generator().manual_seed(seed)
    while len(tokens) < most:
        token = sampler.draw(torch.randn(len(tokenizer), generator=generator))
        if token == end:
            break
        sampler.add(token)
        tokens.append(token)
        if sampler.complete:
            break
    return tokenizer.decode(tokens)


SCHEMA = {
    "type": "object",
    "properties": {"on": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["on", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_json_schema(tokenizer, seed):
    found = json.loads(write(tokenizer, Constraint.json_schema(tokenizer, SCHEMA), seed=seed))
    assert set(found) == {"on", "n"} and isinstance(found["on"], bool) and 0 <= found["n"] <= 99


@pytest.mark.parametrize("seed", range(5))
def test_regex(tokenizer, seed):
    assert re.fullmatch(r"[ab]{3}-\d{2}", write(tokenizer, Constraint.regex(tokenizer, r"[ab]{3}-\d{2}"), seed=seed))


def test_json_object(tokenizer):
    close = tokenizer.convert_tokens_to_ids("}")
    assert isinstance(json.loads(write(tokenizer, Constraint.json_object(tokenizer), bias={close: 100.0})), dict)


def test_what_cannot_be_kept_to_is_refused(tokenizer):
    for make in (
        lambda: Constraint.json_schema(tokenizer, {"type": "nothing"}),
        lambda: Constraint.regex(tokenizer, "(ab"),
    ):
        with pytest.raises(ValueError, match="expected a grammar that can be kept to"):
            make()
