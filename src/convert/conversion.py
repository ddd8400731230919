"""Conversion of a split: plan, units of work, duplicates, merging of parts."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from src.common.errors import DataError
from src.common.files import atomic, locked, settle_folder
from src.convert import filters, workers
from src.convert.files import Span
from src.convert.samples import Tokens
from src.convert.sources import Inventory, TextSource, columns_of_files, documents, units_of
from src.convert.stats import Stats
from src.convert.unit import DUPLICATES, Job, Unit, convert_unit, gram_file, hash_file, hash_unit, unit_folder
from src.convert.walk import fixed_part, is_local
from src.convert.work_folder import FILES, PLAN, begin, check_free, differences, publish, remove

FIRST_DOCUMENTS = {"train_small": ("train", 100_000), "val_small": ("val", 10_000)}
"""Splits that are the first documents of a split of C4: which, and how many."""

UNIT_BYTES = (8 << 20, 256 << 20)
"""Least and most text of a unit in bytes; between them, a 64th of the source. Depends on the source only, never on the
machine, because shards do not cross units."""

WORKERS_PAY = {"text": 512 << 20, "tokens": 64 << 20}
"""Bytes of text above which worker processes save more time than their start takes (about 4 s). Tokens take longer per
byte, although one process already tokenizes on all cores."""


@dataclass(frozen=True)
class Settings:
    """How to convert, named as the arguments of convert_c4.py. The last three do not change the shards."""

    out_root: Path
    """Parent of the splits' folders."""
    source: TextSource = TextSource()
    """What to read; C4 from the hub by default."""
    tokens: Tokens | None = None
    """How to tokenize, or None to write text."""
    grams: filters.Grams | None = None
    """Drop documents that contain one of these word sequences (from ``filters.gram_set``)."""
    dedup: str | None = None
    """Drop documents whose words an earlier one has: ``exact`` or ``near`` (``filters.METHODS``)."""
    limit: int | None = None
    """Read only the first ``limit`` documents, in one process."""
    skip_bad: bool = False
    """Count and skip what cannot be read, instead of raising."""
    compression: str | None = None
    size_limit: str | None = None
    """Size of a shard before compression, 64mb by default."""
    num_workers: int | None = None
    """Worker processes at most; None for all usable cores if the source has ``WORKERS_PAY`` bytes, otherwise 1."""
    part: tuple[int, int] | None = None
    """(3, 16) converts the third of 16 parts, into a folder of its own."""
    overwrite: bool = False
    """Replace the split, or unfinished work of other settings."""


def convert(settings: Settings, split: str) -> tuple[int, int]:
    """Write a split, or this machine's part of it. After a stop, a call with the same settings continues.

    Returns:
        Documents read by this call, without those of earlier calls; units of the split, including those of other parts.

    Raises:
        DataError: the source cannot be read or has no document.
        ValueError: the split exists, is being written, or was begun with other settings.
    """
    folder = settings.out_root / split
    work = part_folder(folder, *settings.part) if settings.part else folder.with_name(f"{split}.partial")
    files = Inventory(settings.source, FIRST_DOCUMENTS.get(split, (split,))[0], settings.skip_bad, folder)
    files.print_skipped()
    plan, text_bytes = plan_of(settings, split, files)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers_pay = text_bytes >= WORKERS_PAY["tokens" if settings.tokens else "text"]
    num_workers = settings.num_workers or (cores if workers_pay else 1)
    job = Job(work, plan, settings.tokens, settings.source.text_column, settings.skip_bad, settings.dedup)

    def run(
        task: Callable[[Job, Unit, workers.Count], None],
        path_of: Callable[[Path, int], Path],
        title: str,
        part: tuple[int, int] | None,
    ) -> int:
        """Do the task for each unit of a part whose output is missing; returns the number of documents."""
        todo = units_without(partial(path_of, work), files, part, plan)
        with tqdm(desc=title, unit="doc", unit_scale=True, mininterval=1) as progress:
            workers.run(partial(task, job), todo, num_workers, progress.update)
            return progress.n

    done = 0
    with locked(work if settings.part else folder):
        settle_folder(folder)
        check_free(folder, settings.overwrite)
        begin(work, plan, settings.overwrite)
        if (work / PLAN).exists():  # else the split is complete and lacks only its name
            files.save(work / FILES)
            for size, hashes in (settings.grams or {}).items():
                np.save(gram_file(work, size), hashes)
            if settings.dedup and not (work / DUPLICATES).exists():
                # Of all parts: an earlier document may belong to another machine.
                run(hash_unit, hash_file, "looking for duplicates", None)
                keys = [hash_file(work, number) for number in range(plan["units"])]
                with atomic(work / DUPLICATES) as out:
                    filters.find_duplicates(keys, filters.METHODS[settings.dedup], out)
            done = run(convert_unit, unit_folder, work.name, settings.part)
            files.check_unchanged()
        if not settings.part:
            publish(work, folder, partial(unit_folder, work), settings.overwrite)
    return done, plan["units"]


