"""Data: MDS shards -> samples -> masked, padded batches.

    StreamingC4         one sample at a time, from one dataset or a mixture, of text (tokenized here) or of tokens
    ExactEvalDataset    the same samples for evaluation, each exactly once
    build_dataloader    samples -> batches, by a collator: ``MaskingCollator``, padded; ``SplittingCollator``, split

Letters: B sequences, S longest length in the batch, N samples of a dataset.

As a script it prints what training would see:  python src/data_c4.py REMOTE [LOCAL] [--split val]
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import active_children
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # python src/data_c4.py: installed packages before the files of src, and src as a package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray
from streaming.base.shuffle import get_shuffle
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from src.common.errors import ConfigError, DataError, first_line
from src.data.columns import TEXT, Column, ids_of, text_of
from src.data.cutting import TextEncoder, encode_crop, encode_prefix
from src.data.index import TOKENS_KEY, read_index
from src.data.masking import EVALUATION_SEED, MaskingCollator, Sample
from src.data.microbatches import num_tokens
from src.data.order import group_lengths, occurrences
from src.data.shards import check_shards, check_tokens
from src.data.source import Source
from src.data.streaming import RepairedDataset, fetch_index
from src.data.tokenizer import load_tokenizer, vocab_size

LONGER = "set max_seq_len (--max_seq_len) to the length of the samples"


class StreamingC4(RepairedDataset):
    """Samples of at most ``max_seq_len`` ids from MDS shards of text or of tokens, by convert_c4.py or other programs.

    Args:
        tokenizer: from ``load_tokenizer``.
        max_seq_len: longest sample in tokens, special tokens included. Texts are truncated to it; convert_c4.py must
            have written shards of tokens for exactly this length, and those of other programs may not be longer.
        local, remote, split: the one dataset, as for ``Source``.
        sources: several datasets to mix, by name, in place of the one.
        verify: of the shards that are there, as for ``check_shards``. A download is always compared with the index.
        length_window: global batches within which a shuffled epoch is grouped by length (``group_lengths``); 0 does
            not group. Needs ``shuffle`` and shards of tokens with their lengths.bin.
        moving_crop: random crop: an epoch takes part sample id + epoch of a text that is too long (``encode_crop``),
            instead of its beginning. Needs shards of text.
        special_tokens: what a word such as [MASK] in a text becomes (``text_backend``). No effect on shards of tokens.
        kwargs: StreamingDataset's.

    Raises:
        DataError: as ``RepairedDataset``; or the shards have neither text nor tokens, or tokens of another tokenizer or
            length; ``length_window`` without lengths; ``moving_crop`` with tokens. While reading: a text is not UTF-8,
            or another program's ids do not fit the tokenizer or are too many.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_len: int,
        local: str | None = None,
        remote: str | None = None,
        split: str | None = None,
        sources: Mapping[str, Source] | None = None,
        verify: str = "size",
        length_window: int = 0,
        moving_crop: bool = False,
        special_tokens: str = "text",
        **kwargs: Any,
    ):
        super().__init__(sources or {"": Source(local, remote, split)}, verify, **kwargs)
        self.tokenizer, self.max_seq_len, self.vocab_size = tokenizer, max_seq_len, vocab_size(tokenizer)
        self.length_window, self.moving_crop = length_window, moving_crop
        formats = [self._format(source) for source in self.sources.values()]
        self.columns = [column for column, _ in formats]
        """For each source the column that is read."""
        self.token_dtypes = [dtype for _, dtype in formats]
        """Type of the ids on disk, for each source; None for text, and for tokens of other programs."""
        self.encoder = TextEncoder.of(tokenizer, special_tokens)
        if length_window:
            assert self.shuffle, "grouping by length starts from a shuffled order"
            self.shuffle = False  # resample_streams shuffles; streaming must not shuffle its result
            self.lengths = [self.open_lengths(i) for i in range(self.num_streams)]

    def _format(self, source: Source) -> tuple[Column, np.dtype[Any] | None]:
        """Check that a source's shards fit the run. Returns an item of ``columns`` and of ``token_dtypes``."""
        index = read_index(source.folder)
        column, description = Column.of(index, source.folder), index.get(TOKENS_KEY)
        text = column.name == TEXT
        if self.length_window and description is None:
            kind = "text, whose lengths in tokens are" if text else "tokens, whose lengths are"
            raise DataError(
                f"{source.folder} holds {kind} not known: set train_loader.length_window to 0, or convert text to "
                "tokens (convert_c4.py --tokenizer)"
            )
        if self.moving_crop and not text:
            raise DataError(
                f"{source.folder} holds tokens: what --pack truncate cut off is not there, and --pack chunk cuts "
                "nothing off. Set train_loader.moving_crop to false, or convert to text (without --tokenizer)"
            )
        if description is None:
            return column, None
        check_tokens(description, self.tokenizer, self.max_seq_len, source.folder)
        return column, np.dtype(description["dtype"]).newbyteorder("<")

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """One sample by its id."""
        # Streaming counts next_epoch up when an iteration begins; a dataset that is only indexed stays at epoch 0.
        epoch = max(self.next_epoch - 1, 0)
        turn = int(sample_id) + epoch if self.moving_crop else None
        sample = Sample(input_ids=self.ids(sample_id, turn, retry), sample_id=int(sample_id), epoch=epoch)
        if "" not in self.sources:  # a mixture, also of one dataset
            sample["stream"] = self.stream_of(sample_id)
        return sample

    def filler(self) -> Sample:
        """[CLS][SEP], which has nothing to mask."""
        ids = np.array([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id])
        sample = Sample(input_ids=ids, sample_id=-1, epoch=0)
        if "" not in self.sources:
            sample["stream"] = 0
        return sample

    def ids(self, sample_id: int, turn: int | None = None, retry: int = 7) -> NDArray[Any]:
        """A sample's ids (length,). Of a text that is too long: its beginning, or part ``turn`` of it."""
        sample = super().get_item(sample_id, retry)
        if not isinstance(sample, str):
            return sample
        room = self.max_seq_len - 2
        if turn is None:
            ids = encode_prefix(self.encoder, sample, room)
        else:
            ids = encode_crop(self.encoder, sample, room, turn)
        return np.array([self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id])

    def decode(self, shard_id: int, index: int, data: bytes) -> NDArray[Any] | str:
        """A sample's ids (length,), or its text."""
        dtype = self.token_dtypes[self.stream_per_shard[shard_id]]
        if dtype is None:
            return self._decode_column(shard_id, index, data)
        ids = np.frombuffer(data, dtype, offset=4)  # the only column: its size (uint32) and the ids
        if not 0 < len(ids) <= self.max_seq_len:
            raise ValueError(f"a sample has {len(ids):,} tokens, expected 1 to {self.max_seq_len:,}")
        if (largest := np.maximum.reduce(ids)) >= self.vocab_size:
            raise ValueError(f"a sample has the id {largest:,}, and the tokenizer {self.vocab_size:,} entries")
        return ids

    def _decode_column(self, shard_id: int, index: int, data: bytes) -> NDArray[np.int64] | str:
        """The same, of shards that do not describe their tokens, or of text."""
        column = self.columns[self.stream_per_shard[shard_id]]
        value = column.value(data)
        try:
            if column.name == TEXT:
                return text_of(value)
            ids = ids_of(value, column.encoding, self.vocab_size, int(self.tokenizer.pad_token_id))  # pyright: ignore
            if not len(ids):
                raise DataError("it has no tokens, or padding alone; write the dataset without it")
            if len(ids) > self.max_seq_len:
                raise DataError(f"it has {len(ids):,} tokens, expected 1 to {self.max_seq_len:,}; {LONGER}")
        except DataError as error:
            raise DataError(f"{self._paths[shard_id]}, sample {index}: {error}") from None
        return ids

    def stream_of(self, sample_id: int) -> int:
        """Position of the source that a sample comes from."""
        return 0 if self.num_streams == 1 else int(self.stream_per_shard[self.spanner[sample_id][0]])

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source in the samples that an epoch draws."""
        return {name: stream.choose / self.epoch_size for name, stream in zip(self.sources, self.streams, strict=True)}

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What an epoch draws: sizes of the parts of shards, and sample ids (``Sample.sample_id``).

        Streaming calls it once an epoch on each node. With ``length_window``, the ids are in the order of training.
        """
        units, ids = super().resample_streams(epoch, stream_id)
        if any(stream.choose > size for stream, size in zip(self.streams, self.samples_per_stream, strict=True)):
            ids = ids + occurrences(ids) * self.size
        if self.length_window:
            assert self.num_canonical_nodes and self.batch_size and self.shuffle_block_size, "set by streaming before"
            nodes, seed = self.num_canonical_nodes, self.shuffle_seed
            ids = ids[get_shuffle(self.shuffle_algo, units, nodes, seed, epoch, self.shuffle_block_size)]
            lengths = np.concatenate(self.lengths)[ids % self.size]
            batch = self.batch_size * self.num_ranks // nodes
            rng = np.random.default_rng([seed, epoch])
            ids = ids[group_lengths(lengths, nodes, batch, self.length_window, rng)]
        return units, ids


