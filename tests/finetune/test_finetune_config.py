import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from src.common.errors import ConfigError
from src.finetune import config, glue
from src.finetune.config import RunSpec, load, selected
from src.train.schema import read, to_dict
from tests.train.test_config import misspell, paths_of

YAMLS = sorted(Path("yamls").glob("finetune*.yaml"))
GIVEN = {"pretrained": "x", "tasks.mine.data.train": "train.csv"}
"""Values for what the YAMLs leave to be given."""


def overrides_of(path):
    return [f"{key}={value}" for key, value in GIVEN.items() if "mine" not in key or "own" in path.stem]


@pytest.fixture
def own():
    """The YAML for one's own files, with what must be given."""
    tree = yaml.safe_load(Path("yamls/finetune_own.yaml").read_text())
    tree["pretrained"], tree["tasks"]["mine"]["data"]["train"] = GIVEN.values()
    return tree


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_shipped_yamls_load_and_survive_a_round_trip(path, write):
    config = load(str(path), overrides_of(path))
    assert load(write(to_dict(config))) == config


def test_what_must_be_given_is_asked_for():
    with pytest.raises(ConfigError, match="pretrained: missing(.|\n)*tasks.mine.data.train: missing"):
        load("yamls/finetune_own.yaml")


def test_the_reference_recipe():
    """MosaicBERT's: learning rate, batch, epochs, number of seeds, and what a task starts from."""
    config = load("yamls/finetune_glue.yaml", ["pretrained=x"])
    recipe = {n: (t.lr, t.batch_size, t.epochs, len(t.seeds), t.starts_from) for n, t in config.tasks.items()}
    assert recipe == {
        "mnli": (5e-5, 48, 3, 1, None),
        "qqp": (3e-5, 16, 5, 1, None),
        "qnli": (1e-5, 16, 10, 1, None),
        "sst2": (3e-5, 16, 3, 3, None),
        "cola": (5e-5, 32, 10, 4, None),
        "rte": (1e-5, 16, 3, 5, "mnli"),
        "mrpc": (8e-5, 32, 10, 5, "mnli"),
        "stsb": (3e-5, 32, 10, 5, "mnli"),
    }
    assert config.max_seq_len == 256 and set(recipe) == set(glue.TASKS)
    assert sum(len(task.seeds) for task in config.tasks.values()) == 25


def test_only_takes_along_what_tasks_start_from():
    config = load("yamls/finetune_glue.yaml", ["pretrained=x", "only=[stsb,cola]"])
    assert list(selected(config)) == ["mnli", "cola", "stsb"]
    assert list(selected(load("yamls/finetune_glue.yaml", ["pretrained=x"]))) == list(config.tasks)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_each_key_misspelt_is_refused(path, write):
    """But for names of tasks, which are free, and options of components, which are refused where these are built."""
    tree = yaml.safe_load(path.read_text())
    free = ("model.", "optimizer.", "scheduler.")
    for key in paths_of(tree):
        if not key.startswith(free) and key.removeprefix("tasks.") not in tree["tasks"]:
            with pytest.raises(ConfigError, match=f"{key}x: unknown"):
                load(write(misspell(tree, key)), overrides_of(path))


