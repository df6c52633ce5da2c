"""Hashes of files: right, remembered, and never taken for those of a file that changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lora_train.receipts import file_hashes
from lora_train.receipts.file_hashes import Cancelled, FileHashes

CONTENT = b"W + BA" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


def remember(file: Path) -> None:
    hashes = FileHashes()
    hashes.of(file)
    hashes.save()


@pytest.fixture
def num_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    read, reads = FileHashes._read_through, []
    monkeypatch.setattr(
        FileHashes, "_read_through", lambda self, path: reads.append(path) or read(self, path)
    )
    return reads


def test_size_and_sha256(file: Path) -> None:
    assert FileHashes().of(file) == {"size": 6000, "sha256": SHA256}


def test_an_unchanged_file_is_not_read_again(file: Path, num_reads: list[Path]) -> None:
    remember(file)
    link = file.with_name("link")
    link.symlink_to(file)
    for path in (file, link):
        assert FileHashes().of(path)["sha256"] == SHA256
    assert num_reads == [file]


def test_a_change_shows_also_with_the_old_size_and_time(file: Path) -> None:
    remember(file)
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"X")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert FileHashes().of(file)["sha256"] == hashlib.sha256(b"X" + CONTENT[1:]).hexdigest()


def test_a_file_just_written_is_not_trusted(
    file: Path, num_reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next change may come within the same tick of the file system's clock."""
    monkeypatch.setattr(file_hashes, "_SETTLED_NANOSECONDS", 10**15)
    remember(file)
    FileHashes().of(file)
    assert len(num_reads) == 2


def test_a_blob_of_the_hub_is_named_by_its_hash(tmp_path: Path, num_reads: list[Path]) -> None:
    blob = tmp_path / "blobs" / SHA256
    blob.parent.mkdir()
    blob.write_bytes(CONTENT)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert FileHashes().of(link) == {"size": 6000, "sha256": SHA256}
    assert not num_reads


def test_cancelled_in_mid_file(file: Path) -> None:
    with pytest.raises(Cancelled):
        FileHashes(lambda: True).of(file)


def test_two_writers_keep_each_others_hashes(file: Path, num_reads: list[Path]) -> None:
    other = file.with_name("other")
    other.write_bytes(b"other")
    first, second = FileHashes(), FileHashes()
    first.of(file)
    second.of(other)
    first.save()
    second.save()
    for path in (file, other):
        FileHashes().of(path)
    assert num_reads == [file, other]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"a": [1, 2]', "\x00"])
def test_a_damaged_memory_is_begun_anew(content: str, file: Path, tmp_path: Path) -> None:
    memory = tmp_path / "cache" / "file_hashes.json"
    memory.parent.mkdir()
    memory.write_text(content)
    remember(file)
    assert SHA256 in memory.read_text()


def test_a_cache_folder_that_cannot_be_written(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    hashes = FileHashes()
    assert hashes.of(file)["sha256"] == SHA256
    hashes.save()
