"""The page in a real browser: it streams an answer and draws the prefill that made it."""

import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from .support import Running, questions, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--virtual-time-budget=15000",
]
browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def rendered(server: Running, folder: Path, prompt: str) -> str:
    """The page's elements after it has run ``prompt``."""
    url = f"{server.url}/#prompt={quote(prompt)}"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@browser
def test_the_page_streams_an_answer_and_draws_its_prefill(server: Running, tmp_path: Path):
    prompt = questions(3)[2]
    with server.http() as http:
        ask = {"prompt": prompt, "max_tokens": 128, "temperature": 0}
        text = http.post("/v1/completions", json=ask).json()["choices"][0]["text"]
    page = rendered(server, tmp_path, prompt)
    assert 'data-done="yes"' in page
    assert text.strip() in page
    assert "ms to first token" in page
    assert re.search(r'id="sentence">\d+ tokens? replay in bucket (16|32|64|128)', page)
    picture = page[page.index("<svg") : page.index("</svg>")]
    assert len(re.findall(r'<rect class="segment"', picture)) == 7 + 1 + 1  # rows, the bucket
    assert len(re.findall(r'<rect class="break"', picture)) == 6
    assert "padding" in picture


@browser
def test_the_page_says_why_a_prefill_was_eager(tmp_path: Path):
    with running(enable_breakable_cuda_graph=False) as server:
        page = rendered(server, tmp_path, questions(1)[0])
    assert "graphs are off: pass --enable-breakable-cuda-graph" in page
    assert re.search("eager: 6 layers", page)
    assert '<rect class="segment"' not in page and '<rect class="break"' not in page


def test_the_page_reaches_no_other_host(server: Running):
    with server.http() as http:
        answer = http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    links = set(re.findall(r"https?://[^\"' )]+", answer.text))
    assert links <= {"http://www.w3.org/2000/svg"}
    assert len(answer.text) < 20_000
