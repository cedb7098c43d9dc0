"""Text that keeps to a JSON schema or a regular expression, by the library ``llguidance``."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_OBJECT = {"type": "object"}
_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # making one takes about a second
_making = threading.Lock()


class Constraint:
    """A grammar over the tokens of a tokenizer. Needs ``llguidance``, of the extra ``serve``.

    Args:
        tokenizer: of the model, a fast one.
        grammar: as ``llguidance`` has it; see the class methods.

    Raises:
        ValueError: a grammar that cannot be kept to, a tokenizer that is not a fast one.
        ImportError: no llguidance.
    """

    def __init__(self, tokenizer: Any, grammar: str) -> None:
        from llguidance import LLMatcher

        self._tokenizer, self._grammar = _tokenizer(tokenizer), grammar
        if wrong := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise ValueError(f"expected a grammar that can be kept to: {wrong}")

    @classmethod
    def json_schema(cls, tokenizer: Any, schema: Mapping[str, Any] | bool) -> Constraint:
        """Any text that is JSON and fits the schema."""
        from llguidance import LLMatcher

        return cls(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))

    @classmethod
    def json_object(cls, tokenizer: Any) -> Constraint:
        """Any JSON object."""
        return cls.json_schema(tokenizer, _OBJECT)

    @classmethod
    def regex(cls, tokenizer: Any, pattern: str) -> Constraint:
        """Any text that the regular expression, in Rust's syntax, matches whole."""
        from llguidance import LLMatcher

        return cls(tokenizer, LLMatcher.grammar_from_regex(pattern))

    def matcher(self) -> Matcher:
        """Follows one row's tokens."""
        from llguidance import LLMatcher

        return Matcher(LLMatcher(self._tokenizer, self._grammar))


class Matcher:
    """Where one row is in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask_(self, logits: Tensor) -> None:
        """Set the logits (vocabulary,) of tokens that may not come next to -inf.

        Raises:
            ValueError: the grammar has grown beyond llguidance's limits.
        """
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8).bool()
        self._check()
        logits[: len(allowed)].masked_fill_(~allowed.to(logits.device), -torch.inf)
        logits[len(allowed) :] = -torch.inf

    def add(self, token: int) -> None:
        """Take the next token, which the mask allowed."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        """True once nothing but an end-of-text token may follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be kept to: {self._matcher.get_error()}")


def _tokenizer(tokenizer: Any) -> Any:
    with _making:
        if tokenizer not in _tokenizers:
            from llguidance.hf import from_tokenizer

            _tokenizers[tokenizer] = from_tokenizer(tokenizer)
        return _tokenizers[tokenizer]


__all__ = ["Constraint", "Matcher"]
