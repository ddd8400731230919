"""Text to a streaming dataset: C4 from the hub, C4's own files, or yours, as MDS shards of text or of tokens.

python convert_c4.py --out_root ./my-copy-c4 --splits val                              C4's validation split, 0.5 GB
python convert_c4.py --out_root ./data --splits train --source ./texts                 your text
... --tokenizer ./tokenizer --max_seq_len 128 --pack chunk                             tokens in place of text
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter
from streaming.base.compression import is_compression
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from src.data_c4 import TOKENS_KEY, encode_prefix, load_tokenizer, tokenizer_fingerprint
from src.text import COLUMNS, Counts, Document, is_c4_folder, iter_documents

SMALL = {"train_small": ("train", 100_000), "val_small": ("val", 10_000)}
"""The first so many documents of a split."""

HASHES = ["sha1"]
"""Written for each shard, so that damage can be found."""

BATCH = 256
"""Documents tokenized at once; the tokenizer works on them in parallel."""


class Tokens:
    """Documents to samples of tokens.

    Args:
        name: tokenizer, a folder or a name on the hub.
        max_seq_len: longest sample, [CLS] and [SEP] included.
        pack: ``truncate`` keeps the beginning of a document, ``chunk`` cuts all of it into consecutive samples.
    """

    def __init__(self, name: str, max_seq_len: int, pack: str):
        self.name, self.max_seq_len, self.pack = name, max_seq_len, pack
        self.tokenizer: PreTrainedTokenizerFast = load_tokenizer(name)
        # Half the bytes on disk and in flight, wherever the vocabulary allows it.
        self.dtype = np.dtype("<u2" if len(self.tokenizer) <= 2**16 else "<u4")

    def samples(self, documents: Iterator[Document]) -> Iterator[np.ndarray[Any, Any]]:
        """Each (length,), at most ``max_seq_len``, [CLS] and [SEP] included."""
        room, cls, sep = self.max_seq_len - 2, self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        while batch := list(itertools.islice(documents, BATCH)):
            texts = [document["text"] for document in batch]
            if self.pack == "truncate":
                ids_of = [encode_prefix(self.tokenizer, text, room) for text in texts]
            else:
                encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
                ids_of = [encoding.ids for encoding in encodings]
            for ids in ids_of:
                for start in range(0, len(ids), room):
                    yield np.array([cls, *ids[start : start + room], sep], dtype=self.dtype)

    def description(self) -> dict[str, Any]:
        """What training checks before it uses the shards."""
        return {
            "tokenizer": self.name,
            "fingerprint": tokenizer_fingerprint(self.tokenizer),
            "vocab_size": len(self.tokenizer),
            "max_seq_len": self.max_seq_len,
            "pack": self.pack,
            "dtype": self.dtype.name,
        }


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise a ValueError where ``folder`` exists and may not be replaced."""
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists; give --overwrite to replace it, or another --out_root")
    if folder.exists() and not (folder / "index.json").exists():
        raise ValueError(f"{folder} holds no dataset (no index.json), so it is not replaced; take another name for it")


def settle(folder: Path, replaced: Path) -> None:
    """End a replacement that may have stopped between its two renames: the old split has its name, or is gone."""
    if replaced.exists() and folder.exists():
        shutil.rmtree(replaced)
    elif replaced.exists():
        replaced.rename(folder)


