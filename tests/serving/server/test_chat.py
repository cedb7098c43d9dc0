"""/v1/chat/completions: messages through chat templates, streams, tools, and answers of a given form."""

import json

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from lowrank_kernels.serving import AdapterBank, Engine
from lowrank_kernels.serving.server import create_app
from lowrank_kernels.serving.server.tools import TaggedCalls
from tests.serving.server.asking import CHAT, Client
from tests.serving.tiny_model import make_model, make_tokenizer


def said(client, model="lora", **more):
    reply = client.post("/v1/chat/completions", {"model": model, **CHAT, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def test_a_chat_and_its_stream(client, greedy):
    tokenizer = make_tokenizer()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who?"}]
    asked = {"model": "lora", "messages": messages, "max_completion_tokens": 5, "temperature": 0}
    reply = client.post("/v1/chat/completions", asked).json()
    expected = tokenizer.decode(greedy("lora", tokenizer("system:Be kind.|user:Who?|")["input_ids"], 5))
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert reply["object"] == "chat.completion"
    first, *chunks = client.stream("/v1/chat/completions", asked)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]
    assert {chunk["object"] for chunk in (first, *chunks)} == {"chat.completion.chunk"}


def test_without_max_tokens_a_chat_goes_to_its_end(client):
    reply = client.post(
        "/v1/chat/completions", {"model": "lora", "messages": CHAT["messages"], "temperature": 0}
    ).json()
    assert reply["usage"]["total_tokens"] == 64  # the model's positions; it has no end-of-text token
    assert reply["choices"][0]["finish_reason"] == "length"


def test_log_probabilities(client):
    whole = said(client, logprobs=True, top_logprobs=3)
    content = whole["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == whole["message"]["content"]
    for one in content:
        assert one["bytes"] == list(one["token"].encode()) and one["top_logprobs"][0]["logprob"] == one["logprob"]
        assert len(one["top_logprobs"]) == 3
    chunks = client.stream("/v1/chat/completions", {"model": "lora", **CHAT, "logprobs": True})
    pieces = [one["token"] for c in chunks[1:] for one in c["choices"][0]["logprobs"]["content"]]
    assert pieces == [one["token"] for one in content]


def test_messages_as_clients_send_them(client):
    plain = [
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Who?"},
    ]
    sent = [
        {"role": "developer", "content": "Be kind.", "name": None},
        {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "audio": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "o?"}], "name": "Ann"},
    ]
    more = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False}
    assert said(client, messages=sent, **more) == said(client, messages=plain)


def test_calls_and_their_results_reach_the_template(client, tokenizer):
    tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }},{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}|"
        "{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "Hot?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "heat", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "content": "yes", "tool_call_id": "a"},
    ]
    asked = {"messages": messages, "tools": [TOOL], "model": "lora"}
    tokens = client.post("/tokenize", asked).json()["tokens"]
    assert client.post("/detokenize", {"tokens": tokens}).json()["prompt"] == (
        "heat,user:Hot?|assistant:(heat Rome|tool:yes|"
    )
    messages[1]["tool_calls"][0]["function"]["arguments"] = "[1"
    refused = client.post("/v1/chat/completions", {**CHAT, **asked})
    assert refused.status_code == 400 and "JSON object" in refused.text


TOOL = {
    "type": "function",
    "function": {"name": "heat", "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome"]}}}},
}


@pytest.mark.parametrize("step", [1, 4, 1000])
def test_calls_in_the_known_form_are_told_from_text(step):
    text = 'Let me see. <tool_call>\n{"name": "heat", "arguments": {"city": "Rome"}}\n</tool_call><tool_call>' + (
        '{"name": "now", "arguments": {}}</tool_call>'
    )
    reader, shown = TaggedCalls(), ""
    for at in range(0, len(text), step):
        shown += reader.feed(text[at : at + step])
    rest, calls = reader.end()
    assert (shown, rest) == ("Let me see. ", "")
    assert [call["function"] for call in calls] == [
        {"name": "heat", "arguments": '{"city": "Rome"}'},
        {"name": "now", "arguments": "{}"},
    ]
    for other in ("a < b", "ends in <tool", "<tool_call>{broken</tool_call>", '<tool_call>{"name": 3, "arguments": 1}'):
        reader = TaggedCalls()
        shown = "".join(reader.feed(c) for c in other)
        assert (shown + reader.end()[0], reader.end()[1]) == (other, [])
    assert TaggedCalls.known("<tool_call>") and not TaggedCalls.known("<tool_call><function=")


JSON_TOKENS = ["<pad>", "<end>", *"abcdefghijklmnopqrstuvwxyzRN0123456789-_.:,{}[]\"'?|() \n"]
NO_SPACE = {str(JSON_TOKENS.index(c)): -100 for c in " \n"}
"""A model with random weights would put spaces between the parts of JSON for ever, which is JSON too."""


@pytest.fixture
def json_client(root):
    """A client of a model whose tokens are those of JSON, which grammars can be over."""
    characters = JSON_TOKENS
    spelt = [{" ": "Ġ", "\n": "Ċ"}.get(c, c) for c in characters]
    words = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(spelt)}, [], unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with AdapterBank(make_model()) as bank:
        engine = Engine(bank, tokenizer)
        yield Client(create_app(engine, "tiny", root))
        engine.close(drain=False)


SCHEMA = {"enum": [["a", 7]]}
FORMS = {
    "schema": (
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
            "logit_bias": NO_SPACE,
        },
        lambda text: json.loads(text) == ["a", 7],
    ),
    "guided_json": (
        {"guided_json": {"const": {"b": 1}}, "logit_bias": NO_SPACE},
        lambda text: json.loads(text) == {"b": 1},
    ),
    "regex": ({"guided_regex": "a[0-9]{3}"}, lambda text: text[0] == "a" and text[1:].isdecimal() and len(text) == 4),
    "choice": ({"structured_outputs": {"choice": ["yes (no)", "no"]}}, lambda text: text in ("yes (no)", "no")),
    "structured": ({"structured_outputs": {"json": {"const": 3}}}, lambda text: json.loads(text) == 3),
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_of_a_given_form(json_client, form):
    settings, right = FORMS[form]
    choice = said(json_client, "tiny", max_completion_tokens=None, temperature=1.0, **settings)
    assert choice["finish_reason"] == "stop" and right(choice["message"]["content"]), choice


@pytest.mark.parametrize("wanted", ["required", {"type": "function", "function": {"name": "heat"}}])
def test_a_call_that_is_demanded_is_made(json_client, wanted):
    more = {"tools": [TOOL], "tool_choice": wanted, "max_completion_tokens": None, "logit_bias": NO_SPACE}
    parameters = {"type": "object", "properties": {"city": {"const": "R"}}, "required": ["city"]}
    more["tools"][0]["function"]["parameters"] = {**parameters, "additionalProperties": False}
    choice = said(json_client, "tiny", **more)
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["function"]["name"] == "heat" and json.loads(call["function"]["arguments"]) == {"city": "R"}
    *_, last = json_client.stream("/v1/chat/completions", {"model": "tiny", **CHAT, **more})
    assert last["choices"][0]["delta"]["tool_calls"][0]["function"] == call["function"]
    assert last["choices"][0]["finish_reason"] == "tool_calls"


def test_a_form_that_no_grammar_has_is_refused(json_client):
    for settings in ({"guided_regex": "(?=a)b"}, {"guided_json": {"type": "nothing"}}):
        reply = json_client.post("/v1/chat/completions", {"model": "tiny", **CHAT, **settings})
        assert reply.status_code == 400 and "no grammar" in reply.text, reply.text
