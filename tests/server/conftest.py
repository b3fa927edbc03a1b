"""One server for most tests; after each test nothing of it is left running."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'breakgraph[serve]'")
pytest.importorskip("openai", reason="openai is not installed: pip install 'breakgraph[dev]'")

from .support import TEMPLATE, Running, running


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "template.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def shared_server(template: Path) -> Iterator[Running]:
    with running(served_model_name="sums", chat_template=str(template), max_choices=16) as server:
        yield server


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    yield shared_server
    shared_server.wait_until_empty()
