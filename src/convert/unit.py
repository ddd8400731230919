"""One unit of work of a conversion: spans of text -> a folder of MDS shards and their counts. Runs in any process.

text --read--> documents --filters--> kept --Tokens--> samples --MDSWriter--> shards
"""

import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from streaming import MDSWriter

from src.common.errors import DataError
from src.common.files import sync
from src.convert import filters
from src.convert.files import Span
from src.convert.forms import Document, read
from src.convert.samples import Tokens
from src.convert.stats import Stats, printable, rounded
from src.convert.workers import Count
from src.data.index import LENGTHS

COUNTED = 256
"""Documents between two calls of ``count``."""

UNIT, DROPPED = "unit.json", "dropped.jsonl"
"""Files of a unit besides its shards: their part of index.json with the unit's ``Stats``, and the documents that the
filters dropped. Shards of tokens also have LENGTHS."""

DUPLICATES = "duplicates"
"""File in the working folder: output of ``filters.find_duplicates``."""


class Job(NamedTuple):
    """What all units of a split have in common. Can be sent to another process."""

    work: Path
    """The working folder of the split or part."""
    plan: dict[str, Any]
    """All that decides what is written (``conversion.plan_of``)."""
    tokens: Tokens | None
    """How to tokenize, or None to write text."""
    text_column: str
    """Column or field that holds the text."""
    skip_bad: bool
    """Count and skip what cannot be read, instead of raising."""
    dedup: str | None
    """Which of ``filters.METHODS`` drops duplicates, if any."""


class Unit(NamedTuple):
    """One unit of a split's work."""

    number: int
    spans: Iterable[Span]


def unit_folder(work: Path, number: int) -> Path:
    """Folder of a complete unit."""
    return work / "units" / f"{number:06}"


def hash_file(work: Path, number: int) -> Path:
    """File of the hashes of a unit's documents, written by the first pass of --dedup."""
    return work / "units" / f"{number:06}.hashes"


def gram_file(work: Path, size: int | str) -> Path:
    """File of the word sequences of one size (``filters.Grams``), or with "*" a pattern for all of them."""
    return work / f"grams-{size}.npy"


def documents_of(job: Job, unit: Unit, stats: Stats, count: Count) -> Iterator[tuple[str, Document]]:
    """Places and documents of a unit. Calls ``count`` after every ``COUNTED`` documents and at the end."""

    def items() -> Iterator[tuple[str, Document]]:
        for span in unit.spans:
            stats.spans += 1
            yield from read(span, job.text_column, job.skip_bad, stats)

    documents, number = items(), 0
    for number, item in enumerate(itertools.islice(documents, job.plan["limit"]), start=1):
        if number % COUNTED == 0:
            count(COUNTED)
        yield item
    count(number % COUNTED)


def convert_unit(job: Job, unit: Unit, count: Count) -> None:
    """Write a unit's folder, which gets its name once it is complete and on the disk."""
    folder = unit_folder(job.work, unit.number)
    # The process id: the worker of a killed conversion may still write while the next conversion begins.
    partial = folder.with_suffix(f".{os.getpid()}.partial")
    partial.mkdir()
    stats, lengths = Stats(), array("H")
    columns = dict.fromkeys(job.plan["columns"], "bytes" if job.tokens else "str")
    shards = {name: job.plan[name] for name in ("compression", "size_limit")}
    with (
        MDSWriter(out=str(partial), columns=columns, hashes=["sha1"], **shards) as writer,
        (partial / DROPPED).open("w") as dropped,
    ):
        documents = _kept(job, unit, documents_of(job, unit, stats, count), stats, dropped)
        if job.tokens is None:
            for document in documents:
                writer.write({name: document.get(name, "") for name in columns})
                stats.not_kept.update(document.keys() - columns.keys())
                stats.samples += 1
        else:
            for sample in job.tokens.samples((document["text"] for document in documents), stats):
                writer.write({"tokens": sample.tobytes()})
                lengths.append(len(sample))
            stats.samples, stats.tokens = len(lengths), sum(lengths)
            stats.sample_tokens.update(lengths)
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
    sync(folder.parent)


def _kept(
    job: Job, unit: Unit, documents: Iterator[tuple[str, Document]], stats: Stats, dropped: IO[str]
) -> Iterator[Document]:
    """The documents that no filter drops. The others are counted, and listed in the file ``dropped``."""
    number, duplicate, grams = 0, None, None
    if job.dedup:
        sizes = [hash_file(job.work, number).stat().st_size for number in range(unit.number + 1)]
        first, end = (sum(part) // filters.METHODS[job.dedup].bytes for part in (sizes[:-1], sizes))
        duplicate = np.memmap(job.work / DUPLICATES, dtype=bool, mode="r")[first:end]
    if job.plan["decontaminate"]:
        files = job.work.glob(gram_file(job.work, "*").name)
        grams = {int(file.stem.split("-")[1]): np.load(file, mmap_mode="r") for file in files}
    changed = DataError(f"{job.work}: the source changed after --dedup read it; give --overwrite to start again")
    for number, (place, document) in enumerate(documents, start=1):
        text = document["text"]
        if duplicate is not None and number > len(duplicate):
            raise changed
        if duplicate is not None and duplicate[number - 1]:
            stats.duplicate += 1
            reason = {"reason": "near duplicate" if job.dedup == "near" else "duplicate"}
        elif grams is not None and (words := filters.overlap(text, grams)):
            stats.contaminated += 1
            reason = {"reason": "contaminated", "words": words}
        else:
            stats.characters += len(text)
            stats.document_characters[rounded(len(text))] += 1
            yield document
            continue
        dropped.write(json.dumps({**reason, "place": printable(place), "text": text[:80]}) + "\n")
    if duplicate is not None and number < len(duplicate):
        raise changed


def hash_unit(job: Job, unit: Unit, count: Count) -> None:
    """First pass of --dedup: write the keys of a unit's documents, as ``filters.find_duplicates`` reads them."""
    assert job.dedup is not None
    method, file = filters.METHODS[job.dedup], hash_file(job.work, unit.number)
    rows, partial = (file.with_suffix(f".{os.getpid()}{suffix}.partial") for suffix in (".rows", ""))
    with rows.open("wb") as out:
        for _, document in documents_of(job, unit, Stats(), count):
            out.write(method.keys(document["text"]))
    with partial.open("wb") as out:
        if size := rows.stat().st_size:  # an empty file cannot be mapped
            table = np.memmap(rows, "<u8", "r", shape=(size // method.bytes, sum(method.widths)))
            for end, width in zip(itertools.accumulate(method.widths), method.widths, strict=True):
                table[:, end - width : end].tofile(out)
    rows.unlink()
    sync(partial)
    partial.rename(file)
