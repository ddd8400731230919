"""Weights to begin with: from a checkpoint of a run or a Hugging Face folder, into any of the models, strictly.

    load_pretrained(path, model_class, **config) -> model      load_tokenizer(read(path)) -> its tokenizer

A path is one of
    runs/mine/checkpoints, or a file in it    checkpoints of main.py; read as data, nothing in them is run
    a folder with config.json and weights     what export_hf.py or save_pretrained wrote, or a published MosaicBERT
                                              (model_type ``bert`` with ``alibi_starting_size``)
    a folder of Hugging Face's BERT           for transformers' own classes only

Every weight must find its place and every place its weight, but for the heads listed in ``FRESH`` and ``LEFT`` and for
names that a class ties together, of which one is enough.
"""

import inspect
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import transformers
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from src.common.errors import ConfigError
from src.configuration_bert import MosaicBertConfig
from src.data import tokenizer as tokenizers
from src.train import checkpoint
from src.train.schema import nearest

log = logging.getLogger(__name__)

FRESH = ("bert.pooler.", "classifier.")
"""Heads that pretraining does not train: a class with one begins it anew where the weights have nothing of it."""
LEFT = (*FRESH, "cls.", "bert.embeddings.position_ids")
"""What the weights may have and a class may lack: heads, and a buffer of older versions of transformers."""
UNSEEN = ("num_attention_heads", "layer_norm_eps")
"""Settings that decide what weights mean and that no shape shows."""
CONFIGS = {"mosaic_bert": MosaicBertConfig, "hf_bert": transformers.BertConfig}
"""The config's class of each model that main.py trains."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of weights in a Hugging Face folder; the first one that is there is read."""
NAMED = 12
"""Names of weights that an error lists before it counts."""

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True)
class Pretrained:
    """Weights at rest, and what is known of them."""

    path: Path
    """The checkpoint's file, or the Hugging Face folder."""
    config: MosaicBertConfig | transformers.BertConfig
    """Shape of the model."""
    state: dict[str, Tensor]
    """Weights by name; the encoder's begin with ``bert.``, as in BertForMaskedLM."""
    settings: dict[str, Any] | None
    """What a checkpoint states of its run (``resume.ResumeCheck``), by path; None for a Hugging Face folder."""

    @property
    def tokenizer_name(self) -> str | None:
        """Folder or name of the tokenizer: a folder's own, or of the config that lies beside a checkpoint."""
        if self.settings is None:
            has_one = any((self.path / name).exists() for name in ("tokenizer.json", "vocab.txt"))
            return str(self.path) if has_one else None
        config = self.path.with_name("config.yaml")
        if not config.exists():
            return None
        try:
            return OmegaConf.load(config).tokenizer_name
        except OmegaConfBaseException as error:
            raise ConfigError(f"{config}: tokenizer_name: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Pretrained:
    """The weights of a checkpoint or a Hugging Face folder.

    Raises:
        ConfigError: there is neither at ``path``; it is damaged, holds more than data, or is another kind of model.
    """
    path = Path(path)
    if path.is_file():
        return _read_checkpoint(path)
    if (path / "config.json").exists():
        return _read_folder(path)
    latest = path / checkpoint.LATEST.format(rank=0)
    if latest.exists():
        return _read_checkpoint(latest)
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder")
    raise ConfigError(f"{path}: this folder holds neither {latest.name} nor a Hugging Face model (no config.json)")


def _read_checkpoint(path: Path) -> Pretrained:
    reason = checkpoint.fault(path)
    if reason is not None:
        raise ConfigError(f"{path}: the checkpoint is damaged: {reason}")
    state = checkpoint.read(str(path))
    settings = state["callbacks"].get("ResumeCheck") or {}
    kind = CONFIGS.get(settings.get("model.name", ""))
    if kind is None:
        raise ConfigError(f"{path}: the checkpoint does not say which model it is of, as those of main.py do")
    weights = {name.removeprefix("model."): tensor for name, tensor in state["model"].items()}
    prefix = "model.model_config."
    options = {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}
    options["vocab_size"] = len(weights["bert.embeddings.word_embeddings.weight"])
    if "classifier.weight" in weights:
        options["num_labels"] = len(weights["classifier.weight"])
    return Pretrained(path, _config(kind, options, path), weights, settings)


def _read_folder(folder: Path) -> Pretrained:
    try:
        options = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None
    model_type = options.get("model_type")
    if model_type not in ("mosaic_bert", "bert"):
        raise ConfigError(f"{folder}: model_type {model_type!r} is neither mosaic_bert nor bert")
    kind = (
        MosaicBertConfig if model_type == "mosaic_bert" or "alibi_starting_size" in options else transformers.BertConfig
    )
    if kind is MosaicBertConfig:
        if options.get("hidden_act", "gelu") != "gelu":
            raise ConfigError(f"{folder}: hidden_act {options['hidden_act']!r}: MosaicBERT's is gelu")
        # Of a published config, what acts here; it has lengths and positions too, and the names of its own classes.
        takes = {*inspect.signature(MosaicBertConfig).parameters, "id2label", "label2id", "problem_type"}
        options = {name: value for name, value in options.items() if name in takes}
    weights = _read_weights(folder)
    if "embeddings.word_embeddings.weight" in weights:  # of an encoder alone
        weights = {f"bert.{name}": tensor for name, tensor in weights.items()}
    return Pretrained(folder, _config(kind, options, folder), weights, None)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    paths = [folder / name for name in WEIGHTS if (folder / name).exists()]
    if not paths:
        raise ConfigError(f"{folder}: there are no weights here; {' or '.join(WEIGHTS)} is read, each as one file")
    try:
        if paths[0].suffix == ".safetensors":
            weights = safetensors.torch.load_file(paths[0])
        else:
            weights = torch.load(paths[0], map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes of either reader
        text = str(error)
        what = "hold more than data, and running what they hold is refused" if "nsupported" in text else "are damaged"
        raise ConfigError(f"{paths[0]}: the weights {what}: {text[:300]}") from None
    renamed = ((".gamma", ".weight"), (".beta", ".bias"))  # of BERT's first LayerNorms
    for old, new in renamed:
        weights = {name.removesuffix(old) + new if name.endswith(old) else name: w for name, w in weights.items()}
    return weights


def _config(kind: type, options: dict[str, Any], path: Path) -> Any:
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


def load_pretrained(
    source: str | Path | Pretrained, model_class: type[Model], fresh_classifier: bool = False, **overrides: Any
) -> Model:
    """A model with pretrained weights, in evaluation mode.

    Args:
        source: a path that ``read`` takes, or what it gave.
        model_class: BertModel or a BertFor… of bert_layers.py; one of transformers for weights of its BERT.
        fresh_classifier: begin ``classifier`` anew even if the weights have one, as for another task.
        overrides: settings of the config by name, ``num_labels`` or ``hidden_dropout_prob`` for example.

    Raises:
        ConfigError: what ``read`` and ``load_weights`` raise; or a setting that the config does not have.
        ValueError: the model cannot be built so, for example with attention dropout where no kernel has it.
    """
    if not isinstance(source, Pretrained):
        source = read(source)
    check_kind(source, model_class)
    model = model_class(_overridden(source, overrides))
    load_weights(model, source, fresh_classifier)
    return model.eval()


def _overridden(source: Pretrained, overrides: dict[str, Any]) -> Any:
    config = source.config
    for name in overrides:
        if not hasattr(config, name):
            raise ConfigError(f"model_config.{name}: unknown; {nearest(name, list(vars(config)))}")
    options = config.to_dict()
    if "num_labels" in overrides:  # else the names of other labels would win over the number
        del options["id2label"], options["label2id"]
    return _config(type(config), {**options, **overrides}, source.path)


def check_kind(source: Pretrained, model_class: type[PreTrainedModel]) -> None:
    """Refuse weights of a MosaicBERT for Hugging Face's BERT, and the reverse, with the reason (ConfigError)."""
    assert model_class.config_class is not None
    ours, theirs = issubclass(model_class.config_class, MosaicBertConfig), isinstance(source.config, MosaicBertConfig)
    if ours and not theirs:
        raise ConfigError(
            f"{source.path}: these are weights of Hugging Face's BERT (learned positions, separate queries, keys and "
            "values, no gated linear units; no alibi_starting_size in its config): MosaicBERT has no place for them. "
            "Take model hf_bert, or weights of a MosaicBERT"
        )
    if theirs and not ours:
        raise ConfigError(f"{source.path}: these are weights of a MosaicBERT; take model mosaic_bert, not hf_bert")


def load_weights(model: PreTrainedModel, source: Pretrained, fresh_classifier: bool = False) -> None:
    """Put weights into a model, each where it belongs.

    Raises:
        ConfigError: weights are missing, left over, of another shape or, tied, contradict each other; a setting that no
            shape shows differs; the weights are of another kind of model. All of it in one message.
    """
    check_kind(source, type(model))
    prefix = "" if hasattr(model, "bert") else "bert."  # of BertModel, whose names have none
    places = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state = source.state
    if fresh_classifier:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    fresh = tuple(head for head in FRESH if not any(name.startswith(head) for name in state))
    tied: dict[int, list[str]] = {}
    for name, tensor in places.items():
        tied.setdefault(tensor.data_ptr(), []).append(name)

    faults, missing = [], []
    for names in tied.values():
        given = [name for name in names if name in state]
        if not given and not names[0].startswith(fresh):
            missing.append(names[0])
        elif len(given) > 1 and not all(torch.equal(state[given[0]], state[name]) for name in given[1:]):
            faults.append(f"tied, but not equal: {', '.join(given)}")
    left = [name for name in state if name not in places]
    shapes = [
        f"{name} {tuple(state[name].shape)}, not {tuple(place.shape)}"
        for name, place in places.items()
        if name in state and state[name].shape != place.shape
    ]
    for what, found in (
        ("missing", missing),
        ("unexpected", [name for name in left if not name.startswith(LEFT)]),
        ("of another shape", shapes),
    ):
        if found:
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            faults.append(f"{what}: {', '.join(found[:NAMED])}{more}")
    for name in UNSEEN:
        there, here = getattr(source.config, name), getattr(model.config, name)
        if there != here:
            faults.append(f"{name}: {there} there, {here} here")
    if faults:
        raise ConfigError("\n  ".join([f"{source.path}: these weights do not fit {type(model).__name__}", *faults]))

    given = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name in places}
    model.load_state_dict(given, strict=False)
    anew = [name for name in places if name not in state and name.startswith(fresh)]
    for what, names in (("left out", left), ("begun anew", anew)):
        if names:
            log.info("%s: %s: %s", source.path, what, ", ".join(names))


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def load_tokenizer(source: Pretrained, name: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer that the weights were trained with: ``name``, or without it the folder's or the run's own.

    Raises:
        ConfigError: nothing says which it is, it is not to be had, or ``name`` is another.
    """
    name = name or source.tokenizer_name
    if name is None:
        where = "no tokenizer in this folder" if source.settings is None else "no config.yaml beside the checkpoint"
        raise ConfigError(f"{source.path}: nothing says which tokenizer these weights are of ({where}); name it")
    try:
        tokenizer = tokenizers.load_tokenizer(name)
    except ValueError as error:
        raise ConfigError(f"{source.path}: its {error}") from None
    check_tokenizer(source, tokenizer)
    return tokenizer


def check_tokenizer(source: Pretrained, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer that the weights were not trained with, as far as they say with which they were.

    Raises:
        ConfigError: it makes other ids of a text, or has more of them than there are embeddings.
    """
    if source.settings is not None:
        trained_with = source.settings.get("tokenizer")
    elif source.tokenizer_name is not None:
        trained_with = tokenizers.tokenizer_fingerprint(tokenizers.load_tokenizer(source.tokenizer_name))
    else:
        trained_with = None
    if trained_with is None:
        log.warning("%s does not say which tokenizer it was trained with, so none was compared", source.path)
    elif trained_with not in (tokenizers.tokenizer_fingerprint(tokenizer), tokenizers.earlier_fingerprint(tokenizer)):
        raise ConfigError(f"{source.path}: the tokenizer {tokenizer.name_or_path} is another than it was trained with")
    if len(tokenizer) > source.config.vocab_size:
        raise ConfigError(
            f"{source.path}: the tokenizer {tokenizer.name_or_path} has {len(tokenizer)} entries, and the model "
            f"embeddings for {source.config.vocab_size}"
        )
