import contextlib
import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from truth import assert_close_to_truth

from lora_kernels import launch

# scripts, which find each other beside themselves
sys.path.insert(0, str(Path(launch.__file__).parents[1] / "benchmarks"))
import tune
from operations import OPERATIONS
from shapes import TINY, Tensors
from tune import TUNINGS, UNTUNED, Tuner, Tuning

CPU = torch.device("cpu")
ALL = [(table, tuning) for table, tunings in TUNINGS.items() for tuning in tunings]
in_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels on CPU tensors need Triton's interpreter"
)


@pytest.fixture
def tables() -> tune.Tables:
    return tune.load_tables(launch.TABLES / "sm_80")


@in_interpreter
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_called_rightly(name: str) -> None:
    operation = OPERATIONS[name](TINY, Tensors(CPU, torch.float32))
    same_dtype, truth = operation.reference(torch.float32), operation.reference(torch.float64)
    results = operation.run()
    assert results.keys() == truth.keys()
    for key, result in results.items():
        assert_close_to_truth(result, same_dtype[key], truth[key], key)
    assert operation.num_bytes > 0


def test_tensors_are_the_same_each_time() -> None:
    def made() -> list[torch.Tensor]:
        tensors = Tensors(CPU, torch.float32)
        return [tensors.normal(3, 4), tensors.rank_rows(8, 64, 16), tensors.normal(3, 4)]

    first, again = made(), made()
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("path", sorted(launch.TABLES.glob("*/*.json")), ids=str)
def test_tables_are_written_as_they_stand(path: Path) -> None:
    assert tune.format_table(json.loads(path.read_text())) == path.read_text()


@pytest.mark.parametrize("folder", ["sm_80", "sm_90"])
def test_every_entry_is_tuned_or_has_a_reason(folder: str) -> None:
    in_tables = {
        (table, kernel)
        for table, kernels in tune.load_tables(launch.TABLES / folder).items()
        for kernel in kernels
    }
    tuned = {(table, tuning.entry) for table, tuning in ALL}
    assert len(tuned) == len(ALL)
    assert {kernel for _, kernel in in_tables - tuned} == UNTUNED.keys()
    assert tuned <= in_tables


@pytest.mark.parametrize(("table", "tuning"), ALL, ids=lambda value: getattr(value, "entry", ""))
def test_candidates_have_the_keys_of_the_table(
    tables: tune.Tables, table: str, tuning: Tuning
) -> None:
    configs = [entry["config"] for entry in tables[table][tuning.entry]]
    keys = list(configs[0])
    for config in configs:
        tried = tune.candidates_of(tuning, config)
        assert tried[0] == config
        assert all(list(candidate) == keys for candidate in tried)
        assert len({json.dumps(candidate) for candidate in tried}) == len(tried)
    assert all(candidate.keys() == set(keys) for candidate in tuning.candidates)
    for other, config in tuning.meanwhile.items():
        assert config.keys() == tables[table][other][0]["config"].keys()


@in_interpreter
def test_operations_use_what_is_tuned(tables: tune.Tables) -> None:
    """A candidate that nobody launches would be as fast as any."""

    def way(tuning: Tuning) -> tuple[str, str]:
        return tuning.operation, json.dumps(tuning.meanwhile)

    for (name, _), group in groupby(sorted((t for _, t in ALL), key=way), key=way):
        tunings = list(group)
        with tune.launched_with(tables, tunings[0].meanwhile) as widths:
            # fp16: wider elements never take some of the ways
            OPERATIONS[name](TINY, Tensors(CPU, torch.float16)).run()
        assert widths.keys() >= {tuning.entry for tuning in tunings}


def test_the_first_stays_unless_another_is_clearly_faster() -> None:
    first, second, third = ({"BLOCK_M": size} for size in (1, 2, 3))
    assert tune.fastest([(first, 1.0), (second, 0.995)]) == (first, 1.0)
    assert tune.fastest([(first, 1.0), (second, 0.9), (third, 0.89)]) == (third, 0.89)
    assert tune.fastest([(first, 1.0)]) == (first, 1.0)


