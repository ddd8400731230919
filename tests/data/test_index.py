"""index.json and the headers of shards: what does not fit is refused, in one message that names file and field."""

import copy
import gc
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from streaming.base.format import reader_from_json

from src import data_c4
from src.common.errors import DataError
from src.data.index import LENGTHS, TOKENS_KEY, parse_index, read_index
from src.data.shards import OpenShards, check_shards, dataset_fingerprints, hash_algorithm
from tests.conftest import VALIDATION

NAME = "here/index.json"


@pytest.fixture(scope="module")
def sound(token_shards):
    """An index with a second, compressed shard."""
    index = json.loads(Path(token_shards, "train", "index.json").read_text())
    shard = copy.deepcopy(index["shards"][0])
    shard["raw_data"]["basename"] = "shard.99999.mds"
    zipped = {"basename": "shard.99999.mds.zstd", "bytes": 7, "hashes": {"sha1": "1"}}
    index["shards"].append({**shard, "compression": "zstd", "zip_data": zipped})
    return index


def change(index, path, value):
    """A copy with another value at a path, or without it if the value is ``...``."""
    index = copy.deepcopy(index)
    at = index
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return index


RAW, ZIP = ("shards", 0, "raw_data"), ("shards", 1, "zip_data")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 3, "(version: expected 2, got 3)"),
        (("shards",), {}, "(shards: expected a list, got {})"),
        (("shards",), ..., "(shards: missing)"),
        (("shards", 0), 5, "(shards[0]: expected an object, got 5)"),
        (("shards", 1, "version"), True, "(shards[1].version: expected 2, got True)"),
        (("shards", 0, "format"), "abc", "(shards[0].format: expected 'mds', the only one that is read, got 'abc')"),
        (("shards", 0, "format"), ..., "(shards[0].format: missing)"),
        (("shards", 0, "raw_meta"), {}, "(shards[0].'raw_meta': unknown field)"),
        (("shards", 0, "samples"), 5.5, "(shards[0].samples: expected a number of at most 32 bits, got 5.5)"),
        (("shards", 0, "samples"), -5, "(shards[0].samples: expected"),
        (("shards", 0, "samples"), True, "(shards[0].samples: expected"),
        (("shards", 0, "samples"), math.nan, "(shards[0].samples: expected"),
        (("shards", 0, "samples"), 10**30, "(shards[0].samples: expected"),
        (("shards", 0, "samples"), 2**30, "(shards[0].samples: 1,073,741,824 are more than its bytes can hold)"),
        (("shards", 0, "size_limit"), "67mb", "(shards[0].size_limit: expected null or a number, got '67mb')"),
        (("shards", 0, "hashes"), ["sha1", 1], "(shards[0].hashes: expected a list of strings"),
        (("shards", 0, "compression"), "rar", "(shards[0].compression: expected null or a compression, got 'rar')"),
        (("shards", 0, "compression"), "zstd", "(shards[0].zip_data: expected an object with compression, else null)"),
        (("shards", 1, "compression"), None, "(shards[1].zip_data: expected an object with compression, else null)"),
        (("shards", 0, "column_names"), ["tokens", "x"], "(shards[0].column_encodings: expected one for each of"),
        (("shards", 0, "column_names"), ["tokens", "tokens"], "(shards[0].column_names: expected different names, got"),
        (("shards", 0, "column_names"), ["text"], "(shards[0].column_names: expected 'tokens' alone, got ['text'])"),
        (("shards", 0, "column_encodings"), ["pkl"], "(shards[0].column_encodings: expected one for each of column_na"),
        (("shards", 0, "column_encodings"), ["pkl:1"], "(shards[0].column_encodings: unknown in ['pkl:1']"),
        (("shards", 0, "column_encodings"), ["str"], "(shards[0].column_encodings: expected bytes for column 'tokens'"),
        (("shards", 0, "column_sizes"), [4], "(shards[0].column_sizes: expected [None], got [4])"),
        (("shards", 1, "column_names"), ["text"], "(shards[1].column_names: other columns than in shards[0])"),
        ((*RAW, "basename"), "../x", "(shards[0].raw_data.basename: expected a file in the index's folder or below"),
        ((*RAW, "basename"), "a/../../x", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "a/.x", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "a//x", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "a/", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "./x", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "a\\x", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "a/index.json", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "..", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "a\0b", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "\ud800", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "index.json", "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), LENGTHS, "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), 5, "(shards[0].raw_data.basename: expected"),
        ((*RAW, "basename"), "shard.99999.mds", "(shards[1].raw_data.basename: 'shard.99999.mds' is another file's"),
        ((*ZIP, "basename"), "/etc/x", "(shards[1].zip_data.basename: expected a file in the index's folder or below"),
        ((*RAW, "bytes"), "x", "(shards[0].raw_data.bytes: expected a number of at most 32 bits, got 'x')"),
        ((*ZIP, "bytes"), -1, "(shards[1].zip_data.bytes: expected"),
        ((*RAW, "hashes"), {"sha1": 5}, "(shards[0].raw_data.hashes: expected digests by hash, got {'sha1': 5})"),
        ((*RAW, "hashes"), {"crc7": "5"}, "(shards[0].raw_data.hashes: expected digests by hash"),
        ((*ZIP, "hashes"), ["sha1"], "(shards[1].zip_data.hashes: expected digests by hash"),
        ((*RAW, "mode"), 1, "(shards[0].raw_data.'mode': unknown field)"),
        ((TOKENS_KEY,), None, f"({TOKENS_KEY}: expected an object, got None)"),
        ((TOKENS_KEY, "dtype"), "bogus", f"({TOKENS_KEY}.dtype: expected uint16 or uint32, got 'bogus')"),
        ((TOKENS_KEY, "dtype"), "uint32", f"({TOKENS_KEY}.dtype: expected uint16 for 1,000 entries, got uint32)"),
        (
            (TOKENS_KEY, "vocab_size"),
            2**16 + 1,
            f"({TOKENS_KEY}.dtype: expected uint32 for 65,537 entries, got uint16)",
        ),
        ((TOKENS_KEY, "fingerprint"), ..., f"({TOKENS_KEY}.fingerprint: missing)"),
        ((TOKENS_KEY, "max_seq_len"), "32", f"({TOKENS_KEY}.max_seq_len: expected a positive number, got '32')"),
        ((TOKENS_KEY, "vocab_size"), 0, f"({TOKENS_KEY}.vocab_size: expected a positive number, got 0)"),
        ((TOKENS_KEY, "tokenizer"), ["a"], f"({TOKENS_KEY}.tokenizer: expected a string"),
    ],
)
def test_each_fault_is_named(path, value, message, sound):
    with pytest.raises(DataError) as refused:
        parse_index(json.dumps(change(sound, path, value)).encode(), NAME)
    assert f"{NAME} is broken {message}" in str(refused.value) and "\n" not in str(refused.value)


