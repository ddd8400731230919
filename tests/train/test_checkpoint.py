"""The reader of checkpoints: what it refuses, by whatever key a file is named."""

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

import export_hf
import main
from src.common.errors import CheckpointError
from src.train import checkpoint
from src.train.weights import read
from tests.runs import QUICKSTART, UNSAVED, losses_of, trainer_of


def change_a_bit(path):
    """In a tensor, so that torch reads it without an error."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def spoil(value):
    """A change of one weight, in a file that is whole."""

    def change(path):
        held = torch.load(path, weights_only=False)
        next(iter(held["state"]["model"].values())).view(-1)[3] = value
        torch.save(held, path)

    return change


UNSOUND = {
    "bytes": (change_a_bit, "damaged: wrong CRC of "),
    "nan": (spoil(float("nan")), "damaged: model.* is NaN or infinite"),
    "inf": (spoil(float("inf")), "damaged: model.* is NaN or infinite"),
}


@pytest.fixture(params=["bytes", "nan"])
def unsound(request, trained, tmp_path):
    """A folder of checkpoints whose newest is unsound, and the reason."""
    change, reason = UNSOUND[request.param]
    folder = Path(shutil.copytree(trained, tmp_path / "unsound", symlinks=True))
    change((folder / "latest-rank0.pt").resolve())
    return folder, reason


KEYS = {
    "load_path": ["load_path=FOLDER/latest-rank0.pt"],
    "weights": ["load_path=FOLDER/latest-rank0.pt", "load_weights_only=true"],
    "rank": ["load_path=FOLDER/latest-rank{rank}.pt"],
    "pretrained": ["pretrained=FOLDER"],
    "eval": ["--eval", "load_path=FOLDER/latest-rank0.pt"],
    "eval of rank": ["--eval", "load_path=FOLDER/latest-rank{rank}.pt"],
    "eval of pretrained": ["--eval", "pretrained=FOLDER"],
}


@pytest.mark.parametrize("key", KEYS)
def test_unsound_checkpoint_is_refused_by_each_key(key, unsound, overrides, tmp_path):
    folder, reason = unsound
    words = [word.replace("FOLDER", str(folder)) for word in KEYS[key]]
    with pytest.raises(CheckpointError, match=f"unsound/.*{reason}"):
        main.main([QUICKSTART, *overrides, *UNSAVED, *words])
    assert not (tmp_path / "metrics.jsonl").exists()


def test_unsound_checkpoint_is_not_exported_or_fine_tuned(unsound, tmp_path):
    folder, reason = unsound
    with pytest.raises(CheckpointError, match=reason):
        export_hf.main([str(folder / "latest-rank0.pt"), str(tmp_path / "out")])
    with pytest.raises(CheckpointError, match=reason):  # as finetune.py
        read(folder)


@pytest.mark.parametrize("name", UNSOUND)
def test_resume_falls_back_from_an_unsound_checkpoint(name, overrides, tmp_path, caplog):
    options = [*overrides, "autoresume=true", "save_interval=1ba", "eval_interval=0"]
    folder = tmp_path / "checkpoints"
    whole, _ = losses_of(options, kill_at=4)
    change, reason = UNSOUND[name]
    change((folder / "latest-rank0.pt").resolve())
    again, _ = losses_of(options)
    assert again == {step: loss for step, loss in whole.items() if step > 2}
    assert "ep0-ba3-rank0.pt is damaged" in caplog.text and (folder / "ep0-ba3-rank0.pt.damaged").exists()
    assert reason.removeprefix("damaged: ").split(".*")[0] in caplog.text


def test_newest_of_two_checkpoints_of_a_step_is_that_of_the_later_epoch(trained, tmp_path):
    folder = checkpoint.RunFolder(str(tmp_path))
    for name in ("ep9-ba8", "ep10-ba8", "ep9-ba7", "ep11-ba8"):
        shutil.copy(trained / "latest-rank0.pt", tmp_path / f"{name}-rank0.pt")
    names = [path.name.removesuffix("-rank0.pt") for path in folder.saved(until="ep10-ba8-rank0.pt")]
    assert names == ["ep9-ba7", "ep9-ba8", "ep10-ba8"]
    folder.point_latest(tmp_path / "ep10-ba8-rank0.pt")
    assert folder.newest() == str(tmp_path / "ep10-ba8-rank0.pt")
    folder.close()


# What is not a file of main.py


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("flags", [[], ["--eval"], ["load_weights_only=true"]])
def test_folder_is_no_checkpoint_and_nothing_in_it_is_unpickled(flags, overrides, tmp_path):
    """As torch.distributed.checkpoint writes it."""
    sharded, proof = tmp_path / "ep0-ba4", tmp_path / "it-ran"
    sharded.mkdir()
    (sharded / ".metadata").write_bytes(pickle.dumps(Attack(str(proof))))
    (sharded / "__0_0.distcp").write_bytes(pickle.dumps(Attack(str(proof))))
    with pytest.raises(SystemExit, match=r"ep0-ba4 is a folder; expected a file, such as latest-rank0\.pt"):
        main.run([QUICKSTART, *flags, *overrides, *UNSAVED, f"load_path={sharded}"])
    assert not proof.exists()


def test_folder_in_place_of_a_checkpoint_is_damage(overrides, tmp_path):
    (tmp_path / "checkpoints" / "ep0-ba4-rank0.pt").mkdir(parents=True)
    (tmp_path / "checkpoints" / "ep0-ba4-rank0.pt" / ".metadata").write_bytes(pickle.dumps(Attack(str(tmp_path / "x"))))
    with pytest.raises(SystemExit, match="every checkpoint is damaged"):
        main.run([QUICKSTART, *overrides, "autoresume=true"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([1], "it has no 'state'"),
        ({"state": [1]}, "it has no 'state'"),
    ],
)
def test_file_of_something_else_is_refused(held, message, overrides, tmp_path):
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"x.pt: not a checkpoint of a run: {message}"):
        trainer_of([*overrides, *UNSAVED, f"load_path={tmp_path}/x.pt"])


JUNK = {
    "model": [None, {}, {"a": 1}, {1: torch.zeros(1)}],
    "callbacks": [None, [], {"RunEnd": []}, {"RunEnd": {"stopped": {"x": 1}}}, {"ResumeCheck": ["a"]}],
    "timestamp": [None, {}, {"Timestamp": {}}, {"Timestamp": {"batch": "x"}}],
    "optimizers": [None, {}, {"AdamW": 1}],
    "schedulers": [None, {}],
    "algorithms": [None, 3],
    "dataset_state": [None, [], {"train": {}}, {"train": {"epoch": "x"}}],
    "rng": [None, 3],
}
"""Other values of each field that is read; None: the field is missing."""


def with_field(start, path, name, value):
    held = checkpoint.load_data(start)
    part = held if name == "rng" else held["state"]
    if value is None:
        del part[name]
    else:
        part[name] = value
    torch.save(held, path)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in JUNK.items() for value in values])
def test_each_field_of_a_checkpoint_is_checked(name, value, trained, tmp_path):
    path, message = tmp_path / "x.pt", f"x.pt: not a checkpoint of a run: its '{name}' is missing or of another form"
    with_field(trained / "latest-rank0.pt", path, name, value)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(path, to_resume=True)
    needed = name in ("model", "callbacks", "timestamp")
    with pytest.raises(CheckpointError, match=message) if needed else contextlib.nullcontext():
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("algorithms", lambda _: [["EMA", {"weights": torch.tensor([1.0, float("nan")])}]], "is NaN or infinite"),
        ("optimizers", lambda held: {**held, "x": {"exp_avg": torch.tensor(float("inf"))}}, "is NaN or infinite"),
        ("model", lambda held: {**held, "x": torch.zeros(2).to_sparse()}, "x is not a dense tensor"),
        ("model", lambda held: {**held, "x": torch.zeros(2, device="meta")}, "x is not a dense tensor"),
        ("model", lambda held: {**held, "x": torch.full([2], float("nan")).to(torch.float8_e4m3fn)}, "is NaN or"),
    ],
)
def test_numbers_of_a_checkpoint_are_checked(name, change, reason, trained, tmp_path):
    state = checkpoint.load_data(trained / "latest-rank0.pt")["state"]
    with_field(trained / "latest-rank0.pt", tmp_path / "x.pt", name, change(state[name]))
    with pytest.raises(CheckpointError, match=rf"x\.pt: .*{reason}"):
        checkpoint.read(tmp_path / "x.pt", to_resume=True)


def test_parts_that_do_not_fit_the_run_are_one_message(trained, overrides, tmp_path):
    """Composer gives them to optimizers and schedules, which have errors of their own."""
    (name,) = checkpoint.load_data(trained / "latest-rank0.pt")["state"]["optimizers"]
    with_field(trained / "latest-rank0.pt", tmp_path / "x.pt", "optimizers", {name: {"state": 3}})
    with pytest.raises(SystemExit, match=r"x\.pt: the checkpoint does not fit this run \("):
        more = ["max_duration=6ba", "resume.allow=[max_duration,optimizer]"]
        main.run([QUICKSTART, *overrides, *UNSAVED, *more, f"load_path={tmp_path}/x.pt"])


ARCHIVES = ["x.tar", "x.tgz", "x.tar.gz", "x.pt.gz", "x.pt.symlink", "missing.pt"]


@pytest.mark.parametrize(
    ("name", "flags"), [*((name, []) for name in ARCHIVES), ("x.tar", ["--eval"]), ("x.tar", ["--validate"])]
)
def test_no_archive_is_unpacked_and_no_other_file_is_written(name, flags, trained, overrides, tmp_path):
    """A checkpoint that is an archive, too, would write where its members say; x.pt.gz is unpacked into x.pt."""
    if name != "missing.pt":
        shutil.copy((trained / "latest-rank0.pt").resolve(), tmp_path / name)
    (tmp_path / "x.pt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    message = "no such file" if name == "missing.pt" else "an archive or a link by its name"
    with pytest.raises(SystemExit, match=rf"{name}: {message}"):
        main.run([QUICKSTART, *flags, *overrides, *UNSAVED, f"load_path={tmp_path}/{name}"])
    assert (tmp_path / "x.pt").read_text() == "mine" and sorted(tmp_path.rglob("*")) == before


# Object stores


@pytest.fixture
def bucket(monkeypatch):
    """A client, and the URI of an empty bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    settings = {"S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="checkpoints")
    yield client, "s3://checkpoints"
    server.stop()


def test_checkpoint_of_an_object_store_is_checked(bucket, unsound, trained, overrides, capsys):
    client, uri = bucket
    folder, reason = unsound
    client.upload_file(str(folder / "latest-rank0.pt"), "checkpoints", "bad.pt")
    client.upload_file(str(trained / "latest-rank0.pt"), "checkpoints", "good.pt")
    client.upload_file(str(trained / "latest-rank0.pt"), "checkpoints", "good.tar")
    options = [QUICKSTART, "--eval", *overrides, *UNSAVED]
    main.main([*options, f"load_path={uri}/good.pt"])
    assert "eval LanguageCrossEntropy=" in capsys.readouterr().out
    for name, message in (("bad.pt", reason), ("good.tar", "an archive or a link by its name")):
        with pytest.raises(CheckpointError, match=f"^{uri}/{name}: .*{message}"):
            main.main([*options, f"load_path={uri}/{name}"])
    with pytest.raises(CheckpointError, match=f"^{uri}/good.pt: the checkpoint is of another model"):
        main.main([*options, "model.model_config.hidden_size=48", f"load_path={uri}/good.pt"])


@pytest.mark.parametrize(
    ("key", "uri", "reason"),
    [
        ("load_path", "s3://b/x.pt", "Unable to locate credentials"),
        ("save_folder", "s3://b/run", "Unable to locate credentials"),
        ("load_path", "gs://b/x.pt", "cannot be used ("),
        ("save_folder", "oci://b/run", "cannot be used ("),
        ("save_folder", "azure://b/run", "cannot be used ("),
        ("load_path", "s4://b/x.pt", "no implementation for the cloud backend s4"),
        ("save_folder", "s4://b/run", "no implementation for the cloud backend s4"),
    ],
)
def test_store_that_cannot_be_used_is_one_message(key, uri, reason, overrides, monkeypatch, tmp_path):
    """No credentials, no such store, or no client, which the pinned stack has."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(SystemExit) as end:
        main.run([QUICKSTART, *overrides, *UNSAVED, f"{key}={uri}", f"autoresume={str(key == 'save_folder').lower()}"])
    assert uri in str(end.value) and reason in str(end.value) and "\n" not in str(end.value)
