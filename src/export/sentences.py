"""The files that sentence-transformers reads: mean pooling, and the length at which it truncates."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from src.common.errors import ConfigError
from src.common.files import write_text
from src.train.weights import Pretrained

AUTO_CLASSES = ("AutoModel", "AutoModelForMaskedLM")
"""Whose folders are encoders of sentences, too."""
FILES = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
POOLING = "1_Pooling"

DEFAULT_MAX_LENGTH = 512
"""BERT's; for a model whose training is not known."""


def trained_length(source: Pretrained) -> int | None:
    """The run's max_seq_len, if the checkpoint holds it: not of a folder, nor a value from the run's environment."""
    length = (source.settings or {}).get("max_seq_len")
    return length if isinstance(length, int) else None


def max_length(source: Pretrained, tokenizer: PreTrainedTokenizerFast, given: int | None) -> int:
    """Tokens at which the tokenizer truncates: ``given``, else the run's max_seq_len, else the tokenizer's own.

    Raises:
        ConfigError: ``given`` has no room for a word, or is more than the positions of Hugging Face's BERT.
    """
    positions = getattr(source.config, "max_position_embeddings", None)  # MosaicBERT has no limit
    if given is not None:
        if given < 3 or given > (positions or given):
            raise ConfigError(f"--max_length: expected 3 to {positions or 'any number'}, got {given}")
        return given
    own = tokenizer.model_max_length
    length = trained_length(source) or (own if own < VERY_LARGE_INTEGER else DEFAULT_MAX_LENGTH)
    return min(length, positions or length)


def is_module_file(path: Path) -> bool:
    """Whether a path is that of a module's file: 1_Pooling/config.json, 2_Dense/model.safetensors."""
    return re.fullmatch(r"\d+_[A-Z]\w*/(config\.json|model\.safetensors)", path.as_posix()) is not None


def write_pooling(source: Path, hidden_size: int, max_length: int, folder: Path) -> None:
    """Add the files to ``folder``. What sentence-transformers saved in ``source`` keeps its modules and prompts.

    The names are those that sentence-transformers 5.7.0 and 6.2.0 both read without a warning.
    """
    if (source / "modules.json").exists():
        for path in (source / "modules.json", source / "config_sentence_transformers.json"):
            if path.exists():
                shutil.copy(path, folder)
        for module in source.glob("[0-9]*_*/"):
            shutil.copytree(module, folder / module.name)
    else:
        types = {"": "Transformer", POOLING: "Pooling"}
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(types.items())
        ]
        _write(folder / "modules.json", modules)
        pooling = {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
        _write(folder / POOLING / "config.json", pooling)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})


def _write(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
