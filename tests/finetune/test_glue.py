"""GLUE's tasks by name, on files of the hub's form."""

import pyarrow
import pyarrow.parquet
import pytest

from src.common import hub
from src.finetune import glue
from src.finetune.config import METRICS, LabelledData
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
    """Its parquet files as the hub has them: numbers as labels, and a test split with labels that are hidden."""
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
    data = LabelledData(**glue.TASKS[task], **glue.files(task, tmp_path))
    sets = read_sets(data)
    names = ["matched", "mismatched"] if task == "mnli" else ["validation"]
    assert list(sets) == ["train", *names]
    for name, rows in sets.items():
        split = f"validation_{name}" if name.endswith("matched") else name
        assert rows.texts[1] == f"{task} {split} {COLUMNS[task][0]} 1"
        assert rows.pairs[1:2] == [f"{task} {split} {column} 1" for column in COLUMNS[task][1:]]
    classes = classes_of(data, sets)
    assert len(classes) == {"mnli": 3, "stsb": 0}.get(task, 2)
    assert set(data.metrics or []) <= set(METRICS[data.kind])


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
    sets = read_sets(LabelledData(**glue.TASKS["sst2"], **glue.files("sst2", tmp_path)))
    assert sets["train"].texts == ['a "bad" film', "good"] and sets["validation"].labels == ["1"]

    write_task(tmp_path, "cola")
    first = tmp_path / "cola" / "train-00000-of-00001.parquet"
    (tmp_path / "cola" / "train-00001-of-00002.parquet").write_bytes(first.read_bytes())
    assert len(read_sets(LabelledData(**glue.TASKS["cola"], **glue.files("cola", tmp_path)))["train"].texts) == 12


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="there is no train-\\*.parquet, as nyu-mll/glue"):
        glue.files("rte", tmp_path)
    write_task(tmp_path, "mnli")
    (tmp_path / "mnli" / "validation_mismatched-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="there is no validation_mismatched-"):
        glue.files("mnli", tmp_path)


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
        ValueError, match="nyu-mll/glue: neither cached nor .* Give a folder with rte, cola of it as glue"
    ):
        glue.download(["rte", "cola"])


def test_what_is_fetched_from_the_hub(cache, monkeypatch):
    """The files that are needed, of alternatives the first one; no test splits, no other forms of the weights."""
    from types import SimpleNamespace

    import huggingface_hub

    fetched = []
    names = ["rte/train-0.parquet", "rte/test-0.parquet", "b.bin", "a.safetensors", "README.md"]
    siblings = [SimpleNamespace(rfilename=name) for name in names]
    monkeypatch.setattr(huggingface_hub, "repo_info", lambda *args, **kwargs: SimpleNamespace(siblings=siblings))

    def download(name, repo_type, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise ValueError
        fetched.extend(allow_patterns)
        return "/somewhere"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert str(hub.folder("x/y", "dataset", ["rte/train-*", "a.safetensors|b.bin", "*.md"], bool)) == "/somewhere"
    assert fetched == ["rte/train-*", "a.safetensors", "*.md"]
