"""Clients that people have, over HTTP: openai, litellm and langchain, whole answers and streams."""

import pytest

from tests.serving.server.asking import prompt_of
from tests.serving.tiny_model import make_tokenizer

MESSAGES = [{"role": "user", "content": "Who?"}]
RENDERED = "user:Who?|"


@pytest.fixture
def expected(greedy):
    """What an adapter says, of a rendered text."""
    tokenizer = make_tokenizer()

    def text(name, prompt, count):
        tokens = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        return tokenizer.decode(greedy(name, tokens, count))

    return text


def test_openai(url, expected):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()][:2] == ["tiny", "lora"]
        assert client.models.retrieve("dora").parent == "tiny"
        whole = client.completions.create(model="lora", prompt=prompt_of(1), max_tokens=4, temperature=0, logprobs=1)
        assert whole.choices[0].text == expected("lora", prompt_of(1), 4)
        assert len(whole.choices[0].logprobs.token_logprobs) == 4
        with client.completions.create(
            model="lora", prompt=prompt_of(1), max_tokens=4, temperature=0, stream=True
        ) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        asked = {"model": "dora", "messages": MESSAGES, "max_completion_tokens": 5, "temperature": 0}
        chat = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1, seed=1, n=2)
        assert [one.message.content for one in chat.choices] == [expected("dora", RENDERED, 5)] * 2
        assert chat.choices[0].logprobs.content[0].top_logprobs[0].token == chat.choices[0].message.content[0]
        with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == expected("dora", RENDERED, 5) and chunks[-1].usage.completion_tokens == 5
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nobody", messages=MESSAGES)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="lora", prompt="x", temperature=-1)
        assert bad.value.param == "temperature"


def test_langchain(url, expected):
    langchain = pytest.importorskip("langchain_openai")
    options = {"base_url": url, "api_key": "none", "temperature": 0, "max_retries": 0}
    chat = langchain.ChatOpenAI(model="lora", max_tokens=5, **options)
    assert chat.invoke("Who?").content == expected("lora", RENDERED, 5)
    assert "".join(chunk.content for chunk in chat.stream("Who?")) == expected("lora", RENDERED, 5)
    # Which sends every setting that it knows, with its neutral value.
    plain = langchain.OpenAI(model="lora", max_tokens=5, **options)
    assert plain.invoke("Who?") == expected("lora", "Who?", 5)
    assert "".join(plain.stream("Who?")) == expected("lora", "Who?", 5)


def test_litellm(url, expected, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a table of prices when imported
    litellm = pytest.importorskip("litellm")
    for provider in ("openai", "hosted_vllm"):
        asked = {
            "model": f"{provider}/lora",
            "api_base": url,
            "api_key": "none",
            "messages": MESSAGES,
            "max_tokens": 5,
            "temperature": 0,
        }
        assert litellm.completion(**asked).choices[0].message.content == expected("lora", RENDERED, 5)
        chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == expected("lora", RENDERED, 5)
        assert any(getattr(chunk, "usage", None) and chunk.usage.completion_tokens == 5 for chunk in chunks)
    text = litellm.text_completion(
        model="text-completion-openai/lora", api_base=url, api_key="none", prompt="Who?", max_tokens=5, temperature=0
    )
    assert text.choices[0].text == expected("lora", "Who?", 5)
