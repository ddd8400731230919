"""The kinds of models that a YAML can name, for pretraining and fine-tuning."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

from src.common.errors import ConfigError, first_line
from src.configuration_bert import MosaicBertConfig
from src.data.tokenizer import vocab_size
from src.hf_bert import HFBert
from src.mosaic_bert import MosaicBert
from src.train.config import RunConfig
from src.train.schema import ILL_TYPED, Component, build, check_options


@dataclass(frozen=True)
class ModelOptions:
    """Options of ``model`` in a YAML; Hugging Face's BERT takes these."""

    model_config: dict[str, Any] | None = None
    """Arguments of the Hugging Face config."""
    gradient_checkpointing: bool = False
    """Less memory for about a third more time."""


def mosaic_bert(
    model_config: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    attention: str = "auto",
    kernels: str = "auto",
) -> ModelOptions:
    """The options of MosaicBERT: also the implementations, which its config holds."""
    for name in ("attention", "kernels"):
        if name in (model_config or {}):
            raise ConfigError(f"model.model_config.{name}: it is model.{name}, next to model_config")
    return ModelOptions({**(model_config or {}), "attention": attention, "kernels": kernels}, gradient_checkpointing)


@dataclass(frozen=True)
class ModelKind:
    """One kind of model."""

    options: Callable[..., ModelOptions]
    """Takes what the YAML may set."""
    config_class: type[MosaicBertConfig] | type[transformers.BertConfig]
    """Its Hugging Face config."""
    pretraining: Callable[[Any, bool], MosaicBert | HFBert]
    """The ComposerModel for pretraining, from a config and ``gradient_checkpointing``."""


KINDS = {
    "mosaic_bert": ModelKind(mosaic_bert, MosaicBertConfig, MosaicBert),
    "hf_bert": ModelKind(ModelOptions, transformers.BertConfig, HFBert),
}
"""By name in the YAML."""


def read_options(component: Component) -> ModelOptions:
    """The options of ``model``; raises ConfigError for an unknown name or option, or an ill-typed ``model_config``."""
    given = component.options.get("model_config")
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"model.model_config: expected keys and values, got {given!r}")
    return build("model", {name: kind.options for name, kind in KINDS.items()}, component)


def padded_vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the word embeddings: the tokenizer's size, rounded up to a multiple of 64 for fast matrix products."""
    return math.ceil(vocab_size(tokenizer) / 64) * 64


def check_shape(kind: ModelKind, given: dict[str, Any], texts: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Refuse unknown and ill-typed arguments of the Hugging Face config; ``texts``: see ``check_options``."""
    check_options("model.model_config", kind.config_class.__init__, given, ["self"], interpolations=texts)


def build_config(kind: ModelKind, options: ModelOptions, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The Hugging Face config of a model with new weights; its vocabulary is the tokenizer's."""
    path, given = "model.model_config", options.model_config or {}
    check_shape(kind, given)
    given = {"vocab_size": padded_vocab_size(tokenizer), "pad_token_id": tokenizer.pad_token_id, **given}
    if given["vocab_size"] < (size := vocab_size(tokenizer)):
        raise ConfigError(f"{path}.vocab_size: expected at least the tokenizer's {size}, got {given['vocab_size']}")
    try:
        return kind.config_class(**given)
    except (ValueError, *ILL_TYPED) as error:
        raise ConfigError(f"{path}: {error}") from error


def check_positions(model_config: Any, max_seq_len: int) -> None:
    """Refuse sequences that are longer than the model's learned positions; MosaicBERT has none."""
    positions = getattr(model_config, "max_position_embeddings", max_seq_len)
    if max_seq_len > positions:
        raise ConfigError(
            f"max_seq_len: {max_seq_len} is more than the model's {positions} positions "
            "(model.model_config.max_position_embeddings)"
        )


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> MosaicBert | HFBert:
    """The model for pretraining, with new weights, on the CPU."""
    options, kind = read_options(config.model), KINDS[config.model.name]
    model_config = build_config(kind, options, tokenizer)
    check_positions(model_config, config.max_seq_len)
    try:
        return kind.pretraining(model_config, options.gradient_checkpointing)
    except (ValueError, RuntimeError, *ILL_TYPED) as error:  # RuntimeError: torch cannot allocate the weights
        raise ConfigError(f"model: {first_line(error)}") from error