def test_a_misspelt_task(write):
    tree = yaml.safe_load(Path("yamls/finetune_glue.yaml").read_text())
    tree["tasks"]["ret"] = tree["tasks"].pop("rte")
    with pytest.raises(ConfigError, match="tasks.ret: no task of GLUE .* one of your own has a section 'data'"):
        load(write(tree), ["pretrained=x"])


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("max_seq_len=2", "max_seq_len: 2 is not more than"),
        ("eval_batch_size=0", "eval_batch_size: 0 is not positive"),
        ("device_train_microbatch_size=0", "device_train_microbatch_size: 0 is not positive"),
        ("device_train_microbatch_size=auto", "device_train_microbatch_size: expected int or null, got 'auto'"),
        ("eval_interval=2x", "eval_interval: '2x' is not a number with"),
        ("eval_interval=0", "eval_interval: expected str, got 0"),
        ("precision=bf16", "precision: expected one of fp32, amp_bf16, amp_fp16"),
        ("only=[yours]", "only: 'yours' is none of the tasks"),
        ("only=[]", "only: names no task"),
        ("glue_folder=x", "glue_folder: acts only on tasks of GLUE"),
        ("tasks.mine.lr=0", "tasks.mine.lr: 0.0 is not positive"),
        ("tasks.mine.batch_size=0", "tasks.mine.batch_size: 0 is not positive"),
        ("tasks.mine.epochs=0", "tasks.mine.epochs: 0 is not positive"),
        ("tasks.mine.seeds=[]", "tasks.mine.seeds: [] is not one seed at least"),
        ("tasks.mine.seeds=[1,2,1]", "tasks.mine.seeds: [1, 2, 1] is not a list without repetitions"),
        ("tasks.mine.seeds=[-1]", "tasks.mine.seeds: [-1] is not a list of numbers from 0 on"),
        ("tasks.mine.seeds=[true]", "tasks.mine.seeds: expected a list of int, got [True]"),
        ("tasks.mine.starts_from=mnli", "tasks.mine.starts_from: 'mnli' is none of the tasks"),
        ("tasks.mine.starts_from=mine", "tasks.mine.starts_from: goes round in a circle: mine <- mine"),
        (
            "tasks.mine.data.metrics=[f2]",
            "tasks.mine.data.metrics: 'f2' is no metric of classification; known: accuracy",
        ),
        ("tasks.mine.data.metrics=[]", "tasks.mine.data.metrics: names none"),
        ("tasks.mine.data.kind=clasification", "tasks.mine.data.kind: expected one of classification"),
        ("tasks.mine.data.validation=1", "tasks.mine.data.validation: 1.0 is not a share between 0 and 1"),
        ("tasks.mine.data.validation={}", "tasks.mine.data.validation: names no file"),
        ("tasks.mine.data.validation={test: a.csv}", "tasks.mine.data.validation.test: 'a.csv' is not a file under"),
        ("tasks.mine.data.validation={near: 3}", "tasks.mine.data.validation.near: 3 is not a file"),
        (
            "tasks.mine.data={kind: tokens, text_pair: b, metrics: null}",
            "tasks.mine.data.text_pair: tasks on words take",
        ),
        ("tasks.mine.data={kind: regression, labels: [a, b], metrics: null}", "labels: regression has no classes"),
        ("tasks.mine.data.labels=[a]", "tasks.mine.data.labels: ['a'] is not two or more different classes"),
        ("tasks.mine.data.label_names=[a, b]", "tasks.mine.data.label_names: needs labels, and as many"),
    ],
)
def test_each_kind_of_fault(override, fault, write, own):
    with pytest.raises(ConfigError) as error:
        load(write(own), [override])
    assert fault in str(error.value)


def test_names_of_tasks_name_folders(write, own):
    own["tasks"]["../x"] = own["tasks"].pop("mine")
    with pytest.raises(ConfigError, match="tasks: '../x' is not a name of letters"):
        load(write(own))


def test_a_runs_spec_survives_a_round_trip(write, own):
    config = load(write(own))
    spec = RunSpec("mine", 17, "0123456789", None, True, config)
    assert read(RunSpec, write(to_dict(spec)), [], lambda spec, faults: None) == spec
    assert (spec.name, spec.folder) == ("mine-seed17", "runs/finetune-own/mine-seed17-01234567")


def test_every_field_is_explained():
    tree = ast.parse(Path(config.__file__).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert documented, f"{node.name}.{field.target.id}"  # pyright: ignore


def test_it_imports_no_torch():
    code = "import sys, src.finetune.config, src.finetune.gpus, src.finetune.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
