"""Load pretrained weights into a model, with strict names and shapes. No code in the files runs.

A path is one of
    runs/mine/checkpoints, or a file in it    checkpoints of main.py
    a folder with config.json and weights     what export_hf.py or save_pretrained wrote, or a published MosaicBERT
                                              (model_type ``bert`` with ``alibi_starting_size``)
    a folder of Hugging Face's BERT           for transformers' own classes only

Missing and unexpected weights are errors, except those in ``NEWLY_INITIALISED`` and ``DROPPED``. Of tied weights, one
name is enough.
"""

import inspect
import json
import logging
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import transformers
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src.common.errors import CheckpointError, ConfigError, first_line
from src.configuration_bert import MosaicBertConfig
from src.data import tokenizer as tokenizers
from src.hf_bert import HFBert
from src.mosaic_bert import MosaicBert
from src.train import checkpoint, yaml12
from src.train.config import RunConfig
from src.train.models import KINDS
from src.train.schema import ILL_TYPED, check_options, nearest
from src.train.yaml12 import is_within

log = logging.getLogger(__name__)

CLASSIFIERS = ("classifier.", "qa_outputs.")
"""Heads of fine-tuned models."""
NEWLY_INITIALISED = ("bert.pooler.", *CLASSIFIERS)
"""Heads that pretraining does not train; newly initialised if the file has no part of them."""
DROPPED = (*NEWLY_INITIALISED, "cls.", "bert.embeddings.position_ids")
"""Weights that a model may lack: heads, and a buffer of older versions of transformers."""
SHAPELESS_SETTINGS = ("num_attention_heads", "layer_norm_eps")
"""Settings that change the computation but no tensor shape; compared explicitly."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in a Hugging Face folder; the first that exists is read."""
WORDS = "bert.embeddings.word_embeddings.weight"
MOST_NAMES = 12
"""Weights that an error lists; further ones are counted."""

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Pretrained:
    """Weights and their config, as read from a checkpoint or a Hugging Face folder."""

    path: Path
    """The checkpoint's file, or the Hugging Face folder."""
    config: MosaicBertConfig | transformers.BertConfig
    """Shape of the model."""
    state: dict[str, Tensor]
    """Weights by name; the encoder's begin with ``bert.``, as in BertForMaskedLM."""
    settings: dict[str, Any] | None
    """Settings of the run that wrote the checkpoint (``resume.ResumeCheck``); None for a Hugging Face folder."""

    @property
    def tokenizer_name(self) -> str | None:
        """Folder or Hub name of the tokenizer, if it is known. Earlier versions only wrote the name, to config.yaml."""
        own = self.path if self.settings is None else self.path.with_name(checkpoint.TOKENIZER)
        if any((own / name).exists() for name in ("tokenizer.json", "vocab.txt")):
            return str(own)
        config = self.path.with_name("config.yaml")
        if self.settings is None or not config.exists():
            return None
        try:
            name = yaml12.load(config.read_text())["tokenizer_name"]
        except (yaml.YAMLError, OSError, ValueError, *ILL_TYPED) as error:
            raise CheckpointError(f"{config}: tokenizer_name cannot be read ({first_line(error)})") from None
        if not isinstance(name, str) or "${" in name:  # not this machine's environment
            raise CheckpointError(f"{config}: tokenizer_name: expected a name, got {name!r}; name the tokenizer")
        return name


def read(path: str | Path) -> Pretrained:
    """The weights of a checkpoint or a Hugging Face folder.

    Raises:
        CheckpointError: there is neither at ``path``; or it is damaged, holds more than data, or is of another kind.
    """
    path, settings = Path(path), None
    latest = path / checkpoint.LATEST.format(rank=0)
    if (path / "config.json").exists():
        config_class, options, weights = _read_folder(path)
    elif path.is_file() or latest.exists():
        path = path if path.is_file() else latest
        config_class, options, weights, settings = _read_checkpoint(path)
    elif path.exists():
        raise CheckpointError(f"{path}: this folder has neither {latest.name} nor a Hugging Face model (config.json)")
    else:
        raise CheckpointError(f"{path}: no such file or folder")
    takes = inspect.signature(config_class.__init__).parameters
    try:
        check_options("config", config_class.__init__, {k: v for k, v in options.items() if k in takes}, ["self"])
        return Pretrained(path, config_class(**options), weights, settings)
    except (ValueError, ArithmeticError, *ILL_TYPED) as error:
        raise CheckpointError(f"{path}: the model's {error}") from None


