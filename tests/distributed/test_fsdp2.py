"""FSDP2 over adapted models: loss and gradients are those of one process, adapters are gathered, runs resume."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import lowrank_kernels as lk
from tests.distributed.models import IDS, METHODS, as_one_process, blocks_of, loss_of, own_batch, shard, trained
from tests.distributed.two_ranks import on_two_ranks, refuses, whole
from tests.tiny_llama import make_llama

DAILY = ["LoRA", "DoRA", "SMT", "LoRA in blocks", "LoRA of experts", "LoRA over nf4", "several adapters"]


def every_method_trains_as_in_one_process():
    for i, name in enumerate(DAILY):
        steps = 3 if name in ("DoRA", "SMT") else 1  # what a layer keeps could be stale from the second on
        as_one_process(METHODS[name](), shard(METHODS[name](), reshard_after_forward=bool(i % 2)), steps=steps)


def every_other_method_does_and_keeps_weights_or_not():
    for reshard in (True, False):
        for name in METHODS:
            as_one_process(METHODS[name](), shard(METHODS[name](), reshard_after_forward=reshard))


def activations_are_recomputed():
    for name in ("DoRA", "SMT"):
        model = METHODS[name]()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        as_one_process(METHODS[name](), shard(model), steps=1)


def compiled_models_train():
    for name in ("LoRA", "DoRA", "SMT", "SVFT", "LoRA in blocks", "LoRA over nf4"):
        torch._dynamo.reset()
        model = shard(METHODS[name]())
        as_one_process(METHODS[name](), model, call=torch.compile(model, backend="aot_eager"))


def peft_layers_are_accelerated_before_and_after_sharding():
    from peft import LoraConfig, get_peft_model

    def make(dora):
        torch.manual_seed(0)
        settings = {"target_modules": "all-linear", "use_dora": dora, "init_lora_weights": False}
        return get_peft_model(make_llama(), LoraConfig(r=4, **settings)).train()

    def shard_peft(model):
        shard(model.base_model.model)
        return model

    before, after = make(True), shard_peft(make(False))
    for model in (before, after):
        assert len(lk.integrations.peft.accelerate(model).replaced) == 14
    as_one_process(make(True), shard_peft(before), steps=1)
    as_one_process(make(False), after, steps=1)


def adapters_are_gathered():
    for name in ("LoRA with gates", "DoRA of experts", "LaMDA"):
        alone, sharded = METHODS[name](), shard(METHODS[name]())
        folders = [lk.save_adapter(model, tempfile.mkdtemp()) for model in (alone, sharded)]
        expected, found = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], t) for key, t in expected.items())


def what_needs_whole_weights_refuses_shards():
    from lowrank_kernels.optim import BlockAdamW, LoRAPro, factor_groups

    experts = shard(METHODS["DoRA of experts"]()).model.layers[0].mlp.experts
    several, svft = shard(METHODS["several adapters"]()), shard(METHODS["SVFT"]())
    nf4, blocks, lora = shard(METHODS["LoRA over nf4"]()), shard(METHODS["SMT"]()), shard(METHODS["LoRA"]())
    refuses("LoRAExperts.merge_: expected whole weights", experts.merge_)
    for model, name in ((several, "MultiLoRALinear"), (svft, "SVFTLinear"), (blocks, "BlockSparseLinear")):
        refuses(f"{name}.merge_.*sharded; gather the model first", model.model.layers[0].mlp.up_proj.merge_)
    refuses("got a shard; gather", lambda: nf4.model.layers[0].mlp.up_proj.merge_(requantize="nearest"))
    refuses("its weight is sharded; gather the model first; nothing has changed", lk.dequantize_, nf4)
    refuses("factor_groups: expected whole factors", lambda: LoRAPro(factor_groups(lora)))
    refuses("BlockAdamW: expected whole blocks", BlockAdamW, blocks)
    for model in (several, svft, nf4, blocks):
        loss_of(model, own_batch())  # as it was


def vectors_of_velora_are_made_before():
    for config in (lk.LoRAConfig(r=4, velora=4), lk.VeLoRAConfig(velora=4)):
        model = make_llama()
        lk.adapt(model, config)
        refuses("made before the model is sharded", loss_of, shard(model).train(), own_batch())


def codes_that_a_policy_casts_are_refused():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = shard(METHODS["LoRA over fp8"](), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    refuses("expected codes of torch.float8_e4m3fn, got torch.bfloat16.*param_dtype=None", loss_of, model, own_batch())


def factors_start_when_the_weights_are_there():
    """The recipe of the meta device: adapt, shard, allocate, load, start."""
    base = make_llama()
    for config in (lk.LoRAConfig(r=4, gate=True), lk.DoRAConfig(r=4), lk.SMTConfig(selection=blocks_of(base))):
        with torch.device("meta"):
            model = make_llama()
        lk.adapt(model, config)
        refuses("weights at hand", model.model.layers[0].mlp.up_proj.reset_parameters)
        shard(model).to_empty(device="cpu")
        state = {_inside(model, name): t for name, t in base.state_dict().items()}
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
        for name, t in base.named_buffers():
            model.get_buffer(name).copy_(t)
        torch.manual_seed(dist.get_rank())
        for layer in model.modules():
            if hasattr(layer, "base_layer"):
                layer.reset_parameters()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(IDS).logits, base(IDS).logits, rtol=1e-5, atol=1e-5)
            a = whole(next(p for p in model.parameters() if p.requires_grad))
        everyones = [torch.empty_like(a) for _ in range(2)]
        dist.all_gather(everyones, a)
        assert torch.equal(*everyones) and a.any()


def _inside(model, name):
    """A base model's name in the adapted one."""
    owner, _, key = name.rpartition(".")
    try:
        adapted = hasattr(model.get_submodule(owner), "base_layer")
    except AttributeError:
        adapted = False
    return f"{owner}.base_layer.{key}" if adapted else name


