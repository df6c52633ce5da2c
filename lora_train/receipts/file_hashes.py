"""SHA-256 of files, remembered: one that did not change since is not read a second time.

What is known lies in file_hashes.json of the cache folder, by path, with what the file system says
of the file: size, times of its last change, inode. Of a file in the hub's cache the name of the
blob is the hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from lora_train.paths import atomic_file, cache_dir

log = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
# a small share of a large model: what was read is kept also when the run ends in mid-work
_SAVE_AFTER_BYTES = 1 << 30
_MAX_ENTRIES = 5000
# file systems tell times in steps of up to 2 s: a younger file could change without another time
_SETTLED_NANOSECONDS = 2 * 10**9
_LFS_BLOB = re.compile(r"[0-9a-f]{64}")


class FileHash(TypedDict):
    """What a file holds."""

    size: int
    """Bytes."""
    sha256: str


class Cancelled(Exception):
    """The hashing was told to stop."""


class FileHashes:
    """Hashes files, and remembers them in the cache folder.

    Args:
        is_cancelled: asked while a file is read.
    """

    def __init__(self, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self._file = cache_dir() / "file_hashes.json"
        self._is_cancelled = is_cancelled
        self._known = self._read()
        self._new: dict[str, list[Any]] = {}
        self._unsaved_bytes = 0

    def of(self, file: Path) -> FileHash:
        """Return size and SHA-256 of a file.

        Args:
            file: the file, or a link to it.

        Returns:
            Both; from memory where the file did not change since.

        Raises:
            OSError: it cannot be read, or changed while it was read.
            Cancelled: `is_cancelled` said so.
        """
        real = file.resolve(strict=True)
        status = real.stat()
        if _LFS_BLOB.fullmatch(real.name) and real.parent.name == "blobs":
            return {"size": status.st_size, "sha256": real.name}
        seen = _identity(status)
        known = self._known.get(str(real))
        if known is not None and known[:-1] == seen:
            return {"size": status.st_size, "sha256": known[-1]}
        began = time.time_ns()
        digest = self._read_through(real)
        if _identity(real.stat()) != seen:
            raise OSError(f"{file} changed while it was read")
        if began - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NANOSECONDS:
            self._known[str(real)] = self._new[str(real)] = [*seen, digest]
            self._unsaved_bytes += status.st_size
            if self._unsaved_bytes > _SAVE_AFTER_BYTES:
                self.save()
        return {"size": status.st_size, "sha256": digest}

    def save(self) -> None:
        """Write down what is new; a cache folder that cannot be written costs only time."""
        if not self._new:
            return
        # read again: another run may have written meanwhile
        known = self._read()
        for path, entry in self._new.items():
            known.pop(path, None)
            known[path] = entry
        kept = dict(list(known.items())[-_MAX_ENTRIES:])
        try:
            with atomic_file(self._file) as unfinished:
                unfinished.write_text(json.dumps(kept), encoding="utf-8")
        except OSError as error:
            log.debug("cannot keep the hashes of files in %s: %s", self._file, error)
            return
        self._new, self._unsaved_bytes = {}, 0

    def _read(self) -> dict[str, list[Any]]:
        try:
            known = json.loads(self._file.read_text(encoding="utf-8"))
            return {path: entry for path, entry in known.items() if len(entry) == 5}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def _read_through(self, file: Path) -> str:
        digest, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
        view = memoryview(buffer)
        with file.open("rb", buffering=0) as stream:
            while size := stream.readinto(buffer):
                if self._is_cancelled():
                    raise Cancelled
                digest.update(view[:size])
        return digest.hexdigest()


def _identity(status: os.stat_result) -> list[int]:
    # ctime: a file that was altered in place can have its old mtime, as `touch -r` gives it
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