def _read_checkpoint(path: Path) -> tuple[type, dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Class and options of the model's config, weights, and the run's settings."""
    state = checkpoint.read(path)
    settings = state["callbacks"].get("ResumeCheck", {})
    hidden = [name for name, value in settings.items() if is_within(name, "model") and yaml12.is_stored(value)]
    if hidden:  # of an earlier version
        raise CheckpointError(
            f"{path}: {hidden[0]} came from the environment, and is not in the checkpoint. Resume its run with this "
            "version, whose checkpoints hold it"
        )
    kind = KINDS.get(str(settings.get("model.name")))
    if kind is None:
        raise CheckpointError(f"{path}: not a checkpoint of main.py: it does not say which model it is of")
    weights = {name.removeprefix("model."): tensor for name, tensor in state["model"].items()}
    prefix = "model.model_config."
    options = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
    if WORDS not in weights:
        raise CheckpointError(f"{path}: not a checkpoint of main.py: it has no {WORDS}")
    options["vocab_size"] = len(weights[WORDS])
    return kind.config_class, options, weights, settings


def _read_folder(folder: Path) -> tuple[type, dict[str, Any], dict[str, Tensor]]:
    """Class and options of the model's config, and weights."""
    try:
        options = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {first_line(error)}") from None
    if not isinstance(options, dict):
        raise CheckpointError(f"{folder / 'config.json'}: expected keys and values, got {type(options).__name__}")
    model_type = options.get("model_type")
    if model_type not in ("mosaic_bert", "bert"):
        raise CheckpointError(f"{folder}: model_type: expected mosaic_bert or bert, got {model_type!r}")
    ours = model_type == "mosaic_bert" or "alibi_starting_size" in options
    kind = KINDS["mosaic_bert" if ours else "hf_bert"].config_class
    if ours:
        if options.get("hidden_act", "gelu") != "gelu":
            raise CheckpointError(f"{folder}: hidden_act: expected gelu, got {options['hidden_act']!r}")
        # A published config has more settings, which have no effect: lengths, positions, names of its own classes.
        own = ("id2label", "label2id", "problem_type", "architectures", "finetuned")
        takes = {*inspect.signature(MosaicBertConfig).parameters, *own}
        options = {name: value for name, value in options.items() if name in takes}
    paths = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not paths:
        raise CheckpointError(f"{folder}: no weights; expected {' or '.join(WEIGHTS)}, as one file")
    if paths[0].suffix == ".safetensors":
        try:
            weights = safetensors.torch.load_file(paths[0])
        except Exception as error:  # the reader can raise anything for a damaged file
            raise CheckpointError(f"{paths[0]}: the file is damaged ({first_line(error)})") from None
    else:
        weights = checkpoint.load_data(paths[0])
        if not checkpoint.is_weights(weights):
            raise CheckpointError(f"{paths[0]}: expected tensors by name")
    # The first files of torch.save were no archives, and have no checksums; nor has safetensors.
    reason = checkpoint.damage(paths[0]) if zipfile.is_zipfile(paths[0]) else None
    reason = reason or checkpoint.not_finite(weights)
    if reason is not None:
        raise CheckpointError(f"{paths[0]}: the file is damaged: {reason}")
    # The first BERT checkpoints name LayerNorm's parameters gamma and beta.
    weights = {re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)): w for name, w in weights.items()}
    if "embeddings.word_embeddings.weight" in weights:  # an encoder without a head
        weights = {f"bert.{name}": tensor for name, tensor in weights.items()}
    return kind, options, weights


def load_pretrained(
    source: str | Path | Pretrained, model_class: type[Model], new_classifier: bool = False, **overrides: Any
) -> Model:
    """A model with pretrained weights, in evaluation mode.

    Args:
        source: a path, or what ``read`` returns.
        model_class: BertModel or a BertFor… of bert_layers.py; for weights of Hugging Face's BERT, of transformers.
        new_classifier: newly initialise the head of a fine-tuned model (CLASSIFIERS) even if the weights have it.
        overrides: settings of the config by name, for example ``num_labels`` or ``hidden_dropout_prob``.

    Raises:
        CheckpointError: as ``read`` and ``load_weights``.
        ConfigError: an override is unknown or refused.
        ValueError: the model cannot be built, for example with attention dropout that no kernel supports.
    """
    source = source if isinstance(source, Pretrained) else read(source)
    check_kind(source, model_class)
    config: Any = source.config
    for name in overrides:
        if not hasattr(config, name):
            raise ConfigError(f"model_config.{name}: unknown key; {nearest(name, list(vars(config)))}")
    options = config.to_dict()
    if "num_labels" in overrides:  # the names of other labels would override the number
        del options["id2label"], options["label2id"]
    try:
        config = type(config)(**{**options, **overrides})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model_config: {error}") from None
    model = model_class(config)
    load_weights(model, source, new_classifier)
    return model.eval()


