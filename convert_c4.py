"""Convert text to a streaming dataset: C4 from the hub, C4's own files, or yours, as MDS shards of text or of tokens.

python convert_c4.py --out_root ./my-copy-c4 --splits val                              C4's validation split, 0.5 GB
python convert_c4.py --out_root ./data --splits train --source ./texts                 your text
... --tokenizer ./tokenizer --max_seq_len 128 --pack chunk                             tokens instead of text
... --part 3/16                                                                        part 3 of 16, on one machine
python convert_c4.py --out_root ./data --splits train --merge                          the parts put together

If it is stopped, run the same command again to continue. The shards do not depend on --num_workers, --part or stops.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from streaming.base.compression import is_compression
from streaming.base.util import bytes_to_int

from src.common.errors import DataError
from src.convert import filters
from src.convert.conversion import FIRST_DOCUMENTS, Settings, convert, merge
from src.convert.samples import Tokens
from src.convert.sources import Inventory, TextSource, add_source_options, documents, is_c4, text_source
from src.convert.work_folder import CONVERSION, check_free
from src.data.tokenizer import load_tokenizer

LONGEST = 2**16 - 1
"""Longest sample in tokens; lengths.bin stores lengths as uint16."""


def part_of(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= 999:
        raise argparse.ArgumentTypeError(f"expected a part such as 3/16, got {text!r}")
    return int(match[1]), int(match[2])


def bytes_of(size: str) -> int:
    """Bytes of a size such as 64mb; 0 if it is none."""
    try:
        return bytes_to_int(size)
    except (ValueError, OverflowError):
        return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out_root", required=True, help="folder of the dataset; each split is a subfolder")
    splits = "for C4: train, val, train_small, val_small; otherwise one name of your choice"
    add("--splits", nargs="+", required=True, help=splits)
    add_source_options(parser, "--source", nargs="+")
    add("--compression", help="compression of the shards, for example zstd or zstd:7 (default: none)")
    add("--size_limit", help="size of a shard before compression (default: 64mb)")
    add("--limit", type=int, help="convert only the first LIMIT documents of each split; one process")
    add("--tokenizer", help="write tokens of this tokenizer (folder or hub name) instead of text")
    add("--max_seq_len", type=int, help="with --tokenizer: longest sample in tokens")
    add(
        "--pack",
        choices=["truncate", "chunk"],
        help="with --tokenizer: keep the beginning of a document, or cut all of it into samples (default: truncate for "
        "C4, chunk for your text)",
    )
    special = "with --tokenizer: what the word [MASK] in a text becomes: word pieces (text, the default), or the token"
    add("--special_tokens", choices=["text", "tokens"], help=special)
    add(
        "--dedup",
        nargs="?",
        const="exact",
        choices=list(filters.METHODS),
        help="drop documents with the same words as an earlier one, or with nearly the same (near); reads the source "
        "twice, with --part all of it on each machine; takes 17 bytes of disk per document (6 GB for C4), 89 for near, "
        "and 0.7 GB of memory",
    )
    decontaminate = (
        f"drop documents that share {filters.GRAM} consecutive words with these texts, or contain one of "
        f"{filters.SHORTEST} words or more; takes 8 bytes of memory per word of these texts"
    )
    add("--decontaminate", nargs="+", metavar="PLACE", help=decontaminate)
    add("--decontaminate_column", help="with --decontaminate: column or field that holds these texts (default: text)")
    add("--num_workers", type=int, help="worker processes (default: all cores for a large source, otherwise 1)")
    add("--part", type=part_of, help="convert one part of the split, for example 3/16")
    add("--merge", action="store_true", help="put the parts in --out_root together; takes no other settings")
    add("--overwrite", action="store_true", help="replace an existing split or unfinished work")
    args = parser.parse_args(argv)

    if "://" in args.out_root:
        raise ValueError(
            f"--out_root: {args.out_root} is no folder of this machine; write to one, and copy it when it is "
            f"complete, for example: aws s3 sync ./data {args.out_root}"
        )
    args.out_root = Path(args.out_root)
    if args.out_root.exists() and not args.out_root.is_dir():
        raise ValueError(f"--out_root: {args.out_root} is a file; name a folder")
    if len(set(args.splits)) < len(args.splits):
        raise ValueError("--splits: a name is given twice")
    for split in args.splits:
        if Path(split).name != split or split.startswith(".") or not split:
            raise ValueError(f"--splits: expected a plain folder name, got {split!r}")
    if args.merge:
        used = ("out_root", "splits", "merge", "overwrite")
        others = {name: value for name, value in vars(args).items() if name not in used and value}
        if given := [name for name, value in others.items() if value != parser.get_default(name)]:
            raise ValueError(f"--merge takes the parts as they are; omit --{', --'.join(given)}")
        return args
    args.source = text_source(args)
    args.c4 = is_c4(args.source)
    if args.c4:
        if unknown := [split for split in args.splits if split not in ("train", "val", *FIRST_DOCUMENTS)]:
            raise ValueError(f"C4 has no split {', '.join(unknown)}; it has train, val, train_small, val_small")
    elif len(args.splits) != 1:
        raise ValueError(f"{args.source} is one split; expected one name in --splits, got {len(args.splits)}")
    if args.tokenizer is None and (args.max_seq_len is not None or args.pack or args.special_tokens):
        raise ValueError("--max_seq_len, --pack and --special_tokens have no effect without --tokenizer")
    if args.decontaminate_column and not args.decontaminate:
        raise ValueError("--decontaminate_column has no effect without --decontaminate")
    if args.tokenizer is not None and (args.max_seq_len is None or not 3 <= args.max_seq_len <= LONGEST):
        raise ValueError(f"--tokenizer needs a --max_seq_len from 3 to {LONGEST:,}")
    if args.compression is not None and not is_compression(args.compression):
        raise ValueError(
            f"--compression: expected zstd, gz, br, bz2 or snappy, with or without a :level, got {args.compression!r}"
        )
    if args.size_limit is not None and not 1 <= bytes_of(args.size_limit) < 1 << 32:
        raise ValueError(f"--size_limit: expected a size below 4gb, for example 64mb, got {args.size_limit!r}")
    for name in ("limit", "num_workers"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1")
    if args.part and (args.limit is not None or any(split in FIRST_DOCUMENTS for split in args.splits)):
        raise ValueError("--part cannot be combined with a limit, which takes one machine")
    return args


def gram_set(places: list[str], column: str) -> filters.Grams:
    """Word sequences of the evaluation sets, which documents may not contain."""
    found = Inventory(TextSource(tuple(places), text_column=column))
    found.print_skipped()
    grams, short = filters.gram_set(document["text"] for document in documents(found))
    if not grams:
        raise DataError(f"{', '.join(places)}: no text has {filters.SHORTEST} words, so --decontaminate finds nothing")
    print(
        f"--decontaminate: {sum(map(len, grams.values())):,} word sequences; {short:,} texts have fewer than "
        f"{filters.SHORTEST} words, and are not looked for"
    )
    return grams


def report(folder: Path, speed: dict[str, Any]) -> None:
    """Print what stats.json holds, for people and, in the last line, for scripts (with the fields ``speed``)."""
    stats = json.loads((folder / "stats.json").read_text())
    plan = json.loads((folder / CONVERSION).read_text())
    tokens, special = plan["tokens"], plan.get("special_tokens", "tokens")
    dropped = stats["dropped"]
    print(
        f"{folder}: {stats['documents']:,} documents ({stats['empty']:,} empty and {stats['bad']:,} bad ones skipped, "
        f"{dropped['duplicate']:,} duplicate and {dropped['contaminated']:,} contaminated dropped) in "
        f"{stats['samples']:,} samples; characters per document: {_quantiles(stats['document_characters'])}"
    )
    if tokens is not None:
        print(
            f"    --pack {tokens['pack']}, up to {tokens['max_seq_len']} tokens: {_quantiles(stats['sample_tokens'])}; "
            f"fill {stats['fill']:.1%}, {stats['cut_share']:.1%} of the text cut off, "
            f"{stats['bytes_per_token']:.2f} bytes and {stats['characters_per_token']:.2f} characters per token"
        )
        if stats.get("unknown_share"):
            lost = f"{stats['unknown_share']:.2%} of the characters became unknown tokens"
            print(f"    {lost}: the tokenizer lacks them, or their words are too long for it")
        if stats["special_in_text"]:
            print(f"    special tokens such as [MASK] in the text: {stats['special_in_text']:,}, taken as {special}")
    counts = {name: stats.get(name, 0) for name in ("documents", "samples", "tokens", "bytes")}
    fields = {"split": folder.name, **counts, **speed, "empty": stats["empty"], "bad": stats["bad"], **dropped}
    if stats["first_bad"]:
        print(f"{folder.name}: bad, skipped: {'; '.join(stats['first_bad'])}", file=sys.stderr)
    for name, number in stats["columns_not_kept"].items():
        print(
            f"{folder.name}: the column {name} of {number:,} documents is not kept, because no file's first document "
            "has it",
            file=sys.stderr,
        )
    print("convert " + " ".join(f"{name}={value}" for name, value in fields.items()))


def _quantiles(distribution: dict[str, Any]) -> str:
    at = distribution["percentiles"]
    return f"mean {distribution['mean']:.0f}, 5% {at['5']}, 50% {at['50']}, 95% {at['95']}, longest {at['100']}"


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    for split in args.splits:
        check_free(args.out_root / split, args.overwrite)
    if args.merge:
        for split in args.splits:
            merge(args.out_root, split, args.overwrite)
            report(args.out_root / split, speed={})
        return
    args.tokens = args.grams = None
    if args.tokenizer is not None:
        pack = args.pack or ("truncate" if args.c4 else "chunk")
        tokenizer, special = load_tokenizer(args.tokenizer), args.special_tokens or "text"
        args.tokens = Tokens(args.tokenizer, tokenizer, args.max_seq_len, pack, special)
        print(f"samples of at most {args.max_seq_len} tokens, --pack {pack}")
    if args.decontaminate:
        args.grams = gram_set(args.decontaminate, args.decontaminate_column or "text")
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    for split in args.splits:
        started = time.perf_counter()
        documents, units = convert(settings, split)
        seconds = time.perf_counter() - started
        if args.part:
            part, parts = args.part
            print(f"part split={split} part={part}/{parts} units={len(range(part - 1, units, parts))} of={units}")
        else:
            speed = {"seconds": round(seconds, 1), "documents_per_s": round(documents / seconds)}
            report(args.out_root / split, speed)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"convert_c4.py: {error}")
    except KeyboardInterrupt:
        sys.exit("convert_c4.py: interrupted; run the same command again to continue")
