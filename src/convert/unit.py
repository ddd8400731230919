"""One unit of work of a conversion: spans of text -> a folder of MDS shards and their counts. Runs in any process.

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
from src.convert.sources import Document, Span, read
from src.convert.stats import Stats, rounded
from src.convert.workers import Count
from src.data.shards import LENGTHS

HASHES = ["sha1"]
"""Hashes of each shard in index.json; they show damage."""

COUNTED = 256
"""Documents between two calls of ``count``."""

UNIT, DROPPED = "unit.json", "dropped.jsonl"
"""Files beside a unit's shards: their part of index.json with the unit's ``Stats``; the documents that filters dropped.
Shards of tokens have LENGTHS too."""

SHOWN = 80
"""Characters of a dropped document that DROPPED shows."""


@dataclass(frozen=True)
class Job:
    """What all units of a split have in common. Can be sent to another process."""

    folder: Path
    """Parent of the units' folders."""
    columns: tuple[str, ...]
    """Columns of shards of text."""
    tokens: Tokens | None
    """How to tokenize, or None to write text."""
    shards: dict[str, Any]
    """MDSWriter's ``compression`` and ``size_limit`` (bytes of a shard before compression)."""
    skip_bad: bool
    limit: int | None
    """Read only the first ``limit`` documents of the unit."""
    duplicates: Path | None
    """Output of ``filters.find_duplicates`` over the documents of all units."""
    grams: Path | None
    """Sorted hashes of the evaluation sets' word sequences, as .npy."""


@dataclass(frozen=True)
class Unit:
    """One unit of a split's work."""

    number: int
    spans: Iterable[Span]
    first_document: int = 0
    """Index in the split of the unit's first document; used with ``Job.duplicates`` only."""


def unit_folder(folder: Path, number: int) -> Path:
    """Folder of a complete unit."""
    return folder / f"{number:06}"


def documents_of(job: Job, unit: Unit, stats: Stats, count: Count) -> Iterator[tuple[str, Document]]:
    """Places and documents of a unit. Calls ``count`` after every ``COUNTED`` documents and at the end."""
    documents = (item for span in unit.spans for item in read(span, job.skip_bad, stats))
    number = 0
    for number, item in enumerate(itertools.islice(documents, job.limit), start=1):
        if number % COUNTED == 0:
            count(COUNTED)
        yield item
    count(number % COUNTED)


def convert_unit(job: Job, unit: Unit, count: Count) -> None:
    """Write a unit's folder, which gets its name once it is complete and on the disk."""
    folder = unit_folder(job.folder, unit.number)
    # The process id: the worker of a killed conversion may still write while the next conversion begins.
    partial = folder.with_suffix(f".{os.getpid()}.partial")
    partial.mkdir()
    stats, lengths = Stats(), array("H")
    columns = {"tokens": "bytes"} if job.tokens else dict.fromkeys(job.columns, "str")
    with (
        MDSWriter(out=str(partial), columns=columns, hashes=HASHES, **job.shards) as writer,
        (partial / DROPPED).open("w") as dropped,
    ):
        documents = _kept(job, unit, documents_of(job, unit, stats, count), stats, dropped)
        if job.tokens is None:
            for document in documents:
                writer.write({name: document.get(name, "") for name in columns})
                stats.samples += 1
        else:
            for sample in job.tokens.samples((document["text"] for document in documents), stats):
                writer.write({"tokens": sample.tobytes()})
                lengths.append(len(sample))
            stats.samples = len(lengths)
            stats.add_lengths(np.array(lengths, "<u2"))
            (partial / LENGTHS).write_bytes(np.array(lengths, "<u2").tobytes())
    # MDSWriter writes an empty shard before a first sample that is larger than a shard may be.
    shards = [shard for shard in json.loads((partial / "index.json").read_text())["shards"] if shard["samples"]]
    stats.bytes = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards)
    (partial / "index.json").unlink()
    (partial / UNIT).write_text(json.dumps({"shards": shards, "stats": vars(stats)}))
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    if not folder.exists():
        partial.rename(folder)
    sync(job.folder)


def _kept(
    job: Job, unit: Unit, documents: Iterator[tuple[str, Document]], stats: Stats, dropped: Any
) -> Iterator[Document]:
    """The documents that no filter drops. The others are counted, and listed in the file ``dropped``."""
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


def hash_file(folder: Path, number: int) -> Path:
    """File of the hashes of a unit's documents."""
    return folder / f"{number:06}.hashes"


def hash_unit(job: Job, unit: Unit, count: Count) -> None:
    """First pass of --dedup: write the 16-byte hashes of a unit's documents, in order."""
    file = hash_file(job.folder, unit.number)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as out:
        for _, document in documents_of(job, unit, Stats(), count):
            out.write(filters.text_hash(document["text"]))
    sync(partial)
    partial.rename(file)
