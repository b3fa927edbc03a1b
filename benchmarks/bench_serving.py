"""Time to first token and tokens per second over real HTTP, with prefill graphs and without.

A server process a mode, and against each the same requests at the same moments: arrivals are a
Poisson process, prompts are random tokens as long as a file's problems. A request that is late is
late by the server's doing: arrivals wait for nobody.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import SHAPES, machine, shape_names, write_json

PROBLEMS = Path(__file__).parent.parent / "examples" / "arithmetic" / "test.jsonl"
MODES = {"graphs": ["--enable-breakable-cuda-graph"], "eager": []}
# About what Qwen's tokenizer makes of English: a word, a digit or a mark is a token.
TOKEN = re.compile(r"[^\W\d_]+|\d|[^\w\s]")


@dataclass
class Timing:
    """One request: seconds from when it was due, and what it got."""

    prompt_tokens: int
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    error: str = ""
    gaps: list[float] = field(default_factory=list)


def prompt_lengths(path: Path, shots: int) -> list[int]:
    """Tokens of each problem of a GSM8K-format file, behind ``shots`` solved ones."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    solved = [len(TOKEN.findall(f"{p['question']} {p['answer']}")) + 4 for p in lines]
    asked = [len(TOKEN.findall(p["question"])) + 4 for p in lines]
    return [
        count + sum(solved[(i + k) % len(lines)] for k in range(1, shots + 1))
        for i, count in enumerate(asked)
    ]