def check_kind(source: Pretrained, model_class: type[PreTrainedModel]) -> None:
    """Raise CheckpointError for weights of a MosaicBERT and a model of Hugging Face's BERT, and the reverse."""
    there = "a MosaicBERT; use model mosaic_bert"
    if not isinstance(source.config, MosaicBertConfig):
        there = "Hugging Face's BERT (learned positions; no alibi_starting_size in its config); use model hf_bert"
    assert model_class.config_class is not None
    if issubclass(model_class.config_class, MosaicBertConfig) != isinstance(source.config, MosaicBertConfig):
        raise CheckpointError(f"{source.path}: these are weights of {there}")


def initialise(config: RunConfig, model: MosaicBert | HFBert, tokenizer: PreTrainedTokenizerFast) -> None:
    """Load the weights of ``config.pretrained``, if it is set, into a model for pretraining."""
    if config.pretrained is not None:
        source = read(config.pretrained)
        check_kind(source, type(model.model))  # before the tokenizer, because its message helps more
        check_tokenizer(source, tokenizer)
        load_weights(model.model, source)


def load_weights(model: PreTrainedModel, source: Pretrained, new_classifier: bool = False) -> None:
    """Load weights into a model.

    Raises:
        CheckpointError: weights are missing, unexpected, of another shape, or tied but not equal; a setting of
            SHAPELESS_SETTINGS differs (one message names all faults); or as ``check_kind``.
    """
    check_kind(source, type(model))
    prefix = "" if hasattr(model, "bert") else "bert."  # names of BertModel have none
    here = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state = source.state
    if new_classifier:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(CLASSIFIERS)}
    new_heads = tuple(head for head in NEWLY_INITIALISED if not any(name.startswith(head) for name in state))
    tied: dict[int, list[str]] = {}
    for name, tensor in here.items():
        tied.setdefault(tensor.data_ptr(), []).append(name)

    faults, missing = [], []
    for names in tied.values():
        given = [name for name in names if name in state]
        if not given and not names[0].startswith(new_heads):
            missing.append(names[0])
        elif len(given) > 1 and not all(torch.equal(state[given[0]], state[name]) for name in given[1:]):
            faults.append(f"tied, but not equal: {', '.join(given)}")
    unused = [name for name in state if name not in here]
    unexpected = [name for name in unused if not name.startswith(DROPPED)]
    shapes = [
        f"{name} (expected {tuple(tensor.shape)}, got {tuple(state[name].shape)})"
        for name, tensor in here.items()
        if name in state and state[name].shape != tensor.shape
    ]
    for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if found:
            more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
            faults.append(f"{what}: {', '.join(found[:MOST_NAMES])}{more}")
    for name in SHAPELESS_SETTINGS:
        theirs, ours = getattr(source.config, name), getattr(model.config, name)
        if theirs != ours:
            faults.append(f"{name}: {theirs} there, {ours} here")
    if faults:
        raise CheckpointError("\n  ".join([f"{source.path}: these weights do not fit {type(model).__name__}", *faults]))

    given = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name in here}
    model.load_state_dict(given, strict=False)
    new = [name for name in here if name not in state and name.startswith(new_heads)]
    log.info("%s: not used: %s; newly initialised: %s", source.path, unused or "none", new or "none")


def load_tokenizer(source: Pretrained, name: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer that the weights were trained with: ``name``, by default ``source.tokenizer_name``.

    Raises:
        CheckpointError: no tokenizer is named or found, or as ``check_tokenizer``.
    """
    name = name or source.tokenizer_name
    if name is None:
        where = "in this folder" if source.settings is None else f"in {checkpoint.TOKENIZER}/ next to the checkpoint"
        raise CheckpointError(f"{source.path}: no tokenizer {where}; name the tokenizer")
    try:
        tokenizer = tokenizers.load_tokenizer(name)
    except ValueError as error:
        raise CheckpointError(f"{source.path}: its {error}") from None
    check_tokenizer(source, tokenizer)
    return tokenizer


def check_tokenizer(source: Pretrained, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that the weights were not trained with; warn if that one is unknown.

    Raises:
        CheckpointError: it gives other ids, or more ids than the model has embeddings.
    """
    name, trained_with = tokenizer.name_or_path, None
    if source.settings is not None:
        trained_with = source.settings.get("tokenizer")
    elif source.tokenizer_name is not None:
        trained_with = tokenizers.tokenizer_fingerprint(tokenizers.load_tokenizer(source.tokenizer_name))
    if trained_with is None:
        log.warning("%s does not say which tokenizer it was trained with, so this one is not checked", source.path)
    elif trained_with not in tokenizers.tokenizer_fingerprints(tokenizer):
        raise CheckpointError(f"{source.path}: the tokenizer {name} is not the one that it was trained with")
    if (size := tokenizers.vocab_size(tokenizer)) > source.config.vocab_size:
        raise CheckpointError(
            f"{source.path}: the tokenizer {name} has {size} entries, but the model only "
            f"{source.config.vocab_size} embeddings"
        )
