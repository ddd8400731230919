import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from src.common.errors import ConfigError
from src.finetune import config, glue
from src.finetune.config import (
    EarlyStopping,
    FinetuneConfig,
    LabelledData,
    PredictConfig,
    RunSpec,
    TaskConfig,
    load,
    selected,
)
from src.train.schema import read, to_dict
from src.train.yaml12 import dump
from tests.train.test_config import misspell, paths_of

YAMLS = sorted(Path("yamls").glob("finetune*.yaml"))
GIVEN = {"pretrained": "x", "tasks.mine.data.train": "train.csv"}
"""Values for what the YAMLs leave to be given."""


def overrides_of(path):
    return [f"{key}={value}" for key, value in GIVEN.items() if "mine" not in key or "own" in str(path)]


def own(*overrides):
    """The config of your own files."""
    path = "yamls/finetune_own.yaml"
    return load(path, [*overrides_of(path), *overrides])


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_shipped_yamls_load_and_survive_a_round_trip(path, write):
    config = load(str(path), overrides_of(path))
    assert load(write(to_dict(config))) == config


def test_required_keys_are_named():
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


def test_only_selects_also_the_tasks_to_start_from():
    config = load("yamls/finetune_glue.yaml", ["pretrained=x", "only=[stsb,cola]"])
    assert list(selected(config)) == ["mnli", "cola", "stsb"]
    assert list(selected(load("yamls/finetune_glue.yaml", ["pretrained=x"]))) == list(config.tasks)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: p.stem)
def test_each_key_misspelt_is_refused(path, write):
    """Names of tasks are free; options of components are checked when these are built."""
    tree = yaml.safe_load(path.read_text())
    free = ("model.", "optimizer.", "scheduler.")
    for key in paths_of(tree):
        if not key.startswith(free) and key.removeprefix("tasks.") not in tree["tasks"]:
            with pytest.raises(ConfigError, match=f"{key}x: unknown"):
                load(write(misspell(tree, key)), overrides_of(path))


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("max_seq_len=2", "max_seq_len: expected more than the 2 special tokens of a text, got 2"),
        ("eval_batch_size=0", "eval_batch_size: expected a positive number, got 0"),
        ("device_train_microbatch_size=0", "device_train_microbatch_size: expected a positive number, got 0"),
        ("device_train_microbatch_size=auto", "device_train_microbatch_size: "),
        ("eval_interval=2x", "eval_interval: expected a number with ba, sp, tok, ep, sec or dur, got '2x'"),
        ("eval_interval=0", "eval_interval: "),
        ("precision=bf16", "precision: "),
        ("only=[yours]", "only: unknown task 'yours'; known: mine"),
        ("only=[]", "only: expected at least one task"),
        ("glue_folder=x", "glue_folder: has no effect without a task of GLUE"),
        ("tasks.mine.lr=0", "tasks.mine.lr: expected a positive number, got 0.0"),
        ("tasks.mine.batch_size=0", "tasks.mine.batch_size: expected a positive number, got 0"),
        ("tasks.mine.epochs=0", "tasks.mine.epochs: expected a positive number, got 0"),
        (
            "tasks.mine.seeds=[]",
            "tasks.mine.seeds: expected one or more different seeds, from 0 to less than 2^32",
        ),
        (
            "tasks.mine.seeds=[5000000000]",
            "tasks.mine.seeds: expected one or more different seeds, from 0 to",
        ),
        ("tasks.mine.weight_decay=-1", "tasks.mine.weight_decay: expected 0 or more, got -1.0"),
        ("tasks.mine.seeds=[1,2,1]", "tasks.mine.seeds: expected one or more different seeds"),
        ("tasks.mine.seeds=[-1]", "tasks.mine.seeds: expected one or more different seeds"),
        ("tasks.mine.seeds=[true]", "tasks.mine.seeds: "),
        ("tasks.mine.starts_from=mnli", "tasks.mine.starts_from: unknown task 'mnli'"),
        ("tasks.mine.starts_from=mine", "tasks.mine.starts_from: circular: mine <- mine"),
        ("tasks.mine.data.metrics=[f2]", "data.metrics: 'f2' is no metric of classification; known: accuracy"),
        ("tasks.mine.data.metrics=[]", "tasks.mine.data.metrics: expected at least one"),
        ("tasks.mine.data.kind=clasification", "tasks.mine.data.kind: "),
        ("tasks.mine.data.validation=1", "data.validation: expected a share between 0 and 1, got 1.0"),
        ("tasks.mine.data.validation={}", "data.validation: expected at least one file"),
        ("tasks.mine.data.validation={test: a.csv}", "data.validation.test: expected a name other than train, test"),
        ("tasks.mine.data.validation={near: 3}", "data.validation.near: expected a name other than"),
        ("tasks.mine.data={kind: tokens, text_pair: b, metrics: null}", "data.text_pair: has no effect with kind tok"),
        ("tasks.mine.data={kind: regression, labels: [a, b], metrics: null}", "labels: regression has no classes"),
        (
            "tasks.mine.data={kind: multiple_choice, metrics: null}",
            "data.choices: missing; multiple_choice needs a col",
        ),
        (
            "tasks.mine.data={kind: question_answering, metrics: null}",
            "data.text_pair: missing; question_answering nee",
        ),
        (
            "tasks.mine.data.unanswerable=true",
            "data.unanswerable: has no effect with kind classification; it is for qu",
        ),
        (
            "tasks.mine.data.choices=x",
            "data.choices: has no effect with kind classification; it is for multiple_choice",
        ),
        ("tasks.mine.data.max_answer_length=0", "data.max_answer_length: expected a positive number, got 0"),
        ("tasks.mine.data.labels=[a]", "data.labels: expected two or more different classes, got ['a']"),
        (
            "tasks.mine.data.label_names=[a, a]",
            "data.label_names: expected two or more different names, got ['a', 'a']",
        ),
        ("tasks.mine.data.label_columns=[a, b]", "data.label_columns: has no effect with kind classification; it is"),
        (
            "tasks.mine.data={kind: multilabel, label_columns: [a, a], metrics: null}",
            "data.label_columns: expected two or more different columns, and no label, got ['a', 'a']",
        ),
        (
            "tasks.mine.data={kind: multilabel, label_columns: [a, b], label_names: [c, d], metrics: null}",
            "data.label_names: needs labels, which gives the order of label_columns",
        ),
        ("tasks.mine.data.label_names=['1', '2']", "data.label_names: names that are numbers need labels"),
        (
            "tasks.mine.data={labels: ['1', '2'], label_names: [a]}",
            "data.label_names: expected as many as labels, 2, got 1",
        ),
        (
            "tasks.mine.early_stopping={watch: 1}",
            "early_stopping.watch: expected a share between 0 and 1, or a file, got",
        ),
        ("tasks.mine.early_stopping={watch: validation}", "watch: 'validation' is reported, and choosing the model by"),
        (
            "tasks.mine={early_stopping: {watch: a.csv}, data: {test: a.csv}}",
            "early_stopping.watch: 'a.csv' is reported",
        ),
        (
            "tasks.mine={early_stopping: {watch: dev}, data: {validation: {dev: a.csv}}}",
            "tasks.mine.early_stopping.watch: 'dev' is reported",
        ),
        ("tasks.mine.early_stopping={watch: 0.1, metric: f2}", "early_stopping.metric: 'f2' is no metric of classific"),
        ("tasks.mine.early_stopping={watch: 0.1, patience: 3x}", "patience: expected a number, with ba or ep, such as"),
        ("tasks.mine.early_stopping={watch: 0.1, patience: 0}", "early_stopping.patience: expected a number, with ba"),
        ("tasks.mine.early_stopping={patience: 2}", "tasks.mine.early_stopping.watch: missing"),
        (
            "tasks.mine.class_weights=balance",
            "tasks.mine.class_weights: expected one of balanced or keys and values or",
        ),
        ("tasks.mine.class_weights={yes: 0}", "tasks.mine.class_weights: expected one above 0 at least, got"),
        ("tasks.mine.class_weights={yes: -1}", "tasks.mine.class_weights.yes: expected 0 or more, got -1"),
        ("tasks.mine.class_weights={yes: much}", "tasks.mine.class_weights.yes: expected 0 or more, got 'much'"),
        (
            "tasks.mine={class_weights: balanced, data: {kind: regression, metrics: null}}",
            "tasks.mine.class_weights: the loss of kind regression has none",
        ),
        (
            "tasks.mine.data.validation={train: a.csv}",
            "validation.train: expected a name other than train, test, early",
        ),
        ("loggers.metrics_file={path: x}", "loggers.metrics_file: expected another logger; each run has this one"),
    ],
)
def test_each_kind_of_fault(override, fault):
    with pytest.raises(ConfigError) as error:
        own(override)
    assert fault in str(error.value)


