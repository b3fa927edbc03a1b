"""A page as a PNG, by a Chromium that is installed already; there is no other dependency.

Two runs: the first asks a copy of the page how high it is, the second takes it at that height.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH = 1220
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
_SECONDS = 120
_MEASURE = (
    "<script>document.title = 'height=' + document.documentElement.scrollHeight;</script></body>"
)


def find_browser() -> str:
    """The browser's path. Raises RuntimeError, saying what to install, if there is none."""
    for name in BROWSERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise RuntimeError(
        "--png needs Chromium or Chrome to draw the page, and none is installed (on Debian and "
        "Ubuntu: apt-get install chromium); or write --html and open it in any browser"
    )


def write_png(html: str, path: Path) -> None:
    """Draw ``html`` at its whole height.

    Raises:
        RuntimeError: no browser is installed, or it fails.
        OSError: ``path`` cannot be written.
    """
    browser = find_browser()
    path.touch()  # a path that cannot be written is told before the browser starts
    with tempfile.TemporaryDirectory() as folder:
        source, shot = Path(folder) / "page.html", Path(folder) / "page.png"
        source.write_text(html.replace("</body>", _MEASURE), encoding="utf-8")
        common = [browser, *_FLAGS, f"--user-data-dir={folder}/profile"]
        dom = _run([*common, f"--window-size={WIDTH},800", "--dump-dom", source.as_uri()])
        height = re.search(r"<title>height=(\d+)", dom)
        if height is None:
            raise RuntimeError(f"{browser} did not draw the page; write --html in its place")
        source.write_text(html, encoding="utf-8")
        size = f"--window-size={WIDTH},{height[1]}"
        _run([*common, size, f"--screenshot={shot}", source.as_uri()])
        if not shot.is_file():
            raise RuntimeError(f"{browser} took no picture of the page; write --html in its place")
        shutil.copyfile(shot, path)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"{command[0]} did not draw the page within {_SECONDS} s; write --html in its place"
        ) from error
    return done.stdout
