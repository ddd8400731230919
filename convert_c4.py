"""Text to a streaming dataset: C4 from the hub, C4's own files, or yours, as MDS shards of text or of tokens.

python convert_c4.py --out_root ./my-copy-c4 --splits val                              C4's validation split, 0.5 GB
python convert_c4.py --out_root ./data --splits train --source ./texts                 your text
... --tokenizer ./tokenizer --max_seq_len 128 --pack chunk                             tokens in place of text
... --part 3/16                                                                        one machine's share of 16
python convert_c4.py --out_root ./data --splits train --merge                          the shares put together

Stopped at any moment, the same command goes on. The shards do not depend on --num_workers, --part or interruptions.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.compression import is_compression
from tqdm import tqdm

from src import filters, pool
from src.convert import Job, Tokens, Unit, convert_unit, hash_file, hash_unit, sync, unit_folder
from src.data_c4 import load_tokenizer
from src.text import COLUMNS, Counts, Span, files_of, is_c4_folder, iter_documents, text_bytes, units_of
from src.work_folder import PLAN, assemble, begin, check_free, locked, publish, settle

SMALL = {"train_small": ("train", 100_000), "val_small": ("val", 10_000)}
"""The first so many documents of a split."""

UNIT_BYTES = (8 << 20, 256 << 20)
"""Least and most text of a share of work; between, a 64th of the source. A function of the source, never of the
machine, because each share has shards of its own."""

LONGEST = 2**16 - 1
"""Tokens of a sample; lengths.bin has 16 bits for each."""


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        settle(folder)
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
                pool.run(partial(convert_unit, job), units_to_do(args, plan, job), args.num_workers, progress.update)
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
        pool.run(partial(hash_unit, job), lacking, args.num_workers, progress.update)
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
        settle(folder)
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


def part_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 999:
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 3/16, from 1/16 to 16/16")
    return int(match[1]), int(match[2])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_root", type=Path, required=True, help="folder of the dataset; each split is a subfolder")
    parser.add_argument(
        "--splits", nargs="+", required=True, help="of C4: train, val, train_small, val_small; else one name of yours"
    )
    parser.add_argument("--source", help="folder of C4's files, or file or folder of yours (default: C4 from the hub)")
    parser.add_argument("--compression", help="of the shards, for example zstd or zstd:7 (default: none)")
    parser.add_argument("--size_limit", help="of a shard, for example 64mb (default: 64mb)")
    parser.add_argument("--limit", type=int, help="only the first so many documents of each split; uses one worker")
    parser.add_argument("--tokenizer", help="write tokens of this tokenizer (folder or hub name) in place of text")
    parser.add_argument("--max_seq_len", type=int, help="with --tokenizer: longest sample in tokens")
    parser.add_argument(
        "--pack",
        choices=["truncate", "chunk"],
        help="with --tokenizer: keep a document's beginning, or cut it all up (default: truncate C4, chunk the rest)",
    )
    parser.add_argument(
        "--dedup",
        action="store_true",
        help="drop documents whose words an earlier one has; reads the source twice, and needs 17 bytes of disk a "
        "document (6 GB for C4) and 0.7 GB of memory",
    )
    parser.add_argument(
        "--decontaminate",
        nargs="+",
        metavar="FILE",
        help=f"drop documents that have {filters.GRAM} words in a row in common with these texts",
    )
    parser.add_argument("--skip_bad", action="store_true", help="count lines that cannot be read, and go on")
    parser.add_argument("--num_workers", type=int, help="processes (default: the cores)")
    parser.add_argument("--part", type=part_of, help="convert one of so many shares, for example 3/16")
    parser.add_argument("--merge", action="store_true", help="put the parts in --out_root together; no other settings")
    parser.add_argument("--overwrite", action="store_true", help="replace a split, or unfinished work, that exists")
    args = parser.parse_args(argv)

    if len(set(args.splits)) < len(args.splits):
        raise ValueError("a split is named twice")
    for split in args.splits:
        if Path(split).name != split or split.startswith(".") or not split:
            raise ValueError(f"{split!r} is no plain name for a split's folder")
    if args.merge:
        acting = ("out_root", "splits", "merge", "overwrite")
        if given := [name for name, value in vars(args).items() if name not in acting and value]:
            raise ValueError(f"--merge takes the parts as they are; leave out --{', --'.join(given)}")
        return args
    args.c4 = args.source is None or is_c4_folder(args.source)
    if args.c4:
        unknown = [split for split in args.splits if split not in ("train", "val", *SMALL)]
        if unknown:
            raise ValueError(f"C4 has no split {', '.join(unknown)}; there are train, val, train_small, val_small")
    elif len(args.splits) != 1:
        raise ValueError(f"{args.source} is one split, and {len(args.splits)} names are given for it")
    if args.tokenizer is None and (args.max_seq_len is not None or args.pack):
        raise ValueError("--max_seq_len and --pack act only with --tokenizer")
    if args.tokenizer is not None and (args.max_seq_len is None or not 3 <= args.max_seq_len <= LONGEST):
        raise ValueError(f"--tokenizer needs a --max_seq_len from 3 to {LONGEST:,}")
    if args.compression is not None and not is_compression(args.compression):
        raise ValueError(
            f"{args.compression!r} is no compression; take zstd, gz, br, bz2 or snappy, or such with a :level"
        )
    if args.limit is not None and args.limit < 1:
        raise ValueError("--limit must be at least 1")
    if args.num_workers is None:
        args.num_workers = usable_cores()
    if args.num_workers < 1:
        raise ValueError("--num_workers must be at least 1")
    if args.part and (args.limit is not None or any(split in SMALL for split in args.splits)):
        raise ValueError("--part does not go with a limit: the first documents are the work of one machine")
    if args.part and args.dedup:
        raise ValueError("--part does not go with --dedup: a copy may lie in another machine's part. Convert on one")
    return args


def gram_set(files: list[str]) -> filters.Hashes:
    """What documents may not have in common with the evaluation sets."""
    grams, short = filters.gram_set(document["text"] for file in files for document in iter_documents(file))
    if not len(grams):
        raise ValueError(f"{', '.join(files)}: no text has {filters.GRAM} words, so there is nothing to look for")
    print(f"--decontaminate: {len(grams):,} word sequences; {short:,} texts are shorter and not looked for")
    return grams


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    for split in args.splits:
        check_free(args.out_root / split, args.overwrite)
    if args.merge:
        for split in args.splits:
            merge(args, split)
        return
    tokens = None
    if args.tokenizer is not None:
        pack = args.pack or ("truncate" if args.c4 else "chunk")
        tokens = Tokens(args.tokenizer, load_tokenizer(args.tokenizer), args.max_seq_len, pack)
        print(f"samples of at most {tokens.max_seq_len} tokens, --pack {tokens.pack}")
    grams = gram_set(args.decontaminate) if args.decontaminate else None
    for split in args.splits:
        convert(args, split, tokens, grams)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"convert_c4.py: {error}")
    except KeyboardInterrupt:
        sys.exit("convert_c4.py: interrupted; the same command goes on")
