"""Files kept for the next start: in ``$XDG_CACHE_HOME/breakgraph`` or ``~/.cache/breakgraph``."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def kept_path(name: str) -> Path:
    """Where the file of that name is, or would be."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "breakgraph" / name


def keep(path: Path, content: bytes, what: str) -> None:
    """Write the file; that it cannot be written is a warning, which says ``what`` is lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # By another name first: a start beside this one never reads half a file.
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".new", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("%s cannot be kept for the next start: %s", what, error)
