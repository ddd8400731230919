"""Repairs of mosaicml-streaming 0.13. Private names of streaming are used in this file and in cache.py alone."""

import contextlib
import errno
import itertools
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from socket import gethostname
from tempfile import gettempdir
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState
from streaming.base.partition import algos
from streaming.base.shared import prefix as shm_prefix
from streaming.base.util import bytes_to_int, wait_for_file_to_exist
from streaming.base.world import World
from torch import distributed as dist

from src.common.errors import DataError, first_line
from src.data import shared_memory
from src.data.cache import SourceStream, lengths_fault
from src.data.index import LENGTHS, read_index, remedy
from src.data.order import filling_worker, partition
from src.data.shards import AGAIN, Locator, OpenShards, check_index, check_shards, hash_algorithm
from src.data.source import Source, without_password

log = logging.getLogger(__name__)

algos["exact"] = partition


def _prefixes() -> Iterator[int]:
    """Prefixes that streaming tries. It would fail at files that are not its own
    (test_prefix_with_files_that_are_not_streamings_is_skipped)."""
    foreign = shared_memory.foreign_prefixes(shm_prefix._unpack_locals)
    return (prefix for prefix in itertools.count() if prefix not in foreign)


shm_prefix._each_prefix_int = _prefixes


def alone_on_node() -> FileLock:
    """This user's lock on this node. Hold it while streaming's shared memory is made or removed.

    Streaming looks for a free prefix and takes it later, so one of two runs that start together would fail
    (test_datasets_of_a_node_are_made_in_turn). Raises DataError if the file of the lock belongs to another user.
    """
    folder = shared_memory.SHARED if shared_memory.SHARED.is_dir() else Path(gettempdir())
    path, user = folder / f"streaming-{os.getuid()}.lock", os.getuid()
    with contextlib.suppress(FileNotFoundError):
        if (owner := path.lstat().st_uid) != user:
            raise DataError(
                f"{path} is the lock of user {user}'s runs, and belongs to user {owner}; ask them or the administrator "
                "to delete it"
            )
    return FileLock(path)


@contextlib.contextmanager
def _together_alone_on_node(leads: bool) -> Iterator[None]:
    """Let the processes of a run enter together, while the first of each node, which ``leads``, has ``alone_on_node``.

    Each of them looks for a free prefix, and one that did so before would find another, or another run's
    (test_processes_of_a_run_wait_for_another_runs_dataset). Every run locks its nodes in the same order: else two runs
    could each wait for a node of the other's.
    """
    joined, host = dist.is_available() and dist.is_initialized(), gethostname()
    hosts = [host] * (dist.get_world_size() if joined else 1)
    if joined:
        dist.all_gather_object(hosts, host)
    with contextlib.ExitStack() as held:
        for each in sorted(set(hosts)):
            if leads and each == host:
                held.enter_context(alone_on_node())
            if joined:
                dist.barrier()
        yield


def fetch_index(source: Source) -> None:
    """Check a dataset's index.json; put that of a remote into its cache. Raises what ``RepairedDataset`` does."""
    check_index(source)
    if not source.complete:
        with alone_on_node():
            SourceStream(source).open_cache(limited=False)


