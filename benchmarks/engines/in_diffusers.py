"""In the environment of diffusers, beside this package: a tiny UNet with an adapter of PEFT's, here and there."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import peft
import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import lowrank_kernels as lk


def made():
    """(model, its inputs)."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 8))


@torch.no_grad()
def outputs(folder, case):
    """(this package's, diffusers') of one adapter."""
    model, inputs = made()
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**case["settings"]))
    for key, p in adapted.named_parameters():
        if "lora_B" in key:
            p.copy_(torch.randn_like(p) * 0.05)
        elif "magnitude" in key:
            p.mul_(0.8 + 0.4 * torch.rand_like(p))
    source = folder / case["name"]
    adapted.save_pretrained(str(source))
    model, _ = made()
    lk.load_adapter(model, source)
    ours = model(*inputs).sample
    to, fault = case["to"], case["fault"]
    target = folder / f"{case['name']}.safetensors"
    adapter = lk.adapters.read(source)
    if fault:
        wrong = {path: f._replace(scaling=f.scaling * f.rank**-0.5) for path, f in adapter.modules.items()}
        adapter = lk.adapters.Adapter(wrong)
    lk.adapters.convert(adapter, target, to=to.split()[0], portable=to != "diffusers")
    model, _ = made()
    if to == "diffusers":  # without use_safetensors, the settings in the header are not read, and s is 1
        model.load_lora_adapter(str(target), prefix="unet", use_safetensors=True)
    elif to == "diffusers portable":
        model.load_lora_adapter(str(target), prefix="unet")
    else:
        from diffusers.loaders import StableDiffusionLoraLoaderMixin

        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(target), unet_config=model.config)[:2]
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, network_alphas=alphas, unet=model)
    return ours.numpy(), model(*inputs).sample.numpy()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    said = {"versions": {"diffusers": version("diffusers"), "peft": version("peft")}, "errors": {}}
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            ours, theirs = outputs(folder, case)
            np.save(folder / f"{case['name']}.ours.npy", ours)
            np.save(folder / f"{case['name']}.theirs.npy", theirs)
        except Exception as error:
            said["errors"][case["name"]] = f"{type(error).__name__}: {error}"
    (folder / "said.json").write_text(json.dumps(said))