def states(model, optimizer):
    trains = StateDictOptions(ignore_frozen_params=True)
    return {
        "model": get_model_state_dict(model, options=trains),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def load(model, optimizer, folder, **options):
    found = states(model, optimizer)
    dcp.load(found, checkpoint_id=folder, **options)
    set_model_state_dict(model, found["model"], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, found["optimizer"])


def step(model, optimizer, ids):
    optimizer.zero_grad()
    loss_of(model, ids).backward()
    optimizer.step()


RESUMED = ("DoRA", "SMT")


def runs_are_saved_and_go_on():
    """Two steps on two ranks, a checkpoint, and a third step, which a resumed run takes alike."""
    place = Path.cwd()
    for name in RESUMED:
        model = shard(METHODS[name]())
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for _ in range(2):
            step(model, optimizer, own_batch())
        dcp.save(states(model, optimizer), checkpoint_id=place / name)
        step(model, optimizer, own_batch())
        torch.save([whole(p.detach()) for p in trained(model)], place / f"{name}.{dist.get_rank()}")
        again = shard(METHODS[name]())
        optimizer = torch.optim.AdamW(trained(again), lr=1e-2)
        load(again, optimizer, place / name)
        step(again, optimizer, own_batch())
        for ours, theirs in zip(trained(again), trained(model), strict=True):
            assert torch.equal(whole(ours), whole(theirs))


CHECKS = [
    every_method_trains_as_in_one_process,
    activations_are_recomputed,
    peft_layers_are_accelerated_before_and_after_sharding,
    adapters_are_gathered,
    what_needs_whole_weights_refuses_shards,
    vectors_of_velora_are_made_before,
    codes_that_a_policy_casts_are_refused,
    factors_start_when_the_weights_are_there,
    runs_are_saved_and_go_on,
]
test_on_two_ranks = on_two_ranks(CHECKS)


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_from_two(tmp_path_factory, name):
    place = test_on_two_ranks.folder(tmp_path_factory)
    model = METHODS[name]()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    load(model, optimizer, place / name, no_dist=True)
    step(model, optimizer, IDS)
    for ours, theirs in zip(trained(model), torch.load(place / f"{name}.0"), strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-3, atol=1e-4)


# every_method_trains_as_in_one_process shows the same of seven methods, activations_are_recomputed without a compiler
test_of_all_methods_on_two_ranks = pytest.mark.nightly(
    on_two_ranks([every_other_method_does_and_keeps_weights_or_not, compiled_models_train], limit=1200)
)
