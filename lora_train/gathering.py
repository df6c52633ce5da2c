"""What every process of a run knows, in the hands of each."""

from __future__ import annotations

from typing import TypeVar

from torch import distributed

T = TypeVar("T")


def gather_from_all(value: T) -> list[T]:
    """Gather a value of each process; a collective call where there are several.

    Args:
        value: of this process; it is pickled.

    Returns:
        The values of all, in the order of the ranks; everywhere the same.
    """
    if not distributed.is_initialized():
        return [value]
    values = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
