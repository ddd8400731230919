"""Conversion of a split: plan, units of work, duplicates, merging of parts, report."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from src.common.files import locked, settle_folder, sync
from src.convert import filters, workers
from src.convert.samples import Tokens
from src.convert.sources import COLUMNS, Counts, Span, files_of, iter_documents, text_bytes, units_of
from src.convert.unit import Job, Unit, convert_unit, hash_file, hash_unit, unit_folder
from src.convert.work_folder import PLAN, assemble, begin, check_free, publish

SMALL = {"train_small": ("train", 100_000), "val_small": ("val", 10_000)}
"""The first so many documents of a split."""

UNIT_BYTES = (8 << 20, 256 << 20)
"""Least and most text of a share of work; between, a 64th of the source. A function of the source, never of the
machine, because each share has shards of its own."""


def plan_of(
    args: argparse.Namespace, split: str, tokens: Tokens | None, grams: filters.Hashes | None
) -> dict[str, Any]:
    """All that decides what is written, flat, and how many units the work has."""
    c4_split, limit = SMALL.get(split, (split, None))
    limits = [n for n in (limit, args.limit) if n is not None]
    names, times, number, size, text = hashlib.sha256(), hashlib.sha256(), 0, 0, 0
    for file in files_of(args.source, c4_split):
        name = os.path.relpath(file.path, args.source) if args.source else file.path
        names.update(f"{name}\t{file.size}\n".encode())
        times.update(f"{file.changed}\n".encode())
        number, size, text = number + 1, size + file.size, text + text_bytes(file)
    counts = Counts()
    first = next(iter_documents(args.source, c4_split, args.skip_bad, counts), None)
    if first is None:
        raise ValueError(f"{split}: the source has no document ({counts.empty} empty, {counts.bad} bad)")
    unit_bytes = min(max(text // 64, UNIT_BYTES[0]), UNIT_BYTES[1])
    return {
        "split": c4_split,
        "files": number,
        "bytes": size,
        "names_and_sizes": names.hexdigest()[:16],
        # Copies of a source on several machines have times of their own.
        "times": times.hexdigest()[:16] if args.part is None else None,
        "limit": min(limits) if limits else None,
        "columns": [name for name in COLUMNS if name in first] if tokens is None else ["tokens"],
        "tokens": None if tokens is None else tokens.description,
        "compression": args.compression,
        "size_limit": args.size_limit or "64mb",
        "dedup": args.dedup,
        "decontaminate": None if grams is None else hashlib.sha256(grams.tobytes()).hexdigest(),
        "unit_bytes": unit_bytes,
        "units": 1 if limits else sum(1 for _ in units_of(files_of(args.source, c4_split), unit_bytes)),
    }


def units(args: argparse.Namespace, plan: dict[str, Any]) -> Iterator[Unit]:
    """The work of this machine, in order. With a limit it is one unit, because the limit counts in order."""
    files = files_of(args.source, plan["split"])
    if plan["limit"]:
        yield Unit(0, (Span(file.path) for file in files))
        return
    part, parts = args.part or (1, 1)
    for number, spans in enumerate(units_of(files, plan["unit_bytes"])):
        if number % parts == part - 1:
            yield Unit(number, spans)


def convert(args: argparse.Namespace, split: str, tokens: Tokens | None, grams: filters.Hashes | None) -> None:
    """Write one split, or this machine's part of it."""
    started = time.perf_counter()
    folder = args.out_root / split
    work = part_folder(folder, *args.part) if args.part else folder.with_name(f"{split}.partial")
    plan = plan_of(args, split, tokens, grams)
    with locked(work if args.part else folder):
        settle_folder(folder)
        check_free(folder, args.overwrite)
        begin(work, plan, args.overwrite)
        here = work / "units"
        job = Job(
            folder=here,
            columns=tuple(plan["columns"]),
            tokens=tokens,
            shards={"compression": plan["compression"], "size_limit": plan["size_limit"]},
            skip_bad=args.skip_bad,
            limit=plan["limit"],
            duplicates=work / "duplicates" if args.dedup else None,
            grams=None if grams is None else work / "grams.npy",
        )
        if job.grams is not None and grams is not None:
            np.save(job.grams, grams)
        done = 0
        if (work / PLAN).exists():  # else all is done but for its name
            if job.duplicates is not None:
                mark_duplicates(args, plan, job)
            with tqdm(desc=work.name, unit="doc", unit_scale=True, mininterval=1) as progress:
                workers.run(partial(convert_unit, job), units_to_do(args, plan, job), args.num_workers, progress.update)
                done = progress.n
        seconds = time.perf_counter() - started
        if args.part:
            mine = sum(1 for _ in units(args, plan))
            print(f"part split={split} part={args.part[0]}/{args.part[1]} units={mine} of={plan['units']}")
            return
        finish(work, folder, plan, partial(unit_folder, here), args.overwrite)
        report(folder, tokens.description if tokens else None, seconds, done)


def units_to_do(args: argparse.Namespace, plan: dict[str, Any], job: Job) -> Iterator[Unit]:
    first = 0
    for unit in units(args, plan):
        if not unit_folder(job.folder, unit.number).exists():
            yield dataclasses.replace(unit, first_document=first)
        if job.duplicates is not None:
            first += hash_file(job.folder, unit.number).stat().st_size // 16


