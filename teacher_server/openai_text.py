"""Between token ids and text, with the checkpoint's tokenizer: prompts in, the strings of tokens out, each made once.

The strings are vLLM's: a token decoded alone, with the leading spaces that decoding strips put back; one that ends
within a UTF-8 character is told by what it adds to the tokens before. Without a tokenizer a token is `token_id:<id>`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from teacher_api.errors import InvalidRequest, Unsupported
from teacher_server.config import ServerConfig

log = structlog.get_logger("teacher_server.openai")

CONTEXT = 4  # tokens, as many as the bytes of the longest UTF-8 character
BROKEN = "\ufffd"  # what bytes that are no character decode to
CORRECTIONS = 1 << 16  # remembered
INVALID_PREFIX = "Invalid prefix encountered"  # how tokenizers' DecodeStream says it


class Texts:
    """Calls may come from several threads.

    Args:
        tokenizer: of transformers, or None.
        size: ids of the teacher; those without a token decode to nothing.
        stop_ids: ids that end a text, beside the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, size: int, stop_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.RLock()
        self._strings: list[str] = [""] * size
        self._json: list[str] = [""] * size
        self._known = np.zeros(size, dtype=bool)
        self._broken = np.zeros(size, dtype=bool)
        self._marker = _space_marker(tokenizer)
        self._corrected = functools.lru_cache(CORRECTIONS)(self._correct)
        self.eos_id: int | None = None if tokenizer is None else tokenizer.eos_token_id
        self.stop_ids = frozenset(stop_ids)
        if tokenizer is not None:
            self._longest = max((len(token) for token in tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool, max_tokens: int, path: str) -> list[int]:
        """Raises TeacherError where there is no tokenizer, or `text` must have more than `max_tokens` tokens."""
        if self._tokenizer is None:
            raise Unsupported("this teacher has no tokenizer; expected token ids instead of text", field=path)
        if len(text) > max_tokens * self._longest:  # before the time that tokenising it would take
            raise InvalidRequest(
                f"a text of {len(text)} characters has more than the {max_tokens} tokens that this teacher takes",
                field=path,
            )
        with self._lock:
            ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def of_prompt(self, ids: Sequence[int]) -> str:
        """What `echo` gives back of a prompt that came as ids."""
        if self._tokenizer is None:
            return "".join(f"token_id:{token}" for token in ids)
        return self._decode(ids)

    def of_next(self, prompt_ids: Sequence[int], token: int, *, skip_special_tokens: bool) -> str:
        """What `token` adds to the text of the prompt; nothing while a character is incomplete."""
        if self._tokenizer is None:
            return f"token_id:{token}"
        backend = getattr(self._tokenizer, "_tokenizer", None)
        with self._lock:
            if backend is not None:
                from tokenizers.decoders import DecodeStream

                stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=skip_special_tokens)
                return stream.step(backend, token) or ""
            before = list(prompt_ids[-CONTEXT:])
            old = self._tokenizer.decode(before, skip_special_tokens=skip_special_tokens)
            new = self._tokenizer.decode([*before, token], skip_special_tokens=skip_special_tokens)
        return "" if new.endswith(BROKEN) else _added(old, new)

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def decoder(self, prompt_ids: Sequence[int], *, skip_special_tokens: bool) -> Callable[[int], str]:
        """Gives what each token after the prompt adds to its text, in order; nothing within a character."""
        if self._tokenizer is None:
            return lambda token: f"token_id:{token}"
        if getattr(self._tokenizer, "_tokenizer", None) is None:
            return self._slow_decoder(list(prompt_ids), skip_special_tokens)
        return self._fast_decoder(list(prompt_ids), skip_special_tokens)

    def _fast_decoder(self, prompt_ids: list[int], skip_special_tokens: bool) -> Callable[[int], str]:
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(ids=prompt_ids, skip_special_tokens=skip_special_tokens)

        def step(token: int) -> str:
            nonlocal stream
            with self._lock:
                try:
                    return stream.step(self._tokenizer._tokenizer, token) or ""
                except Exception as error:  # tokenizers has one class for everything
                    if not str(error).startswith(INVALID_PREFIX):
                        raise
                    # Bytes that are no text: the stream can't go on with them, and begins anew.
                    stream = DecodeStream(skip_special_tokens=skip_special_tokens)
                    return stream.step(self._tokenizer._tokenizer, token) or ""

        return step

    def _slow_decoder(self, prompt_ids: list[int], skip_special_tokens: bool) -> Callable[[int], str]:
        before, held = prompt_ids[-CONTEXT:], list[int]()

        def step(token: int) -> str:
            nonlocal before, held
            with self._lock:
                held.append(token)
                old = self._tokenizer.decode(before, skip_special_tokens=skip_special_tokens)
                new = self._tokenizer.decode([*before, *held], skip_special_tokens=skip_special_tokens)
            if new.endswith(BROKEN):
                return ""
            before, held = [*before, *held][-CONTEXT:], []
            return _added(old, new)

        return step

    def alone(self, token: int) -> str:
        """A token without anything before it."""
        return f"token_id:{token}" if self._tokenizer is None else self._decode([token])

    def in_rows(
        self,
        ids: npt.NDArray[np.int64],
        row_of: npt.NDArray[np.int64],
        context: Callable[[int], tuple[int, ...]],
        *,
        as_json: bool,
    ) -> list[str]:
        """The string of each of `ids`, as it is or as JSON.

        Args:
            ids: [E], all below `size`.
            row_of: [E], the row that each belongs to.
            context: up to CONTEXT tokens before a row.
        """
        self._learn(ids)
        table = self._json if as_json else self._strings
        strings = list(map(table.__getitem__, ids.tolist()))
        for at in np.flatnonzero(self._broken[ids]).tolist():
            told = self._corrected(int(ids[at]), context(int(row_of[at])))
            strings[at] = json.dumps(told) if as_json else told
        return strings

    def _learn(self, ids: npt.NDArray[np.int64]) -> None:
        new = np.unique(ids[~self._known[ids]]).tolist()
        if not new:
            return
        with self._lock:
            for token in new:
                text = self._plain(token)
                self._strings[token], self._json[token] = text, json.dumps(text)
                self._broken[token] = text.endswith(BROKEN)
            self._known[new] = True

    def _plain(self, token: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token}"
        text = self._decode([token])
        if self._marker is None:
            return text
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        spaces = len(piece) - len(piece.lstrip(self._marker))
        return " " * max(spaces - (len(text) - len(text.lstrip(" "))), 0) + text

    def _correct(self, token: int, context: tuple[int, ...]) -> str:
        """What `token` adds to the shortest part of `context` with which it makes whole characters; "" with none."""
        for num in range(1, len(context) + 1):
            before = context[-num:]
            whole = self._decode([*before, token])
            if whole.endswith(BROKEN):
                continue
            while before and self._decode(before[-1:]).endswith(BROKEN):  # these added nothing when it was their turn
                before = before[:-1]
            known = self._decode(before) if before else ""
            return _added(known, whole)
        return ""

    def _decode(self, ids: Sequence[int]) -> str:
        with self._lock:
            text: str = self._tokenizer.decode(list(ids))
        return text or ""


