"""The data's way: MDS shards -> samples -> masked, padded batches.

    StreamingC4            one sample: ids, sample id, epoch; shards of text (tokenized here) or of tokens; one dataset
                           or several, mixed; in streaming's order, or with samples of like length together
    EachSampleOnce         evaluation's view of it: no sample repeated, none left out
    MaskingCollator        samples -> padded (B, S) batch, masked as a pure function of seed, epoch, sample, position

Letters: B sequences, S longest length in the batch, T real tokens, M masked tokens.

As a script it prints what training would see:  python src/data_c4.py REMOTE [LOCAL] [--split val]
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # python src/data_c4.py: packages before the files of src, and src as a package
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState
from streaming.base.shuffle import get_shuffle
from streaming.base.util import wait_for_file_to_exist
from streaming.base.world import World
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from src.common.errors import DataError, first_line
from src.data.masking import MaskingCollator, Sample
from src.data.microbatches import Batch, num_tokens
from src.data.order import group_lengths, occurrences
from src.data.shards import (
    LENGTHS,
    TOKENS_KEY,
    Locator,
    OpenShards,
    Source,
    _check_tokens,
    _hash_of_downloads,
    check_shards,
)
from src.data.streaming import alone_on_node
from src.data.tokenizer import encode_crop, encode_prefix, load_tokenizer

log = logging.getLogger(__name__)


class StreamingC4(StreamingDataset):
    """Samples of at most ``max_seq_len`` ids from MDS shards of text or of tokens, as convert_c4.py writes them.

    Args:
        tokenizer: from ``load_tokenizer``.
        max_seq_len: longest sample in tokens, special tokens included. Texts are truncated to it; shards of tokens must
            have been written for just this length.
        local, remote, split: of the one dataset, as for ``Source``.
        sources: several datasets to mix, by name, in place of the one.
        verify: what of the shards is checked, as for ``check_shards``; with ``hash``, those fetched later too.
        length_window: global batches within which a shuffled epoch is grouped by length (``group_lengths``); 0 does
            not group. Needs ``shuffle``, shards of tokens, and the lengths that convert_c4.py writes beside them.
        moving_crop: take of a text that is too long not its beginning but another part each epoch (``encode_crop``),
            at the turn that is the sum of sample id and epoch. Needs shards of text.
        kwargs: StreamingDataset's.

    Raises:
        DataError: there is no dataset, or it is damaged or cannot be fetched, or its shards have neither text nor
            tokens, or tokens of another tokenizer or length, or no lengths, or tokens where a crop is to move. While
            iterating: a shard is lost or cannot be fetched.
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
        **kwargs: Any,
    ):
        if sources is None:
            assert local is not None, "one dataset, or several sources"
            sources = {"": Source(local, remote, split)}
        self.sources = dict(sources)
        # The processes of a node share its files; one of them is enough to read them all.
        leads = World.detect().is_local_leader
        for source in self.sources.values():
            source.check("size" if verify == "hash" and not leads else verify)
            if not source.complete and leads and (source.folder / "index.json").is_file():
                check_shards(source.folder, False, verify)  # before streaming notes what is in the cache
        try:
            with alone_on_node() if leads else contextlib.nullcontext():
                super().__init__(streams=[source.stream() for source in self.sources.values()], **kwargs)
        except Exception as error:  # each object store has errors of its own
            remotes = [f"{s.remote}/{s.split or ''}" for s in self.sources.values() if "://" in str(s.remote)]
            if isinstance(error, ValueError) or not remotes:
                raise
            raise DataError(
                f"{', '.join(remotes)}: index.json cannot be fetched ({first_line(error)}). Check the address, that "
                "credentials are set, and the network"
            ) from error
        for source, stream in zip(self.sources.values(), self.streams, strict=True):
            if not source.complete:
                check_shards(source.folder, False, "off")  # the names in an index that has just come
                if verify == "hash":
                    stream.validate_hash = _hash_of_downloads(source.folder)
        self.spanner: Any = Locator(self.samples_per_shard)
        self._fetched_again = set[int]()
        self.failure: BaseException | None = None
        self._open_shards, self._prepared = OpenShards(), set[int]()
        for shard_id, shard in enumerate(self.shards):
            shard.get_sample_data = partial(self._read, shard_id)  # pyright: ignore[reportAttributeAccessIssue]
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.token_dtypes = [
            self._token_dtype(source.folder, self.shards[first])
            for source, first in zip(self.sources.values(), self.shard_offset_per_stream, strict=True)
        ]
        """Of each source: type of the ids on disk; None where it is text."""
        self.moving_crop = moving_crop
        for source, dtype in zip(self.sources.values(), self.token_dtypes, strict=True):
            if moving_crop and dtype is not None:
                raise DataError(
                    f"{source.folder} holds tokens: what --pack truncate cut off is not there, and --pack chunk cuts "
                    "nothing off. Set train_loader.moving_crop to false, or convert to text (without --tokenizer)"
                )
        self.length_window = length_window
        if length_window:
            assert self.shuffle, "an order by length is made from a shuffled one"
            # In resample_streams the order is made whole; streaming would shuffle it again.
            self.shuffle = False
            self.lengths = [self._open_lengths(i) for i in range(self.num_streams)]

    def _token_dtype(self, folder: Path, shard: Any) -> np.dtype[Any] | None:
        """Of the ids in a split's shards, if they fit the run; None if these hold text."""
        description = json.loads((folder / "index.json").read_text()).get(TOKENS_KEY)
        if description is not None:
            _check_tokens(description, self.tokenizer, self.max_seq_len, folder)
            return np.dtype(description["dtype"]).newbyteorder("<")
        if "text" not in shard.column_names:
            columns = ", ".join(shard.column_names)
            raise DataError(f"{folder}: the shards have no column 'text' ({columns}); write them with convert_c4.py")
        return None

    def _open_lengths(self, stream_id: int) -> NDArray[np.uint16]:
        """The lengths of a source's samples, mapped, so that the processes of a node share them; fetched if need be."""
        source, stream = list(self.sources.values())[stream_id], self.streams[stream_id]
        path, samples = source.folder / LENGTHS, int(self.samples_per_stream[stream_id])
        if self.token_dtypes[stream_id] is None:
            raise DataError(
                f"{source.folder} holds text, whose lengths in tokens are not known: set train_loader.length_window to "
                "0, or convert it to tokens (convert_c4.py --tokenizer)"
            )
        try:
            if not source.complete and not path.exists():
                if World.detect().is_local_leader:
                    os.replace(stream._download_file(LENGTHS, f"{LENGTHS}.tmp"), path)
                else:
                    wait_for_file_to_exist(str(path), TICK, stream.download_timeout, f"{path} did not come")
            found = path.stat().st_size
        except Exception as error:  # of any object store
            raise DataError(
                f"{source.remote or source.local}/{source.split or ''}: {LENGTHS} cannot be had "
                f"({first_line(error)}). Convert again, which writes it, or set train_loader.length_window to 0"
            ) from error
        if found != 2 * samples:
            raise DataError(
                f"{path} has {found:,} bytes, not 2 for each of {samples:,} samples; copy or convert the split again"
            )
        return np.memmap(path, "<u2", "r")

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source in the samples that an epoch draws."""
        return {name: stream.choose / self.epoch_size for name, stream in zip(self.sources, self.streams, strict=True)}

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What an epoch draws, called by streaming once an epoch on each node: sizes of parts of shards, sample ids.

        Ids of repeated samples count on (see ``Sample``). Grouped by length, they are in the order of training.
        """
        units, ids = super().resample_streams(epoch, stream_id)
        if any(stream.choose > size for stream, size in zip(self.streams, self.samples_per_stream, strict=True)):
            ids = ids + occurrences(ids) * self.size
        if self.length_window:
            assert self.num_canonical_nodes and self.batch_size and self.shuffle_block_size, (
                "set before the first epoch"
            )
            nodes, seed = self.num_canonical_nodes, self.shuffle_seed
            ids = ids[get_shuffle(self.shuffle_algo, units, nodes, seed, epoch, self.shuffle_block_size)]
            lengths = np.concatenate(self.lengths)[ids % self.size]
            batch = self.batch_size * self._parallel_rank_world.num_ranks // nodes
            rng = np.random.default_rng([seed, epoch])
            ids = ids[group_lengths(lengths, nodes, batch, self.length_window, rng)]
        return units, ids

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch and unpack a shard if need be. When that fails, streaming alone lets the others wait for ever."""
        # Called for each sample, hence without a lock, as streaming reads; an evicted shard is missed and fetched.
        if shard_id in self._prepared and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._shard_access_times[shard_id] = time.time_ns()
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            # Threads and processes that wait for it go on, do not find it either, and stop too.
            self._shard_states[shard_id] = _ShardState.LOCAL
            damage = self._damage(shard_id, error)
            self._fail(damage)
            raise damage from error
        if self._shard_states[shard_id] == _ShardState.LOCAL:  # without ``blocking`` another process may still fetch it
            self._prepared.add(shard_id)

    def _read(self, shard_id: int, index: int) -> bytes:
        """A sample's bytes, in place of streaming's own way, which opens the file each time."""
        shard: Any = self.shards[shard_id]
        try:
            return self._open_shards.read(f"{shard.dirname}/{shard.split}/{shard.raw_data.basename}", index)
        except FileNotFoundError:  # evicted, perhaps; streaming then prepares it again
            self._prepared.discard(shard_id)
            raise

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where a checkpoint's run goes on; after an epoch's end, streaming alone would begin that same epoch again."""
        state = super().state_dict(num_samples, from_beginning)
        return state if num_samples else {**state, "epoch": self.next_epoch}

    def on_exception(self, future: Future) -> None:
        """Called when a thread that fetches shards ends, well or not."""
        error = future.exception()
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep the first reason, and end this process's threads, or it could not exit."""
        self.failure = self.failure or error
        if hasattr(self, "_event"):  # not before the first iteration
            self._event.set()

    def _ready_thread(self, it: Any) -> None:
        """Let samples be taken whose shards are there, in order, as a thread beside the iteration.

        Streaming's own waits for ever for a shard that a cache with a limit drops between two looks at it.
        """
        while not (it.should_exit() or it.ready_index == it.total or self._event.is_set()):
            if self.predownload is not None and it.ready_index - it.yield_index > self.predownload:
                time.sleep(TICK)
                continue
            sample_id = it.sample_ids[it.ready_index]
            shard_id = None if sample_id == -1 else int(self.spanner[sample_id][0])  # -1 fills up a batch
            if shard_id is None or self._shard_states[shard_id] == _ShardState.LOCAL:
                it.ready_index += 1
            elif self._shard_states[shard_id] == _ShardState.REMOTE:
                self.prepare_shard(shard_id, False)
            else:
                time.sleep(TICK)
        it.on_exit()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        """Ids as they become ready. When a shard fails, streaming ends the epoch here and says nothing."""
        yield from super()._each_sample_id(it)
        if self.failure is not None:
            raise DataError(str(self.failure))

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """One sample by its id."""
        # Iterating begins with counting next_epoch up; a dataset that is only indexed stays at epoch 0.
        epoch = max(self.next_epoch - 1, 0)
        turn = int(sample_id) + epoch if self.moving_crop else None
        sample = Sample(input_ids=self._ids(sample_id, turn, retry), sample_id=int(sample_id), epoch=epoch)
        if self.num_streams > 1:
            sample["stream"] = self._stream_of(sample_id)
        return sample

    def beginning(self, sample_id: int) -> NDArray[Any]:
        """A sample's ids as evaluation takes them: (length,) from the text's beginning, wherever a crop has moved."""
        return self._ids(sample_id, None)

    def _stream_of(self, sample_id: int) -> int:
        return 0 if self.num_streams == 1 else int(self.stream_per_shard[self.spanner[sample_id][0]])

    def _ids(self, sample_id: int, turn: int | None, retry: int = 7) -> NDArray[Any]:
        """A sample's ids; of a text its beginning, or what is its turn."""
        raw, dtype = self._raw(sample_id, retry), self.token_dtypes[self._stream_of(sample_id)]
        if dtype is not None:
            return np.frombuffer(raw["tokens"], dtype)
        room = self.max_seq_len - 2
        if turn is None:
            ids = encode_prefix(self.tokenizer, raw["text"], room)
        else:
            ids = encode_crop(self.tokenizer, raw["text"], room, turn)
        return np.array([self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id])

    def _raw(self, sample_id: int, retry: int) -> Any:
        """A sample as the shard has it, which is fetched once more if it is damaged."""
        try:
            return super().get_item(sample_id, retry)
        except Exception as error:
            shard_id = int(self.spanner[sample_id][0])
            streamed = not list(self.sources.values())[int(self.stream_per_shard[shard_id])].complete
            if self.failure is None and streamed and shard_id not in self._fetched_again:
                self._fetch_again(shard_id, error)
                return self._raw(sample_id, retry)
            if not isinstance(error, DataError):
                error = self._damage(shard_id, error)
            self._fail(error)
            raise error from None

    def _fetch_again(self, shard_id: int, error: Exception) -> None:
        """Drop a damaged shard from the cache, once in this process; it is fetched when it is read next."""
        shard: Any = self.shards[shard_id]
        log.warning("%s in the cache is damaged (%s). Fetching it again", shard.raw_data.basename, error)
        self._fetched_again.add(shard_id)
        self._prepared.discard(shard_id)
        self._open_shards.forget(f"{shard.dirname}/{shard.split}/{shard.raw_data.basename}")
        self.evict_shard(shard_id)

    def _damage(self, shard_id: int, error: Exception) -> DataError:
        shard: Any = self.shards[shard_id]
        path = Path(shard.dirname) / shard.split / shard.file_pairs[0][0].basename
        return DataError(f"{path} cannot be read or fetched ({error}); copy or convert it again")


