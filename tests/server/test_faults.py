"""Among clients that abort, vanish, flood and babble, every well-formed request is answered.

``BREAKGRAPH_FAULT_REQUESTS=2000`` makes it the long run.
"""

import asyncio
import gc
import json
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from .support import Running, post, questions

COUNT = int(os.environ.get("BREAKGRAPH_FAULT_REQUESTS", "200"))
CLIENTS = 24
GROWTH_MB = 24  # far under what 100 leaked requests with their buffers would leave
NEW_TOKENS = 12

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


async def exchange(server: Running, data: bytes) -> tuple[int, bytes]:
    """Send a whole request and read all of its answer."""
    reader, writer = await asyncio.open_connection(*server.address)
    try:
        writer.write(data)
        answer = await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def ask(prompt: str, **fields: object) -> bytes:
    body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0} | fields
    return post("/v1/completions", body, "Connection: close")


class Crowd:
    """Clients of every kind; each method is one."""

    def __init__(self, server: Running, expected: dict[str, str], seed: int) -> None:
        self.server, self.expected = server, expected
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()

    def prompt(self) -> str:
        return self.random.choice(list(self.expected))

    async def whole(self) -> None:
        prompt = self.prompt()
        status, body = await exchange(self.server, ask(prompt))
        assert status == 200, body
        assert json.loads(body)["choices"][0]["text"] == self.expected[prompt]

    async def streamed(self) -> None:
        prompt = self.prompt()
        status, body = await exchange(self.server, ask(prompt, stream=True))
        assert status == 200, body
        lines = [line[6:] for line in body.split(b"\r\n") if line.startswith(b"data: ")]
        events = [line.strip() for line in lines]
        assert events[-1] == b"[DONE]", body
        texts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
        assert "".join(texts) == self.expected[prompt]

    async def leaves_early(self) -> None:
        _reader, writer = await asyncio.open_connection(*self.server.address)
        writer.write(ask(self.prompt(), max_tokens=2000, ignore_eos=True, n=2))
        await asyncio.sleep(self.random.random() / 10)
        if self.random.random() < 0.5:
            writer.transport.abort()  # a reset in place of a good-bye
        else:
            writer.close()

    async def leaves_the_stream(self) -> None:
        reader, writer = await asyncio.open_connection(*self.server.address)
        writer.write(ask(self.prompt(), max_tokens=2000, ignore_eos=True, stream=True))
        for _ in range(self.random.randrange(1, 8)):
            await reader.readline()
        writer.close()

    async def half(self) -> None:
        _reader, writer = await asyncio.open_connection(*self.server.address)
        data = ask(self.prompt())
        writer.write(data[: self.random.randrange(1, len(data) - 1)])
        await asyncio.sleep(self.random.random() / 20)
        writer.close()

    async def oversize(self) -> None:
        limit = self.server.engine.args.max_body_bytes
        status, body = await exchange(
            self.server, ask("x" * (limit + self.random.randrange(limit)))
        )
        assert status == 413, body

    async def malformed(self) -> None:
        wrong = self.random.choice(
            [
                b"{",
                b"[]",
                b"\xff\xfe",
                b'{"prompt": {}}',
                b'{"prompt": "a", "n": "many"}',
                b"[" * 999,
            ]
        )
        status, body = await exchange(
            self.server, post("/v1/completions", wrong, "Connection: close")
        )
        assert status == 400 and json.loads(body)["error"]["message"]

    async def babble(self) -> None:
        status, _ = await exchange(self.server, self.random.randbytes(99) + b"\r\n\r\n")
        assert status == 400

    async def run(self, count: int) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [
            *[self.whole, self.streamed] * 3,
            self.leaves_early,
            self.leaves_the_stream,
            *(self.half, self.oversize, self.malformed, self.babble),
        ]
        places = asyncio.Semaphore(CLIENTS)

        async def one(kind: Callable[[], Awaitable[None]]) -> None:
            async with places:
                await kind()
                self.seen[kind.__name__] += 1

        await asyncio.gather(*(one(self.random.choice(kinds)) for _ in range(count)))


def memory_mb() -> float:
    gc.collect()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS in /proc/self/status")


def test_every_well_formed_request_is_answered(server: Running):
    expected = {}
    with server.http() as http:
        for prompt in questions(8):
            done = http.post(
                "/v1/completions",
                content=ask(prompt).partition(b"\r\n\r\n")[2],
                headers={"content-type": "application/json"},
            ).json()
            expected[prompt] = done["choices"][0]["text"]
    crowds = [Crowd(server, expected, seed) for seed in range(2)]
    sizes = []
    for crowd in crowds:  # the first fills caches and buffers; the second must add nothing
        asyncio.run(crowd.run(COUNT // 2))
        server.wait_until_empty()
        sizes.append(memory_mb())
    seen = crowds[0].seen + crowds[1].seen
    assert seen.total() == COUNT // 2 * 2 and len(seen) == 8
    assert sizes[1] - sizes[0] < GROWTH_MB, sizes
    print(f"{dict(seen)}; {sizes[0]:.0f} then {sizes[1]:.0f} MB")
    with server.http() as http:
        assert http.get("/health_generate").status_code == 200
    assert server.metric("breakgraph_kv_used_tokens") == 0