def plan_of(settings: Settings, split: str, files: Inventory) -> tuple[dict[str, Any], int]:
    """All that decides what is written (a flat dict), and the source's bytes of text (approximate)."""
    c4_split, first = FIRST_DOCUMENTS.get(split, (split, None))
    limit = min((n for n in (first, settings.limit) if n is not None), default=None)
    column, base = settings.source.text_column, _base(settings.source)
    names, times, number, size, text = hashlib.sha256(), hashlib.sha256(), 0, 0, 0
    for file in files:
        name = os.path.relpath(file.path, base) if base and is_local(file.path) else file.path
        names.update(os.fsencode(f"{name}\t{file.size}\n"))
        times.update(f"{file.changed}\n".encode())
        number, size, text = number + 1, size + file.size, text + file.text_bytes
    stats = Stats()
    if next(documents(files, settings.skip_bad, stats), None) is None:
        raise DataError(f"{split}: the source has no document ({stats.empty} empty, {stats.bad} bad)")
    unit_bytes = min(max(text // 64, UNIT_BYTES[0]), UNIT_BYTES[1])
    tokens, grams = settings.tokens, settings.grams
    plan = {
        "split": c4_split,
        "files": number,
        "bytes": size,
        "names_and_sizes": names.hexdigest()[:16],
        # Several machines may have copies of the source, with other times.
        "times": times.hexdigest()[:16] if settings.part is None else None,
        "limit": limit,
        **({} if column == "text" else {"text_column": column}),
        "columns": columns_of_files(files, limit) if tokens is None else ["tokens"],
        "tokens": None if tokens is None else tokens.description,
        "special_tokens": None if tokens is None else tokens.special_tokens,
        "compression": settings.compression,
        "size_limit": settings.size_limit or "64mb",
        "dedup": filters.NEAR if settings.dedup == "near" else settings.dedup is not None,
        "decontaminate": None if grams is None else _digest(grams),
        "unit_bytes": unit_bytes,
        "units": 1 if limit else sum(1 for _ in units_of(files, unit_bytes)),
    }
    return plan, text


def _digest(grams: filters.Grams) -> str:
    digest = hashlib.sha256()
    for size, hashes in grams.items():
        digest.update(f"{size} {len(hashes)}\n".encode() + hashes.tobytes())
    return digest.hexdigest()


def _base(source: TextSource) -> str | None:
    """Folder or file to which the names of local files are relative, wherever the source lies."""
    local = [fixed_part(place) for place in source.places if is_local(place)]
    return os.path.commonpath(list(map(os.path.abspath, local))) if local else None


def units_without(
    path_of: Callable[[int], Path], files: Inventory, part: tuple[int, int] | None, plan: dict[str, Any]
) -> Iterator[Unit]:
    """The units of a part, or of the split, whose ``path_of(number)`` does not exist, in order."""
    # Documents are counted in order, so a limit makes one unit of all files.
    units = [(Span(file.path) for file in files)] if plan["limit"] else units_of(files, plan["unit_bytes"])
    of, parts = part or (1, 1)
    for number, spans in enumerate(units):
        if number % parts == of - 1 and not path_of(number).exists():
            yield Unit(number, spans)


def part_folder(folder: Path, part: int, parts: int) -> Path:
    """Working folder of one machine of several."""
    return folder.with_name(f"{folder.name}.part-{part:03}-of-{parts:03}")


def merge(out_root: Path, split: str, overwrite: bool) -> None:
    """Assemble a split from the parts of several machines.

    Raises:
        DataError: a part is missing, incomplete, or differs from the first in its settings or source.
        ValueError: the split exists and ``overwrite`` is off, or a part is being written.
    """
    folder = out_root / split
    totals = sorted({int(path.name.rsplit("-", 1)[1]) for path in out_root.glob(f"{split}.part-*-of-*")})
    if not totals:
        raise DataError(f"{out_root} has no part of {split} (no folder {split}.part-001-of-...)")
    if len(totals) > 1:
        raise DataError(f"{out_root} has parts of several divisions of {split} (of {totals}); remove all but one")
    parts = [part_folder(folder, part, totals[0]) for part in range(1, totals[0] + 1)]

    def folder_of(number: int) -> Path:
        return unit_folder(parts[number % len(parts)], number)

    with contextlib.ExitStack() as locks:
        for path in (folder, *parts):
            locks.enter_context(locked(path))
        plans = []
        for path in parts:
            if not (path / PLAN).exists():
                raise DataError(f"{path} is missing or was not begun; run that part")
            plans.append(json.loads((path / PLAN).read_text()))
            if differ := differences(plans[0], plans[-1]):
                raise DataError(f"{path} does not match {parts[0].name} ({differ})")
        plan = plans[0]
        incomplete = [number for number in range(plan["units"]) if not folder_of(number).exists()]
        if incomplete:
            part = parts[incomplete[0] % len(parts)]
            raise DataError(f"{len(incomplete)} of {plan['units']} units are incomplete; run {part.name} again")
        settle_folder(folder)
        check_free(folder, overwrite)
        work = folder.with_name(f"{split}.partial")
        begin(work, plan, overwrite)
        if (parts[0] / FILES).exists() and (work / PLAN).exists():  # older versions wrote none
            shutil.copyfile(parts[0] / FILES, work / FILES)
        publish(work, folder, folder_of, overwrite)
        for path in parts:
            remove(path)
