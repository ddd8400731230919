"""Text to a streaming dataset: C4 from the hub, C4's own files, or yours, as MDS shards of text or of tokens.

python convert_c4.py --out_root ./my-copy-c4 --splits val                              C4's validation split, 0.5 GB
python convert_c4.py --out_root ./data --splits train --source ./texts                 your text
... --tokenizer ./tokenizer --max_seq_len 128 --pack chunk                             tokens in place of text
... --part 3/16                                                                        one machine's share of 16
python convert_c4.py --out_root ./data --splits train --merge                          the shares put together

Stopped at any moment, the same command goes on. The shards do not depend on --num_workers, --part or interruptions.
"""

import argparse
import os
import re
import sys
from pathlib import Path

from streaming.base.compression import is_compression

from src.convert import filters
from src.convert.conversion import SMALL, convert, merge
from src.convert.samples import Tokens
from src.convert.sources import is_c4_folder, iter_documents
from src.convert.work_folder import check_free
from src.data.tokenizer import load_tokenizer

LONGEST = 2**16 - 1
"""Tokens of a sample; lengths.bin has 16 bits for each."""


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
