"""Converted splits: writing and reading them."""

import json
from pathlib import Path

import numpy as np
from streaming import StreamingDataset

import convert_c4
from src.data.index import TOKENS_KEY
from src.data.streaming import alone_on_node

TEXTS = ["a short one", "the cat sat on the mat and looked at the moon . " * 40, "the album"]


def convert(out, source, *options, split="mine"):
    convert_c4.main(["--out_root", str(out), "--splits", split, "--source", str(source), *options])
    return Path(out) / split


def rows_of(folder, **options):
    with alone_on_node():  # tests run in two processes
        dataset = StreamingDataset(**{"local": str(folder), "batch_size": 1, **options})
    return list(dataset)


def texts_of(folder):
    return [row["text"] for row in rows_of(folder)]


def json_of(path):
    return json.loads(path.read_text())


def tokens_of(folder):
    dtype = json_of(folder / "index.json")[TOKENS_KEY]["dtype"]
    return [np.frombuffer(row["tokens"], dtype).tolist() for row in rows_of(folder)]


def bytes_of(folder):
    """Every file's bytes, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())
