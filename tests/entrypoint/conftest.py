"""What the tests of the entrypoint share."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_image import Image


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """A small image in an empty place."""
    return Image(tmp_path)
