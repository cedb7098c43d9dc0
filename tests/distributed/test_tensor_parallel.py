"""Tensor parallelism: sharding rules of the ops, and models whose linears are cut, against one process."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import lowrank_kernels as lk
from tests.distributed.models import IDS, METHODS, adapted, as_one_process, loss_of, shard
from tests.distributed.two_ranks import mesh, on_two_ranks, refuses, whole
from tests.tiny_llama import make_llama

R, SUM = Replicate(), Partial()
OPS = {
    "frozen_linear": lambda x, w, a, b, m, gate, bias, **more: lk.frozen_linear(x, w, bias),
    "lora_linear": lambda x, w, a, b, m, gate, bias, **more: lk.lora_linear(x, w, a, b, bias, scaling=0.5, **more),
    "lora_linear, gate": lambda x, w, a, b, m, gate, bias, **more: lk.lora_linear(x, w, a, b, bias, gate=gate),
    "dora_linear": lambda x, w, a, b, m, gate, bias, **more: lk.dora_linear(x, w, a, b, m, bias, scaling=0.5, **more),
}
PLACEMENTS = {  # of x, W, A, B, m, gate, bias
    "whole": (R, R, R, R, R, R, R),
    "rows": (Shard(0), R, R, R, R, R, R),
    "columns of y": (R, Shard(0), R, Shard(0), Shard(0), R, Shard(0)),
    "columns of x": (Shard(2), Shard(1), Shard(1), R, R, R, R),
    "sequence, columns of y": (Shard(1), Shard(0), R, Shard(0), Shard(0), R, Shard(0)),
}
OF_Y = {"whole": R, "rows": Shard(0), "columns of y": Shard(2), "columns of x": SUM, "sequence, columns of y": Shard(2)}


def operands():
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 6, 8), (12, 8), (3, 8), (12, 3), (12,), (3,), (12,)
    found = [torch.randn(size, generator=generator) for size in sizes]
    found[4] = found[4].abs() + 0.5
    return found, torch.randn(4, 6, 12, generator=generator)


def run(op, trains, placements=None, **more):
    """(y, the gradients of what trains, how often data moved in forward)."""
    tensors, grad = operands()
    if placements is not None:
        tensors = [distribute_tensor(t, mesh(), [p]) for t, p in zip(tensors, placements, strict=True)]
        grad = distribute_tensor(grad, mesh(), [R])
    for i in trains:
        tensors[i].requires_grad_()
    with CommDebugMode() as moved:
        y = OPS[op](*tensors, **more)
    (y.redistribute(placements=[R]) * grad if placements is not None else y * grad).sum().backward()
    return y, [t.grad for t in tensors], moved.get_total_counts()


def ops_give_what_one_process_gives():
    """For each set of gradients anew: what is remembered of one must not serve another."""
    for op in OPS:
        for trains in ((0, 2, 3), (0, 2, 3, 4, 5), (0, 2), (0, 3, 6), (0,)):
            want, grads, _ = run(op, trains)
            for name, placements in PLACEMENTS.items():
                y, found, moved = run(op, trains, placements)
                assert y.placements == (OF_Y[name],), (op, name, y.placements)
                once = name.startswith("sequence") or (name == "columns of x" and op == "dora_linear")
                assert moved == once, (op, name, moved)  # x is gathered; N squares are summed
                torch.testing.assert_close(whole(y), want, rtol=1e-5, atol=1e-5)
                for theirs, ours in zip(found, grads, strict=True):
                    assert (theirs is None) == (ours is None), (op, name)
                    if ours is not None:
                        torch.testing.assert_close(whole(theirs), ours, rtol=1e-5, atol=1e-5)


def dropout_draws_the_masks_of_one_process():
    for op in ("lora_linear", "dora_linear"):
        want, grads, _ = run(op, (0, 2, 3), dropout_p=0.4, dropout_seed=7)
        for placements in PLACEMENTS.values():
            y, found, _ = run(op, (0, 2, 3), placements, dropout_p=0.4, dropout_seed=7)
            torch.testing.assert_close(whole(y), want, rtol=1e-5, atol=1e-5)
            for i in (0, 2, 3):
                torch.testing.assert_close(whole(found[i]), grads[i], rtol=1e-5, atol=1e-5)
    torch.manual_seed(dist.get_rank())  # drawn seeds are rank 0's
    y, _, _ = run("lora_linear", (2,), PLACEMENTS["columns of y"], dropout_p=0.4)
    torch.manual_seed(0)
    torch.testing.assert_close(whole(y), run("lora_linear", (2,), dropout_p=0.4)[0], rtol=1e-5, atol=1e-5)


def norms_through_which_gradients_go_are_right():
    tensors, grad = operands()
    alone = [t.requires_grad_() if i in (2, 3, 4) else t for i, t in enumerate(tensors)]
    x, w, a, b, m, _, _ = alone
    (lk.dora_linear(x, w, a, b, m, detach_norm=False) * grad).sum().backward()
    for placements in PLACEMENTS.values():
        cut = [distribute_tensor(t.detach(), mesh(), [p]) for t, p in zip(tensors, placements, strict=True)]
        for i in (2, 3, 4):
            cut[i].requires_grad_()
        y = lk.dora_linear(*cut[:5], detach_norm=False)
        (y.redistribute(placements=[R]) * distribute_tensor(grad, mesh(), [R])).sum().backward()
        for i in (2, 3, 4):
            torch.testing.assert_close(whole(cut[i].grad), alone[i].grad, rtol=1e-4, atol=1e-5)
        norm = lk.dora_weight_norm(*(t.detach() for t in cut[1:4]))
        torch.testing.assert_close(whole(norm), lk.dora_weight_norm(w, a.detach(), b.detach()))


def operands_of_two_kinds_are_refused():
    (x, w, a, b, m, _, _), _ = operands()
    cut = [distribute_tensor(t, mesh(), [R]) for t in (x, w, a, b)]
    by_columns = distribute_tensor(w, mesh(), [Shard(1)])
    refuses("lora_linear: .*got a plain tensor for lora_b", lk.lora_linear, *cut[:3], b, error=TypeError)
    refuses("a plain tensor of shape", lk.dora_linear, cut[0], by_columns, *cut[2:], m, error=TypeError)
    nf4 = lk.weights.NF4Weight.from_dense(torch.randn(64, 64))
    pair = [distribute_tensor(torch.randn(*size), mesh(), [R]) for size in ((2, 64), (3, 64), (64, 3))]
    refuses("got a weight stored as nf4", lk.lora_linear, pair[0], nf4, *pair[1:], error=TypeError)
    blocks, index = torch.randn(1, 16, 16), torch.zeros(1, 2, dtype=torch.int32)
    wide = [distribute_tensor(t, mesh(), [R]) for t in (torch.randn(2, 16), torch.randn(16, 16), blocks, index)]
    refuses("block_sparse_linear: .*no sharding rule", lk.block_sparse_linear, *wide, error=TypeError)


def parallel(name, **settings):
    model = METHODS[name]() if isinstance(name, str) else name()
    torch.manual_seed(dist.get_rank())
    return model, lk.distributed.parallelize(model, mesh(), **settings)


def models_train_as_in_one_process():
    for name in ("LoRA with gates", "DoRA", "LoRA with a bias of B", "LoRA in blocks"):
        model, report = parallel(name)
        assert len(report.replaced) == 14
        as_one_process(METHODS[name](), model, steps=3 if name == "DoRA" else 1, rtol=1e-5, whole_batch=True)
        for p in model.parameters():
            assert p.grad is None or not hasattr(p, "placements") or p.grad.placements == p.placements


def linears_without_adapters_and_other_styles_are_cut_too():
    make = adapted(lk.LoRAConfig(r=4, target_modules=["q_proj", "down_proj"]))
    as_one_process(make(), parallel(make)[0], steps=1, rtol=1e-5, whole_batch=True)
    make = adapted(lk.DoRAConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]))
    gathers, splits = "colwise_gather_output", "rowwise_split_input"
    styles = {"gate_proj": gathers, "up_proj": gathers, "down_proj": splits}
    model, report = parallel(make, plan={f"model.layers.*.mlp.{name}": style for name, style in styles.items()})
    assert [r.name for r in report.replaced][:3] == [f"model.layers.0.mlp.{name}" for name in styles]
    as_one_process(make(), model, steps=1, rtol=1e-5, whole_batch=True)


def the_masks_of_a_model_are_those_of_one_process():
    make = adapted(lk.LoRAConfig(r=4, dropout=0.3))
    model, _ = parallel(make)
    alone = make()
    torch.manual_seed(0)
    want = loss_of(alone, IDS)
    torch.manual_seed(dist.get_rank())
    torch.testing.assert_close(loss_of(model, IDS), want, rtol=1e-6, atol=1e-6)


def models_generate_save_merge_and_are_put_back():
    alone, (model, report) = METHODS["DoRA"]().eval(), parallel("DoRA")
    model.eval()
    tokens = [m.generate(IDS[:2, :4], max_new_tokens=4, do_sample=False) for m in (alone, model)]
    assert torch.equal(*tokens)
    folders = [lk.save_adapter(m, tempfile.mkdtemp()) for m in (alone, model)]
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], t) for k, t in expected.items())
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        want = alone(IDS).logits
        with lk.base_only(model), lk.base_only(alone):
            torch.testing.assert_close(model(IDS).logits, alone(IDS).logits, rtol=1e-5, atol=1e-5)
        mlp.up_proj.merge_()
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
        refuses(r"sharded by \(Shard\(dim=1\),\), not by rows", mlp.down_proj.merge_)
        mlp.up_proj.unmerge_()
        report.undo()
        torch.testing.assert_close(model(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert not any(hasattr(p, "placements") for p in model.parameters())


def layers_between_sequences_keep_tensors_distributed():
    """x cut along the sequence, as torch's SequenceParallel has it, is gathered for columns of y."""
    layer = lk.nn.LoRALinear(nn.Linear(8, 8), r=2)
    nn.init.normal_(layer.lora_B.weight)
    model = nn.Sequential(layer)
    x = operands()[0][0]
    dist.broadcast(layer.base_layer.weight.detach(), 0)
    dist.broadcast(layer.base_layer.bias.detach(), 0)
    for p in (layer.lora_A.weight, layer.lora_B.weight):
        dist.broadcast(p.detach(), 0)
    want = layer(x)
    lk.distributed.parallelize(model, mesh(), {"0": "colwise"})
    y = model(distribute_tensor(x, mesh(), [Shard(1)]))
    assert y.placements == (Shard(2),)
    torch.testing.assert_close(whole(y), want)