class ExactEvalDataset(IterableDataset):
    """Evaluation: each sample exactly once, for any number of ranks and workers and any batch size. Epoch is 0.

    It indexes the dataset, in its own order. A rank with one sample less than others yields the dataset's ``filler``:
    all ranks have the same number of batches.

    Args:
        batch_size: of the DataLoader, whose workers take whole batches in turn.
        rank, world_size: number of this process, and number of processes.
    """

    def __init__(self, dataset: StreamingC4, batch_size: int, rank: int, world_size: int):
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self.sources = dataset.sources

    def __len__(self) -> int:
        return -(-self.dataset.size // self.world_size)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        mine, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(len(self)):
            if i // self.batch_size % workers != mine:
                continue
            index = i * self.world_size + self.rank
            if index < self.dataset.size:
                yield Sample(input_ids=self.dataset.ids(index), sample_id=index, epoch=0)
            else:
                yield self.dataset.filler()


class Loader(DataLoader):
    """torch's DataLoader, in which a time-out, a dead worker and a worker's DataError raise a DataError of one line."""

    workers: frozenset[Any] = frozenset()
    added = 0
    """Batches of the current epoch in addition to those of an epoch that has this batch size from its beginning."""

    def __len__(self) -> int:
        return super().__len__() + self.added

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        earlier = active_children()
        batches = super().__iter__()
        self.workers = frozenset(active_children()).difference(earlier) or self.workers  # persistent ones live on
        while True:
            asked = time.monotonic()
            try:
                batch = next(batches, None)
            except DataError as error:  # torch raises a worker's with its traceback as the message
                last = str(error).splitlines()[-1]
                raise DataError(last.removeprefix(f"{DataError.__module__}.DataError: ")) from None
            except RuntimeError as error:
                died = any(worker.exitcode for worker in self.workers)  # None: alive, 0: done
                if not died and not 0 < self.timeout <= time.monotonic() - asked:
                    raise
                for source in self.dataset.sources.values():  # pyright: ignore[reportAttributeAccessIssue]
                    if source.complete:
                        check_shards(source.folder, True)  # raises if a lost shard is the reason
                hint = "a worker died; out of memory?" if died else "raise the loader's 'timeout' if loading is slow"
                raise DataError(f"no batch came: {first_line(error)}; {hint}") from error
            if batch is None:
                return
            yield batch


def build_dataloader(
    dataset: StreamingC4 | ExactEvalDataset,
    collator: Callable[[list[Sample]], Any],
    batch_size: int,
    num_workers: int = 0,
    timeout: float = 0,
    **options: Any,
) -> Loader:
    """A DataLoader of the collator's batches. ``timeout`` (seconds) has no effect without workers; ``options`` are
    torch's."""
    timeout = timeout if num_workers else 0
    return Loader(dataset, batch_size, collate_fn=collator, num_workers=num_workers, timeout=timeout, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Script
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Print what training would see of a dataset.")
    parser.add_argument("remote", help="where the dataset is: a folder or an object-store URI")
    parser.add_argument("local", nargs="?", help="where to stream it to (default: remote itself, nothing is copied)")
    parser.add_argument("--split", default="val")
    parser.add_argument("--tokenizer", help="name or folder (default: the shards' own, else bert-base-uncased)")
    parser.add_argument("--max_seq_len", type=int, help="default: the shards' own, else 128")
    parser.add_argument("--mlm_probability", type=float, default=0.15)
    parser.add_argument("--mlm_whole_words", action="store_true", help="mask all pieces of a word or none")
    what = "what a word such as [MASK] in a text becomes: ordinary word pieces (text), or the special token (tokens)"
    parser.add_argument("--special_tokens", choices=["text", "tokens"], default="text", help=what)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_batches", type=int, default=100, help="batches to time")
    parser.add_argument("--print", type=int, default=2, dest="shown", help="batches to print, two samples each")
    args = parser.parse_args(argv)
    if args.local is None and "://" in args.remote:
        raise ConfigError(f"{args.remote} is remote: give a local folder to stream it to")
    local = args.local or args.remote

    source = Source(local, args.remote, args.split)
    fetch_index(source)
    index = read_index(source.folder)
    description, column = index.get(TOKENS_KEY, {}), Column.of(index, source.folder)
    if not (description or args.tokenizer or column.name == TEXT):
        raise ConfigError(f"{source.folder} does not say which tokenizer made its {column.name!r}: give --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer or description.get("tokenizer", "bert-base-uncased"))
    max_seq_len = args.max_seq_len or description.get("max_seq_len", 128)
    options: dict[str, Any] = {"special_tokens": args.special_tokens, "shuffle": False}
    dataset = StreamingC4(tokenizer, max_seq_len, local, args.remote, args.split, **options)
    kind = "text" if column.name == TEXT else "tokens"
    print(f"{dataset.size:,} samples of {kind} in {local}/{args.split}")

    exact = ExactEvalDataset(dataset, args.batch_size, rank=0, world_size=1)
    collator = MaskingCollator(tokenizer, args.mlm_probability, EVALUATION_SEED, args.mlm_whole_words)
    batches = tokens = padded = masked = 0
    started = time.perf_counter()
    for batch in build_dataloader(exact, collator, args.batch_size):
        if batches < args.shown:
            print(f"batch {batches}: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in batch.items()))
            for ids, real in list(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True))[:2]:
                print("   ", tokenizer.decode(ids[real]))
        counts = num_tokens(batch)
        tokens += counts["total"]
        masked += counts["loss_generating"]
        padded += batch["input_ids"].numel()
        batches += 1
        if batches == args.num_batches:
            break
    seconds = time.perf_counter() - started
    print(
        f"data batches={batches} tokens={tokens} padding_share={1 - tokens / padded:.4f} "
        f"masked_share={masked / tokens:.4f} tokens_per_s={tokens / seconds:.0f}"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"data_c4.py: {error}")
