"""Work with an end: a hanging file system or driver must not hang the program that asks it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start(work: Callable[[], T]) -> Future[T]:
    """Start work in a thread of its own, which does not keep the process alive.

    An executor's threads would: they are waited for when the interpreter ends.

    Args:
        work: a function without arguments.

    Returns:
        Its future; `result(timeout=seconds)` raises TimeoutError, or what the function raised.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="preflight").start()
    return future