def what_cannot_be_cut_is_refused_before_anything_changes():
    for name, message in (
        ("SMT", "got a BlockSparseLinear"),
        ("SVFT", "got a SVFTLinear"),
        ("LaMDA", "got a LaMDALinear"),
        ("several adapters", "got a MultiLoRALinear"),
        ("LoRA over nf4", "got a CodedLinear"),
        ("LoRA with VeLoRA", "without VeLoRA"),
        ("LoRA of experts", "got 'moe_tp_experts'"),
    ):
        refuses(f"{message}.*nothing has changed", parallel, name)
    model = METHODS["LoRA"]()
    cut = lk.distributed.parallelize
    refuses("names linears of the model", cut, model, mesh(), {"up": "colwise"})
    refuses("expected a plan", cut, nn.Sequential(nn.Linear(8, 8)), mesh())
    refuses("N = 9 to be a multiple", cut, nn.Sequential(nn.Linear(8, 9)), mesh(), {"0": "colwise"})
    refuses("num_key_value_heads to be a multiple of 2 ranks, got 1", cut, make_llama_of_one_head(), mesh())
    refuses("one dimension", cut, model, None)
    model.model.layers[1].mlp.up_proj.merge_()
    refuses("layers.1.mlp.up_proj: expected an unmerged layer", cut, model, mesh())
    assert not any(hasattr(p, "placements") for p in model.parameters())
    refuses("sharded already", cut, shard(METHODS["LoRA"]()), mesh())


