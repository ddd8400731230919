"""Models by name."""

import math
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from src.common.errors import ConfigError
from src.configuration_bert import MosaicBertConfig
from src.hf_bert import HFBert
from src.mosaic_bert import MosaicBert
from src.train import weights
from src.train.config import RunConfig
from src.train.schema import build, check_options


def padded_vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the word embeddings: the tokenizer's entries, up to a multiple of 64, which matrix products like."""
    return math.ceil(len(tokenizer) / 64) * 64


def build_model_config(kind: type, tokenizer: PreTrainedTokenizerFast, options: Mapping[str, Any], path: str) -> Any:
    """A Hugging Face config of ``kind`` from the YAML's options, its vocabulary the tokenizer's."""
    check_options(path, kind.__init__, options, ["self"])
    options = {"vocab_size": padded_vocab_size(tokenizer), "pad_token_id": tokenizer.pad_token_id, **options}
    if options["vocab_size"] < len(tokenizer):
        raise ConfigError(f"{path}.vocab_size: {options['vocab_size']} is less than the tokenizer's {len(tokenizer)}")
    try:
        return kind(**options)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def with_kernels(model_config: dict[str, Any] | None, attention: str, kernels: str) -> dict[str, Any]:
    """``model_config`` with the keys that stand beside it."""
    for name in ("attention", "kernels"):
        if name in (model_config or {}):
            raise ConfigError(f"model.model_config.{name}: it is model.{name}, beside model_config")
    return {**(model_config or {}), "attention": attention, "kernels": kernels}


def mosaic_bert(
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
    model_config: dict[str, Any] | None = None,
    attention: str = "auto",
    kernels: str = "auto",
    gradient_checkpointing: bool = False,
) -> MosaicBert:
    """MosaicBERT; ``model_config`` takes what MosaicBertConfig does; sequences may have any length."""
    options = with_kernels(model_config, attention, kernels)
    config = build_model_config(MosaicBertConfig, tokenizer, options, "model.model_config")
    try:
        return MosaicBert(config, gradient_checkpointing)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def hf_bert(
    tokenizer: PreTrainedTokenizerFast,
    max_seq_len: int,
    model_config: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
) -> HFBert:
    """Hugging Face's BERT; ``model_config`` takes what transformers' BertConfig does."""
    config = build_model_config(transformers.BertConfig, tokenizer, model_config or {}, "model.model_config")
    if max_seq_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_seq_len: {max_seq_len} is more than this model's {config.max_position_embeddings} positions "
            "(model.model_config.max_position_embeddings)"
        )
    return HFBert(config, gradient_checkpointing)


MODELS = {"mosaic_bert": mosaic_bert, "hf_bert": hf_bert}


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> MosaicBert | HFBert:
    """The model, with fresh weights, on the CPU."""
    return build("model", MODELS, config.model, tokenizer=tokenizer, max_seq_len=config.max_seq_len)


def load_pretrained(config: RunConfig, model: MosaicBert | HFBert, tokenizer: PreTrainedTokenizerFast) -> None:
    """Put the weights of ``config.pretrained``, if there is one, into the model."""
    if config.pretrained is None:
        return
    source = weights.read(config.pretrained)
    weights.check_kind(source, type(model.model))
    weights.check_tokenizer(source, tokenizer)
    weights.load_weights(model.model, source)
