"""A server of two ranks in processes of its own, and what becomes of it when one is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

FLAGS = ["--tp-size", "2", "--max-total-tokens", "4096"]


class Output:
    """A process, and what it has printed."""

    def __init__(self, command: list[str], environ: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | (environ or {}),
        )
        self.output = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while chunk := os.read(self.process.stdout.fileno(), 4096):
            self.output += chunk.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.output:
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    @property
    def address(self) -> str:
        return next(line for line in self.output.splitlines() if line.startswith("http://"))

    def children(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if int(path.read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    found.append(int(path.parent.name))
        return found

    def wait(self, seconds: float) -> int:
        """The exit code, once all that was printed is read. Raises TimeoutExpired."""
        code = self.process.wait(seconds)
        self.reader.join(10)
        return code

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Launcher(Output):
    """A server that spawns its second rank."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        command = ["-m", "breakgraph.launch_server", "--model-path", str(folder), "--port", "0"]
        super().__init__([*command, *FLAGS, *flags])


def complete(address: str, prompt: str, max_tokens: int = 1) -> str:
    """What a server adds to ``prompt``."""
    fields = {"model": "", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    body = json.dumps(fields).encode()
    kind = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", body, kind)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["choices"][0]["text"]


def flood(address: str, stop: threading.Event) -> None:
    """Prompts of 90 tokens, each different, one after the other."""
    number = 0
    while not stop.is_set():
        number += 1
        with contextlib.suppress(OSError):
            complete(address, f"{number:06d}" + "x" * 84)


def check_kill(when: str, launcher: Launcher) -> None:
    """Kill the second rank while capturing, in prefill or idle: all ends, and it is named."""
    stop = threading.Event()
    launcher.wait_for("capturing prefill" if when == "capture" else "http://")
    if when == "prefill":
        assert complete(launcher.address, "hello") == complete(launcher.address, "hello")
        for _ in range(3):
            threading.Thread(target=flood, args=(launcher.address, stop), daemon=True).start()
        time.sleep(0.5)
    [rank] = launcher.children()
    os.kill(rank, signal.SIGKILL)
    code = launcher.wait(30)
    stop.set()
    assert code != 0
    assert "rank 1 of 2 was killed by SIGKILL" in launcher.output, launcher.output
    if when == "capture":
        assert "http://" not in launcher.output