def make_llama_of_one_head():
    model = make_llama()
    model.config.num_key_value_heads = 1
    return model


def peft_layers_over_weights_that_transformers_cut_are_right():
    """PEFT's own forward of those whose x is cut has no backward."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    if rank == "0":
        make_llama().save_pretrained("base")
    dist.barrier()

    def make(**settings):
        config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained("base", **settings), config)
        for name, p in model.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(sum(map(ord, name)))
                values = 0.2 * torch.randn(p.shape, generator=generator)
                cut = hasattr(p, "placements")
                p.data.copy_(distribute_tensor(values, p.device_mesh, p.placements) if cut else values)
        return model

    alone, model = make(), make(distributed_config=DistributedConfig(tp_size=2))
    for m in (alone, model):
        assert len(lk.integrations.peft.accelerate(m).replaced) == 14
    as_one_process(alone.eval(), model.eval(), steps=1, rtol=1e-5, whole_batch=True, groups=cut_and_whole)
    torch.manual_seed(0)
    want = loss_of(alone.train(), IDS)
    torch.manual_seed(dist.get_rank())
    torch.testing.assert_close(loss_of(model.train(), IDS), want, rtol=1e-5, atol=1e-5)


def cut_and_whole(parameters):
    """Optimizers step DTensors and plain tensors in different groups."""
    cut = [p for p in parameters if hasattr(p, "placements")]
    return [{"params": ps} for ps in (cut, [p for p in parameters if not hasattr(p, "placements")]) if ps]


def parameters_that_stay_whole_train_in_a_group_of_their_own():
    name = "LoRA and a head that trains"
    as_one_process(METHODS[name](), parallel(name)[0], rtol=1e-5, whole_batch=True, groups=cut_and_whole)


def compiled_models_are_right():
    for name in ("LoRA", "DoRA"):
        torch._dynamo.reset()
        model, _ = parallel(name)
        call = torch.compile(model, backend="aot_eager")
        as_one_process(METHODS[name](), model, steps=1, rtol=1e-5, call=call, whole_batch=True)


CHECKS = [
    ops_give_what_one_process_gives,
    dropout_draws_the_masks_of_one_process,
    norms_through_which_gradients_go_are_right,
    operands_of_two_kinds_are_refused,
    models_train_as_in_one_process,
    linears_without_adapters_and_other_styles_are_cut_too,
    the_masks_of_a_model_are_those_of_one_process,
    models_generate_save_merge_and_are_put_back,
    layers_between_sequences_keep_tensors_distributed,
    what_cannot_be_cut_is_refused_before_anything_changes,
    parameters_that_stay_whole_train_in_a_group_of_their_own,
    peft_layers_over_weights_that_transformers_cut_are_right,
]
test_on_two_ranks = on_two_ranks(CHECKS)
# models_train_as_in_one_process shows the same without a compiler
test_of_compiled_models_on_two_ranks = pytest.mark.nightly(on_two_ranks([compiled_models_are_right], limit=1200))
