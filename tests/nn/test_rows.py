"""Which row has which adapter: right for every layout that the calls of a model tell, refused for any other."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.nn import MultiLoRALinear, use_adapters
from lowrank_kernels.nn.rows import RowsUnknownError
from tests.serving.tiny_model import make_model

K = 8


def randomised(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
    return model.eval()


def adapted(model, targets="all-linear", ranks=(4, 3, 2)):
    lk.adapt(model, lk.MultiLoRAConfig(ranks=ranks, target_modules=targets))
    return randomised(model)


def make_layer(ranks=(4, 3, 2)):
    torch.manual_seed(0)
    return randomised(MultiLoRALinear.from_linear(nn.Linear(K, K), ranks))


class Model(nn.Module):
    """Token ids (B, L) -> (B, L, K); ``body`` is what happens in between."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(64, K), body

    def forward(self, input_ids):
        return self.body(self.embedding(input_ids))


class LengthFirst(nn.Module):
    """The layout of XLNet and FSMT inside, and of a Longformer's attention."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x):
        return self.second(self.first(x.transpose(0, 1)).relu().transpose(0, 1))


class Flattening(nn.Module):
    """OPT's feed-forward: rows (B L, K)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(K, K)

    def forward(self, x):
        return self.linear(x.reshape(-1, K)).view(x.shape)


class Experts(nn.Module):
    """Each token to the two experts that it prefers, as linears in a list; and one that all tokens share."""

    def __init__(self, shared=False):
        super().__init__()
        torch.manual_seed(3)
        self.router = nn.Parameter(torch.randn(4, K))
        self.experts = nn.ModuleList(nn.Linear(K, K) for _ in range(4))
        self.shared_expert = nn.Linear(K, K) if shared else None

    def forward(self, x):
        rows = x.reshape(-1, K)
        y = torch.zeros_like(rows) if self.shared_expert is None else self.shared_expert(rows)
        slots = (rows @ self.router.T).topk(2).indices.T
        for i, expert in enumerate(self.experts):
            token = torch.where(slots == i)[1]  # those that prefer it first before those that prefer it second
            y.index_add_(0, token, expert(rows[token]))
        return y.view(x.shape)


def tokens(batch, length):
    return torch.arange(batch * length).reshape(batch, length) * 7 % 61 + 1


def assert_rows_are_right(model, ids, inputs):
    """Each sequence in the batch as alone, where all rows are its adapter's whatever the layout."""
    with use_adapters(ids):
        together = model(inputs)
    for row, i in enumerate(ids):
        with use_adapters([i]):
            alone = model(inputs[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- layouts told apart


@pytest.mark.parametrize("length", [1, 3, 4, 7])
@pytest.mark.parametrize("body", [LengthFirst, Flattening, lambda: nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))])
@torch.no_grad()
def test_a_layout_is_read_from_the_calls_of_a_model(body, length):
    assert_rows_are_right(adapted(Model(body())), [0, 2, -1, 1, 0], tokens(5, length))


@torch.no_grad()
def test_xlnet_is_length_first():
    torch.manual_seed(0)
    model = transformers.XLNetModel(
        transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48)
    )
    adapted(model, ("layer_1", "layer_2"))
    assert_rows_are_right(lambda ids: model(ids).last_hidden_state, [0, 1], tokens(2, 9))
    assert_rows_are_right(lambda ids: model(ids).last_hidden_state, [0, 1], tokens(2, 2))  # known by now


@torch.no_grad()
def test_opt_flattens_its_rows():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    model = adapted(transformers.OPTForCausalLM(config), ("q_proj", "fc1", "fc2"))
    assert_rows_are_right(lambda ids: model(ids).logits, [0, 1, -1], tokens(3, 5))


