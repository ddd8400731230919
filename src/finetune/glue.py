"""GLUE (Wang et al., 2018, arXiv 1804.07461): its tasks and their files. Imports no torch.

The files are those of nyu-mll/glue on the Hugging Face Hub, ``rte/train-00000-of-00001.parquet`` and so on, from there
or from a folder. A folder may also hold .csv, .tsv, .json and .jsonl with the same names and columns. WNLI is left out,
as since BERT (Devlin et al., 2019, section 4.1). A task's score is the mean of its metrics, GLUE's the mean over tasks.
"""

from pathlib import Path
from typing import Any

from src.common import hub
from src.common.errors import DataError

REPOSITORY = "nyu-mll/glue"
SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl")


def _classification(label_names: str, metrics: str, text: str, text_pair: str | None = None) -> dict[str, Any]:
    """A task whose files hold the classes as numbers from 0, here with their names."""
    names = label_names.split()
    labels = {"labels": [str(i) for i in range(len(names))], "label_names": names}
    return {"text": text, "text_pair": text_pair, **labels, "metrics": metrics.split()}


_SENTENCES = ("sentence1", "sentence2")

TASKS: dict[str, dict[str, Any]] = {
    "cola": _classification("unacceptable acceptable", "matthews", "sentence"),
    "mnli": _classification("entailment neutral contradiction", "accuracy", "premise", "hypothesis"),
    "mrpc": _classification("not_equivalent equivalent", "accuracy f1", *_SENTENCES),
    "qnli": _classification("entailment not_entailment", "accuracy", "question", "sentence"),
    "qqp": _classification("not_duplicate duplicate", "accuracy f1", "question1", "question2"),
    "rte": _classification("entailment not_entailment", "accuracy", *_SENTENCES),
    "sst2": _classification("negative positive", "accuracy", "sentence"),
    "stsb": {"text": "sentence1", "text_pair": "sentence2", "kind": "regression", "metrics": ["pearson", "spearman"]},
}
"""By name on the hub: arguments of LabelledData, without the files."""

SPLITS = {"mnli": {"matched": "validation_matched", "mismatched": "validation_mismatched"}}
"""Validation sets by name, each with its split, of tasks that have several."""


def task_files(task: str, folder: Path) -> dict[str, Any]:
    """``train`` and ``validation`` of LabelledData: patterns of files in ``folder / task``.

    Raises:
        DataError: a file is missing.
    """

    def pattern(split: str) -> str:
        for name in (f"{split}-*.parquet", *(f"{split}{suffix}" for suffix in SUFFIXES)):
            if any((folder / task).glob(name)):
                return str(folder / task / name)
        raise DataError(
            f"{folder / task}: no {split}-*.parquet as in {REPOSITORY}, and no {split}{{{','.join(SUFFIXES)}}}"
        )

    train, sets = pattern("train"), SPLITS.get(task)
    validation = pattern("validation") if sets is None else {name: pattern(split) for name, split in sets.items()}
    return {"train": train, "validation": validation}


def download(tasks: list[str]) -> Path:
    """The folder of these tasks' files, from the local cache of the hub or from the hub.

    Raises:
        DataError: it has them in neither.
    """

    def is_complete(folder: Path) -> bool:
        try:
            return all(task_files(task, folder) for task in tasks)
        except DataError:
            return False

    splits = {task: ["train", *SPLITS.get(task, {"": "validation"}).values()] for task in tasks}
    patterns = [f"{task}/{split}-*" for task in tasks for split in splits[task]]
    try:
        return hub.snapshot(REPOSITORY, "dataset", [patterns], is_complete)
    except DataError as error:
        raise DataError(f"{error}. Set glue_folder to a folder with {', '.join(tasks)}, or go online") from None
