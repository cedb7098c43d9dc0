"""The small files of tests/adapters/files, made by the engines' own tools, each in its engine's environment.

python benchmarks/engines/fixtures.py peft             (PEFT's: the adapter that the others are made of)
python benchmarks/engines/fixtures.py llama_cpp SOURCE (SOURCE: the folder of llama.cpp's converters)
python benchmarks/engines/fixtures.py mlx | lycoris | diffusers | onnx
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FILES = Path(__file__).resolve().parents[2] / "tests" / "adapters" / "files"
BASE = FILES / "base"
PREFIX = "base_model.model."
SCALE = 5 / 3


def peft() -> None:
    """A tiny Llama's config, and an adapter of it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    model = get_peft_model(
        LlamaForCausalLM(config()),
        LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(str(FILES / "peft"))
    (FILES / "peft" / "README.md").unlink(missing_ok=True)
    config().save_pretrained(BASE)
    assert torch.is_tensor(next(model.parameters()))


def config():
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
    )


def factors():
    """{path: (A, B)} as NumPy arrays."""
    from safetensors.numpy import load_file

    tensors = load_file(FILES / "peft" / "adapter_model.safetensors")
    paths = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors})
    return {p: tuple(tensors[f"{PREFIX}{p}.lora_{k}.weight"] for k in "AB") for p in paths}


def llama_cpp() -> None:
    script = Path(sys.argv[2]) / "convert_lora_to_gguf.py"
    with tempfile.TemporaryDirectory() as folder:
        from transformers import LlamaForCausalLM

        LlamaForCausalLM(config()).save_pretrained(folder)
        words = [sys.executable, script, "--base", folder, "--outtype", "f32", "--outfile", FILES / "llama_cpp.gguf"]
        subprocess.run([*words, FILES / "peft"], check=True)


def mlx() -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import save_config

    model = Model(
        ModelArgs("llama", 16, 1, 24, 2, 1e-6, 16, head_dim=8, num_key_value_heads=1, tie_word_embeddings=False)
    )
    model.freeze()
    keys = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
    parameters = {"rank": 3, "scale": SCALE, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 1, parameters)
    pairs = [(f"{path}.lora_{k}", t) for path, pair in factors().items() for k, t in zip("ab", pair, strict=True)]
    own = {name: mx.array(t.T.copy()) for name, t in pairs}
    model.update(tree_unflatten(list(own.items())))
    (FILES / "mlx").mkdir(exist_ok=True)
    mx.save_safetensors(str(FILES / "mlx" / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    said = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    save_config(said, FILES / "mlx" / "adapter_config.json")


def lycoris() -> None:
    import torch
    from lycoris import LycorisNetwork, create_lycoris

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.to_out = torch.nn.Linear(16, 16), torch.nn.Linear(24, 16)

    torch.manual_seed(0)
    model = torch.nn.Module()
    model.down_blocks = torch.nn.ModuleList([Block()])
    LycorisNetwork.apply_preset({"target_name": [".*to_.*"]})
    network = create_lycoris(model, 1.0, linear_dim=3, linear_alpha=5, algo="lora", dora_wd=True)
    network.apply_to()
    for p in network.parameters():
        torch.nn.init.normal_(p)
    network.save_weights(str(FILES / "lycoris.safetensors"), None, {})


def diffusers() -> None:
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    model = UNet2DConditionModel(
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    settings = {"alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_k": 7}, "use_rslora": True}
    model.add_adapter(
        LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k"], init_lora_weights=False, **settings)
    )
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=get_peft_model_state_dict(model), **_collate_lora_metadata({"unet": model})
        )
        shutil.copy(Path(folder) / "pytorch_lora_weights.safetensors", FILES / "diffusers.safetensors")
    assert torch.is_tensor(next(model.parameters()))


def onnx() -> None:
    import numpy as np
    import onnxruntime

    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    named = {}
    for path, (a, b) in factors().items():
        named[f"{path}.lora_A.weight"] = np.ascontiguousarray(a.T)
        named[f"{path}.lora_B.weight"] = np.ascontiguousarray(b.T * np.float32(2.0))
    made.set_parameters({k: onnxruntime.OrtValue.ortvalue_from_numpy(t) for k, t in named.items()})
    made.export_adapter(str(FILES / "onnxruntime.onnx_adapter"))


if __name__ == "__main__":
    {f.__name__: f for f in (peft, llama_cpp, mlx, lycoris, diffusers, onnx)}[sys.argv[1]]()
