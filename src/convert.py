"""One share of a conversion's work: spans of text -> a folder of MDS shards, with what was counted. For any process.

text --read--> documents --filters--> kept --Tokens--> samples --MDSWriter--> shards
"""

import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import MDSWriter
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from src import filters
from src.data_c4 import tokenizer_fingerprint
from src.pool import Beat
from src.stats import Stats, rounded
from src.text import Counts, Document, Span, end_of_prefix, pieces, read

HASHES = ["sha1"]
"""Written for each shard, so that damage can be found."""

BATCH = 256
"""Pieces of text tokenized at once."""

BEAT = 256
"""Documents between two signs of life."""

UNIT, LENGTHS, DROPPED = "unit.json", "lengths.bin", "dropped.jsonl"
"""Beside a unit's shards: their part of the index and what was counted; the length of each sample (little-endian
uint16, shards of tokens only); the documents that filters dropped."""

SHOWN = 80
"""Characters of a dropped document that are listed."""


class Tokens:
    """Documents to samples of tokens. Can be sent to another process.

    Args:
        name: of the tokenizer, for the description.
        tokenizer: from ``load_tokenizer``.
        max_seq_len: longest sample, [CLS] and [SEP] included.
        pack: ``truncate`` keeps the beginning of a document, ``chunk`` cuts all of it into consecutive samples.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast, max_seq_len: int, pack: str):
        self.max_seq_len, self.pack = max_seq_len, pack
        # Half the bytes on disk and in flight, wherever the vocabulary allows it.
        self.dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
        self.cls: Any = tokenizer.cls_token_id
        self.sep: Any = tokenizer.sep_token_id
        self.backend: Tokenizer = tokenizer.backend_tokenizer
        self.description: dict[str, Any] = {  # what training checks before it uses the shards
            "tokenizer": name,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
            "max_seq_len": max_seq_len,
            "pack": pack,
            "dtype": self.dtype.name,
        }

    def samples(self, texts: Iterator[str], stats: Stats) -> Iterator[NDArray[Any]]:
        """Each (length,), at most ``max_seq_len``, [CLS] and [SEP] included; ``stats`` learns what is cut off."""
        return self._truncated(texts, stats) if self.pack == "truncate" else self._chunks(texts)

    def _framed(self, ids: Any) -> NDArray[Any]:
        sample = np.empty(len(ids) + 2, self.dtype)
        sample[0], sample[1:-1], sample[-1] = self.cls, ids, self.sep
        return sample

    def _chunks(self, texts: Iterator[str]) -> Iterator[NDArray[Any]]:
        room = self.max_seq_len - 2
        parts = ((piece, last) for text in texts for piece, last in pieces(text))
        left = np.empty(0, self.dtype)
        while batch := list(itertools.islice(parts, BATCH)):
            encodings = self.backend.encode_batch([piece for piece, _ in batch], add_special_tokens=False)
            for encoding, (_, last) in zip(encodings, batch, strict=True):
                ids = np.concatenate([left, np.array(encoding.ids, self.dtype)])
                end = len(ids) if last else len(ids) // room * room
                for start in range(0, end, room):
                    yield self._framed(ids[start : min(start + room, end)])
                left = ids[end:]

    def _truncated(self, texts: Iterator[str], stats: Stats) -> Iterator[NDArray[Any]]:
        while batch := list(itertools.islice(texts, BATCH)):
            for ids, cut in self._beginnings(batch):
                stats.cut_characters += cut
                if ids:
                    yield self._framed(ids)

    def _beginnings(self, texts: list[str]) -> list[tuple[list[int], int]]:
        """The first ids of each text, as of the whole, and the number of characters behind them.

        What is cut off anyway is not tokenized: a prefix is, and where it gives too few ids, one of twice its length.
        """
        room = self.max_seq_len - 2
        found: list[tuple[list[int], int]] = [([], 0)] * len(texts)
        todo, characters = list(range(len(texts))), 6 * room  # English has 4 to 5 characters a word piece
        while todo:
            ends = [end_of_prefix(texts[i], characters) for i in todo]
            prefixes = [texts[i][:end] for i, end in zip(todo, ends, strict=True)]
            short = []
            encodings = self.backend.encode_batch(prefixes, add_special_tokens=False)
            for i, end, encoding in zip(todo, ends, encodings, strict=True):
                if len(encoding) >= room:
                    found[i] = encoding.ids[:room], len(texts[i]) - encoding.offsets[room - 1][1]
                elif end == len(texts[i]):
                    found[i] = encoding.ids, 0
                else:
                    short.append(i)
            todo, characters = short, 2 * characters
        return found


@dataclass(frozen=True)
class Job:
    """What is the same for all units of a split. Can be sent to another process."""

    folder: Path
    """Where the units' folders are made."""
    columns: tuple[str, ...]
    """Of shards of text."""
    tokens: Tokens | None
    """How to tokenize, or None to write text."""
    shards: dict[str, Any]
    """MDSWriter's ``compression`` and ``size_limit`` (bytes of a shard before compression)."""
    skip_bad: bool
    limit: int | None
    """Documents of a unit; only the first ones are taken."""
    duplicates: Path | None
    """From ``filters.find_duplicates``, over the documents of all units."""
    grams: Path | None
    """Sorted hashes of the evaluation sets' word sequences, as .npy."""


