"""Text as tokens come: whole characters, stop texts, and in the end what the tokenizer makes of all of them."""

import random

import pytest

from lowrank_kernels.serving.engine.text import TextStream
from tests.serving.tiny_model import make_tokenizer


def bytes_tokenizer():
    """A token a byte, as byte-level vocabularies have them."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def prefix_tokenizer():
    """Words that begin with a mark for a space, the first of which is stripped when they are decoded."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁the", "▁cat", "s", "▁", "<0xE2>", "<0x82>", "<0xAC>", "!", "<0x0A>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def read(tokenizer, tokens, **options):
    stream, pieces = TextStream(tokenizer, **options), []
    for token in tokens:
        pieces.append(stream.add(token))
        if stream.found is not None:
            break
    return stream, [*pieces, stream.end()]


PIECES = {bytes_tokenizer: None, make_tokenizer: None, prefix_tokenizer: [[0], [1], [2], [3], [4, 5, 6], [7], [8]]}
"""Tokens that make whole characters; None where each one does, or what is none comes out the same in any order."""


@pytest.mark.parametrize("make", PIECES)
def test_pieces_together_are_the_whole(make):
    tokenizer, draw = make(), random.Random(0)
    units = PIECES[make] or [[token] for token in range(1, len(tokenizer))]
    for _ in range(100):
        tokens = [token for _ in range(draw.randint(1, 12)) for token in draw.choice(units)]
        _, pieces = read(tokenizer, tokens)
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(pieces) == whole, tokens


def test_a_character_of_several_tokens_comes_whole():
    tokenizer = bytes_tokenizer()
    tokens = tokenizer("a€b")["input_ids"]
    assert len(tokens) == 5
    assert read(tokenizer, tokens)[1] == ["a", "", "", "€", "b", ""]


def test_what_is_no_character_comes_at_the_end():
    tokenizer = bytes_tokenizer()
    assert read(tokenizer, tokenizer("a€")["input_ids"][:2])[1] == ["a", "", "\ufffd"]


STOPS = [
    ("hello world", ("wor",), "hello "),
    ("hello world", ("lo w", "hello world"), "hel"),
    ("hello world", ("zz", "x"), "hello world"),
    ("aaab", ("aab",), "a"),
    ("ababac", ("abac",), "ab"),
    ("hello", ("h",), ""),
    ("hello", ("hello", "lo"), ""),
]


@pytest.mark.parametrize(("text", "stop", "kept"), STOPS)
def test_stop_texts(text, stop, kept):
    tokenizer = bytes_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    stream, pieces = read(tokenizer, tokens, stop=stop)
    assert "".join(pieces) == stream.text == kept
    assert (stream.found in stop) == (kept != text)
    stream, pieces = read(tokenizer, tokens, stop=stop, include_stop=True)
    assert "".join(pieces) == stream.text == kept + (stream.found or "")


def test_text_is_held_back_only_while_it_may_begin_a_stop():
    tokenizer = bytes_tokenizer()
    pieces = read(tokenizer, tokenizer("ab abd x")["input_ids"], stop=("abc",))[1]
    assert "|".join(pieces) == "||ab |||abd| |x|"
