"""Calls of functions: what a model has to write, where it must call one, and what it wrote, as calls."""

from __future__ import annotations

import json
import uuid
from typing import Any

from .bodies import ChatBody, NamedTool

_START, _END = "<tool_call>", "</tool_call>"


def call_schema(body: ChatBody) -> dict[str, Any] | None:
    """A JSON schema of the call that ``tool_choice`` demands, {"name": ..., "arguments": ...}; None if of none."""
    if isinstance(body.tool_choice, NamedTool):
        wanted = [tool.function for tool in body.tools if tool.function.name == body.tool_choice.function.name]
    elif body.tool_choice == "required":
        wanted = [tool.function for tool in body.tools]
    else:
        return None
    every = [
        {
            "type": "object",
            "properties": {"name": {"const": one.name}, "arguments": one.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in wanted
    ]
    return every[0] if len(every) == 1 else {"anyOf": every}


class Plain:
    """Text without calls."""

    def feed(self, text: str) -> str:
        """What of the text so far may be shown."""
        return text

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """What was held back: text, and calls."""
        return "", []


class OneCall(Plain):
    """A call alone, as a constraint has it written."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        self._held += text
        return ""

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        call = _call(self._held)
        return ("", [call]) if call is not None else (self._held, [])


class TaggedCalls(Plain):
    """Text, then calls as JSON between ``<tool_call>`` and ``</tool_call>``, as Qwen's and Hermes' templates ask."""

    def __init__(self) -> None:
        self._held = ""

    @staticmethod
    def known(template: str) -> bool:
        """True if a template asks for calls in this form."""
        return _START in template and "<function=" not in template

    def feed(self, text: str) -> str:
        self._held += text
        at = self._held.find(_START)
        if at < 0:  # perhaps its beginning
            at = next(
                (len(self._held) - n for n in range(len(_START) - 1, 0, -1) if self._held.endswith(_START[:n])),
                len(self._held),
            )
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        parts = self._held.split(_START)
        calls = [_call(part.partition(_END)[0]) for part in parts[1:]]
        if not calls or None in calls:
            return self._held, []
        return parts[0], [call for call in calls if call is not None]


def _call(text: str) -> dict[str, Any] | None:
    """A call in OpenAI's form; None for what is none."""
    try:
        said = json.loads(text)
        name, arguments = said["name"], said["arguments"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(name, str):
        return None
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
