"""What an adapter's folder says of conversations: a chat template of its own, a tokenizer that is not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.folder import inside, read_json

_MOST_BYTES = {"chat_template.jinja": 1 << 20, "tokenizer_config.json": 8 << 20, "tokenizer.json": 64 << 20}


def chat_template(folder: Path) -> str | None:
    """The template in ``chat_template.jinja`` or, as older versions of transformers write it, tokenizer_config.json.

    Raises:
        ValueError: a file that is too large, leaves the folder, or does not hold what it should.
    """
    text = _template_file(folder)
    if text is not None:
        return text
    given = _json(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        given = named.get("default")
    if given is not None and not isinstance(given, str):
        raise ValueError(f"expected chat_template in tokenizer_config.json to be text, got {type(given).__name__}")
    return given


def unused_tokenizer(folder: Path, tokenizer: Any) -> str | None:
    """Says that the folder's tokenizer has other tokens than the model's, which are not used; None where it has not."""
    file = _json(folder, "tokenizer.json")
    if not file:
        return None
    try:
        vocab = file["model"]["vocab"]
        own = dict(vocab) if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
        own |= {token["content"]: token["id"] for token in file.get("added_tokens") or ()}
    except (KeyError, TypeError, IndexError):
        raise ValueError("expected tokenizer.json to hold a vocabulary") from None
    differ = len(own.items() ^ tokenizer.get_vocab().items())
    return f"its tokenizer has {differ} tokens that differ from the model's; the model's is used" if differ else None


def _template_file(folder: Path) -> str | None:
    name = "chat_template.jinja"
    if not (folder / name).exists():
        return None
    path = inside(folder, name)
    if path.stat().st_size > _MOST_BYTES[name]:
        raise ValueError(f"expected {name} of at most {_MOST_BYTES[name]} bytes, got {path.stat().st_size}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {name} to hold UTF-8: {error}") from None


def _json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(inside(folder, name), limit=_MOST_BYTES[name]) if (folder / name).exists() else {}
