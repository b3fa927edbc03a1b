"""The page in a real browser: it streams an answer and draws the prefill that made it."""

import re
from pathlib import Path
from urllib.parse import quote

import pytest

from .browser import CHROMIUM, Page
from .support import Running, questions, running

browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def count(page: Page, kind: str) -> int:
    return page.evaluate(f"document.querySelectorAll('#picture rect.{kind}').length")


@browser
def test_the_page_streams_an_answer_and_draws_its_prefill(server: Running, tmp_path: Path):
    prompt = questions(3)[2]
    with server.http() as http:
        ask = {"prompt": prompt, "max_tokens": 128, "temperature": 0}
        text = http.post("/v1/completions", json=ask).json()["choices"][0]["text"]
    with Page(server.url, tmp_path) as page:
        page.wait_for("document.getElementById('state').className === 'up'")
        assert page.text("model") == "sums"
        page.fill("prompt", prompt)
        page.click("go")
        page.wait_for("document.body.dataset.done === 'yes'")
        assert page.text("answer") == text.lstrip()
        figures = page.text("figures")
        assert "ms to first token" in figures and "tokens/s" in figures
        assert page.text("go") == "Run"
        # All but one token was cached by the request above.
        sentence = page.text("sentence")
        assert "in bucket 16 (15 rows of padding)" in sentence
        assert count(page, "segment") == 7 + 1 + 1  # and the rows, and the bucket in the ladder
        assert count(page, "break") == 6
        assert "padding" in page.text("picture")
        # Stopping aborts the request.
        page.fill("tokens", 2000)
        page.fill("prompt", "Tom")
        page.click("go")
        page.wait_for("document.getElementById('go').textContent === 'Stop'")
        page.click("go")
        page.wait_for("document.getElementById('go').textContent === 'Run'")
        # A refusal is shown.
        page.fill("tokens", 99999)
        page.click("go")
        page.wait_for("document.getElementById('answer').className === 'bad'")
        assert "max_tokens" in page.text("answer")


@browser
def test_the_page_says_why_a_prefill_was_eager(tmp_path: Path):
    prompt = quote(questions(1)[0])
    with (
        running(enable_breakable_cuda_graph=False) as server,
        Page(f"{server.url}/#prompt={prompt}", tmp_path) as page,
    ):
        page.wait_for("document.body.dataset.done === 'yes'")
        sentence = page.text("sentence")
        picture = page.text("picture")
        assert "graphs are off: pass --enable-breakable-cuda-graph" in sentence
        assert "eager: 6 layers" in picture
        assert count(page, "segment") == count(page, "break") == 0


def test_the_page_reaches_no_other_host(server: Running):
    with server.http() as http:
        answer = http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    links = set(re.findall(r"https?://[^\"' )]+", answer.text))
    assert links <= {"http://www.w3.org/2000/svg"}
    assert len(answer.text) < 20_000