def mark_duplicates(args: argparse.Namespace, plan: dict[str, Any], job: Job) -> None:
    """The first of two passes: hashes of all documents, and which of them an earlier one has."""
    assert job.duplicates is not None
    if job.duplicates.exists():
        return
    lacking = (unit for unit in units(args, plan) if not hash_file(job.folder, unit.number).exists())
    with tqdm(desc="looking for duplicates", unit="doc", unit_scale=True, mininterval=1) as progress:
        workers.run(partial(hash_unit, job), lacking, args.num_workers, progress.update)
    unfinished = job.duplicates.with_suffix(".partial")
    filters.find_duplicates([hash_file(job.folder, number) for number in range(plan["units"])], unfinished)
    sync(unfinished)
    unfinished.rename(job.duplicates)


def finish(work: Path, folder: Path, plan: dict[str, Any], folder_of: Any, overwrite: bool) -> None:
    """From complete units to the split under its name."""
    if (work / PLAN).exists():
        assemble(work, plan["units"], folder_of, plan["tokens"])
    publish(work, folder, overwrite)


def part_folder(folder: Path, part: int, parts: int) -> Path:
    """Where one machine of several works."""
    return folder.with_name(f"{folder.name}.part-{part:03}-of-{parts:03}")


def merge(args: argparse.Namespace, split: str) -> None:
    """Put the parts of several machines together.

    Raises:
        ValueError: a part is not there, is incomplete, or was made with other settings or another source.
    """
    folder = args.out_root / split
    found = sorted(args.out_root.glob(f"{split}.part-*-of-*"))
    if not found:
        raise ValueError(f"{args.out_root} has no part of {split} (no folder {split}.part-001-of-…)")
    totals = sorted({int(path.name.rsplit("-", 1)[1]) for path in found})
    if len(totals) > 1:
        raise ValueError(f"{args.out_root} has parts of several divisions of {split} ({totals}); remove one of them")
    parts = [part_folder(folder, part, totals[0]) for part in range(1, totals[0] + 1)]
    with contextlib.ExitStack() as locks:
        for path in (folder, *parts):
            locks.enter_context(locked(path))
        plans = []
        for path in parts:
            if not (path / PLAN).exists():
                raise ValueError(f"{path} is not there, or was not begun; run that part")
            plans.append(json.loads((path / PLAN).read_text()))
        for path, plan in zip(parts, plans, strict=True):
            differ = [f"{k}: {plans[0][k]} in the first, {plan[k]} here" for k in plan if plan[k] != plans[0][k]]
            if differ:
                raise ValueError(f"{path} was made otherwise than {parts[0].name} ({'; '.join(differ)})")

        def folder_of(number: int) -> Path:
            return unit_folder(parts[number % len(parts)] / "units", number)

        units = plans[0]["units"]
        if lacking := [number for number in range(units) if not folder_of(number).exists()]:
            part = parts[lacking[0] % len(parts)]
            raise ValueError(f"{len(lacking)} of {units} units are not done; {part.name} lacks some: run it again")
        settle_folder(folder)
        check_free(folder, args.overwrite)
        work = folder.with_name(f"{split}.partial")
        begin(work, plans[0], args.overwrite)
        finish(work, folder, plans[0], folder_of, args.overwrite)
        for path in parts:
            shutil.rmtree(path)
    report(folder, plans[0]["tokens"], None, 0)


def report(folder: Path, tokens: dict[str, Any] | None, seconds: float | None, done: int) -> None:
    """Print what stats.json holds, for people and, in the last line, for scripts."""
    stats = json.loads((folder / "stats.json").read_text())
    of_documents, dropped = stats["document_characters"], stats["dropped"]
    print(
        f"{folder}: {stats['documents']:,} documents ({stats['empty']:,} empty and {stats['bad']:,} bad ones left out, "
        f"{dropped['duplicate']:,} duplicate and {dropped['contaminated']:,} contaminated dropped) in "
        f"{stats['samples']:,} samples; characters of a document: {_quantiles(of_documents)}"
    )
    if tokens is not None:
        print(
            f"    --pack {tokens['pack']}, up to {tokens['max_seq_len']} tokens: {_quantiles(stats['sample_tokens'])}; "
            f"fill {stats['fill']:.1%}, {stats['cut_share']:.1%} of the text cut off, "
            f"{stats['bytes_per_token']:.2f} bytes and {stats['characters_per_token']:.2f} characters a token"
        )
    fields = {"split": folder.name, "documents": stats["documents"], "samples": stats["samples"]}
    fields |= {"tokens": stats.get("tokens", 0), "bytes": stats["bytes"]}
    if seconds is not None:
        fields |= {"seconds": round(seconds, 1), "documents_per_s": round(done / seconds)}
    fields |= {"empty": stats["empty"], "bad": stats["bad"], **dropped}
    if stats["first_bad"]:
        print(f"{folder.name}: bad, left out: {'; '.join(stats['first_bad'])}", file=sys.stderr)
    print("convert " + " ".join(f"{name}={value}" for name, value in fields.items()))


def _quantiles(distribution: dict[str, Any]) -> str:
    at = distribution["percentiles"]
    return f"mean {distribution['mean']:.0f}, 5% {at['5']}, 50% {at['50']}, 95% {at['95']}, longest {at['100']}"