class RepairedDataset(StreamingDataset):
    """StreamingDataset of checked sources, in which a fault ends every process and thread with one error.

    Without the checks, a missing shard hangs the workers; without workers it ends the epoch early, with exit code 0
    (test_damage_is_found_before_the_first_step).

    Args:
        sources: datasets by name; their samples are numbered in this order.
        verify: of the shards that are there, as for ``check_shards``. A download is always compared with the index.
        cache_limit: bytes of the caches together, such as ``100gb``, above which their least recently used shards are
            deleted. Complete sources do not count.
        download_retry: attempts of a download.
        download_timeout: seconds that a download may take.
        kwargs: StreamingDataset's.

    Raises:
        DataError: a dataset is not there, or is damaged; its remote cannot be opened; its folder cannot be its cache
            (``SourceStream.open_cache``), or another run streams into it; ``cache_limit`` is below 4 shards; its weight
            draws no sample; a shuffled epoch has fewer samples than ``num_canonical_nodes``. While reading: a shard is
            lost, damaged or cannot be downloaded.
    """

    streams: Any  # of SourceStream

    def __init__(
        self,
        sources: Mapping[str, Source],
        verify: str = "size",
        cache_limit: str | int | None = None,
        download_retry: int = 2,
        download_timeout: float = 60,
        **kwargs: Any,
    ):
        self.sources = dict(sources)
        streams: list[SourceStream] = []
        for source in self.sources.values():
            check_index(source)
            streams.append(SourceStream(source, download_retry, download_timeout))
        leads = World.detect().is_local_leader  # one process of the node reads all files; the others share them
        with alone_on_node() if leads else contextlib.nullcontext():
            for stream in streams:
                if not stream.source.complete and leads:
                    stream.open_cache(limited=bool(cache_limit))
        for source, stream in zip(self.sources.values(), streams, strict=True):
            if not source.complete and not leads:  # if the leader fails, the launcher ends the others
                wait_for_file_to_exist(str(source.folder / "index.json"), TICK, math.inf, "")
            quick = "size" if source.complete and verify != "off" else "off"
            # A cache too: before streaming notes which shards it has.
            stream.damaged = check_shards(source.folder, source.complete, verify if leads else quick)
            if verify == "hash" and not source.complete:
                hash_algorithm(source.folder)  # raises if the index has no hashes
        with _together_alone_on_node(leads):
            try:
                super().__init__(streams=streams, partition_algo="exact", **kwargs)
            except ValueError:
                self._check_caches_are_free()
                raise
        self._cached = np.array([not streams[i].source.complete for i in self.stream_per_shard])
        self._set_cache_limit(cache_limit)
        for (name, source), stream, size in zip(self.sources.items(), streams, self.samples_per_stream, strict=True):
            if not stream.choose:  # streaming would look for a sample without end
                weight = f"repeat {source.repeat}" if source.repeat is not None else f"proportion {source.proportion}"
                raise DataError(
                    f"train_loader.streams.{name}: {weight} draws none of its {size:,} samples per epoch; raise it, or "
                    "remove the dataset"
                )
        if self.shuffle and (self.num_canonical_nodes or 0) > self.epoch_size:  # streaming would refuse the first step
            raise DataError(
                f"train_loader.num_canonical_nodes: expected at most the {self.epoch_size:,} samples of an epoch with "
                f"shuffle, got {self.num_canonical_nodes:,}"
            )
        self.num_ranks = self._parallel_rank_world.num_ranks
        """Processes of the run, on all nodes."""
        self.shared_memory_prefix = self._shm_prefix_int
        """Number in the names of this dataset's shared memory."""
        self.spanner: Any = Locator(self.samples_per_shard)
        self.open_shards = OpenShards()
        shards: Any = self.shards
        self._paths = [os.path.join(shard.dirname, shard.split, shard.raw_data.basename) for shard in shards]
        self.failure: BaseException | None = None
        self._prepared, self._fetched_again = set[int](), set[int]()
        self._fills = False

    def own_shared_memory(self) -> None:
        """Record that this process, the first of its node, owns the dataset's shared memory."""
        shared_memory.own_shared_memory(self.shared_memory_prefix, self._filelock_root)

    def _check_caches_are_free(self) -> None:
        """Raise DataError if another dataset of this node streams into a cache of this one; streaming's error speaks of
        Python calls (test_second_run_in_a_cache_is_refused)."""
        for stream in self.streams:
            user = shared_memory.user_of(os.path.abspath(stream.folder), shm_prefix._unpack_locals)
            if user and not stream.source.complete:
                raise DataError(
                    f"{stream.source.folder} is the cache of another run on this machine ({user}). Name another folder "
                    "as local, or wait until it ends"
                ) from None

    def _set_cache_limit(self, limit: str | int | None) -> None:
        """Streaming would compare the limit with the shards of complete sources, too."""
        caches = [stream for stream in self.streams if not stream.source.complete]
        if not limit or not caches:
            return
        try:
            self.cache_limit = bytes_to_int(limit)
        except ValueError:
            raise DataError(f"cache_limit: expected a number of bytes such as 100gb, got {limit!r}") from None
        largest = max(shard.get_max_size() for i, shard in enumerate(self.shards) if self._cached[i])
        least = 4 * largest + sum(stream.get_index_size() for stream in caches)
        if self.cache_limit < least:
            raise DataError(
                f"cache_limit: expected at least {least:,} bytes, 4 times the largest shard of {largest:,} bytes and "
                f"the indexes, got {limit}"
            )

    def open_lengths(self, stream_id: int) -> NDArray[np.uint16]:
        """Lengths (N,) of a source's samples, memory-mapped. Raises DataError if the file is missing, cannot be fetched
        or differs from the index."""
        source, stream = list(self.sources.values())[stream_id], self.streams[stream_id]
        path, index, leads = source.folder / LENGTHS, read_index(source.folder), World.detect().is_local_leader
        try:
            fault = lengths_fault(path, index)
            # Not under ``alone_on_node``: its holder may wait for the other processes of the node. They wait for as
            # long as the file takes; if the leader fails, the launcher ends them.
            while fault and not source.complete and not leads:
                time.sleep(TICK)
                fault = lengths_fault(path, index)
            if fault and not source.complete:
                with stream.fetched(LENGTHS) as fetched:
                    if not (fault := lengths_fault(fetched, index)):
                        fetched.replace(path)
        except Exception as error:  # each object store has errors of its own
            fault = f"cannot be read or fetched ({first_line(error)})"
        if fault:
            message = f"{source.origin}: {LENGTHS} {fault}"
            hint = "Convert again, which writes it, or set train_loader.length_window to 0"
            raise DataError(without_password(f"{message}. {hint}"))
        return np.memmap(path, "<u2", "r")

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download and unpack a shard if it is not there.

        Streaming's own makes room by deleting shards of complete sources (test_a_limit_deletes_shards_of_caches_only).
        After a failure it leaves the shard in the state PREPARING, and all who need it hang
        (test_lost_shard_stops_the_run, test_lost_remote_shard_stops_the_run). It takes a file lock for each sample;
        here only a shard that is not known to be there takes one.
        """
        states = self._shard_states
        # The state may be old, as no lock is held. Then the file is missing when it is read, and is prepared again.
        if shard_id in self._prepared and states[shard_id] == _ShardState.LOCAL:
            self._shard_access_times[shard_id] = time.time_ns()
            return
        shard: Any = self.shards[shard_id]
        with FileLock(self._cache_filelock_path):
            state = states[shard_id]
            if state == _ShardState.LOCAL and not os.path.exists(self._paths[shard_id]):  # evicted by another node
                self.cache_usage -= shard.raw_data.bytes if self._cached[shard_id] else 0
                state = _ShardState.REMOTE
            if state == _ShardState.REMOTE:
                states[shard_id] = _ShardState.PREPARING
                self._make_room(shard.get_max_size() if self._cached[shard_id] else 0)
        if state == _ShardState.REMOTE:
            try:
                size = self.streams[self.stream_per_shard[shard_id]].prepare_shard(shard)
            except Exception as error:
                states[shard_id] = _ShardState.REMOTE  # others stop waiting, try, and fail too
                raise self._fail(error, shard_id) from error
            with FileLock(self._cache_filelock_path):
                self.cache_usage += size
                self._shard_access_times[shard_id] = time.time_ns()
                states[shard_id] = _ShardState.LOCAL
        while blocking and states[shard_id] == _ShardState.PREPARING:
            time.sleep(TICK)
        if states[shard_id] == _ShardState.LOCAL:
            self._shard_access_times[shard_id] = time.time_ns()
            self._prepared.add(shard_id)

    def _make_room(self, size: int) -> None:
        """Evict the least recently used shards of caches until ``size`` bytes fit. Call it under the lock."""
        while self.cache_limit and self.cache_usage + size > int(self.cache_limit):
            evictable = np.flatnonzero(self._cached & (self._shard_states.numpy() == _ShardState.LOCAL))
            if not len(evictable):
                return  # the others are being downloaded
            self._evict_shard(int(evictable[np.argmin(self._shard_access_times.numpy()[evictable])]))

    def _evict_shard(self, shard_id: int) -> None:
        """Evict a shard, under the lock. Every eviction comes here; ``SourceStream.evict`` raises where it must not."""
        self.cache_usage -= self.streams[self.stream_per_shard[shard_id]].evict(self.shards[shard_id])
        self._shard_states[shard_id] = _ShardState.REMOTE

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """A sample as its shard holds it.

        Streaming opens the file for each sample (140 of 320 us). For a damaged shard in the cache it raises IndexError
        or returns a wrong sample; here the shard is downloaded again, once per process
        (test_shard_damaged_in_the_cache_while_running_is_fetched_again_once).
        """
        if self.failure is not None:
            raise DataError(str(self.failure))
        shard_id, index = self.spanner[sample_id]
        try:
            return self._read(shard_id, index, retry)
        except Exception as error:
            if not self._fetches_again(shard_id, error):
                raise self._fail(error, shard_id) from None
        try:
            self.streams[self.stream_per_shard[shard_id]].fetch_shard(self.shards[shard_id])
        except Exception as error:
            raise self._fail(error, shard_id) from None
        self.open_shards.forget(self._paths[shard_id])
        return RepairedDataset.get_item(self, sample_id, retry)

    def _fetches_again(self, shard_id: int, error: Exception) -> bool:
        """Whether a shard that cannot be read is to be downloaded again: in a cache, once per process."""
        source = list(self.sources.values())[int(self.stream_per_shard[shard_id])]
        if self.failure is not None or source.complete or shard_id in self._fetched_again:
            return False
        log.warning("%s in the cache is damaged (%s). Fetching it again", self._paths[shard_id], error)
        self._fetched_again.add(shard_id)
        return True

    def _read(self, shard_id: int, index: int, retry: int) -> Any:
        shard: Any = self.shards[shard_id]
        path = self._paths[shard_id]
        for _ in range(retry + 1):
            if path not in self.open_shards.files and self._shard_states[shard_id] != _ShardState.LOCAL:
                self.prepare_shard(shard_id)  # a file may be there, and damaged
            try:
                data = self.open_shards.read(path, index, shard.raw_data.bytes, shard.samples)
            except OSError as error:  # not downloaded yet, or evicted, perhaps by another node
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                self.open_shards.forget(path)
                self._prepared.discard(shard_id)
                self.prepare_shard(shard_id)
            else:
                self._shard_access_times[shard_id] = time.time_ns()
                return self.decode(shard_id, index, data)
        raise DataError(f"{path} was evicted from the cache {retry + 1} times; raise cache_limit")

    def decode(self, shard_id: int, index: int, data: bytes) -> Any:
        """Sample ``index`` of a shard, from its bytes. After an error the shard is damaged."""
        shard: Any = self.shards[shard_id]
        return shard.decode_sample(data)

    def on_exception(self, future: Future) -> None:
        """Called when a thread that fetches shards ends. Streaming raises its error where nobody catches it
        (test_lost_remote_shard_stops_the_run)."""
        error = future.exception()
        if error is not None:
            self._fail(error)

    def _fail(self, error: BaseException, shard_id: int | None = None) -> BaseException:
        """Keep the first error, and end this process's threads: while they run, it cannot exit."""
        if shard_id is not None and not isinstance(error, DataError):
            path = self._paths[shard_id]
            message = f"{path} cannot be read or fetched ({error}); {remedy(path, AGAIN)}"
            error = DataError(without_password(message))
        self.failure = self.failure or error
        if hasattr(self, "_event"):  # made by the first iteration
            self._event.set()
        return error

    def __iter__(self) -> Iterator[Any]:
        """This worker's samples of the next epoch, and perhaps ``filler()`` (``filling_worker``)."""
        yield from super().__iter__()
        if self._fills:
            yield self.filler()

    def filler(self) -> Any:
        """A sample with nothing to learn, which is not counted."""
        raise NotImplementedError

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """Sample ids of this worker for an epoch that resumes at ``sample_in_epoch``, -1 where there is no sample."""
        world, left = self._parallel_worker_world, self.epoch_size - sample_in_epoch
        place = world.rank_of_node * world.num_nodes + world.node  # samples go to nodes first, as in ``partition``
        assert self.batch_size is not None
        worker = filling_worker(left, place, world.num_ranks, world.workers_per_rank, self.batch_size)
        self._fills = worker == world.worker_of_rank
        return super()._get_work(epoch, sample_in_epoch)

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        """Sample ids as their shards become ready. After a failure, streaming ends the epoch here without an error
        (test_lost_remote_shard_stops_the_run)."""
        yield from super()._each_sample_id(it)
        if self.failure is not None:
            raise DataError(str(self.failure))

    def _ready_thread(self, it: Any) -> None:
        """Thread that counts, in order, the samples whose shards are there.

        Streaming's own never returns if a shard is downloaded and evicted between two looks at its state
        (test_shard_evicted_while_awaited_is_fetched_again).
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

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where a resumed run goes on. At the end of an epoch, streaming would repeat the epoch
        (test_resume_after_an_epoch_begins_the_next)."""
        state = super().state_dict(num_samples, from_beginning)
        return state if num_samples else {**state, "epoch": self.next_epoch}
