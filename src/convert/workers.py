"""Tasks run in worker processes; the first error cancels the rest."""

import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from src.common.signals import how_it_ended

Count = Callable[[int], Any]
"""Called by a task from time to time, with the number of documents done since the last call."""


def run(function: Callable[[Any, Count], None], tasks: Iterable[Any], num_workers: int, count: Count) -> None:
    """Call ``function(task, count)`` for each task in up to ``num_workers`` processes, in any order.

    Starts no more processes than there are tasks, and runs in this process if there is one worker or one task. Takes a
    task from ``tasks`` only when a worker is free.

    Raises:
        OSError: a worker died, for example because memory ran out; with its signal or exit code.
        Exception: the first error of ``function``. The other tasks are cancelled.
    """
    tasks = iter(tasks)
    first = list(itertools.islice(tasks, num_workers))
    tasks = itertools.chain(first, tasks)
    if len(first) < 2:
        for task in tasks:
            function(task, count)
        return

    # A fork would inherit locks that other threads of this process hold, and could wait for them for ever.
    context = multiprocessing.get_context("forkserver")
    # Installed packages only: the fork server does not get this process's sys.path (seen up to Python 3.13).
    context.set_forkserver_preload(["streaming", "transformers.models.auto.tokenization_auto"])
    theirs, ours = context.Pipe(duplex=False)
    documents, counted = context.Value("q", 0), 0
    pool, processes = ProcessPoolExecutor(num_workers, context, _start_worker, (function, documents, theirs)), set()
    try:
        pending = {pool.submit(_call, task) for task in itertools.islice(tasks, num_workers)}
        while pending:
            processes.update(multiprocessing.active_children())
            done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            total = documents.get_obj().value  # without the lock, which a killed worker may still hold
            count(total - counted)
            counted = total
            for future in done:
                future.result()
            pending |= {pool.submit(_call, task) for task in itertools.islice(tasks, len(done))}
    except BrokenProcessPool:
        pool.shutdown()
        codes = {process.exitcode for process in processes} - {None, 0}
        codes = codes - {-signal.SIGTERM} or codes  # by which the pool ended the others
        how = ", ".join(map(how_it_ended, codes)) or "unknown cause"
        hint = " Try fewer --num_workers." if -signal.SIGKILL in codes else ""
        raise OSError(
            f"a worker process died ({how}).{hint} Completed work is kept: run the same command again to continue"
        ) from None
    finally:
        ours.close()  # ends the workers, see _start_worker
        pool.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any, Count], None], documents: Any, main: Connection) -> None:
    """Prepare a worker process, which ends as soon as the main process closes its end of the pipe, or dies."""

    def end_with_main() -> None:
        main.poll(None)  # returns at the end of the pipe; nothing is ever sent
        os._exit(1)

    global _function, _documents
    _function, _documents = function, documents
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
    threading.Thread(target=end_with_main, daemon=True).start()


def _call(task: Any) -> None:
    try:
        _function(task, _count)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # it cannot be sent to the main process
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


def _count(documents: int) -> None:
    with _documents:
        _documents.value += documents
