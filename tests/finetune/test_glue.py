"""GLUE's tasks by name, on files as on the hub."""

import pyarrow
import pyarrow.parquet
import pytest

from src.common import hub
from src.common.errors import DataError
from src.finetune import glue
from src.finetune.config import KNOWN_METRICS, LabelledData
from src.finetune.data import classes_of, read_sets

COLUMNS = {  # of nyu-mll/glue
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
}


def write_task(folder, task, rows=6):
    """Its parquet files as on the hub: numbers as labels, and a test split with hidden labels."""
    splits = ["train", "test", *glue.SPLITS.get(task, {"": "validation"}).values()]
    for split in splits:
        number = [-1] * rows if split == "test" else [i % len(glue.TASKS[task].get("labels", "x")) for i in range(rows)]
        labels = pyarrow.array(
            [float(n + i / 5) for i, n in enumerate(number)] if task == "stsb" else number,
            pyarrow.float32() if task == "stsb" else pyarrow.int64(),
        )
        columns = {name: [f"{task} {split} {name} {i}" for i in range(rows)] for name in COLUMNS[task]}
        table = pyarrow.table({**columns, "label": labels, "idx": pyarrow.array(range(rows), pyarrow.int32())})
        (folder / task).mkdir(exist_ok=True, parents=True)
        pyarrow.parquet.write_table(table, folder / task / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("task", glue.TASKS)
def test_each_task_reads_the_hubs_files(task, tmp_path):
    write_task(tmp_path, task)
    data = LabelledData(**glue.TASKS[task], **glue.task_files(task, tmp_path))
    sets = read_sets(data)
    names = ["matched", "mismatched"] if task == "mnli" else ["validation"]
    assert list(sets) == ["train", *names]
    for name, rows in sets.items():
        split = f"validation_{name}" if name.endswith("matched") else name
        texts = [f"{task} {split} {column} 1" for column in COLUMNS[task]]
        assert rows[1][:2] == (*texts, None)[:2]
    classes = classes_of(data, sets)
    assert len(classes) == {"mnli": 3, "stsb": 0}.get(task, 2)
    assert set(data.metrics or []) <= set(KNOWN_METRICS[data.kind])


def test_the_definition():
    """Wang et al., 2018, table 1; scores of the hub's numbers of classes."""
    metrics = {task: found["metrics"] for task, found in glue.TASKS.items()}
    assert metrics == {
        "cola": ["matthews"],
        "mnli": ["accuracy"],
        "mrpc": ["accuracy", "f1"],
        "qnli": ["accuracy"],
        "qqp": ["accuracy", "f1"],
        "rte": ["accuracy"],
        "sst2": ["accuracy"],
        "stsb": ["pearson", "spearman"],
    }
    assert glue.TASKS["mnli"]["label_names"] == ["entailment", "neutral", "contradiction"]
    assert glue.TASKS["rte"]["label_names"] == ["entailment", "not_entailment"] == glue.TASKS["qnli"]["label_names"]
    assert [glue.TASKS[task]["label_names"][1] for task in ("cola", "mrpc", "qqp", "sst2")] == [
        *("acceptable", "equivalent", "duplicate", "positive")
    ]


def test_other_forms_and_several_shards(tmp_path):
    (tmp_path / "sst2").mkdir()
    for name, rows in (("train", ['a "bad" film\t0', "good\t1"]), ("validation", ["fine\t1"])):
        (tmp_path / "sst2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    sets = read_sets(LabelledData(**glue.TASKS["sst2"], **glue.task_files("sst2", tmp_path)))
    assert [row.text for row in sets["train"]] == ['a "bad" film', "good"] and sets["validation"][0].label == "1"

    write_task(tmp_path, "cola")
    first = tmp_path / "cola" / "train-00000-of-00001.parquet"
    (tmp_path / "cola" / "train-00001-of-00002.parquet").write_bytes(first.read_bytes())
    assert len(read_sets(LabelledData(**glue.TASKS["cola"], **glue.task_files("cola", tmp_path)))["train"]) == 12


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="rte: no train-\\*.parquet as in nyu-mll/glue"):
        glue.task_files("rte", tmp_path)
    write_task(tmp_path, "mnli")
    (tmp_path / "mnli" / "validation_mismatched-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match="mnli: no validation_mismatched-"):
        glue.task_files("mnli", tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub; the hub cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def snapshot_in(cache, repository):
    repo = cache / repository
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123abcd")
    return repo / "snapshots" / "0123abcd"


def test_the_hubs_cache(cache):
    folder = snapshot_in(cache, "datasets--nyu-mll--glue")
    write_task(folder, "rte")
    assert glue.download(["rte"]) == folder
    with pytest.raises(
        DataError, match="nyu-mll/glue: not cached, and not available .* Set glue_folder to a folder with"
    ):
        glue.download(["rte", "cola"])


def test_what_is_downloaded(tmp_path, monkeypatch):
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