@dataclass(frozen=True)
class Unit:
    """One share of a split's work."""

    number: int
    spans: Iterable[Span]
    first_document: int = 0
    """Place of its first document in the split; needed to find its duplicates."""


def unit_folder(folder: Path, number: int) -> Path:
    """Where a complete unit lies."""
    return folder / f"{number:06}"


def documents_of(job: Job, unit: Unit, counts: Counts, beat: Beat) -> Iterator[tuple[str, Document]]:
    """Places and documents of a unit; ``beat`` is called on the way."""
    documents = (item for span in unit.spans for item in read(span, job.skip_bad, counts))
    number = 0
    for number, item in enumerate(itertools.islice(documents, job.limit), start=1):
        if number % BEAT == 0:
            beat(BEAT)
        yield item
    beat(number % BEAT)


def convert_unit(job: Job, unit: Unit, beat: Beat) -> None:
    """Write a unit's folder; it has its name when it is complete and on disk."""
    folder = unit_folder(job.folder, unit.number)
    # A name of its own: a worker whose parent was killed may live on for some documents beside the next call's.
    partial = folder.with_suffix(f".{os.getpid()}.partial")
    partial.mkdir()
    counts, stats, lengths = Counts(), Stats(), array("H")
    columns = {"tokens": "bytes"} if job.tokens else dict.fromkeys(job.columns, "str")
    with (
        MDSWriter(out=str(partial), columns=columns, hashes=HASHES, **job.shards) as writer,
        (partial / DROPPED).open("w") as dropped,
    ):
        documents = _kept(job, unit, documents_of(job, unit, counts, beat), stats, dropped)
        if job.tokens is None:
            for document in documents:
                writer.write({name: document.get(name, "") for name in columns})
                stats.samples += 1
        else:
            for sample in job.tokens.samples((document["text"] for document in documents), stats):
                writer.write({"tokens": sample.tobytes()})
                stats.samples += 1
                lengths.append(len(sample))
    stats.documents, stats.empty = counts.documents, counts.empty
    stats.bad, stats.first_bad = counts.bad, counts.first_bad
    if job.tokens is not None:
        stats.add_lengths(np.array(lengths, "<u2"))
        (partial / LENGTHS).write_bytes(np.array(lengths, "<u2").tobytes())
    # Before a first sample that is larger than the limit of a shard, the writer leaves an empty one.
    shards = [shard for shard in json.loads((partial / "index.json").read_text())["shards"] if shard["samples"]]
    stats.bytes = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards)
    (partial / "index.json").unlink()
    (partial / UNIT).write_text(json.dumps({"shards": shards, "stats": stats.to_json()}))
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    if not folder.exists():
        partial.rename(folder)
    sync(job.folder)


def _kept(
    job: Job, unit: Unit, documents: Iterator[tuple[str, Document]], stats: Stats, dropped: Any
) -> Iterator[Document]:
    """The documents that no filter drops; the others are counted and listed."""
    duplicate = None if job.duplicates is None else np.memmap(job.duplicates, dtype=bool, mode="r")
    grams = None if job.grams is None else np.load(job.grams, mmap_mode="r")
    for i, (place, document) in enumerate(documents, start=unit.first_document):
        text = document["text"]
        drop = None
        if duplicate is not None and duplicate[i]:
            stats.duplicate += 1
            drop = {"reason": "duplicate"}
        elif grams is not None and (words := filters.overlap(text, grams)) is not None:
            stats.contaminated += 1
            drop = {"reason": "contaminated", "words": words}
        if drop is not None:
            dropped.write(json.dumps({**drop, "place": place, "text": text[:SHOWN]}) + "\n")
            continue
        stats.characters += len(text)
        stats.document_characters[rounded(len(text))] += 1
        yield document


def hash_unit(job: Job, unit: Unit, beat: Beat) -> None:
    """Write the 16-byte hashes of a unit's documents, in order: the first pass of leaving out duplicates."""
    file = hash_file(job.folder, unit.number)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as out:
        for _, document in documents_of(job, unit, Counts(), beat):
            out.write(filters.text_hash(document["text"]))
    sync(partial)
    partial.rename(file)


def hash_file(folder: Path, number: int) -> Path:
    """Where the hashes of a unit lie."""
    return folder / f"{number:06}.hashes"


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk: a rename must not outlive what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: Iterable[str]) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as out:
        out.writelines(text)
    sync(partial)
    partial.rename(path)