@contextmanager
def served(config: Path, flags: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """A server process of a configuration with dummy weights: its host, port and summary line."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(config, Path(folder) / "config.json")
        command = [sys.executable, "-m", "breakgraph.launch_server", "--model-path", folder]
        command += ["--load-format", "dummy", "--skip-tokenizer-init", "--port", "0", *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                summary, address = process.stdout.readline(), process.stdout.readline()
                found = re.match(r"http://(.*):(\d+)", address)
                if found is None:
                    raise SystemExit(f"the server did not start: {' '.join(command)}")
                yield found[1], int(found[2]), summary.strip()
            finally:
                process.terminate()


async def ask(host: str, port: int, body: dict[str, Any], due: float) -> Timing:
    """Send one request and time its events, by the clock that ``due`` is of."""
    timing = Timing(len(body["prompt"]))
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: benchmark\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    try:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(head.encode() + data)
        status = (await reader.readline()).split()[1]
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter() - due
            event = json.loads(line[6:])
            if "error" in event:
                timing.error = event["error"]["message"]
            elif count := len(event["choices"][0]["token_ids"]):
                if timing.tokens:
                    timing.gaps += [(now - timing.last) / count] * count
                else:
                    timing.first = now
                timing.tokens += count
                timing.last = now
        writer.close()
        if not timing.tokens and not timing.error:
            timing.error = f"status {status.decode()}"
    except OSError as error:
        timing.error = str(error)
    return timing


async def load(
    host: str, port: int, prompts: Sequence[list[int]], arrivals: Sequence[float], max_tokens: int
) -> list[Timing]:
    """Send each prompt at its moment, and wait for all answers."""
    base = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    start = time.perf_counter()

    async def one(prompt: list[int], at: float) -> Timing:
        await asyncio.sleep(start + at - time.perf_counter())
        return await ask(host, port, base | {"prompt": prompt}, start + at)

    pairs = zip(prompts, arrivals, strict=True)
    return await asyncio.gather(*(one(prompt, at) for prompt, at in pairs))


def measure(
    address: tuple[str, int], lengths: Sequence[int], vocab: int, rate: float, args: Any
) -> dict[str, Any]:
    """One row: ``args.requests`` requests at ``rate`` a second."""
    random = np.random.default_rng(args.seed)
    drawn = random.choice(lengths, args.requests)
    prompts = [random.integers(5, vocab, int(n)).tolist() for n in drawn]
    arrivals = np.cumsum(random.exponential(1 / rate, args.requests)).tolist()
    asyncio.run(load(*address, [p[::-1] for p in prompts[:32]], [0.02] * 32, 4))  # warm-up
    timings = asyncio.run(load(*address, prompts, arrivals, args.max_tokens))
    good = [t for t in timings if not t.error]
    if not good:
        raise SystemExit(f"no request was answered: {timings[0].error}")
    seconds = max(at + t.last for at, t in zip(arrivals, timings, strict=True)) - arrivals[0]
    first = np.array([t.first for t in good]) * 1e3
    gaps = np.array([gap for t in good for gap in t.gaps] or [0.0]) * 1e3
    return {
        "rate": rate,
        "answered": len(good),
        "failed": len(timings) - len(good),
        "ttft_p50_ms": float(np.percentile(first, 50)),
        "ttft_p99_ms": float(np.percentile(first, 99)),
        "ttft_mean_ms": float(first.mean()),
        "next_token_p50_ms": float(np.percentile(gaps, 50)),
        "next_token_p99_ms": float(np.percentile(gaps, 99)),
        "output_tokens_per_s": sum(t.tokens for t in good) / seconds,
        "prompt_tokens_per_s": sum(t.prompt_tokens for t in good) / seconds,
    }


def plot(rows: dict[str, list[dict[str, Any]]], title: str) -> str:
    """Time to first token over the rate, as SVG: medians in full lines, p99 dashed."""
    colours = {"graphs": "#2f6f4f", "eager": "#b3382c"}
    rates = sorted({row["rate"] for mode in rows.values() for row in mode})
    top = 1.1 * max(row["ttft_p99_ms"] for mode in rows.values() for row in mode)
    left, width, height = 60, 640, 280

    def x(rate: float) -> float:
        return left + width * (rates.index(rate) + 0.5) / len(rates)

    def y(value: float) -> float:
        return 40 + height * (1 - value / top)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 390" font-size="12" '
        'font-family="Helvetica, Arial, sans-serif"><rect width="760" height="390" fill="#fff"/>',
        f'<text x="{left}" y="22" font-size="14" font-weight="bold">{title}</text>',
    ]
    for step in range(5):
        value = top * step / 4
        parts.append(f'<path d="M{left} {y(value):.1f} h{width}" stroke="#dde2dd"/>')
        label = f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        parts.append(label)
    for rate in rates:
        parts.append(f'<text x="{x(rate):.1f}" y="338" text-anchor="middle">{rate:g}</text>')
    parts.append('<text x="380" y="358" text-anchor="middle">requests a second</text>')
    place = left
    for mode, measured in rows.items():
        for name, dash in (("p50", ""), ("p99", ' stroke-dasharray="5 4"')):
            points = [(x(row["rate"]), y(row[f"ttft_{name}_ms"])) for row in measured]
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            style = f'fill="none" stroke="{colours[mode]}" stroke-width="2"{dash}'
            parts.append(f'<polyline points="{line}" {style}/>')
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colours[mode]}"/>'
                for a, b in points
            ]
            parts.append(f'<path d="M{place} 376 h24" {style}/>')
            parts.append(f'<text x="{place + 30}" y="380">{mode}, {name}, ms</text>')
            place += 160
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=shape_names(), default="qwen3-0.6b")
    parser.add_argument("--config", type=Path, help="config.json of another shape")
    parser.add_argument("--data-path", type=Path, default=PROBLEMS, help="problems, GSM8K's format")
    parser.add_argument("--shots", type=int, default=0, help="solved problems before each")
    parser.add_argument("--rates", type=float, nargs="+", default=(10, 20, 40, 80))
    parser.add_argument("--requests", type=int, default=400, help="requests a mode and rate")
    parser.add_argument("--max-tokens", type=int, default=32, help="new tokens a request")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--plot", help="SVG file to write")
    parser.add_argument("server_flags", nargs="*", help="flags of the server, behind --")
    args = parser.parse_args()
    lengths = prompt_lengths(args.data_path, args.shots)
    config = args.config or SHAPES / f"{args.shape}.json"
    vocab = json.loads(config.read_text())["vocab_size"]
    print(f"{len(lengths)} problems of {min(lengths)} to {max(lengths)} tokens")
    rows: dict[str, list[dict[str, Any]]] = {}
    for mode in args.modes:
        with served(config, [*MODES[mode], *args.server_flags]) as (host, port, summary):
            print(f"\n{mode}: {summary}")
            print("  rate  answered  first token p50    p99 ms  next token p50   p99 ms  tokens/s")
            rows[mode] = []
            for rate in args.rates:
                row = measure((host, port), lengths, vocab, rate, args)
                rows[mode].append(row)
                print(
                    f"{rate:6g} {row['answered']:9d} {row['ttft_p50_ms']:16.2f} "
                    f"{row['ttft_p99_ms']:9.2f} {row['next_token_p50_ms']:15.2f} "
                    f"{row['next_token_p99_ms']:8.2f} {row['output_tokens_per_s']:9.1f}",
                    flush=True,
                )
    if len(rows) == len(MODES):
        for graphs, eager in zip(rows["graphs"], rows["eager"], strict=True):
            ratio = graphs["ttft_p50_ms"] / eager["ttft_p50_ms"]
            print(f"{graphs['rate']:g} a second: median time to first token {ratio:.2f} of eager's")
    settings = {
        key: value.name if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("output", "plot")
    }
    write_json(args.output, {"settings": settings, "rows": rows})
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        kind = machine().get("gpu", "CPU")
        Path(args.plot).write_text(
            plot(rows, f"{args.config or args.shape}, time to first token, {kind}")
        )


if __name__ == "__main__":
    main()