def test_a_name_of_digits_is_a_text(write):
    tree = yaml.safe_load(Path("yamls/finetune_own.yaml").read_text())
    tree["tasks"][2019] = tree["tasks"].pop("mine")
    overrides = ["pretrained=x", "tasks.2019.data.train=a.csv", "tasks.2019.seeds=[0,4294967295]"]
    assert load(write(tree), overrides).tasks["2019"].seeds == [0, 2**32 - 1]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("ret", "tasks.ret: not a task of GLUE .did you mean 'rte'.* a task on your own files needs a section 'data'"),
        ("../x", "tasks: expected a name of letters"),
    ],
)
def test_names_of_tasks_that_are_refused(name, fault, write):
    tree = yaml.safe_load(Path("yamls/finetune_glue.yaml").read_text())
    tree["tasks"][name] = tree["tasks"].pop("rte")
    with pytest.raises(ConfigError, match=fault):
        load(write(tree), ["pretrained=x"])


def test_a_runs_description_is_its_spec(write):
    spec = RunSpec("mine", 17, "0123456789", None, True, own(), {"hf:owner/texts:train": ["a.arrow"]})
    assert read(RunSpec, write(dump(spec.described())), [], lambda spec, faults: None) == spec
    assert (spec.name, spec.folder) == ("mine-seed17", "runs/finetune-own/mine-seed17-01234567")


def test_every_field_is_explained():
    fields = re.findall(r"^    (\w+): .*\n(.*)", Path(config.__file__).read_text(), re.MULTILINE)
    count = sum(
        len(dataclasses.fields(x))
        for x in (LabelledData, EarlyStopping, TaskConfig, FinetuneConfig, RunSpec, PredictConfig)
    )
    assert len(fields) == count and [name for name, next_line in fields if '"""' not in next_line] == []


def test_config_imports_no_torch():
    code = "import sys, src.finetune.config, src.finetune.gpus, src.finetune.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
