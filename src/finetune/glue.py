"""GLUE (Wang et al., 2018, arXiv 1804.07461): its tasks, and where their files are. Imports no torch.

The files are those of nyu-mll/glue on the hub, from there or from a folder: ``rte/train-00000-of-00001.parquet`` and so
on; in a folder also .csv, .tsv, .json and .jsonl with the same names and columns. WNLI is left out, as everybody does
since BERT (Devlin et al., 2019, section 4.1). A task's score is the mean of its metrics, GLUE's the mean of its tasks.
"""

from pathlib import Path
from typing import Any

from src.common import hub

REPOSITORY = "nyu-mll/glue"

_YES_NO = {"labels": ["0", "1"], "label_names": ["entailment", "not_entailment"], "metrics": ["accuracy"]}

TASKS: dict[str, dict[str, Any]] = {
    "cola": {
        "text": "sentence",
        "labels": ["0", "1"],
        "label_names": ["unacceptable", "acceptable"],
        "metrics": ["matthews"],
    },
    "mnli": {
        "text": "premise",
        "text_pair": "hypothesis",
        "labels": ["0", "1", "2"],
        "label_names": ["entailment", "neutral", "contradiction"],
        "metrics": ["accuracy"],
    },
    "mrpc": {
        "text": "sentence1",
        "text_pair": "sentence2",
        "labels": ["0", "1"],
        "label_names": ["not_equivalent", "equivalent"],
        "metrics": ["accuracy", "f1"],
    },
    "qnli": {"text": "question", "text_pair": "sentence", **_YES_NO},
    "qqp": {
        "text": "question1",
        "text_pair": "question2",
        "labels": ["0", "1"],
        "label_names": ["not_duplicate", "duplicate"],
        "metrics": ["accuracy", "f1"],
    },
    "rte": {"text": "sentence1", "text_pair": "sentence2", **_YES_NO},
    "sst2": {
        "text": "sentence",
        "labels": ["0", "1"],
        "label_names": ["negative", "positive"],
        "metrics": ["accuracy"],
    },
    "stsb": {
        "text": "sentence1",
        "text_pair": "sentence2",
        "kind": "regression",
        "metrics": ["pearson", "spearman"],
    },
}
"""By name on the hub: columns, labels as the files have them (numbers) and as they are called, metrics."""

SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl")

SPLITS = {"mnli": {"matched": "validation_matched", "mismatched": "validation_mismatched"}}
"""Sets to evaluate on, each with its split, where there is more than ``validation``."""


def files(task: str, folder: Path) -> dict[str, Any]:
    """``train`` and ``validation`` of a task, as patterns of files in ``folder / task``.

    Raises:
        ValueError: the folder lacks one of them.
    """

    def pattern(split: str) -> str:
        for name in (f"{split}-*.parquet", *(f"{split}{suffix}" for suffix in SUFFIXES)):
            if any((folder / task).glob(name)):
                return str(folder / task / name)
        raise ValueError(
            f"{folder / task}: there is no {split}-*.parquet, as {REPOSITORY} on the hub has it, and no {split} with "
            f"{', '.join(SUFFIXES)}"
        )

    train, sets = pattern("train"), SPLITS.get(task)
    validation = pattern("validation") if sets is None else {name: pattern(split) for name, split in sets.items()}
    return {"train": train, "validation": validation}


def download(tasks: list[str]) -> Path:
    """The folder of these tasks' files, from the hub's local cache or from the hub.

    Raises:
        ValueError: they are in neither.
    """

    def complete(cached: Path) -> bool:
        try:
            return all(files(task, cached) for task in tasks)
        except ValueError:
            return False

    patterns = [f"{task}/{split}-*" for task in tasks for split in ("train", *SPLITS.get(task, {}).values())]
    patterns += [f"{task}/validation-*" for task in tasks if task not in SPLITS]
    try:
        return hub.folder(REPOSITORY, "dataset", patterns, complete)
    except ValueError as error:
        raise ValueError(f"{error}. Give a folder with {', '.join(tasks)} of it as glue_folder, or go online") from None
