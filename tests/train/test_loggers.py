"""Loggers write metrics that can be read again, offline; a package or service that fails ends in one message."""

import importlib
import json
import struct
import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from src.common.errors import ConfigError
from src.train import builders, loggers
from src.train.config import load
from src.train.schema import Component
from tests.runs import QUICKSTART, UNSAVED, tiny_run

LOSS = "loss/train/total"


def wandb_records(path):
    """Records of a run's .wandb file: LevelDB's log format (github.com/google/leveldb, doc/log_format.md)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""  # W&B's own header
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_metrics_are_written_offline_and_read_again(token_shards, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    folder = {"mlflow": Component("mlflow", {"tracking_uri": f"file:{tmp_path}/mlruns"})}
    with pytest.raises(ConfigError, match="loggers.mlflow: .*sqlite:///.*MLFLOW_ALLOW_FILE_STORE=true"):
        loggers.build_loggers(folder, resumes=True)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    added = [
        f"loggers.wandb={{project: p, init_kwargs: {{dir: {tmp_path}}}}}",
        f"loggers.mlflow={{tracking_uri: '{store}', experiment_name: e, log_system_metrics: false}}",
    ]
    run = [*tiny_run(token_shards, tokenizer_folder, tmp_path), *UNSAVED, *added, "max_duration=2ba"]
    main.run([QUICKSTART, *run])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line[LOSS] for line in lines if LOSS in line]
    assert len(losses) == 2

    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FINISHED" and "metrics/eval/MaskedAccuracy" in logged.data.metrics
    assert [point.value for point in client.get_metric_history(logged.info.run_id, LOSS)] == losses

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    items = [item for record in wandb_records(file) for item in record.history.item]
    assert [json.loads(item.value_json) for item in items if LOSS in (item.key, *item.nested_key)] == losses

    events = EventAccumulator(str(tmp_path / "tensorboard" / "quickstart"))
    events.Reload()
    assert [point.value for point in events.Scalars(LOSS)] == losses


@pytest.mark.parametrize(("name", "package"), loggers.PACKAGES.items())
def test_a_package_that_is_not_installed_is_named_before_the_run(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    config = load(QUICKSTART, [f"loggers={{{name}: {{}}}}"])
    with pytest.raises(ConfigError) as error:
        builders.check_components(config)
    said = f"loggers.{name}: its package cannot be imported (import of {package} halted; None in sys.modules); "
    assert str(error.value) == said + "requirements-loggers.txt has the version to install"
    with pytest.raises(ConfigError, match="requirements-loggers.txt"):
        loggers.build_loggers(config.loggers, resumes=True)


def test_a_package_that_does_not_fit_the_stack_is_named(monkeypatch):
    def unfit(name):
        raise RuntimeError("gencode 6.31.1 runtime 5.29.6")  # protobuf's own error is no ImportError

    monkeypatch.setattr(importlib, "import_module", unfit)
    with pytest.raises(ConfigError, match=r"loggers.wandb: .*\(gencode 6.31.1 runtime 5.29.6\); requirements-loggers"):
        loggers.check_package("wandb")


def test_a_service_that_does_not_start_ends_in_one_message(tmp_path):
    (tmp_path / "file").touch()
    options = {"log_dir": str(tmp_path / "file")}
    (logger,) = loggers.build_loggers({"tensorboard": Component("tensorboard", options)}, resumes=True)
    with pytest.raises(ConfigError, match=r"^loggers.tensorboard: .*file"):
        logger.init(SimpleNamespace(run_name="run"), None)
