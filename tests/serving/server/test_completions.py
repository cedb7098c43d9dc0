"""/v1/completions: each row its adapter's, what OpenAI and vLLM let a request say, whole or as a stream."""

import pytest
import torch

from tests.serving.server.asking import body, prompt_of
from tests.serving.tiny_model import make_tokenizer

NAMES = ["lora", None, "dora", "patterns", "bias", None, "rslora", "everywhere"]


def test_requests_for_different_adapters_are_each_its_own(client, greedy):
    replies = client.all(*(("POST", "/v1/completions", {"json": body(n, i)}) for i, n in enumerate(NAMES)))
    tokenizer = make_tokenizer()
    for row, (name, reply) in enumerate(zip(NAMES, replies, strict=True)):
        assert reply.status_code == 200, reply.text
        said = reply.json()
        expected = tokenizer.decode(greedy(name, prompt_of(row), 3 + row), skip_special_tokens=True)
        assert said["choices"][0]["text"] == expected, name
        assert said["choices"][0]["finish_reason"] == "length" and said["model"] == (name or "tiny")
        assert said["usage"] == {
            "prompt_tokens": 3 + row,
            "completion_tokens": 3 + row,
            "total_tokens": 6 + 2 * row,
        }


def test_several_prompts_and_several_rows_of_each(client, greedy):
    tokenizer = make_tokenizer()
    said = client.post("/v1/completions", body("dora", 0, prompt=["Hello there", "bye"], n=2)).json()
    assert [choice["index"] for choice in said["choices"]] == [0, 1, 2, 3]
    for choice, text in zip(said["choices"], ("Hello there", "Hello there", "bye", "bye"), strict=True):
        assert choice["text"] == tokenizer.decode(greedy("dora", tokenizer(text)["input_ids"], 3))
    drawn = client.post("/v1/completions", body("dora", 4, n=4, temperature=1.0, seed=7)).json()["choices"]
    assert len({choice["text"] for choice in drawn}) > 1
    again = client.post("/v1/completions", body("dora", 4, n=4, temperature=1.0, seed=7)).json()["choices"]
    assert drawn == again


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = body("lora", 5, prompt=[prompt_of(5), prompt_of(2)], n=2)
    whole = client.post("/v1/completions", asked).json()
    *chunks, last = client.stream("/v1/completions", {**asked, "stream_options": {"include_usage": True}})
    texts, reasons = [""] * 4, [None] * 4
    for chunk in chunks:
        assert chunk["object"] == "text_completion" and chunk["usage"] is None
        assert (chunk["id"], chunk["model"]) == (last["id"], "lora")
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        assert reasons[choice["index"]] is None
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]] and reasons == ["length"] * 4
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert len(chunks) > 4
    assert all("usage" not in chunk for chunk in client.stream("/v1/completions", body("lora", 1)))


def test_log_probabilities_of_prompt_and_answer(client, alone):
    prompt, count = prompt_of(4), 4
    asked = body("bias", 4, max_tokens=count, logprobs=2, echo=True)
    choice = client.post("/v1/completions", asked).json()["choices"][0]
    tokenizer = make_tokenizer()
    tokens = tokenizer(choice["text"])["input_ids"]
    assert tokens[: len(prompt)] == prompt and len(tokens) == len(prompt) + count
    expected = alone("bias", torch.tensor([tokens]))[0].log_softmax(-1)
    said = choice["logprobs"]
    assert said["tokens"] == [tokenizer.decode([token]) for token in tokens]
    assert said["text_offset"] == list(range(len(tokens)))
    assert said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
    for i, token in enumerate(tokens[1:], 1):
        assert said["token_logprobs"][i] == pytest.approx(float(expected[i - 1, token]), abs=1e-4)
        best, at = expected[i - 1].max(0)
        assert said["top_logprobs"][i][tokenizer.decode([int(at)])] == pytest.approx(float(best), abs=1e-4)
        assert len(said["top_logprobs"][i]) in (2, 3)
    of_prompt = client.post("/v1/completions", {**asked, "max_tokens": 0}).json()
    assert of_prompt["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(
        said["token_logprobs"][: len(prompt)], abs=1e-4
    )
    assert of_prompt["choices"][0]["text"] == tokenizer.decode(prompt) and of_prompt["usage"]["completion_tokens"] == 0
    streamed = client.stream("/v1/completions", {**asked, "echo": False})
    pieces = [value for chunk in streamed for value in chunk["choices"][0]["logprobs"]["token_logprobs"]]
    assert pieces == pytest.approx(said["token_logprobs"][len(prompt) :], abs=1e-4)


def test_a_stop_text_ends_a_row(client, greedy):
    whole = make_tokenizer().decode(greedy("lora", prompt_of(2), 12))
    stop = whole[4:6]
    asked = body("lora", 2, max_tokens=12, stop=[stop, "\n\n\n\n"])
    choice = client.post("/v1/completions", asked).json()["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert "".join(c["choices"][0]["text"] for c in client.stream("/v1/completions", asked)) == choice["text"]
    kept = client.post("/v1/completions", {**asked, "include_stop_str_in_output": True}).json()["choices"][0]
    assert kept["text"] == whole[: whole.index(stop)] + stop


def test_settings_reach_the_sampler(client, greedy):
    expected = greedy("lora", prompt_of(1), 4)
    for settings in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"logit_bias": {str(expected[0]): 100}}):
        asked = body("lora", 1, temperature=1.0, **settings)
        text = client.post("/v1/completions", asked).json()["choices"][0]["text"]
        assert text[0] == make_tokenizer().decode(expected[:1]), settings
    for settings in (
        {"stop_token_ids": [expected[1]]},
        {"logit_bias": {str(expected[1]): -100}},
        {"max_tokens": 40, "presence_penalty": 2, "frequency_penalty": 2.0, "repetition_penalty": 5.0},
    ):
        plain = body("lora", 1, max_tokens=settings.get("max_tokens", 4))
        texts = [client.post("/v1/completions", b).json()["choices"][0]["text"] for b in (plain, {**plain, **settings})]
        assert texts[0] != texts[1], settings


NEUTRAL = {
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logprobs": None,
    "echo": False,
    "best_of": 1,
    "n": 1,
    "suffix": None,
    "logit_bias": {},
    "seed": None,
    "stop": None,
    "user": "someone",
    "top_p": 1,
    "top_k": -1,
    "stream": False,
    "stream_options": None,
    "response_format": {"type": "text"},
}


def test_neutral_values_null_and_unknown_fields_are_taken(client):
    plain = client.post("/v1/completions", body("lora", 1)).json()
    for more in (NEUTRAL, {"temperature": 1e-7}, {"no_such_field": 1}):
        assert client.post("/v1/completions", body("lora", 1, **more)).json()["choices"] == plain["choices"]
    everything = {"max_tokens": None, "temperature": None, "n": None, "stream": None, "model": None}
    assert client.post("/v1/completions", body("lora", 1, **everything)).json()["usage"]["completion_tokens"] == 16