class EachSampleOnce(IterableDataset):
    """A dataset for evaluation: every sample in just one batch of one rank, whatever the ranks, workers and batches.

    Iterating a StreamingDataset repeats samples to fill up batches and nodes; this one indexes it. Ranks that run out
    earlier get [CLS][SEP], of which nothing can be masked, so that all ranks have equally many batches. Epoch is 0.

    Args:
        dataset: samples by index.
        batch_size: of the DataLoader; workers take whole batches in turn.
        rank, world_size: this process and how many there are.
    """

    def __init__(self, dataset: StreamingC4, batch_size: int, rank: int, world_size: int):
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.dataset.size // self.world_size)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for start in range(first * self.batch_size, len(self), step * self.batch_size):
            for i in range(start, min(start + self.batch_size, len(self))):
                yield self._sample(i * self.world_size + self.rank)

    def _sample(self, index: int) -> Sample:
        if index < self.dataset.size:
            return Sample(input_ids=self.dataset.beginning(index), sample_id=index, epoch=0)
        tokenizer = self.dataset.tokenizer
        return Sample(input_ids=np.array([tokenizer.cls_token_id, tokenizer.sep_token_id]), sample_id=index, epoch=0)


class Loader(DataLoader):
    """torch's DataLoader; what its workers say, and its time-out, as errors of one line."""

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            yield from super().__iter__()
        except DataError as error:  # a worker's comes with its whole traceback as its text
            raise DataError(str(error).splitlines()[-1].removeprefix(f"{DataError.__module__}.DataError: ")) from None
        except RuntimeError as error:
            if "timed out" not in str(error) and "exited unexpectedly" not in str(error):
                raise
            dataset = self.dataset.dataset if isinstance(self.dataset, EachSampleOnce) else self.dataset
            for source in dataset.sources.values() if isinstance(dataset, StreamingC4) else ():
                if source.complete:
                    check_shards(source.folder, True)  # a lost shard may be why, and is then named
            raise DataError(f"no batch came: {error}; its limit is the loader's 'timeout'") from None


