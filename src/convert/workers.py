"""Work shared out to processes, one task at a time to each; the first error ends it all.

The standard library's pools do not fit: concurrent.futures keeps a future for every task, and multiprocessing.Pool
waits for ever for the task of a worker that was killed.
"""

import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

Beat = Callable[[int], Any]
"""Called by the work now and then with the number of documents done since; it also ends an abandoned worker."""


class WorkerDied(OSError):
    """A worker process ended without a word."""


def run(function: Callable[[Any, Beat], None], tasks: Iterable[Any], num_workers: int, beat: Beat) -> None:
    """Call ``function(task, beat)`` for each task in up to ``num_workers`` processes, in any order.

    Tasks are drawn as workers become free. With one worker, or one task, all happens in this process.

    Raises:
        WorkerDied: a worker was killed, for example for memory.
        Exception: what ``function`` raised first; the other workers are ended.
    """
    tasks = iter(tasks)
    head = list(itertools.islice(tasks, 2))
    tasks = itertools.chain(head, tasks)
    if num_workers == 1 or len(head) < 2:
        for task in tasks:
            function(task, beat)
        return

    # A fork of this process would inherit the locks of its threads (the hub's client has some) and hang on them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["src.convert.unit"])
    workers: dict[Connection, Any] = {}
    busy: set[Connection] = set()
    try:
        for task in tasks:
            if len(workers) < num_workers:
                free, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, function), daemon=True)
                process.start()
                theirs.close()
                workers[free] = process
            else:
                free = _wait(workers, busy, beat)
            free.send(task)
            busy.add(free)
        while busy:
            _wait(workers, busy, beat)
    finally:
        for process in workers.values():
            process.terminate()
        for pipe, process in workers.items():
            process.join()
            pipe.close()


def _wait(workers: dict[Connection, Any], busy: set[Connection], beat: Beat) -> Connection:
    """Take messages until one worker has done its task, and return it."""
    while True:
        for pipe in connection.wait(list(workers)):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except (EOFError, ConnectionResetError):
                process = workers[pipe]
                process.join(5)
                code = process.exitcode
                how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
                memory = "; out of memory? try fewer --num_workers" if code == -signal.SIGKILL else ""
                raise WorkerDied(
                    f"a worker process {how}{memory}. What is complete is kept: the same command goes on"
                ) from None
            if isinstance(message, BaseException):
                raise message
            if message is None:
                busy.remove(pipe)
                return pipe
            beat(message)


def _serve(pipe: Connection, function: Callable[[Any, Beat], None]) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None

    def beat(documents: int) -> None:
        if not parent.is_alive():
            os._exit(1)
        pipe.send(documents)

    try:
        while True:
            task = pipe.recv()
            function(task, beat)
            pipe.send(None)
    except (EOFError, BrokenPipeError):  # the parent is gone
        os._exit(1)
    except Exception as error:
        pipe.send(_portable(error))


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot travel between processes."""
    if not isinstance(error, (ValueError, OSError)):
        traceback.print_exc(file=sys.stderr)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
