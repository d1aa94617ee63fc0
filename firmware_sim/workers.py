"""A pool of worker processes that end with their parent, however it ends: by Ctrl-C, a signal, or SIGKILL.

Each worker watches the reading end of a pipe whose only writing end the parent holds. The parent closes it to stop
work at once, and the kernel closes it when the parent is gone.
"""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, get_context


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """Give an executor of `workers` processes; an exception inside the block ends them at once."""
    context = get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_watch, initargs=(watched,)) as pool:
            try:
                yield pool
            except BaseException:
                held.close()  # before the pool waits for what is running
                raise
    finally:
        held.close()
        watched.close()


def _watch(watched: "connection.Connection[object, object]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()


def _end_with(watched: "connection.Connection[object, object]") -> None:
    connection.wait([watched])
    os._exit(1)
