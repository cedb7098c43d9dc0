"""Regular expressions from a file, matched in bounded time.

Python's ``re`` tries one way to match after another, and a short pattern can have more ways than it can try in a year.
Here each part of a pattern maps the set of places where it may start to the set of places where it may end, so that
all ways are followed at once. A set of places is an integer with one bit a place: bit i is before character i.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from itertools import takewhile
from typing import Any

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MAX_COST = 20_000
"""Steps that all patterns of a file may take for one name, of ``_NAME_LENGTH`` characters."""
_MAX_LENGTH = 1 << 16
_MAX_DEPTH = 40
_NAME_LENGTH = 128

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda c: c.isalnum() or c == "_",
}
_REFUSED = {
    "GROUPREF": "backreferences",
    "GROUPREF_EXISTS": "conditions",
    "ATOMIC_GROUP": "atomic groups",
    "POSSESSIVE_REPEAT": "possessive repeats",
}

Places = int
Step = Callable[["_Name", Places], Places]


class FilePattern(str):
    """A regular expression that a file holds: matched like one of ``re``, in a number of steps known beforehand.

    It may have what ``re`` has but for backreferences, conditions, flags, atomic groups and possessive repeats.

    Raises:
        ValueError: at construction, for what is no regular expression, or not one of these.
    """

    _step: Step
    _tail: str
    cost: int
    """Steps that a match takes at most, for a name of 128 characters."""

    def __new__(cls, pattern: str) -> FilePattern:
        self = super().__new__(cls, pattern)
        self._step, self.cost, self._tail = _compiled(str(pattern))
        return self

    def __reduce__(self) -> tuple[type[FilePattern], tuple[str]]:
        return FilePattern, (str(self),)

    def fullmatch(self, name: str) -> bool:
        """True if the pattern matches the whole name."""
        return name.endswith(self._tail) and bool(self._step(_name(name), 1) >> len(name))

    def matches_ending(self, name: str) -> bool:
        """True if the pattern matches the whole name, or what follows one of its dots."""
        if not name.endswith(self._tail):
            return False
        places = _name(name)
        return bool(self._step(places, places.starts) >> len(name))


class _Name:
    """A text to match, and at which places of it a character, a class or a word begins."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.every = (1 << len(text)) - 1
        self.end = 1 << len(text)
        self._words: dict[str, Places] = {}
        self._classes: dict[Any, Places] = {}
        self.starts = 1 | self.word(".") << 1

    def word(self, word: str) -> Places:
        if word not in self._words:
            places, at = 0, self.text.find(word)
            while at >= 0:
                places, at = places | 1 << at, self.text.find(word, at + 1)
            self._words[word] = places
        return self._words[word]

    def characters(self, belongs: Callable[[str], bool]) -> Places:
        if belongs not in self._classes:
            self._classes[belongs] = sum(1 << at for at, c in enumerate(self.text) if belongs(c))
        return self._classes[belongs]


_name = lru_cache(maxsize=4096)(_Name)


@lru_cache(maxsize=8192)
def _compiled(pattern: str) -> tuple[Step, int, str]:
    """How to match, in how many steps at most, and the letters that every match ends with."""
    if len(pattern) > _MAX_LENGTH:
        raise ValueError(f"expected a pattern of at most {_MAX_LENGTH} characters, got {len(pattern)}")
    try:
        tree = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"expected a regular expression, got {pattern[:80]!r}: {error}") from None
    try:
        if tree.state.flags & ~re.UNICODE:
            raise _Unsupported("flags such as (?i)")
        step, cost = _sequence(tree, 0)
    except _Unsupported as error:
        raise ValueError(
            f"expected a pattern without {error}, which one of a file may not have, got {pattern[:80]!r}"
        ) from None
    if cost > MAX_COST:
        raise ValueError(
            f"expected a pattern that is matched in {MAX_COST} steps, got one of {cost}: {pattern[:80]!r}; "
            f"write it with fewer repeats inside repeats"
        )
    letters = takewhile(lambda part: part[0].name == "LITERAL", reversed(list(tree)))
    return step, cost, "".join(chr(code) for _, code in letters)[::-1]


class _Unsupported(Exception):
    pass


def _sequence(tree: Any, depth: int) -> tuple[Step, int]:
    if depth > _MAX_DEPTH:
        raise _Unsupported(f"more than {_MAX_DEPTH} groups inside one another")
    parts, word = [], ""
    for op, argument in tree:
        if op.name == "LITERAL":
            word += chr(argument)
            continue
        if word:
            parts.append((_word(word), 1))
            word = ""
        parts.append(_part(op.name, argument, depth))
    if word:
        parts.append((_word(word), 1))
    if len(parts) == 1:
        return parts[0]
    steps = [step for step, _ in parts]

    def sequence(name: _Name, at: Places) -> Places:
        for step in steps:
            if not at:
                break
            at = step(name, at)
        return at

    return sequence, 1 + sum(cost for _, cost in parts)


def _word(word: str) -> Step:
    length = len(word)
    return lambda name, at: (at & name.word(word)) << length


