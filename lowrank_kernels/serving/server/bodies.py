"""The bodies of requests. A setting that the server lacks is allowed with the value that asks for nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MAX_CHOICES = 64
_MAX_STOP = 4


class _Body(BaseModel):
    """A body whose unknown fields are refused, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


# Settings of OpenAI's that this server lacks, with the values that ask for nothing. Null is allowed for any of them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "stream_options": (),
    "store": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
# Fields of an answer's message, empty beside its text, which clients send back as part of the conversation.
_OF_AN_ANSWER = ("refusal", "tool_calls", "function_call", "audio", "annotations", "name", "reasoning_content")


def _without_neutral(given: Any) -> Any:
    """The fields of a body, without those that ask for nothing."""
    if not isinstance(given, dict):
        return given

    def asks_for_nothing(key: str, value: Any) -> bool:
        return value is None or any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
            for neutral in _NEUTRAL.get(key, ())
        )

    return {key: value for key, value in given.items() if not asks_for_nothing(key, value)}


class Sampling(_Body):
    """What completions and chat have in common."""

    model: str
    max_tokens: int = Field(16, ge=1)
    temperature: float = Field(1.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=_MAX_STOP)]
        | None
    ) = None
    n: Literal[1] = 1
    stream: Literal[False] = False
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, given: Any) -> Any:
        return _without_neutral(given)

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


_Tokens = Annotated[list[int], Field(min_length=1)]


class CompletionBody(Sampling):
    prompt: (
        str
        | _Tokens
        | Annotated[list[str], Field(min_length=1, max_length=_MAX_CHOICES)]
        | Annotated[list[_Tokens], Field(min_length=1, max_length=_MAX_CHOICES)]
    )


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a chat. ``content`` may be a list of text parts, which are joined; role "developer" is "system"."""

    role: Literal["system", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        said = {key: value for key, value in given.items() if key not in _OF_AN_ANSWER or value not in (None, [], "")}
        if isinstance(said.get("content"), list):
            said["content"] = "".join(TextPart.model_validate(part).text for part in said["content"])
        return said | ({"role": "system"} if said.get("role") == "developer" else {})


class ChatBody(Sampling):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


class AdapterBody(_Body):
    name: str = Field(min_length=1, max_length=128, pattern=r"^[\w.:-]+$")
    folder: str = Field(min_length=1, max_length=512)
    pin: bool = False
