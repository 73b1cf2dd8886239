"""Completions that the teacher writes, as `/v1/completions` answers them: from a request and its prompts to jobs, the
text of a completion as it grows, and the JSON of what was written, in vLLM's shape.

Shape legend: N written tokens, K top-k.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from teacher_api.errors import Unsupported
from teacher_api.types import ScoreOptions, Scores, TeacherInfo
from teacher_server.backends.generation import GenerationJob
from teacher_server.caller import Caller
from teacher_server.generation import Writer, Written
from teacher_server.openai_answer import SLAB_ENTRIES, Answer, Entries, Scored
from teacher_server.openai_generation import GenerationRequest, check_writing
from teacher_server.openai_text import CONTEXT, Texts
from teacher_server.validation import check_options


class GrowingText:
    """The text of one completion, token by token, and the first of the stop strings that is in it whole.

    Args:
        decode: gives what a token adds to the text; of prompt and completion in order.
    """

    def __init__(self, decode: Callable[[int], str], stops: Sequence[str]) -> None:
        self._decode = decode
        self._stops = stops
        self.text = ""
        self.found: str | None = None

    def add(self, token: int) -> bool:
        """Whether a stop string has come. The text then ends before it."""
        new = self._decode(token)
        self.text += new
        if not new:
            return False
        ends: dict[int, str] = {}
        for stop in self._stops:
            at = self.text.find(stop, max(0, len(self.text) - len(new) - len(stop) + 1))
            if at >= 0:
                ends.setdefault(at + len(stop), stop)
        if not ends:
            return False
        end = min(ends)
        self.found = ends[end]
        self.text = self.text[: end - len(self.found)]
        return True


@dataclass(frozen=True, slots=True)
class WrittenChoice(Scored):
    """One completion beside its prompt."""

    new_ids: tuple[int, ...]  # [N]
    new_text: str
    new_scores: Scores | None  # [N] rows; None: logprobs were not asked for
    reason: str
    stop_reason: int | str | None


class WrittenAnswer(Answer):
    """`scored` are WrittenChoices, all completions of a prompt one after another."""

    def __init__(self, asked: GenerationRequest, choices: Sequence[WrittenChoice], *rest: object) -> None:
        super().__init__(asked, choices, *rest)  # type: ignore[arg-type]  # as of Answer
        self._completions = asked.num_completions

    def _counts(self) -> tuple[int, int]:
        prompts = sum(len(one.ids) for one in self._scored[:: self._completions])
        return prompts, sum(len(_written(one).new_ids) for one in self._scored)

    def _new_ids(self, one: Scored) -> list[int]:
        return list(_written(one).new_ids)

    def _ended(self, one: Scored, new: list[int]) -> tuple[str, int | str | None]:
        return _written(one).reason, _written(one).stop_reason

    def _new_text(self, one: Scored, new: list[int], reason: str) -> str:
        return _written(one).new_text

    def _new_rows(self, one: Scored, new: list[int], k: int) -> Iterator[Entries]:
        scores = _written(one).new_scores
        assert scores is not None, "logprobs were asked for"
        ids_N = np.asarray(new, np.int32)
        step = max(1, SLAB_ENTRIES // (1 + self._columns(k)))
        for start in range(0, len(new), step):
            rows = slice(start, min(start + step, len(new)))

            def context(row: int, first: int = start) -> tuple[int, ...]:
                at = first + row
                return tuple(new[max(0, at - CONTEXT) : at])  # as in vLLM without the prompt

            top_NK, top_logprob_NK = self._top(scores, rows, k)
            ranks_N = np.zeros(len(ids_N[rows]), np.uint32)  # not told here
            yield Entries.of(ids_N[rows], scores.token_logprob[rows], ranks_N, top_NK, top_logprob_NK, context)


def _written(one: Scored) -> WrittenChoice:
    assert isinstance(one, WrittenChoice), "made here"
    return one


async def written_answer(
    writer: Writer,
    asked: GenerationRequest,
    prompts: Sequence[Scored],
    texts: Texts,
    info: TeacherInfo,
    caller: Caller,
    answer_id: str,
    created: int,
    hold: contextlib.AsyncExitStack,
) -> Answer:
    """Writes the completions of all prompts. Their budget is given back when `hold` is closed."""
    check_writing(asked, [prompt.ids for prompt in prompts], info)
    if asked.stops and not texts.has_tokenizer:
        raise Unsupported("this teacher has no tokenizer; expected stop_token_ids instead", field="stop")
    places = [(prompt, index) for prompt in prompts for index in range(asked.num_completions)]
    growing = [_growing(asked, prompt, texts) for prompt, _ in places] if asked.stops else []
    own_ends = texts.stop_ids | (set() if texts.eos_id is None else {texts.eos_id})
    jobs = [
        GenerationJob(
            id=str(n),
            prompt_ids=prompt.ids,
            max_tokens=asked.max_tokens or 0,
            sampling=asked.sampling(index),
            stop_ids=frozenset(asked.stop_token_ids or ()) | (frozenset() if asked.ignore_eos else own_ends),
            ended=growing[n].add if growing else None,
        )
        for n, (prompt, index) in enumerate(places)
    ]
    options = None if asked.logprobs is None else _options(asked.logprobs, asked, info)
    if options is not None:
        check_options(options, info)
    written = await hold.enter_async_context(writer.written(jobs, options, caller))

    def choices() -> list[WrittenChoice]:
        grown: list[GrowingText | None] = [*growing] or [None] * len(jobs)
        return [
            _choice(asked, texts, prompt, job, one, text)
            for (prompt, _), job, one, text in zip(places, jobs, written, grown, strict=True)
        ]

    return WrittenAnswer(asked, await asyncio.to_thread(choices), texts, info, answer_id, created)


def _growing(asked: GenerationRequest, prompt: Scored, texts: Texts) -> GrowingText:
    decode = texts.decoder(prompt.ids.tolist(), skip_special_tokens=asked.skip_special_tokens)
    return GrowingText(decode, asked.stops)


def _options(k: int, asked: GenerationRequest, info: TeacherInfo) -> ScoreOptions:
    return ScoreOptions(top_k=info.tokenizer_size if k == -1 else k, temperature=asked.teacher_temperature)


def _choice(
    asked: GenerationRequest, texts: Texts, prompt: Scored, job: GenerationJob, one: Written, grown: GrowingText | None
) -> WrittenChoice:
    ids, ending = one.generated.token_ids, one.generated.ending
    found = None if grown is None else grown.found
    ended_by_id = ending == "stop" and found is None
    if grown is None:
        grown = _growing(asked, prompt, texts)
        for token in ids[: len(ids) - ended_by_id]:  # the id that ends a text is not part of it
            grown.add(token)
    stop_reason: int | str | None = found
    if ended_by_id and (asked.ignore_eos or ids[-1] != texts.eos_id):
        stop_reason = ids[-1]
    return WrittenChoice(
        ids=prompt.ids,
        text=prompt.text,
        scores=prompt.scores,
        has_prompt_rows=prompt.has_prompt_rows,
        new_ids=ids,
        new_text=grown.text,
        new_scores=one.scores,
        reason=ending,
        stop_reason=stop_reason,
    )
