"""Ends all processes of a run soon after one of them failed, was killed, or hangs.

Left alone, the others would wait for it in a collective operation until that one's time limit. A
process that fails announces the end in the store; one that was killed loses its lifeline to process
0; one that was stopped or hangs gives no sign of life in the store, or does not come to where the
others wait. A thread looks, so it also works while the main thread waits for a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, Store

from lora_train import exit_status
from lora_train.lifeline import Lifeline

_BEAT_SECONDS = 1.0
# Silence of a process that was stopped. Python's threads stand still while one of them waits for a
# file to be opened, or loads a library, so it is long, and longest while files are in use. (The
# tests on a real cluster cannot wait for it.)
_SILENCE_SECONDS = float(os.environ.get("LORA_SILENCE_SECONDS", "120"))
_BUSY_SILENCE_SECONDS = 900.0
# from the loss of a lifeline; who announced the end has lost it as well
_LAST_WORDS_SECONDS = 3.0
# this process was stopped itself (a suspended job), and has no idea of the others
_PAUSE_SECONDS = 10.0
# How long processes wait for one that still gives signs of life, but does not come to the sum of
# the step's gradients: at least so long, and so many times the longest step before.
_STUCK_SECONDS = 300.0
_STUCK_FIRST_SECONDS = 1800.0
_STUCK_STEPS = 20
# what a checkpoint that is being written gets, and what the others get to read the message
_SAVE_SECONDS = 15.0
_FAREWELL_SECONDS = 5.0
_JOIN_SECONDS = 40.0


class Watch:
    """The sign of life of one process, and its eye on the others.

    Args:
        store: a connection of its own to the store of all processes.
        rank: of this process.
        hosts: of every process.
        lifeline: of this process.
    """

    def __init__(self, store: Store, rank: int, hosts: list[str], lifeline: Lifeline) -> None:
        self._store = store
        self._rank = rank
        self._hosts = hosts
        self._others = [other for other in range(len(hosts)) if other != rank]
        self._beats = 0
        self._sums = 0
        self._is_waiting = False
        self._longest_step = 0.0
        self._last_sum = 0.0
        self._states: dict[int, tuple[int, bool]] = {}
        self._seen: dict[int, tuple[Any, float]] = {}
        self._lifeline = lifeline
        self._lost: dict[int, float] = {}
        self._not_saving = threading.Event()
        self._not_saving.set()
        self._stopped = threading.Event()
        self._last_answer = time.monotonic()
        self.before_end: Callable[[dict[str, Any]], None] | None = None
        """Called on process 0 before it ends because of another one."""
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._check_answers, name="watch of the store", daemon=True).start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark that the main thread waits for what all processes must come to in each step."""
        self._sums += 1
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False
            now = time.monotonic()
            if self._last_sum:
                self._longest_step = max(self._longest_step, now - self._last_sum)
            self._last_sum = now

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Mark that a checkpoint is being written."""
        self._not_saving.clear()
        self._give_sign_now()  # the thread may stand still in a moment
        try:
            yield
        finally:
            self._not_saving.set()
            self._give_sign_now()

    def announce(self, status: int, message: str, hint: str | None) -> None:
        """Tell all the others that the run ends here, and why; waits a while for them to read it.

        Args:
            status: exit status for all.
            message: what went wrong, without the place.
            hint: how to go on.
        """
        self._stopped.set()
        self._thread.join(_JOIN_SECONDS)
        with contextlib.suppress(DistNetworkError, DistStoreError):
            end = {"rank": self._rank, "status": status, "message": message, "hint": hint}
            self._publish(end)
            self._say_farewell()

    def wait_for_end(self) -> None:
        """Wait until a process that failed could have said so, or its silence is noticed."""
        self._thread.join(_JOIN_SECONDS)

    def stop(self) -> None:
        """Stop watching at the good end of a run, once all processes are there."""
        self._stopped.set()
        self._thread.join(_JOIN_SECONDS)
        with contextlib.suppress(DistNetworkError, DistStoreError):
            self._say_farewell()

    def _run(self) -> None:
        try:
            for _, was_stopped in self._turns():
                if was_stopped:
                    self._seen.clear()
                self._beat()
        except (DistNetworkError, DistStoreError):
            if not self._stopped.is_set():
                self._end(self._gone(0, "is gone"), has_store=False)

    def _check_answers(self) -> None:
        """End the run when the store's process is stopped: a request to it may wait for ever."""
        for now, was_stopped in self._turns():
            if was_stopped:
                self._last_answer = now
            silence = now - self._last_answer
            if silence > self._silence(is_busy=not self._sums):
                seen = f"has not answered for {silence:.0f} s: stopped, or its node is"
                self._end(self._gone(0, seen), has_store=False)

    def _turns(self) -> Iterator[tuple[float, bool]]:
        """Yield the time at each beat, and whether this process was stopped since the last one."""
        before = time.monotonic()
        while not self._stopped.wait(_BEAT_SECONDS):
            now = time.monotonic()
            yield now, now - before > _PAUSE_SECONDS
            before = now

    def _silence(self, *, is_busy: bool) -> float:
        return _BUSY_SILENCE_SECONDS if is_busy else _SILENCE_SECONDS

    def _give_sign(self) -> None:
        is_busy = not self._sums or not self._not_saving.is_set()
        sign = [self._beats, self._sums, self._is_waiting, is_busy]
        self._store.set(f"beat/{self._rank}", json.dumps(sign))

    def _give_sign_now(self) -> None:
        with contextlib.suppress(DistNetworkError, DistStoreError):  # the thread will see it too
            self._give_sign()

    def _beat(self) -> None:
        self._beats += 1
        self._give_sign()
        # the store answers, or this raises
        self._store.wait([f"beat/{self._rank}"], timedelta(seconds=_BUSY_SILENCE_SECONDS))
        self._last_answer = time.monotonic()
        if self._store.check(["end"]):
            self._end(json.loads(self._store.get("end")))
        now = time.monotonic()
        for rank in list(self._lifeline.closed):
            if now - self._lost.setdefault(rank, now) > _LAST_WORDS_SECONDS:
                self._end_all(self._gone(rank, "has ended without a word: killed, or its node is"))
        # all look at process 0, which looks at all: the store may be torchrun's
        for rank in self._others if self._rank == 0 else [0]:
            self._look_at(rank, now)
        if self._rank == 0:
            self._look_for_stuck(now)

    def _look_at(self, rank: int, now: float) -> None:
        """End the run when a process gives no sign of life any more."""
        key = f"beat/{rank}"
        sign: Any = [0, 0, False, True]
        if self._store.check([key]):
            sign = json.loads(self._store.get(key))
        number, sums, is_waiting, is_busy = sign
        self._states[rank] = (sums, is_waiting)
        limit = self._silence(is_busy=is_busy)
        if self._is_unchanged(rank, number, now, limit):
            self._end_all(self._gone(rank, f"has given no sign of life for {limit:.0f} s: stopped"))

    def _look_for_stuck(self, now: float) -> None:
        """End the run when the others wait too long for one."""
        self._states[self._rank] = (self._sums, self._is_waiting)
        furthest = max(self._states.values())
        limit = max(_STUCK_SECONDS, _STUCK_STEPS * self._longest_step)
        if not self._longest_step:
            limit = _STUCK_FIRST_SECONDS
        for rank, state in self._states.items():
            # ~rank: another key than that of its signs of life
            is_stuck = self._is_unchanged(~rank, state, now, limit)
            if is_stuck and furthest[1] and state != furthest:
                seen = f"has not come to where the others wait for it, for {limit:.0f} s: it hangs"
                self._end_all(self._gone(rank, seen))

    def _is_unchanged(self, key: int, value: Any, now: float, limit: float) -> bool:
        if key not in self._seen or self._seen[key][0] != value:
            self._seen[key] = (value, now)
        return now - self._seen[key][1] > limit

    def _gone(self, rank: int, seen: str) -> dict[str, Any]:
        return {
            "rank": rank,
            "status": exit_status.FAILED,
            "message": seen,
            "hint": "the same command goes on from the newest checkpoint, if there is one; "
            f"if it is this node again: #SBATCH --exclude={self._hosts[rank]}",
        }

    def _publish(self, end: dict[str, Any]) -> dict[str, Any]:
        """Write the first announcement; later ones are its consequences. Return the first."""
        return json.loads(self._store.compare_set("end", "", json.dumps(end)))

    def _end_all(self, end: dict[str, Any]) -> None:
        self._end(self._publish(end))

    def _end(self, end: dict[str, Any], *, has_store: bool = True) -> None:
        """End this process, whatever its main thread waits for."""
        rank = end["rank"]
        # of process 0 it has said it itself, unless it is gone
        if self._rank == 0 or (not has_store and self._rank == 1):
            text = f"error: rank {rank} on {self._hosts[rank]}: {end['message']}\n"
            if end["hint"]:
                text += f"hint: {end['hint']}\n"
            os.write(2, f"\n{text}".encode())
        else:
            where = f"rank {self._rank} on {platform.node()}"
            os.write(2, f"{where} ends, because rank {rank} has failed\n".encode())
        self._not_saving.wait(_SAVE_SECONDS)
        if has_store:
            with contextlib.suppress(DistNetworkError, DistStoreError):
                self._say_farewell(but=rank)
        if self._rank == 0 and self.before_end is not None:
            self.before_end(end | {"host": self._hosts[rank]})
        os._exit(end["status"])

    def _say_farewell(self, but: int | None = None) -> None:
        """Leave; process 0 holds the store, and stays until the others (`but` one) have read it."""
        self._store.set(f"bye/{self._rank}", "")
        keys = [f"bye/{rank}" for rank in self._others if rank != but]
        if self._rank == 0 and keys:
            self._store.wait(keys, timedelta(seconds=_FAREWELL_SECONDS))
