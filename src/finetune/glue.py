"""GLUE (Wang et al., 2018, arXiv 1804.07461): its tasks and their files. Imports no torch.

The files are those of nyu-mll/glue on the Hugging Face Hub, ``rte/train-00000-of-00001.parquet`` and so on, from there
or from a folder. A folder may also hold ``rte/train.tsv`` or another of SUFFIXES, with the same columns. WNLI is left
out, as in BERT (Devlin et al., 2019, section 4.1). A task's score is the mean of its metrics, GLUE's that of its tasks.
"""

from pathlib import Path
from typing import Any

from src.common import hub
from src.common.errors import DataError

REPOSITORY = "nyu-mll/glue"


def _classification(label_names: str, metrics: str, text: str, text_pair: str | None = None) -> dict[str, Any]:
    """A task whose files hold the classes as numbers from 0, here with their names."""
    names = label_names.split()
    labels = {"labels": [str(i) for i in range(len(names))], "label_names": names}
    return {"text": text, "text_pair": text_pair, **labels, "metrics": metrics.split()}


TASKS: dict[str, dict[str, Any]] = {
    "cola": _classification("unacceptable acceptable", "matthews", "sentence"),
    "mnli": _classification("entailment neutral contradiction", "accuracy", "premise", "hypothesis"),
    "mrpc": _classification("not_equivalent equivalent", "accuracy f1", "sentence1", "sentence2"),
    "qnli": _classification("entailment not_entailment", "accuracy", "question", "sentence"),
    # Two of its training rows have no second question (https://github.com/huggingface/datasets/issues/277).
    "qqp": _classification("not_duplicate duplicate", "accuracy f1", "question1", "question2") | {"empty_texts": True},
    "rte": _classification("entailment not_entailment", "accuracy", "sentence1", "sentence2"),
    "sst2": _classification("negative positive", "accuracy", "sentence"),
    "stsb": {"text": "sentence1", "text_pair": "sentence2", "kind": "regression", "metrics": ["pearson", "spearman"]},
}
"""By name on the hub: arguments of LabelledData, without the files."""

SUFFIXES = ".parquet", ".csv", ".tsv", ".json", ".jsonl"

SPLITS = {"mnli": {"matched": "validation_matched", "mismatched": "validation_mismatched"}}
"""Validation sets by name, each with its split, of tasks that have several."""


def _patterns(task: str) -> dict[str, str]:
    """Files of the sets by name, on the hub or in a folder."""
    splits = {"train": "train", **SPLITS.get(task, {"validation": "validation"})}
    return {name: f"{task}/{split}-*.parquet" for name, split in splits.items()}


def task_files(task: str, folder: Path) -> dict[str, Any]:
    """``train`` and ``validation`` of LabelledData, from ``folder``; raises DataError if a file is missing."""
    sets = {}
    for name, pattern in _patterns(task).items():
        split = pattern.removesuffix("-*.parquet")
        there = [files for files in (pattern, *(f"{split}{suffix}" for suffix in SUFFIXES)) if any(folder.glob(files))]
        if not there:
            raise DataError(f"{folder}: no {pattern} as in {REPOSITORY}, nor {split} with {', '.join(SUFFIXES)}")
        sets[name] = str(folder / there[0])
    train = sets.pop("train")
    return {"train": train, "validation": sets if task in SPLITS else sets["validation"]}


def download(tasks: list[str]) -> Path:
    """The folder of these tasks' files, cached or from the hub; raises DataError if neither has them all."""
    patterns = [pattern for task in tasks for pattern in _patterns(task).values()]
    try:
        return hub.snapshot(
            REPOSITORY, "dataset", [patterns], lambda folder: all(any(folder.glob(p)) for p in patterns)
        )
    except DataError as error:
        raise DataError(f"{error}. Set glue_folder to a folder with {', '.join(tasks)}, or go online") from None
