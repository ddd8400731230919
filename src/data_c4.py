"""The data's way: MDS shards -> samples -> masked, padded batches.

    StreamingC4            one sample: ids, sample id, epoch; shards of text (tokenized here) or of tokens; one dataset
                           or several, mixed; in streaming's order, or with samples of like length together
    EachSampleOnce         evaluation's view of it: no sample repeated, none left out
    MaskingCollator        samples -> padded (B, S) batch, masked as a pure function of seed, epoch, sample, position

Letters: B sequences, S longest length in the batch, T real tokens, M masked tokens.

As a script it prints what training would see:  python src/data_c4.py REMOTE [LOCAL] [--split val]
"""

import argparse
import bisect
import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NotRequired, TypedDict

if __name__ == "__main__":  # python src/data_c4.py: packages before the files of src, and src as a package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import huggingface_hub
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from streaming import Stream, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState
from streaming.base.hashing import get_hash
from streaming.base.shuffle import get_shuffle
from streaming.base.util import wait_for_file_to_exist
from streaming.base.world import World
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from src.microbatches import IGNORED, Batch, num_tokens

log = logging.getLogger(__name__)

TOKENS_KEY = "mosaic_bert_tokens"
"""Key of index.json that describes shards of tokens; streaming reads past it. Shards of text have none."""

LENGTHS = "lengths.bin"
"""File beside the index.json of shards of tokens: each sample's length, little-endian uint16, in the index's order."""


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def load_tokenizer(name_or_folder: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer with BERT's special tokens, from a folder, the local cache, or the hub, in that order.

    Raises:
        ValueError: there is none, or it is not fast, or it lacks one of [CLS], [SEP], [MASK], [PAD].
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        if not any((folder / file).exists() for file in ("tokenizer.json", "vocab.txt", "tokenizer_config.json")):
            raise ValueError(f"tokenizer {name_or_folder!r}: this folder holds no tokenizer")
        tokenizer = _from_pretrained(name_or_folder, local_files_only=True)
    elif name_or_folder.startswith((".", "/", "~")) or name_or_folder.count("/") > 1:
        raise ValueError(f"tokenizer {name_or_folder!r}: there is no such folder")
    else:
        tokenizer = _hub_tokenizer(name_or_folder)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name_or_folder!r} has no fast version (no tokenizer.json); it is too slow to use")
    lacking = [name for name in ("cls", "sep", "mask", "pad") if getattr(tokenizer, f"{name}_token_id") is None]
    if lacking:
        raise ValueError(f"tokenizer {name_or_folder!r} has no {', '.join(lacking)} token; BERT's training needs them")
    _restore_saved_parts(tokenizer, name_or_folder)
    # Some folders carry truncation and padding of their own; lengths are ours to decide.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _from_pretrained(name: str, **options: Any) -> Any:
    """transformers' tokenizer; code that comes with one is never run, and nobody is asked whether it may be.

    Raises:
        OSError: it is not there.
        ValueError: this version of transformers cannot read it.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except OSError:
        raise
    except Exception as error:  # whatever a file that it does not understand makes of it
        raise ValueError(
            f"tokenizer {name!r}: transformers {transformers.__version__} cannot read it ({_first_line(error)}); what "
            "transformers 5 saved may need 5, the current stack"
        ) from None


def _hub_tokenizer(name: str) -> Any:
    """From the local cache, else from the hub, which is said."""
    try:
        return _from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        log.warning("tokenizer %r is neither a folder nor cached: asking the Hugging Face hub", name)
    try:
        huggingface_hub.model_info(name, timeout=10)  # offline this fails at once; from_pretrained tries for a minute
        return _from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"tokenizer {name!r} is neither a folder, nor cached, nor to be had from the hub ({reason}). "
            "Give the path of a tokenizer folder (train_tokenizer.py makes one), or go online."
        ) from None


def _restore_saved_parts(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Make a tokenizer what its tokenizer.json says, as transformers 4 does.

    transformers 5 builds the tokenizers of a model type from the vocabulary and puts that type's own normalizer,
    pre-tokenizer and post-processor in the place of the saved ones.
    """
    path = cached_file(name, "tokenizer.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    if int(transformers.__version__.split(".")[0]) < 5 or path is None:
        return
    backend, saved = tokenizer.backend_tokenizer, Tokenizer.from_file(path)
    if type(saved.model) is type(backend.model) and saved.get_vocab() == backend.get_vocab():
        backend.model = saved.model
    if not (type(saved.normalizer) is type(backend.normalizer) is BertNormalizer):  # else tokenizer_config.json decides
        backend.normalizer = saved.normalizer
    backend.pre_tokenizer, backend.post_processor = saved.pre_tokenizer, saved.post_processor
    backend.decoder = saved.decoder


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer that AutoTokenizer of transformers 4 and 5 loads, and that gives the same ids under both.

    What transformers 5 writes is not always read by 4: the class TokenizersBackend, a list of extra special tokens.
    """
    tokenizer.save_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        config["additional_special_tokens"] = extra
    for name in ("backend", "is_local", "local_files_only", "model_specific_special_tokens"):
        config.pop(name, None)
    parts = json.loads(backend.to_str())
    normalizer = parts["normalizer"] or {}
    if normalizer.get("type") == "BertNormalizer":  # both versions let these options win over tokenizer.json
        config["do_lower_case"], config["strip_accents"] = normalizer["lowercase"], normalizer["strip_accents"]
        config["tokenize_chinese_chars"] = normalizer["handle_chinese_chars"]
    word_piece = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    word_piece["unk_token"] = str(tokenizer.unk_token)
    is_bert = (
        word_piece.items() <= parts["model"].items()
        and normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and parts["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and parts["post_processor"] in _bert_post_processors(tokenizer)
    )
    if not is_bert or config["tokenizer_class"] == "TokenizersBackend":
        # transformers 5 builds any other class anew from the vocabulary; this one is what tokenizer.json says.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256, in hex, of all that decides which ids a text becomes.

    [CLS] A [SEP] B [SEP] has two forms in a tokenizer.json, the one that transformers 4 writes and the one that 5
    writes; they have one fingerprint.
    """
    return _fingerprint(tokenizer, 0)


def earlier_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """What shards and checkpoints may hold in its place that were made when the two forms had a fingerprint each."""
    return _fingerprint(tokenizer, 1)


def _fingerprint(tokenizer: PreTrainedTokenizerFast, form: int) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None
    forms = _bert_post_processors(tokenizer)
    if backend["post_processor"] in forms:
        backend["post_processor"] = forms[form]
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps([backend, special], sort_keys=True).encode()).hexdigest()


