"""Shards that other programs wrote: read as they are, or refused in one message that says what to do."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import JSONWriter, MDSWriter
from streaming.base.util import merge_index

from src import data_c4
from src.common.errors import ConfigError, DataError
from src.data.masking import MaskingCollator
from src.data.source import Source
from tests.conftest import VALIDATION

IDS = [[200, 201, 2, 300], [7], [999, 5, 5, 5, 5, 8]]
TEXTS = ["A river runs past the mill.", "größer", ""]


def write(folder, columns, rows, **options):
    """A split ``val`` by streaming's MDSWriter; returns its dataset's folder."""
    with MDSWriter(out=str(folder / "val"), columns=columns, **options) as writer:
        for row in rows:
            writer.write(row)
    return folder


def tokens(encoding, dtype, column="tokens", ids=IDS, shape=lambda x: x, **others):
    """Columns and rows of token ids, with the same ``others`` (encoding and value) in each row."""
    arrays = [shape(np.array(each, dtype)) for each in ids]
    values = [array.tobytes() if encoding == "bytes" else array for array in arrays]
    more = {name: value for name, (_, value) in others.items()}
    columns = {column: encoding, **{name: kind for name, (kind, _) in others.items()}}
    return columns, [{column: value, **more} for value in values]


MASKS = {"attention_mask": ("ndarray:int8", np.ones(4, np.int8)), "labels": ("ndarray:int64", np.array([-100, 5]))}


@pytest.fixture
def mixed(tokenizer, tmp_path):
    """Opens datasets of these columns and rows as one mixture, numbered in this order."""

    def mixed(parts):
        for i, part in enumerate(parts):
            write(tmp_path / f"{i:03}", *part)
        sources = {f"{i:03}": Source(str(tmp_path / f"{i:03}"), split="val") for i in range(len(parts))}
        return data_c4.StreamingC4(tokenizer, 32, sources=sources)

    return mixed


def fixed(*shape):
    array = np.arange(1, 33, dtype=np.int32).reshape(shape)
    return {"tokens": f"ndarray:int32:{','.join(map(str, shape))}"}, [{"tokens": array}]


def test_tokens_of_other_programs_are_read_as_they_are(mixed):
    forms = [
        tokens("bytes", np.int64),  # mosaicml/examples
        tokens("ndarray:int32", np.int32),  # llm-foundry
        tokens("ndarray:uint16", np.uint16, "input_ids"),  # ModernBERT
        tokens("ndarray:uint32", np.uint32),
        tokens("ndarray:uint64", np.uint64),
        tokens("ndarray", np.int16),  # the type is in each sample
        tokens("ndarray:int64", np.int64, "input_ids", **MASKS),
        tokens("bytes", np.int64, id=("str", "doc"), len=("int", 4), a=("jpeg_array", [b"x"])),
        tokens("ndarray:int32", np.int32, shape=lambda x: x[None], z=("uint8", 3)),  # of return_tensors="np"
    ]
    dataset = mixed([*forms, fixed(32), fixed(1, 32)])
    found = [dataset[i]["input_ids"].tolist() for i in range(dataset.size)]
    assert found == [*IDS * len(forms), *[list(range(1, 33))] * 2]


def test_padding_at_the_ends_is_cut_off(opened, tokenizer, tmp_path):
    pad = tokenizer.pad_token_id
    rows = [[2, 9, pad, 8, 3, *[pad] * 60], [pad, pad, 9]]
    dataset = opened(write(tmp_path, *tokens("ndarray:int32", np.int32, "input_ids", rows)), "val")
    assert [dataset[i]["input_ids"].tolist() for i in range(2)] == [[2, 9, pad, 8, 3], [9]]


def test_text_beside_other_columns_is_read(mixed, tokenizer):
    forms = [
        ({"text": "bytes"}, [{"text": text.encode()} for text in TEXTS]),
        ({"text": "str", "a": "json", "z": "int"}, [{"text": text, "a": [text], "z": 5} for text in TEXTS]),
        # Text comes first: it fits every tokenizer.
        ({"text": "bytes", "tokens": "bytes"}, [{"text": text.encode(), "tokens": b"?"} for text in TEXTS]),
        (
            {"text": "str", "tokens": "str", "input_ids": "int"},
            [{"text": t, "tokens": "", "input_ids": 5} for t in TEXTS],
        ),
    ]
    dataset = mixed(forms)
    found = [dataset[i]["input_ids"].tolist() for i in range(dataset.size)]
    assert found == [tokenizer(text)["input_ids"] for text in TEXTS] * len(forms)


def test_they_train_like_ours_alone_and_mixed(token_shards, opened, tokenizer, tmp_path):
    """The same masked batches; in a shuffled mixture, each sample of both once."""
    ours = opened(token_shards, "val")
    ids = [ours[i]["input_ids"] for i in range(VALIDATION)]
    theirs = opened(write(tmp_path / "remote", *tokens("bytes", np.int64, ids=ids), size_limit=3000), "val")
    collate = MaskingCollator(tokenizer, 0.3, seed=5)
    for mine, other in zip(*(collate_all(dataset, collate) for dataset in (ours, theirs)), strict=True):
        assert all(torch.equal(mine[name], other[name]) for name in mine)

    sources = {"ours": Source(token_shards, split="val"), "theirs": Source(str(tmp_path / "remote"), split="val")}
    mixed = data_c4.StreamingC4(tokenizer, 32, sources=sources, batch_size=4, num_canonical_nodes=1, shuffle=True)
    found = {(each["sample_id"], tuple(each["input_ids"].tolist())) for each in mixed}
    assert found == {(i, tuple(ids[i % VALIDATION].tolist())) for i in range(2 * VALIDATION)}


def collate_all(dataset, collate):
    samples = [dataset[i] for i in range(dataset.size)]
    return [collate(samples[i : i + 8]) for i in range(0, dataset.size, 8)]


def test_sample_that_does_not_fit_is_named(mixed):
    misfits = [
        (
            tokens("bytes", np.uint16),
            r"8 bytes are not int64 ids below 1,000; they fit ndarray:uint16: write the column so",
        ),
        (tokens("bytes", np.int32), "16 bytes are not int64 ids below 1,000; they fit ndarray:int32: write the column"),
        (tokens("bytes", np.int64, ids=[[1000]]), "8 bytes are not int64 .*; name the tokenizer that made them"),
        (tokens("ndarray:int32", np.int32, ids=[[5, 1000]]), "its ids are 5 to 1,000, .*1,000 entries; name the token"),
        (tokens("ndarray:int32", np.int32, ids=[[5, -100]]), "its ids are -100 to 5, .*; name the tokenizer"),
        (tokens("ndarray", np.float32), r"its tokens are float32\[4\], expected integers in one dimension"),
        (fixed(2, 16), r"its tokens are int32\[2, 16\], expected integers in one dimension"),
        (
            tokens("bytes", np.int64, ids=[[5] * 33]),
            r"it has 33 tokens, expected 1 to 32; set max_seq_len .--max_seq_le",
        ),
        (tokens("bytes", np.int64, ids=[[]]), "it has no tokens, or padding alone; write the dataset without it"),
        (tokens("bytes", np.int64, ids=[[0] * 40]), "it has no tokens, or padding alone"),
        (({"text": "bytes"}, [{"text": b"caf\xe9"}]), r"the text is not UTF-8 \(.*0xe9 in position 3.*; write it as U"),
    ]
    dataset = mixed([part for part, _ in misfits])
    for (_, message), first in zip(misfits, dataset.sample_offset_per_stream, strict=True):
        with pytest.raises(DataError, match=rf"val/shard.00000.mds, sample 0: {message}") as refused:
            dataset[first]
        assert "\n" not in str(refused.value) and "again" not in str(refused.value)
        dataset.failure = None


def test_sample_whose_sizes_do_not_fit_is_damaged(opened, tmp_path):
    path = write(tmp_path, {"text": "str", "z": "str"}, [{"text": "a", "z": "b"}]) / "val" / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-10] + np.array([1, 2], np.uint32).tobytes() + b"ab")
    with pytest.raises(DataError, match=r"\(a sample has 10 bytes, expected 11\); copy or convert it again"):
        opened(tmp_path, "val")[0]


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({"tokens": "bytes", "input_ids": "bytes"}, {"tokens": b"", "input_ids": b""}, "expected 'tokens' or 'input_i"),
        (
            {"tokens": "str"},
            {"tokens": "5 7"},
            "expected bytes or an ndarray of integers for column 'tokens', got 'str'",
        ),
        ({"input_ids": "ndarray:float32"}, {"input_ids": np.ones(3, np.float32)}, "for column 'input_ids', got 'ndarr"),
        ({"text": "json"}, {"text": "a"}, "expected str or bytes for column 'text', got 'json'"),
        ({"text": "str", "meta": "pkl"}, {"text": "a", "meta": 5}, "column_encodings: .* without pkl"),
        (
            {"content": "str"},
            {"content": "a"},
            r"no column 'text', 'tokens' or 'input_ids' \(content\); .*--text_column",
        ),
    ],
)
def test_columns_that_cannot_be_read_are_refused(columns, row, message, opened, tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}/val.*{message}"):
        opened(write(tmp_path, columns, [row]), "val")


@pytest.mark.parametrize("option", ["length_window", "moving_crop"])
def test_options_that_need_more_than_ids_are_refused(option, opened, tmp_path):
    folder = write(tmp_path, *tokens("ndarray:int32", np.int32))
    with pytest.raises(DataError, match=rf"val holds tokens.* train_loader.{option} to "):
        opened(folder, "val", **{option: 1}, shuffle=True, batch_size=1)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("cached", [False, True])
def test_merged_datasets_have_their_shards_in_subfolders(compression, cached, opened, tokenizer, tmp_path):
    for i in range(2):
        rows = [{"text": f"text {i} {j}"} for j in range(9)]
        with MDSWriter(out=str(tmp_path / f"all/val/{i:05}"), columns={"text": "str"}, compression=compression) as out:
            for row in rows:
                out.write(row)
    merge_index(str(tmp_path / "all/val"), keep_local=True)
    before = sorted(tmp_path.rglob("*"))
    options = {"remote": str(tmp_path / "all"), "cache_limit": "20kb"} if cached else {}
    dataset = opened(tmp_path / ("cache" if cached else "all"), "val", batch_size=2, num_canonical_nodes=1, **options)
    expected = [tokenizer(f"text {i} {j}")["input_ids"] for i in range(2) for j in range(9)]
    assert [each["input_ids"].tolist() for each in dataset] == expected
    assert len([*(tmp_path / "cache").rglob("*.mds")]) == 2 * cached
    for shard in range(2) if cached else []:  # as if the cache were full
        dataset.evict_shard(shard)
    assert not [*(tmp_path / "cache").rglob("*.mds*")]
    assert [dataset[i]["input_ids"].tolist() for i in range(18)] == expected
    made = {*tmp_path.rglob("*")} - {*before}
    assert all(path.suffix == ".mds" or cached for path in made)


def test_streamings_json_and_csv_are_refused_with_the_command_that_converts_them(tmp_path):
    with JSONWriter(out=str(tmp_path / "val"), columns={"text": "str"}) as out:
        out.write({"text": "a"})
    command = f"python convert_c4.py --out_root NEW --splits val --source {tmp_path}/val"
    for place in ([str(tmp_path)], [str(tmp_path), str(tmp_path / "cache")]):
        with pytest.raises(DataError, match=f"val/index.json describes shards of format 'json', .*: {command}$"):
            data_c4.main(place)


def test_a_folder_without_splits_is_told_from_a_missing_split(opened, tmp_path):
    write(tmp_path, {"text": "str"}, [{"text": "a"}])
    with pytest.raises(DataError, match=f"val is a split itself: name {tmp_path} as the folder, and val as the split"):
        opened(tmp_path / "val", "train")


def test_script_asks_for_the_tokenizer_of_tokens(tokenizer_folder, tmp_path, capsys):
    folder = str(write(tmp_path, *tokens("ndarray:uint16", np.uint16, "input_ids")))
    with pytest.raises(ConfigError, match=r"val does not say which tokenizer made its 'input_ids': give --tokenizer"):
        data_c4.main([folder])
    data_c4.main([folder, "--tokenizer", tokenizer_folder])
    assert "3 samples of tokens" in capsys.readouterr().out


@pytest.fixture
def read_only(monkeypatch):
    """Makes a folder look as if it could not be written: permissions do not bind root."""

    def read_only(folder):
        access = os.access

        def fixed(path, mode):
            return access(path, mode) and (mode != os.W_OK or not Path(path).is_relative_to(folder))

        monkeypatch.setattr(os, "access", fixed)

    return read_only


def state(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_nothing_is_written_to_a_complete_dataset(token_shards, text_shards, tokenizer, tmp_path):
    """By two runs at once, while both read: neither knows of the other."""
    folders = [Path(token_shards), Path(text_shards), write(tmp_path, *tokens("ndarray:int32", np.int32))]
    before = [state(folder) for folder in folders]
    sources = {str(i): Source(str(folder), split="val") for i, folder in enumerate(folders)}
    runs = [
        data_c4.StreamingC4(tokenizer, 32, sources=sources, batch_size=4, num_canonical_nodes=1, shuffle=True)
        for _ in range(2)
    ]
    for one, other in zip(*runs, strict=True):
        assert np.array_equal(one["input_ids"], other["input_ids"])
    assert [state(folder) for folder in folders] == before


@pytest.mark.parametrize("damage", ["index", "shard", "sample"])
def test_read_only_data_is_not_to_be_replaced(damage, opened, read_only, tmp_path):
    write(tmp_path, {"text": "str"}, [{"text": "a"}])
    name = "index.json" if damage == "index" else "shard.00000.mds"
    path = tmp_path / "val" / name
    path.write_bytes(b"\xff" * path.stat().st_size if damage == "sample" else b"")
    read_only(tmp_path)
    with pytest.raises(
        DataError, match="its folder is read-only: use another copy of the dataset, or ask its"
    ) as error:
        opened(tmp_path, "val")[0]
    assert "again" not in str(error.value) and "delete" not in str(error.value)


def test_compressed_shards_of_a_read_only_folder_need_a_cache(opened, read_only, tmp_path):
    write(tmp_path, {"text": "str"}, [{"text": "a"}], compression="zstd")
    read_only(tmp_path / "val")
    with pytest.raises(DataError, match=r"val is read-only, and its shards are compressed, .*remote \(data_remote\)"):
        opened(tmp_path, "val")
    dataset = opened(tmp_path / "cache", "val", remote=str(tmp_path), batch_size=1)
    assert len(dataset[0]["input_ids"]) == 3