def test_other_columns_than_tokens_are_refused(sound):
    for name, value in ("column_names", "extra"), ("column_encodings", "str"), ("column_sizes", None):
        sound = change(sound, ("shards", 0, name), [*sound["shards"][0][name], value])
    with pytest.raises(DataError, match=r"\(shards\[0\].column_names: expected 'tokens' alone, got"):
        parse_index(json.dumps(sound).encode(), NAME)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'"\xff"', b"\xff\xfe{\x00}\x00", b"[1]", b"null", b"[" * 100_000, b'{"version": %s}' % (b"1" * 5000)],
    ids=["empty", "half", "not utf-8", "utf-16", "list", "null", "nested", "digits"],
)
def test_what_is_not_an_index_is_one_message(content):
    with pytest.raises(DataError, match=rf"^{NAME} is broken \(.*\); copy or convert") as refused:
        parse_index(content, NAME)
    assert "\n" not in str(refused.value)


def paths_of(tree, path=()):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from paths_of(value, (*path, key))


def test_any_changed_field_is_refused_or_read_by_streaming(sound):
    """Each field is removed, and replaced by each of these values. What is accepted is what streaming accepts, too."""
    values = [..., None, True, 0, -1, 5.5, 2**70, math.inf, "", "x", "../x", "int", [], [None], ["x"], {}, {"x": "y"}]
    accepted = refused = 0
    for path in paths_of(sound):
        for value in values:
            index = change(sound, path, value)
            try:
                found = parse_index(json.dumps(index).encode(), NAME)
            except DataError as error:
                assert NAME in str(error)
                refused += 1
                continue
            accepted += 1
            assert found == index
            for shard in found["shards"]:
                reader_from_json("", "", shard).validate(False)
    assert refused > 500 and accepted > 10