def _bert_post_processors(tokenizer: PreTrainedTokenizerFast) -> tuple[dict[str, Any], dict[str, Any]]:
    """[CLS] A [SEP] B [SEP] as transformers 4 writes it, and as 5 does."""
    cls = str(tokenizer.cls_token), tokenizer.cls_token_id
    sep = str(tokenizer.sep_token), tokenizer.sep_token_id

    def special(name: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    single = [special(cls[0], 0), {"Sequence": {"id": "A", "type_id": 0}}, special(sep[0], 0)]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}, special(sep[0], 1)],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (cls, sep)},
    }
    return {"type": "BertProcessing", "sep": list(sep), "cls": list(cls)}, template


def encode_prefix(tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int) -> list[int]:
    """The first ``max_tokens`` ids of ``text``, no special tokens, without tokenizing all that is cut off.

    The text is cut between words, where WordPiece and byte-level BPE cut too, so the ids are exact.
    """
    characters = 6 * max_tokens  # English has 4 to 5 characters a word piece
    while True:
        end = len(text)
        if characters < end:
            end = _last_blank(text, 0, characters)
            end = len(text) if end <= 0 else end
        ids = tokenizer.backend_tokenizer.encode(text[:end], add_special_tokens=False).ids
        if len(ids) >= max_tokens or end == len(text):
            return ids[:max_tokens]
        characters *= 2


