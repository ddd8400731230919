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
from streaming import MDSWriter

from src.common.files import sync
from src.convert import filters
from src.convert.samples import Tokens
from src.convert.sources import Counts, Document, Span, read
from src.convert.stats import Stats, rounded
from src.convert.workers import Beat

HASHES = ["sha1"]
"""Written for each shard, so that damage can be found."""

BEAT = 256
"""Documents between two signs of life."""

UNIT, LENGTHS, DROPPED = "unit.json", "lengths.bin", "dropped.jsonl"
"""Beside a unit's shards: their part of the index and what was counted; the length of each sample (little-endian
uint16, shards of tokens only); the documents that filters dropped."""

SHOWN = 80
"""Characters of a dropped document that are listed."""


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