@contextlib.contextmanager
def appears_when_complete(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write to, which takes the name ``folder`` when the block ends well, and vanishes when it does not.

    Raises:
        ValueError: ``folder`` exists and may not be replaced, or another live process is making it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, lock_path = folder.with_name(f"{folder.name}.partial"), folder.with_name(f".{folder.name}.lock")
    replaced = folder.with_name(f".{folder.name}.replaced")
    with lock_path.open("w") as lock:  # free again when its process is killed; never removed, or two could hold it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {folder}; wait for it to end") from None
        settle(folder, replaced)
        check_free(folder, overwrite)
        if partial.exists():
            print(f"removing {partial}, which an interrupted conversion left", file=sys.stderr)
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            yield partial
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            settle(folder, replaced)


def convert(
    folder: Path,
    documents: Iterator[Document],
    counts: Counts,
    tokens: Tokens | None,
    shards: dict[str, Any],
    overwrite: bool,
) -> dict[str, int | float]:
    """Write one split.

    Args:
        folder: of the split.
        documents: the text; ``counts`` follows it.
        tokens: how to tokenize, or None to write text.
        shards: MDSWriter's ``compression`` and ``size_limit`` (bytes of a shard before compression).
        overwrite: whether an existing split is replaced.

    Returns:
        Numbers of documents, samples, tokens, bytes, seconds, documents a second.
    """
    started = time.perf_counter()
    first = next(documents, None)
    if first is None:
        raise ValueError(f"{folder.name}: the source has no document ({counts.empty} empty, {counts.bad} bad)")
    chained = itertools.chain([first], documents)
    documents = iter(tqdm(chained, desc=folder.name, unit="doc", unit_scale=True, mininterval=1))
    number, length = 0, 0
    with appears_when_complete(folder, overwrite) as out:
        columns = {"tokens": "bytes"} if tokens else {name: "str" for name in COLUMNS if name in first}
        with MDSWriter(out=str(out), columns=columns, hashes=HASHES, **shards) as writer:
            if tokens is None:
                for document in documents:
                    writer.write({name: document.get(name, "") for name in columns})
                    number += 1
            else:
                for sample in tokens.samples(documents):
                    writer.write({"tokens": sample.tobytes()})
                    number, length = number + 1, length + len(sample)
        if not number:
            raise ValueError(f"{folder.name}: the tokenizer makes no token of any document")
        if tokens is not None:
            index = out / "index.json"
            index.write_text(json.dumps({**json.loads(index.read_text()), TOKENS_KEY: tokens.description()}))
        size = sum(file.stat().st_size for file in out.iterdir())
    seconds = time.perf_counter() - started
    return {
        "documents": counts.documents,
        "samples": number,
        "tokens": length,
        "bytes": size,
        "seconds": round(seconds, 1),
        "documents_per_s": round(counts.documents / seconds),
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_root", type=Path, required=True, help="folder of the dataset; each split is a subfolder")
    parser.add_argument(
        "--splits", nargs="+", required=True, help="of C4: train, val, train_small, val_small; else one name of yours"
    )
    parser.add_argument("--source", help="folder of C4's files, or file or folder of yours (default: C4 from the hub)")
    parser.add_argument("--compression", help="of the shards, for example zstd or zstd:7 (default: none)")
    parser.add_argument("--size_limit", default="64mb", help="of a shard, for example 64mb (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many documents of each split")
    parser.add_argument("--tokenizer", help="write tokens of this tokenizer (folder or hub name) in place of text")
    parser.add_argument("--max_seq_len", type=int, help="with --tokenizer: longest sample in tokens")
    parser.add_argument(
        "--pack",
        choices=["truncate", "chunk"],
        help="with --tokenizer: keep a document's beginning, or cut it all up (default: truncate C4, chunk the rest)",
    )
    parser.add_argument("--skip_bad", action="store_true", help="count lines that cannot be read, and go on")
    parser.add_argument("--overwrite", action="store_true", help="replace a split that exists")
    args = parser.parse_args(argv)

    args.c4 = args.source is None or is_c4_folder(args.source)
    if args.c4:
        unknown = [split for split in args.splits if split not in ("train", "val", *SMALL)]
        if unknown:
            raise ValueError(f"C4 has no split {', '.join(unknown)}; there are train, val, train_small, val_small")
    elif len(args.splits) != 1:
        raise ValueError(f"{args.source} is one split, and {len(args.splits)} names are given for it")
    elif Path(args.splits[0]).name != args.splits[0] or args.splits[0].startswith(".") or not args.splits[0]:
        raise ValueError(f"{args.splits[0]!r} is no plain name for a split's folder")
    if len(set(args.splits)) < len(args.splits):
        raise ValueError("a split is named twice")
    if args.tokenizer is None and (args.max_seq_len is not None or args.pack):
        raise ValueError("--max_seq_len and --pack act only with --tokenizer")
    if args.tokenizer is not None and (args.max_seq_len is None or args.max_seq_len < 3):
        raise ValueError("--tokenizer needs a --max_seq_len of 3 or more")
    if args.compression is not None and not is_compression(args.compression):
        raise ValueError(
            f"{args.compression!r} is no compression; take zstd, gz, br, bz2 or snappy, or such with a :level"
        )
    if args.limit is not None and args.limit < 1:
        raise ValueError("--limit must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    tokens = None
    if args.tokenizer is not None:
        tokens = Tokens(args.tokenizer, args.max_seq_len, args.pack or ("truncate" if args.c4 else "chunk"))
        print(f"samples of at most {tokens.max_seq_len} tokens, --pack {tokens.pack}")
    for split in args.splits:
        check_free(args.out_root / split, args.overwrite)
    for split in args.splits:
        part, limit = SMALL.get(split, (split, None))
        counts = Counts()
        documents = iter_documents(args.source, part, args.skip_bad, counts)
        limits = [n for n in (limit, args.limit) if n is not None]
        documents = itertools.islice(documents, min(limits)) if limits else documents
        shards = {"compression": args.compression, "size_limit": args.size_limit}
        done = convert(args.out_root / split, documents, counts, tokens, shards, args.overwrite)
        if counts.bad:
            print(f"{split}: {counts.bad} bad, left out; the first: {'; '.join(counts.first_bad)}", file=sys.stderr)
        fields = {"split": split, **done, "empty": counts.empty, "bad": counts.bad}
        print("convert " + " ".join(f"{name}={value}" for name, value in fields.items()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"convert_c4.py: {error}")
    except KeyboardInterrupt:
        sys.exit("convert_c4.py: interrupted; nothing of the split that was being written is kept")