@torch.no_grad()
def test_rows_that_are_chosen_by_labels_are_refused_even_where_they_are_as_many_as_sequences():
    config = transformers.ModernBertConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        sparse_prediction=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        attn_implementation="eager",
    )
    model = adapted(transformers.ModernBertForMaskedLM(config))
    tokens, labels = torch.randint(3, 64, (2, 5)), torch.full((2, 5), -100)
    with use_adapters([0, 1]):
        model(input_ids=tokens)  # without labels the head gets all rows
        labels[1, 2:4] = 7
        with pytest.raises(RowsUnknownError, match="rows may be those that have labels"):
            model(input_ids=tokens, labels=labels)
        model(input_ids=tokens, labels=tokens)


def test_a_pooler_beside_labels_of_all_tokens_is_no_choice():
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model = adapted(transformers.BertForPreTraining(config), ("dense", "query"))
    tokens = torch.randint(3, 64, (2, 5))
    with torch.no_grad(), use_adapters([0, 1]):
        labelled = model(input_ids=tokens, labels=tokens, next_sentence_label=torch.tensor([0, 1]))
        plain = model(input_ids=tokens)
    assert torch.equal(labelled.seq_relationship_logits, plain.seq_relationship_logits)


@torch.no_grad()
def test_a_pooled_row_is_its_sequences():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = adapted(transformers.BertModel(config), ("query", "dense"))
    assert_rows_are_right(lambda ids: model(ids).pooler_output, [0, 1, -1], tokens(3, 5))


@pytest.mark.parametrize("body", [LengthFirst, lambda: nn.Sequential(nn.Linear(K, K))])
@torch.no_grad()
def test_as_many_tokens_as_sequences_are_refused_until_the_layout_is_known(body):
    model = adapted(Model(body()))
    with use_adapters([0, 1, 2]), pytest.raises(RowsUnknownError, match="both as long as the batch"):
        model(tokens(3, 3))
    assert_rows_are_right(model, [0, 1, 2], tokens(3, 5))
    assert_rows_are_right(model, [0, 1, 2], tokens(3, 3))


@torch.no_grad()
def test_as_many_tokens_as_sequences_with_the_layout_said():
    model = adapted(Model(LengthFirst()))
    model.body.first.row_order, model.body.second.row_order = "positions", "sequences"
    assert_rows_are_right(model, [0, 1, 2], tokens(3, 3))


@torch.no_grad()
def test_one_adapter_for_all_needs_no_layout():
    model, ids = adapted(Model(Experts())), tokens(3, 4)
    with use_adapters([1, 1, 1]):
        together = model(ids)
    for row in range(3):
        with use_adapters([1]):
            torch.testing.assert_close(together[row], model(ids[row : row + 1])[0])


READS_CONTEXT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
"""Whether torch.compile takes a ContextVar's value into a graph; torch 2.10 and 2.12 break the graph there."""


@torch.no_grad()
@pytest.mark.parametrize(
    "whole",
    [False, pytest.param(True, marks=pytest.mark.skipif(not READS_CONTEXT, reason="this torch breaks the graph"))],
)
def test_a_compiled_model_follows_the_ids(whole):
    model = adapted(Model(nn.Sequential(nn.Linear(K, K))))
    compiled = torch.compile(model, fullgraph=whole, backend="eager")
    for ids in ([0, 1, 2], [2, -1, 0], [1, 1, 1]):
        with use_adapters(ids):
            assert torch.equal(compiled(tokens(3, 4)), model(tokens(3, 4)))
    assert torch.equal(compiled(tokens(3, 4)), model(tokens(3, 4)))
    length_first = adapted(Model(LengthFirst()))
    with use_adapters([0, 1, 2]):
        expected = length_first(tokens(3, 4))
        torch.compiler.reset()
        assert torch.equal(torch.compile(length_first, fullgraph=whole, backend="eager")(tokens(3, 4)), expected)
        torch.compiler.reset()
        unknown = adapted(Model(LengthFirst()))
        if not READS_CONTEXT:  # where the graph breaks, calls can be read though the model has never run
            y = torch.compile(unknown, backend="eager")(tokens(3, 4))
            assert torch.equal(y, unknown(tokens(3, 4)))


