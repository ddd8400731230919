"""GLUE's tasks by name, on files as on the hub."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from src.common import hub
from src.common.errors import DataError
from src.finetune import glue
from src.finetune.config import KNOWN_METRICS, LabelledData
from src.finetune.data import classes_of, read_sets
from src.finetune.files import READERS

COLUMNS = {  # of nyu-mll/glue
    "cola": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"],
    "stsb": ["sentence1", "sentence2"],
}


def write_task(folder, task, rows=6):
    """Its parquet files as on the hub: numbers as labels, two files to train, and a test split with hidden labels."""
    classes = len(glue.TASKS[task].get("labels", "x"))
    for split in ["train", "test", *glue.SPLITS.get(task, {"": "validation"}).values()]:
        labels = pyarrow.array([-1 if split == "test" else i % classes for i in range(rows)], pyarrow.int64())
        if task == "stsb":
            labels = pyarrow.array([i / 5 for i in range(rows)], pyarrow.float32())
        columns = {name: [f"{task} {split} {name} {i}" for i in range(rows)] for name in COLUMNS[task]}
        table = pyarrow.table({**columns, "label": labels, "idx": pyarrow.array(range(rows), pyarrow.int32())})
        (folder / task).mkdir(exist_ok=True, parents=True)
        for number in range(2 if split == "train" else 1):
            pyarrow.parquet.write_table(table, folder / task / f"{split}-0000{number}-of-00001.parquet")


def data_of(task, folder):
    return LabelledData(**glue.TASKS[task], **glue.task_files(task, folder))


@pytest.mark.parametrize("task", glue.TASKS)
def test_each_task_reads_the_hubs_files(task, tmp_path):
    write_task(tmp_path, task)
    data = data_of(task, tmp_path)
    sets = read_sets(data)
    assert list(sets) == ["train", *(["matched", "mismatched"] if task == "mnli" else ["validation"])]
    for name, rows in sets.items():
        split = f"validation_{name}" if name.endswith("matched") else name
        texts = [f"{task} {split} {column} 1" for column in COLUMNS[task]]
        assert rows[1][:2] == (*texts, None)[:2] and len(rows) == (12 if name == "train" else 6)
    assert len(classes_of(data, sets)) == {"mnli": 3, "stsb": 0}.get(task, 2)
    assert set(data.metrics or []) <= set(KNOWN_METRICS[data.kind])


def test_a_folder_may_hold_other_forms(tmp_path):
    assert set(glue.SUFFIXES) <= set(READERS)
    (tmp_path / "rte").mkdir()
    with pytest.raises(DataError, match="no rte/train-.*parquet as in nyu-mll/glue, nor rte/train with .parquet, .csv"):
        data_of("rte", tmp_path)
    (tmp_path / "rte" / "train.tsv").write_text("sentence1\tsentence2\tlabel\na\tb\t0\n")
    row = {"sentence1": "c", "sentence2": "d", "label": 1}
    (tmp_path / "rte" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    sets = read_sets(data_of("rte", tmp_path))
    assert {name: rows[0][:2] for name, rows in sets.items()} == {"train": ("a", "b"), "validation": ("c", "d")}


def test_the_definition():
    """Wang et al., 2018, table 1; scores of the hub's numbers of classes."""
    assert {task: " ".join(found["metrics"]) for task, found in glue.TASKS.items()} == {
        **{"cola": "matthews", "mnli": "accuracy", "mrpc": "accuracy f1", "qnli": "accuracy"},
        **{"qqp": "accuracy f1", "rte": "accuracy", "sst2": "accuracy", "stsb": "pearson spearman"},
    }
    assert glue.TASKS["mnli"]["label_names"] == ["entailment", "neutral", "contradiction"]
    assert glue.TASKS["rte"]["label_names"] == ["entailment", "not_entailment"] == glue.TASKS["qnli"]["label_names"]
    assert [glue.TASKS[task]["label_names"][1] for task in ("cola", "mrpc", "qqp", "sst2")] == [
        *("acceptable", "equivalent", "duplicate", "positive")
    ]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match="no rte/train-\\*.parquet as in nyu-mll/glue"):
        glue.task_files("rte", tmp_path)
    write_task(tmp_path, "mnli")
    (tmp_path / "mnli" / "validation_mismatched-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="no mnli/validation_mismatched-"):
        glue.task_files("mnli", tmp_path)


def snapshot_in(cache, repository):
    repo = cache / repository
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abcd")
    return repo / "snapshots" / "0123abcd"


def test_cached_files_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = snapshot_in(tmp_path, "datasets--nyu-mll--glue")
    write_task(folder, "rte")
    assert glue.download(["rte"]) == folder
    with pytest.raises(DataError, match="nyu-mll/glue: not cached, and not .* Set glue_folder to a folder with"):
        glue.download(["rte", "cola"])


def test_only_missing_files_are_downloaded(tmp_path, monkeypatch):
    """The cached folder if it is complete; else the listed files; the next list only if they are not complete."""
    calls = []

    def download(name, repo_type, allow_patterns, local_files_only):
        calls.append((local_files_only, allow_patterns))
        if not local_files_only:
            (tmp_path / allow_patterns[0]).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    for needed, want in (("b", [(True, ["a"]), (False, ["a"]), (False, ["b"])]), ("a", [(True, ["a"])])):
        calls.clear()
        found = hub.snapshot("x/y", "model", [["a"], ["b"]], lambda folder, needed=needed: (folder / needed).exists())
        assert found == tmp_path and calls == want
    with pytest.raises(DataError, match="x/y: not cached, and not available .*some of its files are missing"):
        hub.snapshot("x/y", "model", [["a"]], lambda folder: False)
