from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from truth import poisoned

from lora_kernels import refresh
from lora_kernels.reference import reference_refresh
from lora_kernels.refresh import Copy, WorkingCopies

# the interpreter cuts fp32 to bf16 instead of rounding it
DTYPES = [
    (torch.float32, torch.float16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
]
if torch.cuda.is_available():
    DTYPES += [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]

# none is a multiple of a block, some are smaller than a unit, (33, 128) takes more than one block
SHAPES = [(16, 128), (123, 16), (8, 64), (64, 8), (33, 128), (3, 12), (1, 7), (7, 1), (0, 5)]
SCALE = 0.3

Make = Callable[..., list[Copy]]


@pytest.fixture
def copies(device: str) -> Make:
    """Parameters with targets that are views of one poisoned matrix each."""

    def make(
        shapes: Sequence[tuple[int, int]] = SHAPES,
        source: torch.dtype = torch.float32,
        target: torch.dtype = torch.float32,
        column: int = 16,
    ) -> list[Copy]:
        made = []
        for num_rows, num_columns in shapes:
            values = torch.randn(num_rows, num_columns, dtype=source, device=device)
            wide = poisoned(num_rows + 1, num_columns + 32, dtype=target, device=device)
            view = wide[:num_rows, column : column + num_columns]
            made.append(Copy(torch.nn.Parameter(values), view, SCALE))
        return made

    return make


def _expected(copy: Copy) -> torch.Tensor:
    wide = torch.float64 if copy.source.dtype == torch.float64 else torch.float32
    return (copy.source.detach().to(wide) * copy.scale).to(copy.target.dtype)


def _assert_written(copies: Sequence[Copy]) -> None:
    for copy in copies:
        # one rounding of the product: nothing to choose
        assert torch.equal(copy.target, _expected(copy))
        copy.target.fill_(float("nan"))
        assert copy.target._base.isnan().all(), "wrote beside its target"


@pytest.mark.parametrize("column", [16, 8, 3])
@pytest.mark.parametrize(("source", "target"), DTYPES, ids=str)
def test_every_copy_is_rounded_once(
    copies: Make, source: torch.dtype, target: torch.dtype, column: int
) -> None:
    # with a common unit of 1, and shape by shape with the widest there is
    made = copies(SHAPES, source, target, column)
    WorkingCopies(made).refresh()
    _assert_written(made)
    for copy in made:
        WorkingCopies([copy]).refresh()
        _assert_written([copy])


def test_same_as_the_reference(copies: Make) -> None:
    made = copies()
    WorkingCopies(made).refresh()
    found = [copy.target.clone() for copy in made]
    reference_refresh(made)
    assert all(torch.equal(a, copy.target) for a, copy in zip(found, made, strict=True))


def test_sources_of_any_stride(copies: Make) -> None:
    made = copies([(16, 64), (64, 16)])
    wide = [torch.randn(copy.source.shape[0], 96).to(copy.source.device) for copy in made]
    made = [
        copy._replace(source=rows[:, 5 : 5 + copy.source.shape[1]])
        for copy, rows in zip(made, wide, strict=True)
    ]
    WorkingCopies(made).refresh()
    _assert_written(made)


@pytest.mark.parametrize(
    ("shapes", "column", "expected"),
    [
        ([(16, 128), (128, 16)], 16, 16),
        ([(16, 128), (128, 8)], 16, 8),
        ([(16, 128), (128, 16)], 4, 4),
        ([(1, 128), (128, 1)], 16, 1),
        # strides of a single row do not matter
        ([(1, 128)], 16, 16),
    ],
)
def test_units(copies: Make, shapes: list[tuple[int, int]], column: int, expected: int) -> None:
    (table,) = WorkingCopies(copies(shapes, column=column))._tables
    assert table._arguments["UNIT"] == expected


def test_one_launch_for_each_pair_of_dtypes(copies: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Counting:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
            return lambda *args, **kwargs: launched.append(grid)

    monkeypatch.setattr(refresh, "_refresh", Counting())
    made = copies() + copies(source=torch.float16)
    WorkingCopies(made).refresh()
    assert len(launched) == 2


def test_nothing_to_copy(copies: Make) -> None:
    WorkingCopies([]).refresh()
    WorkingCopies(copies([(0, 16), (16, 0)])).refresh()
    assert not WorkingCopies([])._tables


def test_parameter_that_has_moved(copies: Make) -> None:
    made = copies()
    working_copies = WorkingCopies(made)
    for copy in made:
        old = copy.source.data
        copy.source.data = torch.randn_like(old)
        old.fill_(float("inf"))
    working_copies.refresh()
    _assert_written(made)


def test_set_scales(copies: Make) -> None:
    made = copies()
    working_copies = WorkingCopies(made)
    working_copies.refresh()
    scales = [0.5 + index for index in range(len(made))]
    working_copies.set_scales(scales)
    working_copies.refresh()
    _assert_written([copy._replace(scale=scale) for copy, scale in zip(made, scales, strict=True)])
    with pytest.raises(ValueError, match="1 scales for 9 copies"):
        working_copies.set_scales([1.0])


def test_wrong_arguments_are_refused(device: str) -> None:
    matrix = torch.zeros(4, 8, device=device)
    for source, target, words in (
        (matrix, matrix[:3], "equal matrices"),
        (matrix[0], matrix[0], "equal matrices"),
        (matrix.T, matrix.reshape(8, 4), "contiguous"),
        (matrix.reshape(8, 4), matrix.T, "contiguous"),
        (matrix.int(), matrix, "int32"),
        (matrix, matrix.to("meta"), "meta"),
    ):
        with pytest.raises(ValueError, match=words):
            WorkingCopies([Copy(matrix, matrix.clone()), Copy(source, target)])
