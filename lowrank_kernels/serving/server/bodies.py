"""The bodies of requests, as OpenAI's and vLLM's clients send them, and how one is read."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from .errors import ApiError

MOST_ROWS = 128
"""Prompts times ``n`` of one request."""
_MOST_CHARACTERS = 1 << 16  # of a schema, as JSON, or a pattern: what a grammar is made of
_IGNORED = frozenset(
    {
        "logits_processors",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "store",
        "truncate_prompt_tokens",
        "user",
    }
)
"""Fields that change nothing of an answer here, and are taken in ``strict`` reading too."""

Kind = TypeVar("Kind", bound="Body")


class Body(BaseModel):
    """A part of a body. Null counts as not given; an unknown field is ignored, or refused in strict reading."""

    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        said = {key: value for key, value in given.items() if value is not None}
        if (info.context or {}).get("strict"):
            known = {field.alias or name for name, field in cls.model_fields.items()} | _IGNORED
            for key in said.keys() - known:
                raise ApiError(400, f"{key[:100]}: this server has no such field", param=key[:100])
        return said


async def read_body(request: Request, kind: type[Kind], strict: bool) -> Kind:
    """The body of a request, which has to be JSON; it is refused at the first thing that is wrong.

    Raises:
        ApiError: 400.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise ApiError(400, f"expected the header 'content-type: application/json', got {media[:100]!r}")
    raw = await request.body()
    try:
        given = json.loads(raw.decode(), parse_constant=_no_number)
        if b"\\u" in raw:
            json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "expected text, got half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"expected the body to be JSON: {error}") from None
    try:
        return kind.model_validate(given, context={"strict": strict})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    where = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, ": ".join([*filter(None, [".".join(where)]), message]), param=where[0] if where else None)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


# ---------------------------------------------------------------------------------------------------------- sampling


def _texts(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


def _biases(given: Any) -> Any:
    if not isinstance(given, dict) or len(given) > 1024 or not all(k.isdecimal() and len(k) < 10 for k in given):
        raise ValueError("expected at most 1024 numbers, by token id")
    return {int(key): value for key, value in given.items()}


def _short(given: Any) -> Any:
    if len(given if isinstance(given, str) else json.dumps(given)) > _MOST_CHARACTERS:
        raise ValueError(f"expected at most {_MOST_CHARACTERS} characters")
    return given


_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Schema = Annotated[dict[str, Any], BeforeValidator(_short)]
_Pattern = Annotated[str, Field(min_length=1, max_length=_MOST_CHARACTERS)]
_Choices = Annotated[list[_Stop], Field(min_length=1, max_length=256, fail_fast=True)]


class StreamOptions(Body):
    include_usage: bool = False


class NamedSchema(Body):
    name: str = "schema"
    schema_: _Schema = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Body):
    """vLLM's form of what an answer has to be: one of these."""

    json_: Annotated[dict[str, Any] | str, BeforeValidator(_short)] | None = Field(None, alias="json")
    regex: _Pattern | None = None
    choice: _Choices | None = None
    json_object: bool | None = None


