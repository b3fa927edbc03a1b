"""One server for most tests; after each test nothing of it is left running."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .support import Running


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .support import TEMPLATE

    path = tmp_path_factory.mktemp("chat") / "template.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def shared_server(template: Path) -> Iterator[Running]:
    from .support import running

    with running(served_model_name="sums", chat_template=str(template), max_choices=16) as server:
        yield server


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    yield shared_server
    shared_server.wait_until_empty()