def test_sound_forms_are_read(sound):
    for path, value in [
        (("shards", 0, "samples"), 0),
        (("shards", 0, "size_limit"), None),
        (("url",), "a field that nobody reads"),
        ((TOKENS_KEY, "pack"), ...),
    ]:
        index = change(sound, path, value)
        assert parse_index(json.dumps(index).encode(), NAME) == index


def write_index(folder, change_index):
    index = json.loads((folder / "index.json").read_text())
    change_index(index)
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(token_shards, tmp_path):
    """A copy of a split."""
    (tmp_path / "mds" / "val").mkdir(parents=True)
    for path in Path(token_shards, "val").iterdir():
        (tmp_path / "mds" / "val" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "mds" / "val"


def test_every_reader_checks_the_index(folder, opened, tokenizer_folder):
    write_index(folder, lambda index: index["shards"][0].pop("format"))
    for read in (
        read_index,
        hash_algorithm,
        lambda folder: dataset_fingerprints([folder]),
        lambda folder: check_shards(folder, True, "off"),
        lambda folder: opened(folder.parent, "val"),
        lambda folder: opened(folder.parent / "cache", "val", remote=str(folder.parent)),
        lambda folder: data_c4.main([str(folder.parent), "--tokenizer", tokenizer_folder]),
    ):
        with pytest.raises(DataError, match=r"val/index.json is broken \(shards\[0\].format: missing\)"):
            read(folder)


def shard(folder):
    return next(folder.glob("*.mds"))


def header(position, value):
    """Writes an uint32 of the header: 0 is the number of samples, then their offsets."""

    def edit(folder):
        data = bytearray(shard(folder).read_bytes())
        data[4 * position : 4 * position + 4] = struct.pack("<I", value)
        shard(folder).write_bytes(data)

    return edit


def offsets(change):
    """Changes the offsets of the samples and of their end."""

    def edit(folder):
        data = bytearray(shard(folder).read_bytes())
        found = np.frombuffer(data, np.uint32, VALIDATION + 1, offset=4)
        change(found)
        shard(folder).write_bytes(data)

    return edit


def id_of_the_first_sample(value):
    def edit(folder):
        data = bytearray(shard(folder).read_bytes())
        begin = struct.unpack_from("<I", data, 4)[0] + 4
        data[begin : begin + 2] = struct.pack("<H", value)
        shard(folder).write_bytes(data)

    return edit


def longer_first_sample(offsets):
    offsets[1:9] = offsets[9]


def empty_first_sample(offsets):
    offsets[1] = offsets[0] + 4


def half_an_id(offsets):
    offsets[1] -= 1


def append(folder):
    shard(folder).write_bytes(shard(folder).read_bytes() + b"more")


def samples(number):
    return lambda folder: write_index(folder, lambda index: index["shards"][0].update(samples=number))


DAMAGE = [
    (append, r"has [\d,]+ bytes, not [\d,]+"),
    (lambda folder: shard(folder).write_bytes(b""), "has 0 bytes, not"),
    (samples(7), "is not a shard of 7 samples, or is damaged; copy"),
    (header(0, 5), "is not a shard of .*, or is damaged; copy"),
    (header(1, 8), "is not a shard of .*, or is damaged; copy"),  # the first sample would begin within the header
    (header(2, 2**32 - 1), "is not a shard of .*, or is damaged; copy"),
    (header(4, 0), "is not a shard of .*, or is damaged; copy"),
    (
        id_of_the_first_sample(65_535),
        r"cannot be read .*\(a sample has the id 65,535, and the tokenizer 1,000 entries\)",
    ),
    (id_of_the_first_sample(1000), r"cannot be read .*\(a sample has the id 1,000, and the tokenizer 1,000 entries\)"),
    (offsets(longer_first_sample), r"cannot be read .*\(a sample has \d+ tokens, expected 1 to 32\); copy"),
    (offsets(empty_first_sample), r"cannot be read .*\(a sample has 0 tokens, expected 1 to 32\); copy"),
    (offsets(half_an_id), r"cannot be read .*\(buffer size must be a multiple of element size\); copy"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
@pytest.mark.parametrize("cached", [False, True])
def test_shard_is_compared_with_the_index_when_it_is_opened(damage, message, cached, folder, opened, caplog):
    """Complete data: an error. A cache: it is fetched again once; here the remote itself is damaged, and has no hashes
    that would tell when it arrives."""
    damage(folder)
    write_index(folder, lambda index: index["shards"][0]["raw_data"]["hashes"].clear())
    options = {"remote": str(folder.parent), "batch_size": 4, "download_retry": 1} if cached else {"verify": "off"}
    dataset = opened(folder.parent / "cache" if cached else folder.parent, "val", **options)
    with pytest.raises(DataError, match=rf"shard.00000.mds {message}"):
        dataset[0]
    assert caplog.text.count("Fetching it again") == (cached and not message.startswith("has "))
    with pytest.raises(DataError, match="shard.00000.mds"):
        dataset[0]


def test_last_sample_that_would_end_past_its_shard_is_refused(folder):
    info = read_index(folder)["shards"][0]
    header(info["samples"] + 1, info["raw_data"]["bytes"] + 2)(folder)
    with pytest.raises(DataError, match=rf"ends at byte {info['raw_data']['bytes']:,}, within sample {VALIDATION - 1}"):
        OpenShards().read(str(shard(folder)), info["samples"] - 1, info["raw_data"]["bytes"], info["samples"])


def test_shard_that_another_replaced_is_not_read(folder):
    """Of the same size, with another number of samples."""
    info = read_index(folder)["shards"][0]
    assert OpenShards().read(str(shard(folder)), 0, info["raw_data"]["bytes"], info["samples"])
    with pytest.raises(DataError, match="is not a shard of"):
        OpenShards().read(str(shard(folder)), 0, info["raw_data"]["bytes"], info["samples"] - 1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("meta of another format", "describes shards of format 'xsv', and only MDS is read"),
        *((kind, r"is broken \(shards\[0\]") for kind in ("raw_data", "zip_data")),
    ],
)
def test_index_of_a_remote_cannot_write_outside_the_cache(kind, message, tokenizer, opened, tmp_path):
    """As in a bucket, whose keys may contain '..'."""
    remote, outside = tmp_path / "store" / "remote" / "train", tmp_path / "store" / "home" / "keys"
    for path, content in ((remote / "d.mds", b"hello\n"), (outside, b"a key")):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    (tmp_path / "user" / "home").mkdir(parents=True)
    files = {
        name: {"basename": base, "bytes": 5, "hashes": {}}
        for name, base in (("raw_data", "d.mds"), ("zip_data", "d.mds.zstd"), ("raw_meta", "../../home/keys"))
    }
    shard = {"version": 2, "format": "mds", "hashes": [], "samples": 1, "size_limit": None, "compression": "zstd"}
    shard |= {"column_names": ["text"], "column_encodings": ["str"], "column_sizes": [None]}
    if kind == "meta of another format":
        del shard["column_sizes"]
        shard |= {"format": "xsv", "newline": "\n", "separator": "|", "zip_meta": None, "compression": None}
        shard |= files | {"zip_data": None}
    else:
        shard |= {name: files[name] for name in ("raw_data", "zip_data")}
        shard[kind] = files["raw_meta"]
    (remote / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    with pytest.raises(DataError, match=rf"store/remote/train/index.json {message}"):
        list(opened(tmp_path / "user" / "cache", remote=str(remote.parent), batch_size=4, download_retry=1))
    gc.collect()
    assert not [path for path in (tmp_path / "user").rglob("*") if path.is_file()]