def _part(kind: str, argument: Any, depth: int) -> tuple[Step, int]:
    belongs = _class(kind, argument)
    if belongs is not None:
        return lambda name, at: (at & name.characters(belongs)) << 1, 1
    if kind == "AT":
        where = _position(argument.name)
        return lambda name, at: at & where(name), 1
    if kind == "SUBPATTERN":
        _, added, removed, tree = argument
        if added or removed:
            raise _Unsupported("flags such as (?i:...)")
        return _sequence(tree, depth + 1)
    if kind == "BRANCH":
        return _branch([_sequence(tree, depth + 1) for tree in argument[1]])
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, tree = argument
        return _repeat(least, most, tree, depth)
    if kind in ("ASSERT", "ASSERT_NOT"):
        direction, tree = argument
        return _look(kind == "ASSERT", direction, tree, depth)
    raise _Unsupported(_REFUSED.get(kind, kind.lower()))


def _branch(parts: list[tuple[Step, int]]) -> tuple[Step, int]:
    steps = [step for step, _ in parts]

    def branch(name: _Name, at: Places) -> Places:
        ends = 0
        for step in steps:
            ends |= step(name, at)
        return ends

    return branch, 1 + sum(cost for _, cost in parts)


def _repeat(least: int, most: int, tree: Any, depth: int) -> tuple[Step, int]:
    """The body ``least`` to ``most`` times. More rounds than there are places find nothing new."""
    while len(tree) == 1 and tree[0][0].name == "SUBPATTERN" and not any(tree[0][1][1:3]):
        tree = tree[0][1][3]
    if len(tree) == 1 and (least, most) == (0, _parser.MAXREPEAT):
        belongs = _class(tree[0][0].name, tree[0][1])
        if belongs is not None:

            def run(name: _Name, at: Places) -> Places:
                members = name.characters(belongs)
                return at | (((at & members) + members) ^ members)  # the carry runs on to the first that is not one

            return run, 1
    if len(tree) == 1 and (least, most) == (1, _parser.MAXREPEAT):
        first, rest = _sequence(tree, depth + 1), _repeat(0, most, tree, depth)
        return lambda name, at: rest[0](name, first[0](name, at)), first[1] + rest[1]
    body, cost = _sequence(tree, depth + 1)

    def repeat(name: _Name, at: Places) -> Places:
        rounds = len(name.text) + 1
        for _ in range(min(least, rounds)):
            if not at:
                return 0
            at = body(name, at)
        ends = at
        for _ in range(min(most - least, rounds)):
            if not at:
                break
            at = body(name, at) & ~ends
            ends |= at
        return ends

    return repeat, 4 + cost * min(most, 2 * _NAME_LENGTH)


def _look(wanted: bool, direction: int, tree: Any, depth: int) -> tuple[Step, int]:
    """A lookahead or a lookbehind: keeps the places where its body matches, or those where it does not."""
    body, cost = _sequence(tree, depth + 1)
    back = tree.getwidth()[0] if direction < 0 else 0

    def holds(name: _Name, place: int) -> bool:
        if direction > 0:
            return bool(body(name, 1 << place))
        return place >= back and bool(body(name, 1 << (place - back)) >> place & 1)

    def look(name: _Name, at: Places) -> Places:
        return sum(1 << i for i in range(at.bit_length()) if at >> i & 1 and holds(name, i) == wanted)

    return look, 1 + cost * _NAME_LENGTH


def _position(kind: str) -> Callable[[_Name], Places]:
    if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return lambda name: 1
    if kind == "AT_END_STRING":
        return lambda name: name.end
    if kind == "AT_END":
        return lambda name: name.end | (name.end >> 1 if name.text.endswith("\n") else 0)
    word = _CATEGORIES["WORD"]
    if kind == "AT_BOUNDARY":
        return lambda name: name.characters(word) ^ name.characters(word) << 1
    if kind == "AT_NON_BOUNDARY":
        return lambda name: (name.every | name.end) & ~(name.characters(word) ^ name.characters(word) << 1)
    raise _Unsupported(kind.lower())


def _class(kind: str, argument: Any) -> Callable[[str], bool] | None:
    """Which characters a part takes that takes exactly one; None for another part."""
    if kind == "LITERAL":
        return lambda c: ord(c) == argument
    if kind == "NOT_LITERAL":
        return lambda c: ord(c) != argument
    if kind == "ANY":
        return _any
    if kind != "IN":
        return None
    inverted = argument[0][0].name == "NEGATE"
    members = [_member(op.name, value) for op, value in argument[inverted:]]
    return lambda c: any(member(c) for member in members) != inverted


def _any(c: str) -> bool:
    return c != "\n"


def _member(kind: str, argument: Any) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return lambda c: ord(c) == argument
    if kind == "RANGE":
        low, high = argument
        return lambda c: low <= ord(c) <= high
    if kind == "CATEGORY":
        inverted, category = "_NOT_" in argument.name, _CATEGORIES[argument.name.rpartition("_")[2]]
        return lambda c: category(c) != inverted
    raise _Unsupported(kind.lower())