class LazyTexts:
    """Loads the tokenizer when it is first needed, once and off the event loop."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._texts: Texts | None = None
        self._lock = asyncio.Lock()

    async def get(self, size: int) -> Texts:
        async with self._lock:
            if self._texts is None:
                self._texts = await asyncio.to_thread(load, self._config, size)
            return self._texts


def load(config: ServerConfig, size: int) -> Texts:
    """The checkpoint's; without a tokenizer where there is none to be had."""
    if config.backend == "fake" and not Path(config.model).expanduser().is_dir():
        return Texts(None, size)
    from transformers import AutoTokenizer, GenerationConfig

    directory = Path(config.model).expanduser()
    where = str(directory) if directory.is_dir() else config.model
    wanted = {} if directory.is_dir() else {"revision": config.revision or "main"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **wanted)
    except (OSError, ValueError, KeyError, ImportError) as error:
        log.warning("no_tokenizer", error=type(error).__name__, meaning="text prompts will be refused")
        return Texts(None, size)
    try:
        ends = GenerationConfig.from_pretrained(where, **wanted).eos_token_id
    except (OSError, ValueError):
        ends = None
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Texts(tokenizer, size, listed)


def _added(before: str, whole: str) -> str:
    """What `whole` has beyond the beginning that it shares with `before`."""
    shared = 0
    for a, b in zip(before, whole, strict=False):
        if a != b:
            break
        shared += 1
    return whole[shared:]


def _space_marker(tokenizer: Any) -> str | None:
    """The character that stands for a space in a SentencePiece vocabulary, whose leading ones decoding strips."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    step = json.loads(backend.to_str()).get("pre_tokenizer") or {}
    for each in step.get("pretokenizers", [step]):
        if each.get("type") == "Metaspace":
            return str(each.get("replacement", "▁"))
    return None