# ---------------------------------------------------------------------------------------------------------- rows told


@torch.no_grad()
def test_packed_sequences_are_told_by_their_ends():
    model, lengths, ids = adapted(Model(nn.Sequential(nn.Linear(K, K)))), (3, 5, 0, 4), [0, 1, 2, -1]
    packed, ends = tokens(1, 12), [0, 3, 8, 8, 12]
    for given in (ends, torch.tensor(ends, dtype=torch.int32)):
        with use_adapters(ids, cu_seqlens=given):
            y = model(packed)
            flat = model.body[0](model.embedding(packed[0]))
        assert torch.equal(y[0], flat)
        for i, begin, length in zip(ids, ends, lengths, strict=False):
            with use_adapters([i]):
                torch.testing.assert_close(y[:, begin : begin + length], model(packed[:, begin : begin + length]))
    with use_adapters(ids), pytest.raises(RowsUnknownError, match="there are 4 ids for 1 sequences"):
        model(packed)


@torch.no_grad()
def test_ids_of_rows():
    model, inputs = adapted(Model(Flattening())), tokens(2, 3)
    ids = torch.tensor([[0, 1, -1], [2, 2, 0]])
    with use_adapters(ids):
        y = model(inputs)
    expected = model.body.linear(model.embedding(inputs), ids)
    assert torch.equal(y, expected)
    with use_adapters(ids), pytest.raises(RowsUnknownError, match=r"of leading shape \(2, 3\).*got.*made of \(3, 2\)"):
        model(inputs.T)


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (2, 2), (2, 3), (4, 1), (3, 5)])
@torch.no_grad()
def test_routed_experts_are_refused_however_many_rows_they_get(shape, told):
    model = adapted(Model(Experts()))
    ids = torch.arange(shape[0]) % 3
    with use_adapters(ids[:, None].expand(shape) if told else ids):
        for seed in range(5):
            with pytest.raises(RowsUnknownError, match=r"one of several modules|expected x"):
                model((tokens(*shape) + seed) % 64)


@torch.no_grad()
def test_an_expert_that_all_tokens_share_is_no_routed_one():
    model = adapted(Model(Experts(shared=True)), ("shared_expert",))
    assert_rows_are_right(model, [0, 1, -1], tokens(3, 4))


@pytest.mark.parametrize("sizes", [(16, 32), (16, 16), (1, 1), (3, 2)])
@torch.no_grad()
def test_rows_of_pictures_beside_text_are_refused(sizes):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.text = nn.Linear(K, K), Model(nn.Sequential(nn.Linear(K, K)))

        def forward(self, input_ids, pixel_values):
            return self.text(input_ids).sum() + self.tower(pixel_values).sum()

    for patches in (torch.randn(sum(sizes), K), torch.randn(2, max(sizes), K)):
        model = adapted(Both(), ("tower",))
        with use_adapters([0, 1]), pytest.raises(RowsUnknownError):
            model(tokens(2, 7), patches)
        with use_adapters([0, 1]):
            of_patches = torch.arange(patches.shape[:-1].numel()).view(patches.shape[:-1]) % 3
            with use_adapters(of_patches):
                told = model.tower(patches)
        assert torch.equal(told, model.tower(patches, of_patches))


