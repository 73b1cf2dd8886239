"""From scores to the JSON of an OpenAI-style completion, in vLLM's shape and piece by piece: of the text of a large
answer no more than some rows exist at a time.

Shape legend: T tokens of a prompt, N rows, K top-k, E entries over all rows of a slab (K or K + 1 a row).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_api.types import IntArray, Scores, TeacherInfo
from teacher_server.openai_models import CompletionRequest
from teacher_server.openai_text import CONTEXT, Texts

LOWEST = -9999.0  # vLLM's stand-in for −inf
SLAB_ENTRIES = 1 << 12  # of rows made into text at a time
PIECE_CHARS = 1 << 17  # of the answer sent at a time
_dumps = functools.partial(json.dumps, separators=(",", ":"))

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Scored:
    """One prompt, what was scored of it, and its text where it came as text."""

    ids: IntArray  # [T]
    text: str | None
    scores: Scores | None  # of the rows that were asked for; None: of none
    has_prompt_rows: bool

    @property
    def next_id(self) -> int:
        """The most likely token after the prompt."""
        assert self.scores is not None, "a row after the prompt was scored"
        assert self.scores.topk_ids is not None, "with the one most likely id, at least"
        return int(self.scores.topk_ids[-1, 0])


@dataclass(frozen=True, slots=True)
class Entries:
    """What is told of some rows: for each first its own token, then the most likely ones but that."""

    ids: Ints  # [E]
    logprobs: npt.NDArray[np.float64]  # [E]
    ranks: Ints  # [E]
    row_of: Ints  # [E]
    starts: list[int]  # [N + 1]
    context: Callable[[int], tuple[int, ...]]  # of a row: tokens before it, as far as its strings may need them

    @classmethod
    def of(
        cls,
        own_N: npt.NDArray[Any],
        own_logprob_N: npt.NDArray[Any],
        rank_N: npt.NDArray[Any],
        top_NK: npt.NDArray[Any],
        top_logprob_NK: npt.NDArray[Any],
        context: Callable[[int], tuple[int, ...]],
    ) -> Entries:
        same_NK = top_NK == own_N[:, None]
        inside_N = same_NK.any(axis=1)
        rank_N = np.where(inside_N, 1 + same_NK.argmax(axis=1), rank_N) if same_NK.shape[1] else rank_N
        keep = np.concatenate([np.ones((len(own_N), 1), bool), ~same_NK], axis=1)
        ranks = np.broadcast_to(np.arange(1, 1 + top_NK.shape[1]), top_NK.shape)
        counts = keep.sum(axis=1)
        return cls(
            ids=np.concatenate([own_N[:, None], top_NK], axis=1)[keep].astype(np.int64),
            logprobs=np.maximum(
                np.concatenate([own_logprob_N[:, None], top_logprob_NK], axis=1)[keep].astype(np.float64), LOWEST
            ),
            ranks=np.concatenate([rank_N[:, None], ranks], axis=1)[keep].astype(np.int64),
            row_of=np.repeat(np.arange(len(own_N)), counts),
            starts=[0, *np.cumsum(counts).tolist()],
            context=context,
        )

    @property
    def bounds(self) -> Iterator[tuple[int, int]]:
        """Where the entries of each row begin and end."""
        return zip(self.starts[:-1], self.starts[1:], strict=True)


class Answer:
    """One request's answer as text.

    Args:
        scored: one per prompt; where ranks were not scored, `prompt_logprobs` are left out.
        answer_id: with vLLM's prefix.
    """

    def __init__(
        self,
        asked: CompletionRequest,
        scored: Sequence[Scored],
        texts: Texts,
        info: TeacherInfo,
        answer_id: str,
        created: int,
    ) -> None:
        self._asked = asked
        self._scored = scored
        self._texts = texts
        self._info = info
        self._head = {"id": answer_id, "object": "text_completion", "created": created, "model": info.model_name}

    def pieces(self) -> Iterator[bytes]:
        """The body, in pieces of about PIECE_CHARS."""
        waiting: list[str] = []
        size = 0
        for part in self._parts():
            waiting.append(part)
            size += len(part)
            if size >= PIECE_CHARS:
                yield "".join(waiting).encode()
                waiting, size = [], 0
        yield "".join(waiting).encode()

    def _parts(self) -> Iterator[str]:
        yield _dumps(self._head)[:-1] + ',"choices":['
        for index, one in enumerate(self._scored):
            yield "," if index else ""
            yield from self._choice(index, one)
        tokens, generated = self._counts()
        tail = {
            "service_tier": None,
            "system_fingerprint": self._info.fingerprint,
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens + generated,
                "completion_tokens": generated,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
        yield "]," + _dumps(tail)[1:]

    def _choice(self, index: int, one: Scored) -> Iterator[str]:
        asked = self._asked
        new = self._new_ids(one)
        reason, stop_reason = self._ended(one, new)
        text = (self._prompt_text(one) if asked.echo else "") + self._new_text(one, new, reason)
        yield f'{{"index":{index},"text":{_dumps(text)},"logprobs":'
        yield from self._logprobs(one, new)
        yield f',"finish_reason":"{reason}","stop_reason":{_dumps(stop_reason)}'
        yield f',"token_ids":{_dumps(new if asked.return_token_ids else None)},"prompt_logprobs":'
        yield from self._prompt_logprobs(one)
        prompt_ids = one.ids.tolist() if asked.return_token_ids else None
        yield f',"prompt_token_ids":{_dumps(prompt_ids)},"routed_experts":null}}'

    def _counts(self) -> tuple[int, int]:
        """Tokens of the prompts, and generated ones."""
        return sum(len(one.ids) for one in self._scored), len(self._scored) if self._asked.generates else 0

    def _new_ids(self, one: Scored) -> list[int]:
        """What comes after the prompt."""
        return [one.next_id] if self._asked.generates else []

    def _new_text(self, one: Scored, new: list[int], reason: str) -> str:
        if not new or reason != "length":
            return ""
        return self._texts.of_next(one.ids.tolist(), new[0], skip_special_tokens=self._asked.skip_special_tokens)

    def _ended(self, one: Scored, new: list[int]) -> tuple[str, int | str | None]:
        """(finish_reason, stop_reason): an end token ends a text even where no more was asked for."""
        if new and not self._asked.ignore_eos:
            if new[0] == self._texts.eos_id:
                return "stop", None
            if new[0] in self._texts.stop_ids:
                return "stop", new[0]
        return "length", None

    def _prompt_text(self, one: Scored) -> str:
        if self._asked.return_token_ids:
            return ""
        return self._texts.of_prompt(one.ids.tolist()) if one.text is None else one.text

    def _logprobs(self, one: Scored, new: list[int]) -> Iterator[str]:
        """Of the text that is given back: the prompt's with `echo`, then the generated token's."""
        asked = self._asked
        if asked.logprobs is None:
            yield "null"
            return
        first = int(one.ids[0])
        tokens = [f"token_id:{first}" if asked.return_tokens_as_token_ids else self._texts.alone(first)]
        own: list[float | None] = [None]
        for told in self._text_rows(one, new, with_top=False):
            tokens += self._names(told)
            own += told.logprobs.tolist()
        if not asked.echo:
            del tokens[0], own[0]
        offsets = np.cumsum([0, *map(len, tokens[:-1])]).tolist() if tokens else []
        yield f'{{"text_offset":{_dumps(offsets)},"token_logprobs":{_dumps(own)}'
        yield f',"tokens":{_dumps(tokens)},"top_logprobs":['
        comma = ""
        if asked.echo:
            yield "null"
            comma = ","
        for told in self._text_rows(one, new, with_top=True):
            yield comma + self._tops(told)
            comma = ","
        yield "]}"

    def _text_rows(self, one: Scored, new: list[int], *, with_top: bool) -> Iterator[Entries]:
        """What `logprobs` tells of, some rows at a time."""
        asked = self._asked
        if asked.echo:
            for part in self._prompt_slabs(one):
                yield self._of_prompt(one, part, (asked.prompt_k or 0) if with_top else 0)
        if new:
            yield from self._new_rows(one, new, (asked.logprobs or 0) if with_top else 0)

    def _new_rows(self, one: Scored, new: list[int], k: int) -> Iterator[Entries]:
        yield self._of_next(one, new[0], k)

    def _names(self, told: Entries) -> list[str]:
        if self._asked.return_tokens_as_token_ids:
            return [f"token_id:{token}" for token in told.ids.tolist()]
        return self._texts.in_rows(told.ids, told.row_of, told.context, as_json=False)

    def _tops(self, told: Entries) -> str:
        """One object a row. Made as a dict, for different ids may have one string."""
        names, values = self._names(told), told.logprobs.tolist()
        limit = 1 + self._columns(self._asked.logprobs or 0)
        rows = []
        for start, stop in told.bounds:
            stop = min(stop, start + limit)
            rows.append(dict(zip(names[start:stop], values[start:stop], strict=True)))
        return _dumps(rows)[1:-1]

    def _prompt_logprobs(self, one: Scored) -> Iterator[str]:
        k = self._asked.prompt_k
        ranked = one.scores is None or one.scores.rank is not None
        if k is None or not ranked:
            yield "null"
            return
        yield "[null"
        for part in self._prompt_slabs(one):
            told = self._of_prompt(one, part, k)
            strings = self._texts.in_rows(told.ids, told.row_of, told.context, as_json=True)
            texts = [
                f'"{token}":{{"logprob":{value},"rank":{rank},"decoded_token":{string}}}'
                for token, value, rank, string in zip(
                    told.ids.tolist(), told.logprobs.tolist(), told.ranks.tolist(), strings, strict=True
                )
            ]
            yield "".join(f",{{{','.join(texts[start:stop])}}}" for start, stop in told.bounds)
        yield "]"

    def _prompt_slabs(self, one: Scored) -> Iterator[slice]:
        """The rows of a prompt, so many at a time that their entries are few."""
        if not one.has_prompt_rows:
            return
        num_rows = len(one.ids) - 1
        step = max(1, SLAB_ENTRIES // (1 + self._columns(self._asked.prompt_k or 0)))
        for start in range(0, num_rows, step):
            yield slice(start, min(start + step, num_rows))

    def _columns(self, k: int) -> int:
        return self._info.tokenizer_size if k == -1 else k

    def _of_prompt(self, one: Scored, rows: slice, k: int) -> Entries:
        scores = one.scores
        assert scores is not None, "rows were scored"
        positions = scores.positions[rows]
        ranks = np.zeros(len(positions), np.uint32) if scores.rank is None else scores.rank[rows]

        def context(row: int) -> tuple[int, ...]:
            at = int(positions[row])
            return tuple(one.ids[max(1, at - CONTEXT) : at].tolist())  # as in vLLM without the first token

        top_NK, top_logprob_NK = self._top(scores, rows, k)
        return Entries.of(one.ids[positions], scores.token_logprob[rows], ranks, top_NK, top_logprob_NK, context)

    def _of_next(self, one: Scored, token: int, k: int) -> Entries:
        """Of the row behind the prompt, whose own token is one that the caller never sent: it is not told."""
        scores = one.scores
        assert scores is not None, "a row after the prompt was scored"
        last = slice(len(scores.positions) - 1, None)
        _, logprob_11 = self._top(scores, last, 1)
        top_1K, top_logprob_1K = self._top(scores, last, k)
        return Entries.of(
            np.array([token]), logprob_11[:, 0], np.ones(1, np.uint32), top_1K, top_logprob_1K, lambda _: ()
        )

    def _top(self, scores: Scores, rows: slice, k: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if scores.topk_ids is None or scores.topk_logprob is None:
            num_rows = len(scores.positions[rows])
            return np.zeros((num_rows, 0), np.int32), np.zeros((num_rows, 0), np.float32)
        columns = self._columns(k)
        return scores.topk_ids[rows, :columns], scores.topk_logprob[rows, :columns]
