"""What is on disk when an evaluation ends in the middle."""

import json
import resource

import pytest

from lora_train.errors import RunError
from lora_train.evaluation.journal import Journal

SETTINGS = {"rows": "a"}


@pytest.fixture
def results(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.fixture
def journal(results):
    """A journal that holds a loss and an answer."""
    journal = Journal(results, SETTINGS)
    journal.add_losses("base", [(0, 1.5, 3)])
    journal.add_answers("base", [(0, "yes\u2028", True)])
    return journal


def test_a_journal_is_gone_on_with(journal, results):
    journal.close()
    again = Journal(results, SETTINGS)
    assert again.losses == {("base", 0): (1.5, 3)}
    assert again.answers == {("base", 0): ("yes\u2028", True)}
    again.finish()
    again.close()
    assert not list(results.parent.iterdir())


def test_nothing_measured_leaves_nothing(results):
    Journal(results, SETTINGS).close()
    assert not list(results.parent.iterdir())


def test_a_full_disk_keeps_what_was_written(journal, results):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(RunError, match="cannot write") as error:
            journal.add_answers("base", [(1, "no" * 100, True)])
        journal.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "what was measured is kept" in str(error.value)
    assert not journal.path.read_bytes().endswith(b"\n")
    again = Journal(results, SETTINGS)
    assert len(again.losses) == len(again.answers) == 1
    again.add_answers("base", [(1, "no", True)])
    again.close()
    assert len(Journal(results, SETTINGS).answers) == 2


@pytest.mark.parametrize("damage", [b"", b"[]\n", b'{"fingerprint": 1}\n', b"\xff\n", None])
def test_a_damaged_journal_is_set_aside(damage, journal, results, caplog):
    journal.close()
    whole = journal.path.read_bytes()
    torn = whole.replace(b'"tokens"', b'"tok', 1) if damage is None else damage
    journal.path.write_bytes(torn)
    again = Journal(results, SETTINGS)
    assert not again.losses and not again.answers
    again.close()
    aside = journal.path.with_name(f"{journal.path.name}.old")
    assert aside.read_bytes() == torn and not journal.path.exists()


def test_a_journal_of_other_settings_is_set_aside(journal, results):
    journal.close()
    again = Journal(results, {"rows": "b"})
    again.add_losses("base", [(0, 2.0, 3)])
    again.close()
    header = json.loads(again.path.read_text().splitlines()[0])
    assert header == {"fingerprint": {"rows": "b"}}
    assert again.losses == {("base", 0): (2.0, 3)}