def encode_crop(tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int, turn: int) -> list[int]:
    """At most ``max_tokens`` ids of ``text``, no special tokens, from another place each turn: in time, all of them.

    The text is cut between words into stretches, of which only the turn's is tokenized, and its ids into windows. So
    the work does not grow with the text, and the ids are exact. The last stretch reaches back to be as long as the
    others, and so does the last window.
    """
    size = 8 * max_tokens  # characters: the ids of one or two windows

    def between_words(at: int) -> int:
        blank = _last_blank(text, max(at - size, 0), at)
        return at if blank < 0 else blank

    stretches = max(1, -(-len(text) // size))
    stop = min((turn % stretches + 1) * size, len(text))
    start = between_words(max(stop - size, 0))
    stop = between_words(stop) if stop < len(text) else stop
    ids = tokenizer.backend_tokenizer.encode(text[start:stop], add_special_tokens=False).ids
    windows = max(1, -(-len(ids) // max_tokens))
    end = min((turn // stretches % windows + 1) * max_tokens, len(ids))
    return ids[max(end - max_tokens, 0) : end]


def _last_blank(text: str, start: int, stop: int) -> int:
    """Position of the last blank or line break in ``text[start:stop]``, or -1."""
    return max(text.rfind(" ", start, stop), text.rfind("\n", start, stop))


# ----------------------------------------------------------------------------------------------------------------------
# Samples
# ----------------------------------------------------------------------------------------------------------------------


class DataError(ValueError):
    """A dataset is damaged or does not fit the run; the message says what, where and what to do."""


def check_shards(folder: Path, complete: bool, verify: str = "size") -> None:
    """Compare a split's index.json with its files: 0.1 s for 20,000 shards, unless their hashes are compared too.

    Args:
        folder: of the split, with index.json.
        complete: every shard must be here, with the size that the index states; else (a cache that fills up) only what
            is here is compared, and what is damaged is deleted, with a warning, to be fetched again.
        verify: ``size``; ``hash`` reads each file, on all cores, under a progress bar; ``off`` compares no files.

    Raises:
        DataError: the index is broken or names a file outside the folder; shards are missing, of another size, or of
            another hash; or the index has no hashes to compare.
    """
    try:
        shards = json.loads((folder / "index.json").read_text())["shards"]
        files = [
            [info for info in (shard["raw_data"], shard["zip_data"]) if info is not None and info["basename"]]
            for shard in shards
        ]
        total = sum(shard["samples"] for shard in shards)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'index.json'} is broken ({error!r}); convert or copy the split again") from None
    if not total:
        raise DataError(f"{folder} is an empty dataset; convert the text again")
    faults, damaged, sound = [], [], []
    for either in files:
        for info in either:
            if Path(info["basename"]).name != info["basename"]:
                raise DataError(f"{folder / 'index.json'} names {info['basename']!r}, outside its folder")
        here = [info for info in either if (folder / info["basename"]).exists()] if verify != "off" else []
        if complete and not here and verify != "off":
            faults.append(f"{either[0]['basename']} is missing")
        for info in here:
            found = (folder / info["basename"]).stat().st_size
            if found != info["bytes"]:
                faults.append(f"{info['basename']} has {found:,} bytes, not {info['bytes']:,}")
                damaged.append(info)
            else:
                sound.append(info)
    if verify == "hash":
        others = _other_hashes(folder, sound)
        faults += [f"{info['basename']} has other bytes than when it was written" for info in others]
        damaged += others
    if faults:
        shown = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        if not complete:
            log.warning("%s: %s. Fetching again what is damaged", folder, shown)
            for info in damaged:
                (folder / info["basename"]).unlink()
            return
        raise DataError(f"{folder}: {shown}. Copy these shards again, or convert the split again")


def _other_hashes(folder: Path, files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of ``files`` (of index.json) whose bytes have another hash than the index states."""
    for info in files:
        if not info["hashes"]:
            raise DataError(f"{folder / 'index.json'} has no hashes to compare; convert again, or data_verify: size")

    def differs(info: dict[str, Any]) -> bool:
        algorithm, want = next(iter(info["hashes"].items()))
        return get_hash(algorithm, (folder / info["basename"]).read_bytes()) != want

    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        progress = tqdm(pool.map(differs, files), desc=f"hashes of {folder}", total=len(files), unit="shard", delay=1)
        return [info for info, found in zip(files, progress, strict=True) if found]


class Sample(TypedDict):
    """What a dataset yields."""

    input_ids: NDArray[Any]
    """(length,) ids, [CLS] and [SEP] included, any integer type."""
    sample_id: int
    """Position in the dataset, the same for any shuffle and world size; in a mixture the datasets follow each other. A
    sample that an epoch draws more than once counts on by the dataset's size, so that it is masked otherwise."""
    epoch: int
    """Pass over the data, from 0; with the sample id it decides what is masked."""
    stream: NotRequired[int]
    """Which of the mixed datasets it comes from; only where there are several."""


class OpenShards:
    """Raw shards that stay open in this process, so that a sample is one read; streaming opens the file for each.

    Reads, not maps: a file that shrinks ends in an error and not in a killed process.

    Args:
        limit: files open at once; the least recently opened is closed for the next.
    """

    def __init__(self, limit: int = 64):
        self.limit = limit
        self.process = 0
        self.files: dict[str, tuple[io.FileIO, NDArray[np.uint32]]] = {}

    def read(self, path: str, index: int) -> bytes:
        """Bytes of a shard's sample (MDS: a count, then the offsets of all samples and of the end, then samples)."""
        if self.process != os.getpid():  # descriptors that a fork shares are left to the parent
            self.process, self.files = os.getpid(), {}
        if path not in self.files:
            for opened, (file, _) in list(self.files.items()):  # an evicted shard takes up disk while it is open
                if len(self.files) >= self.limit or not os.fstat(file.fileno()).st_nlink:
                    self.files.pop(opened)[0].close()
            file = io.FileIO(path)
            (samples,) = np.frombuffer(file.read(4), np.uint32)
            self.files[path] = file, np.frombuffer(file.read(4 * (int(samples) + 1)), np.uint32)
        file, offsets = self.files[path]
        begin, end = offsets[index : index + 2].tolist()
        data = os.pread(file.fileno(), end - begin, begin)
        if len(data) != end - begin:
            raise DataError(f"{path} ends at byte {begin + len(data):,}, within sample {index}")
        return data

    def forget(self, path: str) -> None:
        """Close a shard; the next read opens what is then there."""
        if path in self.files:
            self.files.pop(path)[0].close()


class Locator:
    """Where samples lie, in place of streaming's Spanner: a binary search, and no memory for each sample.

    Ids past the end begin again at the first sample: they are later drawings of the same samples in an epoch.
    """

    def __init__(self, samples_per_shard: NDArray[np.int64]):
        self.starts = [0, *np.cumsum(samples_per_shard).tolist()]
        self.num_samples = self.starts.pop()

    def __getitem__(self, sample_id: int) -> tuple[int, int]:
        """Shard, and position in it."""
        index = int(sample_id) % self.num_samples
        shard_id = bisect.bisect_right(self.starts, index) - 1
        return shard_id, index - self.starts[shard_id]


@dataclass(frozen=True)
class Source:
    """A dataset, alone or one of several that are mixed. At most one of the weights is given, of one kind for all."""

    local: str
    """Folder of the dataset, or the cache when there is a ``remote``."""
    remote: str | None = None
    """Path or object-store URI to stream from; None or the same as ``local`` when the data is here already."""
    split: str | None = None
    """Subfolder."""
    proportion: float | None = None
    """Share of an epoch's samples, relative to the other sources'; an epoch is as long as all of them together."""
    repeat: float | None = None
    """Times that an epoch draws each sample: 0.5 draws half of them, 2 each of them twice."""
    choose: int | None = None
    """Samples that an epoch draws."""

    @property
    def folder(self) -> Path:
        """Of the split, with index.json, here or in the cache."""
        return Path(self.local) / (self.split or "")

    @property
    def complete(self) -> bool:
        """Whether all the data is here, and not in a cache that fills up."""
        return self.remote is None or Path(self.remote) == Path(self.local)

    def check(self, verify: str) -> None:
        """Before streaming looks at it: there is a dataset; if all of it must be here, it is."""
        source = Path(self.remote or self.local)
        if "://" not in str(self.remote) and not (source / (self.split or "") / "index.json").is_file():
            there = sorted(p.parent.name for p in source.glob("*/index.json"))
            raise DataError(
                f"{source / (self.split or '')} holds no dataset (no index.json); "
                f"{'splits there: ' + ', '.join(there) if there else 'make one with convert_c4.py'}"
            )
        if self.complete:
            check_shards(self.folder, True, verify)

    def stream(self) -> Stream:
        """As streaming takes it."""
        weights = {"proportion": self.proportion, "repeat": self.repeat, "choose": self.choose}
        given = {name: weight for name, weight in weights.items() if weight is not None}
        return Stream(local=self.local, remote=self.remote, split=self.split, **given)  # pyright: ignore


def occurrences(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each id stood before in ``ids``: [7, 5, 7, 7] gives [0, 0, 1, 2]."""
    order = np.argsort(ids, kind="stable")  # merges runs, which these are: quick
    ranked = ids[order]
    first = np.flatnonzero(np.diff(ranked, prepend=ranked[:1] - 1))
    counts = np.empty_like(ids)
    counts[order] = np.arange(len(ids)) - np.repeat(first, np.diff(first, append=len(ids)))
    return counts


def group_lengths(
    lengths: NDArray[np.uint16], nodes: int, batch: int, window: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """An order in which global batches are of like length: the (N,) positions of a shuffled epoch, permuted.

    Streaming deals the epoch out in equal parts to ``nodes`` canonical nodes, and a global batch takes the next few
    samples of each. So each part is cut into windows of ``window`` batches and sorted by length in each window (ties
    stay as they were shuffled); then a window's batches are permuted, in the same way for all nodes, so that what a
    batch takes from each is of like length. A node's samples stay sorted, and are dealt out to its ranks in turn: with
    one canonical node the tokens of two ranks differ by less than two samples of a batch do. What fills no batch stays
    at the end.

    Args:
        lengths: (N,) of samples in shuffled order.
        nodes: canonical nodes.
        batch: samples of a canonical node in a global batch.
        window: batches, as many as to sort together.
        rng: orders the batches of a window.
    """
    samples = len(lengths)
    order = np.arange(samples)
    batches = samples // nodes // batch
    for first in range(0, batches, window):
        count = min(window, batches - first)
        permuted = rng.permutation(count)
        for node in range(nodes):
            begin = samples * node // nodes + first * batch
            sorted_ = np.argsort(lengths[begin : begin + count * batch], kind="stable")
            order[begin : begin + count * batch] = begin + sorted_.reshape(count, batch)[permuted].ravel()
    return order


@contextlib.contextmanager
def alone_on_node() -> Iterator[None]:
    """Hold a lock of the node and the user while streaming's shared memory is made or removed.

    Streaming looks for the first number that is free and then takes it, so that of two runs that start in the same
    moment one would fail.
    """
    folder = Path("/dev/shm")
    with open((folder if folder.is_dir() else Path(gettempdir())) / f"streaming-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class StreamingC4(StreamingDataset):
    """Samples of at most ``max_seq_len`` ids from MDS shards of text or of tokens, as convert_c4.py writes them.

    Args:
        tokenizer: from ``load_tokenizer``.
        max_seq_len: longest sample in tokens, special tokens included. Texts are truncated to it; shards of tokens must
            have been written for just this length.
        local, remote, split: of the one dataset, as for ``Source``.
        sources: several datasets to mix, by name, in place of the one.
        verify: what of the shards is checked, as for ``check_shards``; with ``hash``, those fetched later too.
        length_window: global batches within which a shuffled epoch is grouped by length (``group_lengths``); 0 does
            not group. Needs ``shuffle``, shards of tokens, and the lengths that convert_c4.py writes beside them.
        moving_crop: take of a text that is too long not its beginning but another part each epoch (``encode_crop``),
            at the turn that is the sum of sample id and epoch. Needs shards of text.
        kwargs: StreamingDataset's.

    Raises:
        DataError: there is no dataset, or it is damaged or cannot be fetched, or its shards have neither text nor
            tokens, or tokens of another tokenizer or length, or no lengths, or tokens where a crop is to move. While
            iterating: a shard is lost or cannot be fetched.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_len: int,
        local: str | None = None,
        remote: str | None = None,
        split: str | None = None,
        sources: Mapping[str, Source] | None = None,
        verify: str = "size",
        length_window: int = 0,
        moving_crop: bool = False,
        **kwargs: Any,
    ):
        if sources is None:
            assert local is not None, "one dataset, or several sources"
            sources = {"": Source(local, remote, split)}
        self.sources = dict(sources)
        # The processes of a node share its files; one of them is enough to read them all.
        leads = World.detect().is_local_leader
        for source in self.sources.values():
            source.check("size" if verify == "hash" and not leads else verify)
            if not source.complete and leads and (source.folder / "index.json").is_file():
                check_shards(source.folder, False, verify)  # before streaming notes what is in the cache
        try:
            with alone_on_node() if leads else contextlib.nullcontext():
                super().__init__(streams=[source.stream() for source in self.sources.values()], **kwargs)
        except Exception as error:  # each object store has errors of its own
            remotes = [f"{s.remote}/{s.split or ''}" for s in self.sources.values() if "://" in str(s.remote)]
            if isinstance(error, ValueError) or not remotes:
                raise
            raise DataError(
                f"{', '.join(remotes)}: index.json cannot be fetched ({_first_line(error)}). Check the address, that "
                "credentials are set, and the network"
            ) from error
        for source, stream in zip(self.sources.values(), self.streams, strict=True):
            if not source.complete:
                check_shards(source.folder, False, "off")  # the names in an index that has just come
                if verify == "hash":
                    stream.validate_hash = _hash_of_downloads(source.folder)
        self.spanner: Any = Locator(self.samples_per_shard)
        self._fetched_again = set[int]()
        self.failure: BaseException | None = None
        self._open_shards, self._prepared = OpenShards(), set[int]()
        for shard_id, shard in enumerate(self.shards):
            shard.get_sample_data = partial(self._read, shard_id)  # pyright: ignore[reportAttributeAccessIssue]
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.token_dtypes = [
            self._token_dtype(source.folder, self.shards[first])
            for source, first in zip(self.sources.values(), self.shard_offset_per_stream, strict=True)
        ]
        """Of each source: type of the ids on disk; None where it is text."""
        self.moving_crop = moving_crop
        for source, dtype in zip(self.sources.values(), self.token_dtypes, strict=True):
            if moving_crop and dtype is not None:
                raise DataError(
                    f"{source.folder} holds tokens: what --pack truncate cut off is not there, and --pack chunk cuts "
                    "nothing off. Set train_loader.moving_crop to false, or convert to text (without --tokenizer)"
                )
        self.length_window = length_window
        if length_window:
            assert self.shuffle, "an order by length is made from a shuffled one"
            # In resample_streams the order is made whole; streaming would shuffle it again.
            self.shuffle = False
            self.lengths = [self._open_lengths(i) for i in range(self.num_streams)]

    def _token_dtype(self, folder: Path, shard: Any) -> np.dtype[Any] | None:
        """Of the ids in a split's shards, if they fit the run; None if these hold text."""
        description = json.loads((folder / "index.json").read_text()).get(TOKENS_KEY)
        if description is not None:
            _check_tokens(description, self.tokenizer, self.max_seq_len, folder)
            return np.dtype(description["dtype"]).newbyteorder("<")
        if "text" not in shard.column_names:
            columns = ", ".join(shard.column_names)
            raise DataError(f"{folder}: the shards have no column 'text' ({columns}); write them with convert_c4.py")
        return None

    def _open_lengths(self, stream_id: int) -> NDArray[np.uint16]:
        """The lengths of a source's samples, mapped, so that the processes of a node share them; fetched if need be."""
        source, stream = list(self.sources.values())[stream_id], self.streams[stream_id]
        path, samples = source.folder / LENGTHS, int(self.samples_per_stream[stream_id])
        if self.token_dtypes[stream_id] is None:
            raise DataError(
                f"{source.folder} holds text, whose lengths in tokens are not known: set train_loader.length_window to "
                "0, or convert it to tokens (convert_c4.py --tokenizer)"
            )
        try:
            if not source.complete and not path.exists():
                if World.detect().is_local_leader:
                    os.replace(stream._download_file(LENGTHS, f"{LENGTHS}.tmp"), path)
                else:
                    wait_for_file_to_exist(str(path), TICK, stream.download_timeout, f"{path} did not come")
            found = path.stat().st_size
        except Exception as error:  # of any object store
            raise DataError(
                f"{source.remote or source.local}/{source.split or ''}: {LENGTHS} cannot be had "
                f"({_first_line(error)}). Convert again, which writes it, or set train_loader.length_window to 0"
            ) from error
        if found != 2 * samples:
            raise DataError(
                f"{path} has {found:,} bytes, not 2 for each of {samples:,} samples; copy or convert the split again"
            )
        return np.memmap(path, "<u2", "r")

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source in the samples that an epoch draws."""
        return {name: stream.choose / self.epoch_size for name, stream in zip(self.sources, self.streams, strict=True)}

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What an epoch draws, called by streaming once an epoch on each node: sizes of parts of shards, sample ids.

        Ids of repeated samples count on (see ``Sample``). Grouped by length, they are in the order of training.
        """
        units, ids = super().resample_streams(epoch, stream_id)
        if any(stream.choose > size for stream, size in zip(self.streams, self.samples_per_stream, strict=True)):
            ids = ids + occurrences(ids) * self.size
        if self.length_window:
            assert self.num_canonical_nodes and self.batch_size and self.shuffle_block_size, (
                "set before the first epoch"
            )
            nodes, seed = self.num_canonical_nodes, self.shuffle_seed
            ids = ids[get_shuffle(self.shuffle_algo, units, nodes, seed, epoch, self.shuffle_block_size)]
            lengths = np.concatenate(self.lengths)[ids % self.size]
            batch = self.batch_size * self._parallel_rank_world.num_ranks // nodes
            rng = np.random.default_rng([seed, epoch])
            ids = ids[group_lengths(lengths, nodes, batch, self.length_window, rng)]
        return units, ids

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and unpack a shard if need be. When that fails, streaming alone lets the others wait for ever."""
        # Called for each sample, hence without a lock, as streaming reads; an evicted shard is missed and fetched.
        if shard_id in self._prepared and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._shard_access_times[shard_id] = time.time_ns()
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            # Threads and processes that wait for it go on, do not find it either, and stop too.
            self._shard_states[shard_id] = _ShardState.LOCAL
            damage = self._damage(shard_id, error)
            self._fail(damage)
            raise damage from error
        if self._shard_states[shard_id] == _ShardState.LOCAL:  # without ``blocking`` another process may still fetch it
            self._prepared.add(shard_id)

    def _read(self, shard_id: int, index: int) -> bytes:
        """A sample's bytes, in place of streaming's own way, which opens the file each time."""
        shard: Any = self.shards[shard_id]
        try:
            return self._open_shards.read(f"{shard.dirname}/{shard.split}/{shard.raw_data.basename}", index)
        except FileNotFoundError:  # evicted, perhaps; streaming then prepares it again
            self._prepared.discard(shard_id)
            raise

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where a checkpoint's run goes on; after an epoch's end, streaming alone would begin that same epoch again."""
        state = super().state_dict(num_samples, from_beginning)
        return state if num_samples else {**state, "epoch": self.next_epoch}

    def on_exception(self, future: Future) -> None:
        """Called when a thread that fetches shards ends, well or not."""
        error = future.exception()
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep the first reason, and end this process's threads, or it could not exit."""
        self.failure = self.failure or error
        if hasattr(self, "_event"):  # not before the first iteration
            self._event.set()

    def _ready_thread(self, it: Any) -> None:
        """Let samples be taken whose shards are there, in order, as a thread beside the iteration.

        Streaming's own waits for ever for a shard that a cache with a limit drops between two looks at it.
        """
        while not (it.should_exit() or it.ready_index == it.total or self._event.is_set()):
            if self.predownload is not None and it.ready_index - it.yield_index > self.predownload:
                time.sleep(TICK)
                continue
            sample_id = it.sample_ids[it.ready_index]
            shard_id = None if sample_id == -1 else int(self.spanner[sample_id][0])  # -1 fills up a batch
            if shard_id is None or self._shard_states[shard_id] == _ShardState.LOCAL:
                it.ready_index += 1
            elif self._shard_states[shard_id] == _ShardState.REMOTE:
                self.prepare_shard(shard_id, False)
            else:
                time.sleep(TICK)
        it.on_exit()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        """Ids as they become ready. When a shard fails, streaming ends the epoch here and says nothing."""
        yield from super()._each_sample_id(it)
        if self.failure is not None:
            raise DataError(str(self.failure))

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """One sample by its id."""
        # Iterating begins with counting next_epoch up; a dataset that is only indexed stays at epoch 0.
        epoch = max(self.next_epoch - 1, 0)
        turn = int(sample_id) + epoch if self.moving_crop else None
        sample = Sample(input_ids=self._ids(sample_id, turn, retry), sample_id=int(sample_id), epoch=epoch)
        if self.num_streams > 1:
            sample["stream"] = self._stream_of(sample_id)
        return sample

    def beginning(self, sample_id: int) -> NDArray[Any]:
        """A sample's ids as evaluation takes them: (length,) from the text's beginning, wherever a crop has moved."""
        return self._ids(sample_id, None)

    def _stream_of(self, sample_id: int) -> int:
        return 0 if self.num_streams == 1 else int(self.stream_per_shard[self.spanner[sample_id][0]])

    def _ids(self, sample_id: int, turn: int | None, retry: int = 7) -> NDArray[Any]:
        """A sample's ids; of a text its beginning, or what is its turn."""
        raw, dtype = self._raw(sample_id, retry), self.token_dtypes[self._stream_of(sample_id)]
        if dtype is not None:
            return np.frombuffer(raw["tokens"], dtype)
        room = self.max_seq_len - 2
        if turn is None:
            ids = encode_prefix(self.tokenizer, raw["text"], room)
        else:
            ids = encode_crop(self.tokenizer, raw["text"], room, turn)
        return np.array([self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id])

    def _raw(self, sample_id: int, retry: int) -> Any:
        """A sample as the shard has it, which is fetched once more if it is damaged."""
        try:
            return super().get_item(sample_id, retry)
        except Exception as error:
            shard_id = int(self.spanner[sample_id][0])
            streamed = not list(self.sources.values())[int(self.stream_per_shard[shard_id])].complete
            if self.failure is None and streamed and shard_id not in self._fetched_again:
                self._fetch_again(shard_id, error)
                return self._raw(sample_id, retry)
            if not isinstance(error, DataError):
                error = self._damage(shard_id, error)
            self._fail(error)
            raise error from None

    def _fetch_again(self, shard_id: int, error: Exception) -> None:
        """Drop a damaged shard from the cache, once in this process; it is fetched when it is read next."""
        shard: Any = self.shards[shard_id]
        log.warning("%s in the cache is damaged (%s). Fetching it again", shard.raw_data.basename, error)
        self._fetched_again.add(shard_id)
        self._prepared.discard(shard_id)
        self._open_shards.forget(f"{shard.dirname}/{shard.split}/{shard.raw_data.basename}")
        self.evict_shard(shard_id)

    def _damage(self, shard_id: int, error: Exception) -> DataError:
        shard: Any = self.shards[shard_id]
        path = Path(shard.dirname) / shard.split / shard.file_pairs[0][0].basename
        return DataError(f"{path} cannot be read or fetched ({error}); copy or convert it again")


def _hash_of_downloads(folder: Path) -> str:
    """Name of the hash that a split's index has of its shards."""
    first = json.loads((folder / "index.json").read_text())["shards"][0]
    hashes = (first["zip_data"] or first["raw_data"])["hashes"]
    if not hashes:
        raise DataError(f"{folder / 'index.json'} has no hashes to compare; convert again, or data_verify: size")
    return next(iter(hashes))


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _check_tokens(
    description: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_seq_len: int, folder: Path
) -> None:
    """Shards of tokens fit the run: same tokenizer, same length."""
    if description["fingerprint"] not in (tokenizer_fingerprint(tokenizer), earlier_fingerprint(tokenizer)):
        raise DataError(
            f"{folder} was tokenized with another tokenizer ({description['tokenizer']!r}, {description['vocab_size']} "
            f"entries; this one has {len(tokenizer)}). Set tokenizer_name to it, or convert the text again."
        )
    if description["max_seq_len"] != max_seq_len:
        raise DataError(
            f"{folder} holds samples of up to {description['max_seq_len']} tokens and max_seq_len is {max_seq_len}. "
            "Set max_seq_len to the former, or convert the text again."
        )


class EachSampleOnce(IterableDataset):
    """A dataset for evaluation: every sample in just one batch of one rank, whatever the ranks, workers and batches.

    Iterating a StreamingDataset repeats samples to fill up batches and nodes; this one indexes it. Ranks that run out
    earlier get [CLS][SEP], of which nothing can be masked, so that all ranks have equally many batches. Epoch is 0.

    Args:
        dataset: samples by index.
        batch_size: of the DataLoader; workers take whole batches in turn.
        rank, world_size: this process and how many there are.
    """

    def __init__(self, dataset: StreamingC4, batch_size: int, rank: int, world_size: int):
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.dataset.size // self.world_size)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for start in range(first * self.batch_size, len(self), step * self.batch_size):
            for i in range(start, min(start + self.batch_size, len(self))):
                yield self._sample(i * self.world_size + self.rank)

    def _sample(self, index: int) -> Sample:
        if index < self.dataset.size:
            return Sample(input_ids=self.dataset.beginning(index), sample_id=index, epoch=0)
        tokenizer = self.dataset.tokenizer
        return Sample(input_ids=np.array([tokenizer.cls_token_id, tokenizer.sep_token_id]), sample_id=index, epoch=0)


# ----------------------------------------------------------------------------------------------------------------------
# Masking
# ----------------------------------------------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea and Flood, 2014, figure 15): every input bit stirs every output bit."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counter_hash(
    seed: int, epochs: NDArray[np.int64], sample_ids: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """64 random bits for each position of each sample: (T,) from epochs, ids and lengths (B,), a pure function."""
    key = _mix(np.full(len(lengths), seed).astype(np.uint64))
    key = _mix(_mix(key ^ epochs.astype(np.uint64)) ^ sample_ids.astype(np.uint64))
    starts = np.cumsum(lengths) - lengths
    position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return _mix(np.repeat(key, lengths) + position.astype(np.uint64) * _GOLDEN)


class MaskingCollator:
    """Samples to a padded batch, masked as BERT does it (Devlin et al., 2019, section 3.1).

    u = hash(seed, epoch, sample id, position) in [0, 1); a position is masked iff u < rate and it holds no special
    token. Of the masked, 80% become [MASK], 10% a random word of the tokenizer's real vocabulary, 10% stay. So masks
    do not depend on workers, ranks, batch sizes or restarts, and a lower rate masks a subset of a higher one's.

    Args:
        tokenizer: from ``load_tokenizer``.
        rate: share of positions to mask; None leaves that to ``mask_batch``, later in the main process, because workers
            fetch ahead and do not know the training step.
        seed: of the masks.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels``, each (B, S) int64, S the longest length in the batch; with
        ``rate=None`` instead of labels ``mask_u`` (B, S) float64, 2 where nothing may be masked, and ``replacement``
        (B, S) int64, the id that a masked position would get. Of mixed datasets also ``stream`` (B, 1) int64.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rate: float | None, seed: int):
        self.rate, self.seed = rate, seed
        self.pad_token_id, self.mask_token_id = int(tokenizer.pad_token_id), int(tokenizer.mask_token_id)  # pyright: ignore
        self.is_special = np.zeros(len(tokenizer), dtype=bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.words = np.flatnonzero(~self.is_special)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        lengths = np.array([len(sample["input_ids"]) for sample in samples])
        epochs = np.array([sample["epoch"] for sample in samples])
        sample_ids = np.array([sample["sample_id"] for sample in samples])
        ids = np.concatenate([sample["input_ids"] for sample in samples]).astype(np.int64)  # (T,)
        bits = counter_hash(self.seed, epochs, sample_ids, lengths)
        u = np.where(self.is_special[ids], 2.0, (bits >> np.uint64(11)) * 2.0**-53)

        real = np.arange(lengths.max())[None, :] < lengths[:, None]  # (B, S)

        def pad(x: NDArray[Any], fill: float) -> Tensor:
            padded = np.full(real.shape, fill, dtype=x.dtype)
            padded[real] = x
            return torch.from_numpy(padded)

        if self.rate is None:
            fields = {"input_ids": pad(ids, self.pad_token_id), "mask_u": pad(u, 2.0)}
            fields["replacement"] = pad(self._replacements(ids, bits), self.pad_token_id)
        else:
            masked = np.flatnonzero(u < self.rate)
            inputs, labels = ids.copy(), np.full_like(ids, IGNORED)
            labels[masked] = ids[masked]
            inputs[masked] = self._replacements(ids[masked], bits[masked])
            fields = {"input_ids": pad(inputs, self.pad_token_id), "labels": pad(labels, IGNORED)}
        if "stream" in samples[0]:
            fields["stream"] = torch.tensor([[sample.get("stream", 0)] for sample in samples])
        return {**fields, "attention_mask": torch.from_numpy(real.astype(np.int64))}

    def _replacements(self, ids: NDArray[np.int64], bits: NDArray[np.uint64]) -> NDArray[np.int64]:
        """What masked positions become: the mask, a random word or the word itself, by a second hash of their bits."""
        bits = _mix(~bits)
        choice = (bits >> np.uint64(32)) * 2.0**-32
        word = self.words[((bits & np.uint64(0xFFFFFFFF)) * np.uint64(len(self.words))) >> np.uint64(32)]
        return np.where(choice < 0.8, self.mask_token_id, np.where(choice < 0.9, word, ids))


def mask_batch(batch: Batch, rate: float) -> Batch:
    """Mask a batch that was collated with ``rate=None``: the same as if the collator had known the rate."""
    masked = batch["mask_u"] < rate
    return {
        "input_ids": torch.where(masked, batch["replacement"], batch["input_ids"]),
        "labels": torch.where(masked, batch["input_ids"], IGNORED),
        **{name: x for name, x in batch.items() if name not in ("input_ids", "mask_u", "replacement")},
    }


def fullest_batch(tokenizer: PreTrainedTokenizerFast, rate: float, batch_size: int, max_seq_len: int) -> Batch:
    """A padded, masked batch (B, S) without padding, T = B * S: the most that a batch can ask of a device."""
    shape = (batch_size, max_seq_len)
    ids = torch.full(shape, int(tokenizer.mask_token_id))  # pyright: ignore[reportArgumentType]
    masked = torch.arange(batch_size * max_seq_len).reshape(shape) % 100 < round(100 * rate)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(masked, ids, IGNORED)}


class Loader(DataLoader):
    """torch's DataLoader; what its workers say, and its time-out, as errors of one line."""

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            yield from super().__iter__()
        except DataError as error:  # a worker's comes with its whole traceback as its text
            raise DataError(str(error).splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")) from None
        except RuntimeError as error:
            if "timed out" not in str(error) and "exited unexpectedly" not in str(error):
                raise
            dataset = self.dataset.dataset if isinstance(self.dataset, EachSampleOnce) else self.dataset
            for source in dataset.sources.values() if isinstance(dataset, StreamingC4) else ():
                if source.complete:
                    check_shards(source.folder, True)  # a lost shard may be why, and is then named
            raise DataError(f"no batch came: {error}; its limit is the loader's 'timeout'") from None


def build_dataloader(
    dataset: StreamingC4 | EachSampleOnce,
    collator: MaskingCollator,
    batch_size: int,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    persistent_workers: bool = False,
    timeout: float = 0,
    pin_memory: bool = False,
    worker_init_fn: Callable[[int], None] | None = None,
) -> DataLoader:
    """A DataLoader of padded batches; ``timeout`` (seconds) acts with workers only."""
    return Loader(
        dataset,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers,
        timeout=timeout if num_workers else 0,
        pin_memory=pin_memory,
        worker_init_fn=worker_init_fn,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Script
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print what training would see of a dataset.")
    parser.add_argument("remote", help="where the dataset is: a folder or an object-store URI")
    parser.add_argument("local", nargs="?", help="where to stream it to (default: remote itself, nothing is copied)")
    parser.add_argument("--split", default="val")
    parser.add_argument("--tokenizer", help="name or folder (default: the shards' own, else bert-base-uncased)")
    parser.add_argument("--max_seq_len", type=int, help="default: the shards' own, else 128")
    parser.add_argument("--mlm_probability", type=float, default=0.15)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_batches", type=int, default=100, help="batches to time")
    parser.add_argument("--print", type=int, default=2, dest="shown", help="batches to print, two samples each")
    args = parser.parse_args(argv)
    if args.local is None and "://" in args.remote:
        raise ValueError(f"{args.remote} is remote: name a local folder to stream it to")
    local = args.local or args.remote

    description = {}
    index = Path(args.remote) / args.split / "index.json"
    if index.is_file():
        description = json.loads(index.read_text()).get(TOKENS_KEY) or {}
    tokenizer = load_tokenizer(args.tokenizer or description.get("tokenizer", "bert-base-uncased"))
    max_seq_len = args.max_seq_len or description.get("max_seq_len", 128)
    dataset = StreamingC4(tokenizer, max_seq_len, local, args.remote, args.split, shuffle=False)
    print(
        f"{dataset.size:,} samples of {'text' if dataset.token_dtypes == [None] else 'tokens'} in {local}/{args.split}"
    )

    each_once = EachSampleOnce(dataset, args.batch_size, rank=0, world_size=1)
    collator = MaskingCollator(tokenizer, args.mlm_probability, seed=17)
    batches = tokens = padded = masked = 0
    started = time.perf_counter()
    for batch in build_dataloader(each_once, collator, args.batch_size):
        if batches < args.shown:
            print(f"batch {batches}: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in batch.items()))
            for ids, real in list(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True))[:2]:
                print("   ", tokenizer.decode(ids[real]))
        counts = num_tokens(batch)
        tokens += counts["total"]
        masked += counts["loss_generating"]
        padded += batch["input_ids"].numel()
        batches += 1
        if batches == args.num_batches:
            break
    seconds = time.perf_counter() - started
    print(
        f"data batches={batches} tokens={tokens} padding_share={1 - tokens / padded:.4f} "
        f"masked_share={masked / tokens:.4f} tokens_per_s={tokens / seconds:.0f}"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"data_c4.py: {error}")
