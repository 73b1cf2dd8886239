"""Makes docs/images/status-*.png: the status page of a server with the fake backend, after some minutes of three
tenants with the weights 1, 2 and 4, as an admin sees it.

    PYTHONPATH=.:tests python tests/picture.py MINUTES docs/images
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import sys
import time
from pathlib import Path

import numpy as np
from browser import Page, browsing
from serving import serving

from teacher_api.client import AsyncTeacherClient
from teacher_api.errors import TeacherError
from teacher_api.types import CallMetadata, Completion, ScoreRequest

WEIGHTS = {"evals": 1.0, "reasoning": 2.0, "code": 4.0}
KEYS = {name: f"the-key-of-{name}" for name in (*WEIGHTS, "platform")}
SHOWN = "!document.getElementById('page').hidden"
TOKENS, WIDTH, CALLS = 120, 4, 6
"""Of a sequence on average, sequences in a request, requests in flight of each tenant."""
AGAIN = {"evals": 0.6, "reasoning": 0.1, "code": 0.25}
"""Share of the requests that were asked before."""


def tenants() -> dict[str, object]:
    def of(name: str) -> dict[str, object]:
        digest = hashlib.sha256(KEYS[name].encode()).hexdigest()
        return {"keys": [f"sha256:{digest}"], "weight": WEIGHTS.get(name, 1.0), "admin": name == "platform"}

    return {name: of(name) for name in KEYS}


async def work(url: str, name: str, until: float) -> None:
    """`CALLS` callers of one tenant, busier at times."""
    rng, asked = random.Random(name), list[ScoreRequest]()

    def fresh() -> ScoreRequest:
        lengths = [rng.randint(TOKENS // 2, 3 * TOKENS // 2) for _ in range(WIDTH)]
        sequences = [np.asarray([rng.randrange(64) for _ in range(length)], np.int32) for length in lengths]
        asked.append(ScoreRequest([Completion(str(n), ids) for n, ids in enumerate(sequences)]))
        return asked[-1]

    async with AsyncTeacherClient(
        url, api_key=KEYS[name], metadata=CallMetadata(experiment="picture"), timeout_s=60, max_concurrency=CALLS
    ) as client:

        async def caller(number: int) -> None:
            while time.monotonic() < until:
                busy = 0.5 + 0.5 * math.sin(time.monotonic() / 90 + len(name))
                if number >= 2 + round((CALLS - 2) * busy):
                    await asyncio.sleep(0.5)
                    continue
                request = rng.choice(asked[-200:]) if asked and rng.random() < AGAIN[name] else fresh()
                if rng.random() < 0.004:
                    request = ScoreRequest([Completion("wrong", np.asarray([1, 10_000], np.int32))])
                try:
                    await client.score(request)
                except TeacherError:
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(caller(number) for number in range(CALLS)))


async def load(url: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    await asyncio.gather(*(work(url, name, until) for name in WEIGHTS))


def pictures(page: Page, url: str, folder: Path) -> None:
    for name, dark, width, height, phone in (
        ("light", False, 1280, 900, False),
        ("dark", True, 1280, 900, False),
        ("phone", False, 390, 844, True),
    ):
        page.look(width, height, dark=dark, phone=phone)
        page.open(url)
        page.wait(f"{SHOWN} || !document.getElementById('ask').hidden")
        if not page.value(SHOWN):
            page.click("#key")
            page.type(KEYS["platform"])
            page.press_enter()
            page.wait(SHOWN)
        page.click('[data-minutes="15"]')
        page.move("footer")
        page.picture(folder / f"status-{name}.png")


def main() -> None:
    minutes, folder = float(sys.argv[1]), Path(sys.argv[2])
    settings = {
        "model": "Qwen3-32B", "fake_vocabulary": 64, "fake_latency_s": 0.2, "batch_tokens": 1536,
        "queue_tokens": 24_000, "max_sequence_tokens": 4096, "cache": {"enabled": True},
    }  # fmt: skip
    with serving(tenants=tenants(), **settings) as server:
        url = f"grpc://{server.grpc_target}"

        async def both() -> None:
            loading = asyncio.create_task(load(url, 60 * minutes + 20))
            await asyncio.sleep(60 * minutes)
            await asyncio.to_thread(look)
            await loading

        def look() -> None:
            with browsing() as page:
                pictures(page, f"{server.http_url}/", folder)

        asyncio.run(both())


if __name__ == "__main__":
    main()