def build_dataloader(
    dataset: StreamingC4 | EachSampleOnce,
    collator: MaskingCollator,
    batch_size: int,
    num_workers: int = 0,
    prefetch_factor: int | None = None,
    persistent_workers: bool = False,
    timeout: float = 0,
    pin_memory: bool = False,
    worker_init_fn: Callable[[int], None] | None = None,
) -> DataLoader:
    """A DataLoader of padded batches; ``timeout`` (seconds) acts with workers only."""
    return Loader(
        dataset,
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        persistent_workers=persistent_workers,
        timeout=timeout if num_workers else 0,
        pin_memory=pin_memory,
        worker_init_fn=worker_init_fn,
    )


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
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_batches", type=int, default=100, help="batches to time")
    parser.add_argument("--print", type=int, default=2, dest="shown", help="batches to print, two samples each")
    args = parser.parse_args(argv)
    if args.local is None and "://" in args.remote:
        raise ValueError(f"{args.remote} is remote: name a local folder to stream it to")
    local = args.local or args.remote

    description = {}
    index = Path(args.remote) / args.split / "index.json"
    if index.is_file():
        description = json.loads(index.read_text()).get(TOKENS_KEY) or {}
    tokenizer = load_tokenizer(args.tokenizer or description.get("tokenizer", "bert-base-uncased"))
    max_seq_len = args.max_seq_len or description.get("max_seq_len", 128)
    dataset = StreamingC4(tokenizer, max_seq_len, local, args.remote, args.split, shuffle=False)
    print(
        f"{dataset.size:,} samples of {'text' if dataset.token_dtypes == [None] else 'tokens'} in {local}/{args.split}"
    )

    each_once = EachSampleOnce(dataset, args.batch_size, rank=0, world_size=1)
    collator = MaskingCollator(tokenizer, args.mlm_probability, seed=17)
    batches = tokens = padded = masked = 0
    started = time.perf_counter()
    for batch in build_dataloader(each_once, collator, args.batch_size):
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