class Sampling(Body):
    """What completions and chat have in common."""

    model: str | None = Field(None, min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    min_tokens: int = Field(0, ge=0, lt=2**31)
    temperature: float = Field(1.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1, lt=2**31)
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(1.0, gt=0.0, le=100.0)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100.0, le=100.0)]],
        BeforeValidator(_biases, json_schema_input_type=dict[str, float]),
    ] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[_Stop],
        Field(max_length=16, fail_fast=True),
        BeforeValidator(_texts, json_schema_input_type=str | list[str]),
    ] = Field(default_factory=list)
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=128, fail_fast=True)] = (
        Field(default_factory=list)
    )
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    n: int = Field(1, ge=1, le=MOST_ROWS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[dict[str, Any] | str, BeforeValidator(_short)] | None = None
    guided_regex: _Pattern | None = None
    guided_choice: _Choices | None = None
    use_beam_search: Literal[False] = False

    @property
    def usage_at_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


# ------------------------------------------------------------------------------------------------------- completions


def _prompts(given: Any) -> list[str] | list[list[int]]:
    """The prompts of ``prompt``: a text, token ids, or a list of either."""
    several = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    if len(several) > MOST_ROWS:
        raise ValueError(f"expected at most {MOST_ROWS} prompts")
    for one in several:
        tokens = isinstance(one, list) and bool(one) and all(type(token) is int for token in one)
        if not tokens and not isinstance(one, str):
            raise ValueError("expected a text, token ids, or a list of either, none of them empty")
    return several


class CompletionBody(Sampling):
    prompt: Annotated[
        list[Any],
        BeforeValidator(_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
    ]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=MOST_ROWS)
    suffix: Literal[""] = ""

    @model_validator(mode="before")
    @classmethod
    def _false_is_none(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("logprobs") is False:
            return {key: value for key, value in given.items() if key != "logprobs"}
        return given

    @model_validator(mode="after")
    def _together(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.n:
            raise ApiError(400, f"best_of: expected as many as n={self.n}, got {self.best_of}", param="best_of")
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: expected at least 1, or echo", param="max_tokens")
        if self.stream and self.echo and (self.logprobs is not None or self.max_tokens == 0):
            raise ApiError(400, "stream: cannot have log-probabilities of the prompt", param="stream")
        return self


# -------------------------------------------------------------------------------------------------------------- chat


def _content(given: Any) -> Any:
    """The text of a message: a string, or the parts of a list, one after another."""
    if not isinstance(given, list):
        return given
    texts = []
    for part in given:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            got = f"one of type {kind[:40]!r}" if isinstance(kind, str) else "something else"
            raise ValueError(f"expected text, or a list of parts of type 'text', got {got}")
        texts.append(text)
    return "".join(texts)


class CalledFunction(Body):
    name: str = Field(min_length=1, max_length=64)
    arguments: str


class ToolCall(Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


_Calls = Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)]


class Message(Body):
    """A message of a chat. Parts of its content are joined; role "developer" is "system" to a chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_content, json_schema_input_type=str | list[dict[str, Any]])] = ""
    name: str | None = Field(None, max_length=256)
    tool_calls: _Calls | None = None
    tool_call_id: str | None = Field(None, max_length=256)
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    reasoning_content: Any = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.role == "user" and "content" not in self.model_fields_set:
            raise ValueError("expected content")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it: the arguments of calls are values, not JSON.

        Raises:
            ValueError: arguments that are no JSON object.
        """
        said: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            said["name"] = self.name
        if self.tool_call_id is not None:
            said["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            said["tool_calls"] = [
                call.model_dump() | {"function": {"name": call.function.name, "arguments": _arguments(call)}}
                for call in self.tool_calls
            ]
        return said


def _arguments(call: ToolCall) -> dict[str, Any]:
    try:
        found = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"expected the arguments of a call of {call.function.name!r} to be a JSON object")
    return found


class Function(Body):
    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    description: str = ""
    parameters: _Schema = Field(default_factory=dict)
    strict: bool = False


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str = Field(min_length=1, max_length=64)


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=2048, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    functions: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)
    function_call: Literal["none", "auto"] = "none"
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    @model_validator(mode="after")
    def _together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs", param="top_logprobs")
        if self.max_tokens == 0:
            raise ApiError(400, "max_tokens: expected at least 1", param="max_tokens")
        names = {tool.function.name for tool in self.tools}
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        if (wanted is not None and wanted not in names) or (self.tool_choice == "required" and not names):
            raise ApiError(400, "tool_choice: expected it to be among tools", param="tool_choice")
        return self


# ------------------------------------------------------------------------------------------------- adapters, tokens

_Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\w.:-]+$")]
_Folder = Annotated[str, Field(min_length=1, max_length=512)]


class AdapterBody(Body):
    name: _Name
    folder: _Folder
    pin: bool = False


class LoadLoRABody(Body):
    """vLLM's form of :class:`AdapterBody`; a path is below the folder of adapters, whether absolute or not."""

    lora_name: _Name
    lora_path: _Folder
    load_inplace: bool = False


class UnloadLoRABody(Body):
    lora_name: _Name
    lora_int_id: int | None = None


class TokenizeBody(Body):
    """A text, or messages, to be made tokens."""

    model: str | None = Field(None, min_length=1, max_length=256)
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=2048, fail_fast=True)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] = Field(default_factory=list)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "expected either prompt or messages", param="prompt")
        return self


class DetokenizeBody(Body):
    model: str | None = Field(None, min_length=1, max_length=256)
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=1 << 20, fail_fast=True)]
