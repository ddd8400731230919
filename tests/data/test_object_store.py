"""Streaming from an object store: moto's S3 server, on this machine."""

import gc
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

import main
from src import data_c4
from src.common.errors import DataError
from src.data.source import without_password
from tests.conftest import VALIDATION
from tests.runs import QUICKSTART


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(server, monkeypatch):
    settings = {"S3_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**settings, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(store, server, token_shards):
    """The shards of tokens, in a bucket."""
    client = boto3.client("s3", endpoint_url=server)
    client.create_bucket(Bucket="corpus")
    for file in Path(token_shards).rglob("*.*"):
        client.upload_file(str(file), "corpus", f"c4/{file.relative_to(token_shards)}")
    return "s3://corpus/c4"


def test_samples_are_read_through_the_cache(bucket, token_shards, opened, tmp_path):
    here = opened(token_shards, "val")
    streamed = opened(tmp_path, "val", remote=bucket, batch_size=7, verify="hash")
    assert not list(tmp_path.rglob("*.mds"))
    assert sorted(sample["sample_id"] for sample in streamed) == list(range(here.size))
    assert all(np.array_equal(here[i]["input_ids"], streamed[i]["input_ids"]) for i in range(here.size))
    assert list(tmp_path.rglob("*.mds"))


def test_script_takes_tokenizer_and_length_from_the_bucket(bucket, tmp_path, capsys):
    data_c4.main([bucket, str(tmp_path), "--num_batches", "1"])
    assert f"{VALIDATION} samples of tokens" in capsys.readouterr().out


def test_run_trains_from_a_bucket(bucket, overrides, tmp_path, capsys):
    cache = tmp_path / "cache"
    options = [*overrides, f"data_remote={bucket}", f"data_local={cache}", "max_duration=2ba"]
    main.main([QUICKSTART, *options, "train_loader.predownload=32", "train_loader.cache_limit=1gb"])
    assert "eval LanguageCrossEntropy" in capsys.readouterr().out and list(cache.rglob("*.mds"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("bucket", "s3://nowhere/c4/val: index.json cannot be fetched (Object s3://nowhere/c4/val/index.json not"),
        ("credentials", "s3://corpus/c4/val: index.json cannot be fetched (Unable to locate credentials"),
        ("server", "s3://corpus/c4/val: index.json cannot be fetched (Could not connect to the endpoint URL"),
        ("scheme", "Unsupported remote path: s4://corpus/c4"),
    ],
)
def test_unreachable_store_is_one_message_within_a_minute(fault, message, store, overrides, monkeypatch, tmp_path):
    remote = {"bucket": "s3://nowhere/c4", "scheme": "s4://corpus/c4"}.get(fault, "s3://corpus/c4")
    if fault == "credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
    if fault == "server":
        monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    options = [*overrides, f"data_remote={remote}", f"data_local={tmp_path}/cache", "train_loader.split=val"]
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        main.run([QUICKSTART, *options])
    assert message in str(end.value) and "\n" not in str(end.value)
    assert time.monotonic() - began < 60  # not the half hour of dist_timeout


@pytest.mark.parametrize(
    ("remote", "module", "package"),
    [
        ("azure://b/c4", "azure.storage.blob", "azure-storage-blob azure-identity"),
        ("azure-dl://b/c4", "azure.storage.filedatalake", "azure-storage-file-datalake azure-identity"),
        ("gs://b/c4", "google.cloud.storage", "google-cloud-storage"),
        ("oci://b/c4", "oci", "oci"),
        ("sftp://me:secret@host/c4", "paramiko", "paramiko"),
    ],
)
def test_remote_without_its_package_is_refused(remote, module, package, opened, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    message = f"remote: {remote.replace(':secret', '')} cannot be opened .*; pip install {package}$"
    with pytest.raises(DataError, match=message):
        opened(tmp_path, "val", remote=remote)


def test_password_of_a_remote_is_not_printed(opened, tmp_path):
    with pytest.raises(DataError) as refused:
        opened(tmp_path, "val", remote="s4://me:s@cret@host/c4")
    assert "Unsupported remote path: s4://me@host/c4" in str(refused.value) and "cret" not in str(refused.value)
    assert without_password("a: s3://b/c@d:e (hf://x:y/z)") == "a: s3://b/c@d:e (hf://x:y/z)"
    signed = "a? 'https://u:p@h/x?sig=s3kr1t&b=c' (https://h/y?s3kr1t) https://h/z?s3kr1t/index.json: why?"
    assert without_password(signed) == "a? 'https://u@h/x' (https://h/y) https://h/z why?"


def test_complete_cache_outlives_its_bucket_without_the_remote(bucket, server, opened, tmp_path):
    list(opened(tmp_path, "val", remote=bucket, batch_size=7))
    gc.collect()
    client = boto3.client("s3", endpoint_url=server)
    client.delete_object(Bucket="corpus", Key="c4/val/index.json")
    advice = f"if {tmp_path}/val holds all shards, it can be used without the remote"
    with pytest.raises(DataError, match=rf"{bucket}/val: index.json cannot be fetched .*{advice}"):
        opened(tmp_path, "val", remote=bucket, download_retry=1)
    assert opened(tmp_path, "val").size == len(list(opened(tmp_path, "val", batch_size=1, num_canonical_nodes=1)))


def test_missing_object_ends_the_run(bucket, server, opened, tmp_path):
    dataset = opened(tmp_path, remote=bucket, batch_size=8, download_retry=1)
    client = boto3.client("s3", endpoint_url=server)
    for found in client.list_objects_v2(Bucket="corpus", Prefix="c4/train/shard")["Contents"]:
        client.delete_object(Bucket="corpus", Key=found["Key"])
    with pytest.raises(ValueError, match=r"train/shard.00000.mds cannot be read or fetched \(.*not found"):
        list(dataset)
