"""Predictions of a model that finetune.py made, for texts without labels.

What the model needs to read texts stands in its config.json, so exports and copies of its folder have it, too.
"""

import warnings
from collections.abc import Sequence

import torch
from composer import Trainer

from src.common.errors import ConfigError, TrainingError, first_line
from src.configuration_bert import MosaicBertConfig
from src.finetune.config import load_predict
from src.finetune.data import read_set
from src.finetune.kinds import KINDS
from src.finetune.model import Classifier
from src.finetune.progress import say
from src.finetune.run import SETTINGS, data_spec
from src.train import checkpoint, weights


def predict(folder: str, file: str, overrides: Sequence[str] = (), scores: bool = False) -> list[str]:
    """A line for each row of a file, in its order.

    Args:
        folder: ``model/`` of a run, or an export of it.
        file: as ``train`` of LabelledData; it needs no labels.
        overrides: of PredictConfig.
        scores: each line is a JSON object with the prediction and the probability of each class.

    Raises:
        ValueError: the folder is no fine-tuned model, or the file or a setting does not fit.
        TrainingError: out of memory.
    """
    checkpoint.load_as_data()
    source = weights.read(folder)
    held = getattr(source.config, SETTINGS, None)
    if not isinstance(held, dict):
        raise ConfigError(f"{folder}: not a model of finetune.py, whose config.json has a section {SETTINGS!r}")
    given = {**held, "data": {**held["data"], "train": "", "validation": ""}}
    config = load_predict(given, f"{folder}/config.json", overrides)
    if config.precision != "fp32" and not torch.cuda.is_available():
        raise ConfigError(f"precision: {config.precision} needs a GPU, and none is found; precision=fp32 runs here")
    data, tokenizer = config.data, weights.load_tokenizer(source, None)
    kind = KINDS[data.kind](data)
    if scores and not kind.has_scores:
        raise ConfigError(f"--scores: predictions of kind {data.kind} have no probabilities")
    head = kind.heads["mosaic_bert" if isinstance(source.config, MosaicBertConfig) else "hf_bert"]
    network = weights.load_pretrained(source, head)
    by_number: dict[int, str] = network.config.id2label or {}  # pyright: ignore[reportAssignmentType]
    names = [by_number[number] for number in sorted(by_number)]
    rows = [row._replace(label=kind.blank_label(row, names)) for row in read_set(file, data, labelled=False)]
    say(f"{file}: {len(rows):,} rows")
    encoded = kind.encode(rows, names, tokenizer, config.max_seq_len)
    if encoded.cut:
        say(f"{file}: {encoded.cut:,} rows cut at {config.max_seq_len} tokens, {encoded.unread:,} words have no tag")
    part = data_spec(kind, encoded, tokenizer, config.batch_size, None)
    warnings.filterwarnings("ignore", "No optimizer was specified")
    trainer = Trainer(model=Classifier(network, kind, {}), precision=config.precision, progress_bar=False)
    try:
        outputs = trainer.predict(part)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of memory ({first_line(error)}). Lower batch_size (the predictions stay the same)"
        ) from None
    lines = kind.scored_lines if scores else kind.lines
    return lines(outputs, part.dataloader, names)
