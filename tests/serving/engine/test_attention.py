"""Packed rows over models of many kinds: each row as the model alone has it, chunks and windows included."""

import pytest
import torch
import transformers

from lowrank_kernels.serving.engine.attention import PackedModel, RowCache, Span

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS = {
    "llama": (transformers.LlamaConfig, GQA, "sdpa"),
    "llama, eager": (transformers.LlamaConfig, GQA, "eager"),
    "mistral, window": (transformers.MistralConfig, {**GQA, "sliding_window": 6}, "sdpa"),
    "mistral, window, eager": (transformers.MistralConfig, {**GQA, "sliding_window": 6}, "eager"),
    "qwen3": (transformers.Qwen3Config, {**GQA, "head_dim": 16}, "sdpa"),
    "gemma2, both windows and softcap": (
        transformers.Gemma2Config,
        {**GQA, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
        "eager",
    ),
    "gemma3": (transformers.Gemma3TextConfig, {**GQA, "head_dim": 8, "sliding_window": 6}, "sdpa"),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "sdpa",
    ),
    "gpt-neox": (transformers.GPTNeoXConfig, {**SIZES, "max_position_embeddings": 64}, "sdpa"),
    "opt": (
        transformers.OPTConfig,
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "sdpa",
    ),
    "mixtral": (transformers.MixtralConfig, {**GQA, "num_local_experts": 4}, "sdpa"),
    "gpt-oss, sinks": (
        transformers.GptOssConfig,
        {**GQA, "head_dim": 8, "sliding_window": 6, "num_local_experts": 4},
        "eager",
    ),
}
ROWS = [[(5 * i + 3) % 64 for i in range(15)], [7], [(11 * i + 1) % 64 for i in range(9)]]


def make(kind):
    config, settings, attention = KINDS[kind]
    torch.manual_seed(0)
    made = config(**settings, pad_token_id=0)
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_the_models_own(kind):
    model = make(kind)
    with torch.no_grad():
        wanted = [model(input_ids=torch.tensor([row])).logits[0] for row in ROWS]
    packed, caches, found = PackedModel(model), [RowCache(16) for _ in ROWS], [[] for _ in ROWS]
    for begins in ((0, 0, 0), (4, 1, 0), (5, 1, 8), (13, 1, 9)):  # chunks of 4, 1, 8, 2 of one row beside others'
        spans, tokens, whose = [], [], []
        for i, (row, cache, begin) in enumerate(zip(ROWS, caches, begins, strict=True)):
            later = [b[i] for b in ((4, 1, 0), (5, 1, 8), (13, 1, 9)) if b[i] > begin]
            end = later[0] if later else len(row)
            if cache.length == begin < end:
                cache.reserve(end)
                spans.append(Span(cache, end - begin))
                tokens += row[begin:end]
                whose += [i] * (end - begin)
        for i, logits in zip(whose, packed.forward(tokens, spans, range(len(tokens))), strict=True):
            found[i].append(logits)
        for span in spans:
            span.cache.length += span.count
    for logits, own in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.stack(logits), own, rtol=1e-4, atol=1e-5)
    packed.close()


def test_a_row_does_not_feel_the_others_lengths():
    packed = PackedModel(make("llama"))

    def step(*others):
        caches = [RowCache(40) for _ in range(3)]
        tokens, spans = [], []
        for cache, row in zip(caches, (ROWS[2], *others), strict=True):
            cache.reserve(40)
            spans.append(Span(cache, len(row)))
            tokens += row
        packed.forward(tokens, spans, [0])
        return [t for _, kv in sorted(caches[0]._layers.items()) for t in (kv[0][:, :, :9], kv[1][:, :, :9])]

    for one, other in zip(step([1], [2] * 20), step([3] * 20, [4]), strict=True):
        assert torch.equal(one, other)


def test_a_model_that_cannot_be_packed_is_refused():
    model = make("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation 'sdpa' or 'eager', got 'flash_attention_2'"):
        PackedModel(model)
    mamba = transformers.MambaConfig(**{**SIZES, "state_size": 4})
    with pytest.raises(ValueError, match="layers of full or sliding attention, got linear_attention"):
        PackedModel(transformers.AutoModelForCausalLM.from_config(mamba))


def test_a_model_whose_positions_are_its_own_is_refused():
    class Counts(transformers.LlamaForCausalLM):
        def forward(self, *args, position_ids=None, **kwargs):  # counts them by itself, from 0
            return super().forward(*args, **kwargs)

    model = Counts(transformers.LlamaConfig(**GQA)).eval()
    with pytest.raises(ValueError, match="Counts does not give in packed rows what it gives alone"):
        PackedModel(model)
    assert model.config._attn_implementation == "sdpa"
