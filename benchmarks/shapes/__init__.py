"""Model configurations by name; nothing heavy is imported to look one up."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SHAPES = Path(__file__).parent


def shape_names() -> list[str]:
    """Every configuration there is."""
    return sorted(path.stem for path in SHAPES.glob("*.json"))


@contextmanager
def model_folder(shape: str) -> Iterator[str]:
    """A folder with the named shape's ``config.json`` alone, enough for dummy weights."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SHAPES / f"{shape}.json", Path(folder) / "config.json")
        yield folder