def test_disagreement() -> None:
    expected = {"x": torch.randn(8, 64, dtype=torch.bfloat16), "loss": torch.tensor(3.0)}
    assert tune.disagreement(expected, {}) is None
    nearly = {"x": expected["x"] * (1 + 2.0**-8), "loss": expected["loss"] + 1e-6}
    assert tune.disagreement(nearly, expected) is None
    assert tune.disagreement({**nearly, "loss": torch.tensor(3.01)}, expected) == "loss"
    for value in (0.0, float("nan")):
        wrong = expected["x"].clone()
        wrong[3, wrong[3].abs().argmax()] = value
        assert tune.disagreement({**expected, "x": wrong}, expected) == "x"


class _FakeTimes:
    """Milliseconds of the runs in the order in which they are asked for."""

    def __init__(self, *times: float | Exception) -> None:
        self.times = list(times)

    def __call__(self, run: object) -> float:
        time = self.times.pop(0)
        if isinstance(time, Exception):
            raise time
        return time


@in_interpreter
def test_the_fastest_goes_into_the_tables(
    tables: tune.Tables, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tuning,) = [tuning for _, tuning in ALL if tuning.entry == "dropped"]
    candidates = tuning.candidates[:3]
    tuning = tuning._replace(candidates=candidates)
    current = {"BLOCK_M": 4, "BLOCK_K": 512, "num_warps": 4, "num_stages": 1}
    tables["project"]["dropped"] = [
        {"max_width": 32, "config": current},
        {"max_width": 64, "config": current},
        {"max_width": None, "config": current},
    ]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    times = _FakeTimes(2.0, RuntimeError("out of resource: shared memory"), 1.0, 1.5)
    monkeypatch.setattr(tune, "_median_ms", times)
    tuner = Tuner(tables, TINY, CPU, torch.float32, 60)
    outcome = tuner.tune(tuning)
    best = {key: candidates[1][key] for key in current}
    assert outcome[:5] == ("dropped", 2.0, 1.0, best, 3)
    configs = [entry["config"] for entry in tables["project"]["dropped"]]
    assert configs == [current, best, current]
    assert "BLOCK_M=1" in capsys.readouterr().out

    # no time: nothing is known, nothing changes
    assert Tuner(tables, TINY, CPU, torch.float32, -1).tune(tuning).best_ms is None
    assert tables["project"]["dropped"][1]["config"] == best


def test_what_differs_is_never_chosen(
    tables: tune.Tables, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object) -> tune.Operation:
        config = launch.launch_config("dropped", CPU, 64)
        result = torch.full((4,), float(config["BLOCK_M"] == 1))
        return tune.Operation(lambda: {"out": result}, lambda _: {}, {}, 16)

    monkeypatch.setitem(OPERATIONS, "dropped", build)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tune, "_median_ms", _FakeTimes(1.0, *[0.5 + time for time in range(20)]))
    (tuning,) = [tuning for _, tuning in ALL if tuning.entry == "dropped"]
    outcome = Tuner(tables, TINY, CPU, torch.float32, 60).tune(tuning)
    assert outcome.config["BLOCK_M"] != 1
    assert "BLOCK_M=1 BLOCK_K=1024 num_warps=4 num_stages=1: skipped" in capsys.readouterr().out


@in_interpreter
def test_what_does_not_compile_is_not_timed(
    tables: tune.Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def recorded_jobs(capability: int) -> Iterator[list[int]]:
        yield [launch.launch_config("dropped", CPU, 64)["BLOCK_M"]]

    class Pool:
        jobs: list[int] = []

        def apply_async(self, _: object, arguments: tuple[int]) -> SimpleNamespace:
            self.jobs += arguments
            return SimpleNamespace(get=lambda _: "spilled" if arguments == (8,) else None)

    monkeypatch.setattr(tune, "recorded_jobs", recorded_jobs)
    monkeypatch.setattr(tune, "_median_ms", lambda run: 1.0)
    (tuning,) = [tuning for _, tuning in ALL if tuning.entry == "dropped"]
    sizes = [config["BLOCK_M"] for config in tuning.candidates]
    tuner = Tuner(tables, TINY, CPU, torch.float32, 60)
    pool = Pool()
    tuner.compile_candidates(tuning, pool, 90)  # type: ignore[arg-type]
    # what several candidates share is compiled once
    assert sorted(pool.jobs) == sorted(set(sizes))
    assert tuner.tune(tuning).num_timed == len(sizes) - sizes.count(8)


def test_names_on_the_command_line() -> None:
    assert tune._names("swiglu,attention") == ["attention", "swiglu"]
    with pytest.raises(Exception, match="swiglo"):
        tune._names("swiglo")
