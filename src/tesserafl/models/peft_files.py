"""Adapters in the peft library's files, and the names that tensors have there and here."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from tesserafl.core.errors import ConfigError, ModelError
from tesserafl.core.params import Params

DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"
"""How the names of factors end in a module with peft's adapters."""


def need_peft() -> None:
    """Raise ConfigError unless the library is installed."""
    # It imports bitsandbytes where that is installed, which then warns of kernels nobody asks for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "model 'lora' needs the library peft: pip install 'tesserafl[huggingface]'"
        ) from error


def read_adapter(folder: Path, rank: int, alpha: float) -> Params:
    """A saved adapter's tensors, by the names that they have in a module with adapters.

    Raises:
        ModelError: there is none, it is of another rank or alpha, or it is scaled otherwise.
    """
    try:
        saved = load_file(folder / "adapter_model.safetensors")
        found = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"model.adapter {folder}: {error}") from error
    if (found.get("r"), found.get("lora_alpha")) != (rank, alpha):
        raise ModelError(
            f"the adapter in {folder} has rank {found.get('r')} and alpha "
            f"{found.get('lora_alpha')}; set model.rank and model.alpha to these (they are "
            f"{rank} and {alpha})"
        )
    if scaling := [key for key in ("use_rslora", "alpha_pattern") if found.get(key)]:
        raise ModelError(
            f"the adapter in {folder} is scaled otherwise than by alpha / rank "
            f"({', '.join(scaling)}); this model cannot start from it"
        )
    return {_own_name(key): value for key, value in saved.items()}


def peft_name(name: str) -> str:
    """Name in a saved adapter of a parameter here."""
    return "base_model.model." + name.removeprefix("model.").replace(".default.weight", ".weight")


def _own_name(key: str) -> str:
    """The inverse of `peft_name`."""
    name = "model." + key.removeprefix("base_model.model.")
    return re.sub(r"(\.lora_[AB])\.weight$", r"\1.default.weight", name)
