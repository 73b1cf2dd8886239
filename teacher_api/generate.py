"""`teacher-generate`: has a teacher write completions of the prompts in a file, for fixed training data. The same
command again goes on where it was stopped.

Exit status: 0 every prompt is written, 1 some were refused or the teacher answered wrongly, 2 wrong usage, 3 the
teacher can't be reached.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from teacher_api import tls
from teacher_api.asking import log_retries_plainly
from teacher_api.errors import InvalidRequest, TeacherError, TooLarge
from teacher_api.generated_file import Output, read_prompts
from teacher_api.generation import AsyncGenerationClient, Prompt, Sampling

OK, WRONG, USAGE, UNREACHABLE = 0, 1, 2, 3
PROGRESS_S = 5.0
PROGRAM = "teacher-generate"


@dataclass(slots=True)
class Tally:
    """How far a run is."""

    total: int
    before: int  # prompts that an earlier run wrote
    refused: list[str] = field(default_factory=list)
    prompts: int = 0
    completions: int = 0
    tokens: int = 0
    ended: int = 0  # completions that ended by themselves
    started_at: float = field(default_factory=time.monotonic)
    told_at: float = field(default_factory=time.monotonic)

    def progress(self) -> str:
        seconds = max(time.monotonic() - self.started_at, 1e-3)
        return (
            f"{self.before + self.prompts} of {self.total} prompts, {self.tokens} tokens, "
            f"{self.tokens / seconds:.0f} tokens/s"
        )

    def summary(self, output: Path) -> str:
        lengths = f"{self.tokens / self.completions:.1f}" if self.completions else "no"
        return (
            f"{self.prompts} prompts written to {output}, {self.before} were there, {len(self.refused)} refused; "
            f"{self.completions} completions of {lengths} tokens on average, {self.ended} ended by themselves; "
            f"{time.monotonic() - self.started_at:.1f} s"
        )


async def write_all(
    client: AsyncGenerationClient,
    prompts: list[Prompt],
    output: Output,
    sampling: Sampling,
    tally: Tally,
    *,
    concurrency: int,
) -> None:
    """Writes the prompts that `output` does not hold yet. A prompt that the teacher refuses is noted, and the others go
    on. Raises TeacherError of anything else, when the answers that came by then are in the file."""
    waiting = iter([index for index in range(len(prompts)) if index not in output.done])

    async def work() -> None:
        for index in waiting:
            try:
                answer = await client.generate(prompts[index], _of_prompt(sampling, index), output.teacher)
            except (InvalidRequest, TooLarge) as error:
                if not error.field.startswith("prompt"):
                    raise
                tally.refused.append(f"prompt {index}: {error.message}")
                print(f"{PROGRAM}: prompt {index}: {error.message}", file=sys.stderr, flush=True)
                continue
            output.add(index, answer)
            tally.prompts += 1
            tally.completions += len(answer.completions)
            tally.tokens += sum(len(each.token_ids) for each in answer.completions)
            tally.ended += sum(each.finish_reason == "stop" for each in answer.completions)
            if time.monotonic() - tally.told_at >= PROGRESS_S:
                tally.told_at = time.monotonic()
                print(tally.progress(), file=sys.stderr, flush=True)

    tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _of_prompt(sampling: Sampling, index: int) -> Sampling:
    """A seed of its own for each prompt and completion, whatever is written in which order."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index * sampling.n)


async def run(args: argparse.Namespace, key: str | None) -> int:
    """Raises TeacherError, and ValueError for wrong usage."""
    sampling = Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        n=args.n,
        seed=args.seed,
        stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_token_id),
        ignore_eos=args.ignore_eos,
    )
    prompts = read_prompts(args.prompts, args.prompt_key)
    client = AsyncGenerationClient(
        args.url,
        api_key=key,
        timeout_s=args.timeout_s,
        attempt_timeout_s=min(args.attempt_timeout_s, args.timeout_s),
        max_concurrency=args.concurrency,
        tls=tls.of_arguments(args),
    )
    async with client:
        info = await client.info()
        with Output(args.output, prompts, sampling, info.fingerprint) as output:
            tally = Tally(len(prompts), before=len(output.done))
            try:
                await write_all(client, prompts, output, sampling, tally, concurrency=args.concurrency)
            except TeacherError:
                done = f"{len(output.done)} of {len(prompts)} prompts are written"
                print(f"{PROGRAM}: stopped; {done}, and the same command again goes on", file=sys.stderr)
                raise
    print(tally.summary(args.output))
    return WRONG if tally.refused else OK


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    made.add_argument("--url", required=True, help="http://host:port of a teacher-serve that runs with --generate")
    made.add_argument("--prompts", required=True, type=Path, help="file: .txt, a prompt a line; .jsonl; .json")
    made.add_argument("--output", required=True, type=Path, help="JSON lines, one a prompt; lines there are kept")
    made.add_argument("--prompt-key", default="prompt", help="of the file's objects: text or token ids (prompt)")
    made.add_argument("--max-tokens", type=_at_least(1), default=256, help="of one completion (256)")
    made.add_argument("--temperature", type=float, default=1.0, help="0: the most likely token each time (1)")
    made.add_argument("--top-p", type=float, default=1.0, help="(1)")
    made.add_argument("--top-k", type=_at_least(0), default=0, help="0: all (0)")
    made.add_argument("--min-p", type=float, default=0.0, help="(0)")
    made.add_argument("--n", type=_at_least(1), default=1, help="completions of each prompt (1)")
    made.add_argument("--seed", type=int, help="makes the same completions again; prompt i has seed + i * n")
    made.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a completion; repeatable")
    made.add_argument(
        "--stop-token-id", action="append", type=_at_least(0), default=[], metavar="ID", help="repeatable"
    )
    made.add_argument("--ignore-eos", action="store_true", help="the model's own end ends nothing")
    made.add_argument("--concurrency", type=_at_least(1), default=8, help="prompts asked for at a time (8)")
    made.add_argument("--timeout-s", type=float, default=3600.0, help="of a prompt, retries included (3600)")
    made.add_argument("--attempt-timeout-s", type=float, default=900.0, help="of one attempt (900)")
    made.add_argument("--api-key", help="better in the environment: TEACHER_API_KEY")
    tls.add_arguments(made)
    return made


def _at_least(least: int):  # type: ignore[no-untyped-def]  # an argparse type
    def whole(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text}; expected {least} or more")
        return int(text)

    whole.__name__ = "int"
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    log_retries_plainly()
    try:
        return asyncio.run(run(args, args.api_key or os.environ.get("TEACHER_API_KEY") or None))
    except TeacherError as error:
        print(f"{PROGRAM}: {args.url}: {error}", file=sys.stderr)
        return UNREACHABLE if error.retryable else WRONG
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command again goes on", file=sys.stderr)
        return WRONG


if __name__ == "__main__":
    sys.exit(main())
