"""A teacher for soaks, in a process of its own, that says what it holds: at each line on stdin one JSON line with its
memory, descriptors, threads and tasks. With `--leak BYTES` its backend keeps so much of every sequence.

    python tests/soakserver.py '{"http_port": 0, …}' [--leak BYTES]
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from teacher_api.errors import TeacherError
from teacher_api.types import Scores
from teacher_server import backends
from teacher_server.app import App
from teacher_server.backends.base import ScoreJob, ScoringBackend
from teacher_server.config import ServerConfig

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def leaking(config: ServerConfig, num_bytes: int) -> ScoringBackend:
    backend: Any = backends.create(config)
    kept: list[bytes] = []
    score = backend.score

    async def remembered(jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
        kept.extend(os.urandom(num_bytes) for _ in jobs)
        answers: list[Scores | TeacherError] = await score(jobs)
        return answers

    backend.score = remembered
    return backend  # type: ignore[no-any-return]


async def held() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * PAGE_BYTES
    tasks, descriptors = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
    return {"rss": resident, "descriptors": descriptors, "threads": threading.active_count(), "tasks": tasks}


async def main() -> None:
    config = ServerConfig.model_validate(json.loads(sys.argv[1]))
    leak = int(sys.argv[sys.argv.index("--leak") + 1]) if "--leak" in sys.argv else 0
    loop = asyncio.get_running_loop()

    def tell(ready: dict[str, Any]) -> None:
        print(json.dumps(ready), flush=True)
        threading.Thread(target=answer, daemon=True).start()

    def answer() -> None:
        for _ in sys.stdin:
            print(json.dumps(asyncio.run_coroutine_threadsafe(held(), loop).result(60)), flush=True)
        loop.call_soon_threadsafe(app.lifecycle.begin_drain)

    app = App(config, create=lambda asked: leaking(asked, leak) if leak else backends.create(asked), announce=tell)
    await app.run()


if __name__ == "__main__":
    asyncio.run(main())