@torch.no_grad()
def test_a_tower_of_pictures_beside_text_is_refused_though_there_are_as_many_as_sequences():
    """Llava: two pictures of one sequence, none of the other."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        ),
        image_token_index=60,
        image_seq_length=4,
    )
    inputs = torch.arange(24).reshape(2, 12)
    inputs[0, 1:9] = 60
    pictures = torch.randn(2, 3, 8, 8)
    for targets, refused in ((r".*vision_tower.*q_proj", True), (("linear_1",), True), (r".*language.*q_proj", False)):
        torch.manual_seed(0)
        model = adapted(transformers.LlavaForConditionalGeneration(config), targets)
        with use_adapters([0, 1]):
            if refused:
                with pytest.raises(RowsUnknownError, match="pictures or sounds"):
                    model(input_ids=inputs, pixel_values=pictures)
            else:
                y = model(input_ids=inputs, pixel_values=pictures).logits
    with use_adapters([1]):
        torch.testing.assert_close(y[1:], model(input_ids=inputs[1:]).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_flattened_images_of_different_sizes_are_refused():
    with use_adapters([0, 1]), pytest.raises(RowsUnknownError, match="there are 2 ids for 48 sequences"):
        make_layer()(torch.randn(48, K))


@pytest.mark.parametrize("body", [Flattening, lambda: nn.Sequential(nn.Linear(K, K))])
@torch.no_grad()
def test_a_batch_put_twice_is_refused_and_right_when_told(body):
    model, ids, inputs = adapted(Model(body())), torch.tensor([0, 1, 2]), tokens(3, 4)
    twice = torch.cat([inputs, inputs])
    with use_adapters(ids):
        once = model(inputs)
        with pytest.raises(RowsUnknownError, match=r"there are 3 ids for 6 sequences.*torch.cat\(\[ids, ids\]\)"):
            model(twice)
    with use_adapters(torch.cat([ids, ids])):
        torch.testing.assert_close(model(twice), torch.cat([once, once]))
    with use_adapters(ids.repeat_interleave(2)):
        torch.testing.assert_close(model(inputs.repeat_interleave(2, dim=0)), once.repeat_interleave(2, dim=0))


@torch.no_grad()
def test_another_number_of_sequences_is_refused():
    model = adapted(Model(LengthFirst()))
    for length in (2, 3, 4):  # as many tokens as ids, more, and twice as many
        with use_adapters([0, 1]), pytest.raises(RowsUnknownError):
            model(tokens(3, length))


@pytest.mark.parametrize("option", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True, "top_k": 1}])
@torch.no_grad()
def test_copies_that_generate_makes_lie_together_and_others_do_not(option):
    model = make_model()
    adapted(model, ("q_proj", "down_proj"))
    inputs, options = tokens(2, 5), {"max_new_tokens": 3, "do_sample": False, **option}
    with use_adapters([0, 1]):
        together = model.generate(inputs, **options)
        with pytest.raises(RowsUnknownError):  # of the shape of the prompts' copies, but not in generate
            model(inputs.repeat(3, 1))
    for row in range(2):
        with use_adapters([row]):
            alone = model.generate(inputs[row : row + 1], **options)
        assert together.view(2, -1, together.shape[1])[row].tolist() == alone.tolist()[: together.shape[0] // 2]


@pytest.mark.parametrize("body", [LengthFirst, Flattening])
@torch.no_grad()
def test_copies_of_a_generation_lie_together_in_every_layout(body):
    model, inputs = adapted(Model(body())), tokens(2, 5)

    def generate(generation_config, ids):
        return model(ids)

    config = transformers.GenerationConfig(num_return_sequences=3, do_sample=True)
    with use_adapters([0, 1]):
        together = generate(config, inputs.repeat_interleave(3, dim=0))
        once = model(inputs)
        with pytest.raises(RowsUnknownError, match="there are 2 ids for 4 sequences"):
            generate(config, inputs.repeat_interleave(2, dim=0))
    torch.testing.assert_close(together, once.repeat_interleave(3, dim=0))


@pytest.mark.parametrize(
    ("order", "shape", "expected"),
    [
        ("sequences", (6,), [0, 0, 0, 1, 1, 1]),
        ("sequences", (2, 3), [0, 0, 0, 1, 1, 1]),
        ("positions", (6,), [0, 1, 0, 1, 0, 1]),
        ("positions", (3, 2), [0, 1, 0, 1, 0, 1]),
        ("sequences", (3,), None),
        ("positions", (3, 2, 1), None),
        ("batch", (2, 3), None),
    ],
)
@torch.no_grad()
def test_an_order_that_is_said_is_trusted(order, shape, expected):
    layer, x = make_layer(), torch.randn(*shape, K)
    layer.row_order = order
    with use_adapters([0, 1]):
        if expected is None:
            with pytest.raises(
                ValueError, match=r"expected x with the rows|expected row_order to be 'sequences', 'pos"
            ):
                nn.Sequential(layer)(x)
        else:
            y = nn.Sequential(layer)(x)
            assert torch.equal(y, layer(x, torch.tensor(expected).view(shape)))


# ----------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    "ids",
    [
        [2, 0, 1],
        (2, 0, 1),
        torch.tensor([2, 0, 1]),
        torch.tensor([2, 0, 1], dtype=torch.uint8),
        torch.tensor([2, 0, 1], dtype=torch.int32),
        torch.tensor([[2, 9], [0, 9], [1, 9]])[:, 0],
        torch.tensor([2, 0, 1], dtype=torch.uint16),
    ],
)
def test_ids_are_any_integers(ids):
    layer, x = make_layer(), torch.randn(3, 4, K)
    with use_adapters(ids):
        y = layer(x)
    assert torch.equal(y, layer(x, torch.tensor([2, 0, 1])[:, None].expand(3, 4)))
    with torch.inference_mode():
        context = use_adapters(ids.clone() if isinstance(ids, torch.Tensor) else ids)
    with context:
        layer(x).sum().backward()
    assert layer.lora_B.grad is not None


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([True, False], TypeError, "use_adapters: expected adapter_ids to be integers, one a sequence or"),
        ([0.0, 1.0], TypeError, "expected adapter_ids to be integers"),
        (torch.tensor([0.0]), TypeError, r"got torch.float32 \(1,\)"),
        (torch.tensor(1), TypeError, r"got torch.int64 \(\)"),
        ("ab", TypeError, "got 'ab'"),
        ([0, None], TypeError, "expected adapter_ids to be integers"),
        ([0, -2], ValueError, "expected adapter_ids from -1, for the base alone, got -2"),
    ],
)
def test_what_is_no_id_is_refused_when_the_context_opens(ids, error, message):
    with pytest.raises(error, match=message), use_adapters(ids):
        pass


@pytest.mark.parametrize("ends", [[0, 3], [1, 3, 5], [0, 4, 3], [0.0, 1.0, 2.0]])
def test_ends_that_are_none_are_refused(ends):
    with pytest.raises((ValueError, TypeError), match="use_adapters: expected cu_seqlens"):
        use_adapters([0, 1], cu_seqlens=ends).__enter__()


@pytest.mark.parametrize("beyond", [3, 2**31, 2**32, 2**32 + 1])
def test_an_id_that_a_layer_has_no_adapter_for_is_refused(beyond):
    with use_adapters([0, beyond]), pytest.raises(ValueError, match=f"from -1 to 2, got 0 to {beyond}"):
        make_layer()(torch.randn(2, 4, K))


def test_layers_with_different_numbers_of_adapters():
    few, many, x = make_layer((4, 3)), make_layer((4, 3, 2)), torch.randn(2, 4, K)
    with use_adapters([1, 0]):
        assert torch.equal(few(x), few(x, torch.tensor([1, 0])[:, None].expand(2, 4)))
        assert torch.equal(many(x), many(x, torch.tensor([1, 0])[:, None].expand(2, 4)))
    with use_adapters([2, 0]):
        many(x)
        with pytest.raises(ValueError, match="from -1 to 1, got 0 to 2"):
            few(x)


@pytest.mark.parametrize("ids", [[], torch.empty(0, dtype=torch.int64)])
def test_an_empty_batch(ids):
    layer = make_layer()
    with use_adapters(ids):
        y = layer(torch.empty(0, 4, K, requires_grad=True))
        assert y.shape == (0, 4, K)
        y.sum().backward()
        with pytest.raises(RowsUnknownError, match="rows of 0 sequences"):
            layer(torch.randn(1, 4, K))
    with use_adapters([0, 1]):  # an expert without tokens, say
        assert layer(torch.empty(0, K)).shape == (0, K)
