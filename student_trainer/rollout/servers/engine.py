"""Samples from servers of vLLM on GPUs of their own or on other machines. After each update rank 0 has them load the
new weights and holds each to the trainer's own forward pass; then all ranks sample.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import torch
from torch import Tensor

from student_trainer import guards
from student_trainer.config import TrainConfig
from student_trainer.distributed import Distributed
from student_trainer.forms import lora
from student_trainer.rollout import handover
from student_trainer.rollout.base import ByPlace, RolloutError
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.servers.links import GlooLink, Link, NcclLink, free_port
from student_trainer.rollout.servers.pool import Job, Pool, Snapshot
from student_trainer.rollout.servers.remote import Info
from student_trainer.rollout.transfer import Packed, own_address
from student_trainer.rollout.vllm_engine import refuse_own_forms
from student_trainer.rollout.vllm_side.request import Draws, Weights
from student_trainer.student import Student
from student_trainer.types import Metrics, Prompt, Rollout
from teacher_api.types import FloatArray

WHOSE = "rollout.engine vllm-server"


class ServersSampler(ByPlace):
    """See RolloutEngine.

    Args:
        student: as it was loaded; its weights are read in `update`.
        longest_tokens: longest prompt with its completion that can come up.
        stop: what may ask the run to stop while ranks hand weights over together.
    Raises:
        ValueError: servers or a student that it can't be. RolloutGone: no server answers within start_timeout_s.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        dist: Distributed,
        *,
        longest_tokens: int,
        stop: guards.StopSignals | None = None,
    ) -> None:
        # Of one process alone, nobody waits in a collective, and a thread of its own may call `update`.
        self._stop = stop if stop is not None and dist.world > 1 else guards.StopSignals()
        self._rollout, self._options = config.rollout, config.rollout.server
        self._student, self._dist, self._seed = student, dist, config.train.seed
        self._stop_ids = tuple(sorted({*student.eos_token_ids, *config.rollout.stop_token_ids}))
        refuse_own_forms(config, student, "rollout.engine: got vllm-server")
        self._dtype = ""  # of the servers
        self._max_tokens = 0
        self._weights = Weights()
        self._pool = Pool(
            self._options.urls,
            api_key=self._options.api_key.get_secret_value(),
            check=lambda url, info: self._check(url, info, longest_tokens),
            make_link=self._make_link if dist.is_main else None,
            most_running=config.rollout.batch_sequences,
            timeout_s=self._options.timeout_s,
            attempt_timeout_s=self._options.attempt_timeout_s,
        )
        try:
            self._pool.greet(self._options.start_timeout_s)
        except BaseException:
            self._pool.close()
            raise
        self._tolerance = handover.tolerance(self._options.logprob_tolerance, self._dtype)

    def update(self, version: int) -> None:
        """See RolloutEngine.update. The same version again hands nothing over.

        Raises:
            RolloutGone: no server could take the weights within timeout_s. RolloutError: one computes something else
            than the trainer afterwards.
        """
        if version != self._weights.version:
            with self._stop.deferred():
                self._update(version)

    def _update(self, version: int) -> None:
        session = self._weights.session or self._dist.gather(uuid.uuid4().hex)[0]
        weights, usable = Weights(session, version), list[str]()
        failure: Exception | None = None
        if self._dist.is_main:
            try:
                with self._stop.resumed():
                    usable = self._pool.use(weights, self._snapshot(version))
            except Exception as error:  # the other ranks wait to hear how it went
                failure = error
        guards.agree(self._dist, failure)
        usable = self._dist.gather(usable)[0]
        if not self._dist.is_main:
            self._pool.adopt(weights, usable)
        self._weights = weights

    def figures(self) -> Metrics:
        """See RolloutEngine.figures."""
        pool = self._pool
        return {
            "handover_gap": pool.gap,
            "rollout_servers": float(pool.num_usable),
            "rollout_retries": float(pool.retried),
            "rollout_handovers": float(pool.handed_over),
        }

    def close(self) -> None:
        """See RolloutEngine.close: the servers go on."""
        self._pool.close()

    def _finished(
        self, prompts: Sequence[Prompt], uids: Sequence[int], keep_top_k: int
    ) -> Iterator[tuple[int, Rollout]]:
        if not self._weights.session:
            raise RolloutError(f"{WHOSE} has no weights yet: update comes before sampling")
        _check_prompts(prompts, uids, self._rollout, self._student.vocabulary_size, self._max_tokens)
        groups: dict[int, list[Job]] = {}
        for place, (prompt, uid) in enumerate(zip(prompts, uids, strict=True)):
            draws = Draws.of(self._rollout, seed=self._seed, uid=uid, vocabulary_size=self._student.vocabulary_size)
            groups.setdefault(prompt.index, []).append(Job(place, prompt.token_ids, draws))
        batch = self._pool.sample(list(groups.values()), self._stop_ids, keep_top_k)
        try:
            for _ in prompts:
                result = batch.results.get()
                if isinstance(result, Exception):
                    raise result
                place, record = result
                yield place, record.rollout(prompts[place], uids[place])
        finally:
            batch.cancel()

    @torch.no_grad()
    def _snapshot(self, version: int) -> Snapshot:
        """The weights on the host, in the servers' precision: a server that comes back later gets these."""
        self._pool.forget()
        dtype: torch.dtype = getattr(torch, self._dtype)
        model = self._student.model
        plain = lora.merged(model) if lora.is_adapted(model) else model
        packed = Packed.of((name, _cast(tensor, dtype)) for name, tensor in handover.weights(plain).items())
        text = handover.known_text(self._student.vocabulary_size, self._max_tokens - 1)

        def compare(mine: FloatArray, theirs: FloatArray, url: str) -> float:
            return handover.difference(mine, theirs, self._tolerance, f"rollout server {url}", version)

        return Snapshot(packed, text, handover.logprobs(self._student, text), compare)

    def _make_link(self, url: str, info: Info) -> Link:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = self._options.address or own_address(str(parts.hostname), port)
        if info.transport == "nccl":
            return NcclLink(address, free_port(address), info.num_workers, self._student.device)
        return GlooLink(address, info.num_workers, self._options.attempt_timeout_s)

    def _check(self, url: str, info: Info, longest_tokens: int) -> None:
        """Raises ValueError where this server can't sample for this run."""
        width, device = self._student.parts.logit_width, self._student.device
        if info.logit_width != width:
            raise ValueError(
                f"rollout server {url} serves {info.model}, whose head has {info.logit_width} columns; expected the "
                f"student's {width}: start it with the student's directory"
            )
        if info.max_model_len < longest_tokens:
            raise ValueError(
                f"prompts and rollout.max_new_tokens make up to {longest_tokens} tokens, rollout server {url} takes at "
                f"most {info.max_model_len}; start it with a larger --max-model-len"
            )
        if self._dtype not in ("", info.dtype):
            raise ValueError(
                f"rollout server {url}: got --dtype {info.dtype}, expected {self._dtype}, as the others have"
            )
        if info.transport not in ("gloo", "nccl") or (info.transport == "nccl" and device.type != "cuda"):
            raise ValueError(
                f"rollout server {url} takes weights over {info.transport}, the student is on {device}; start it with "
                '--weight-transfer-config \'{"backend": "gloo"}\''
            )
        self._dtype = info.dtype
        self._max_tokens = min(self._max_tokens or info.max_model_len, info.max_model_len)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check_prompts(
    prompts: Sequence[Prompt], uids: Sequence[int], config: RolloutConfig, vocabulary_size: int, max_tokens: int
) -> None:
    for prompt, uid in zip(prompts, uids, strict=True):
        ids = prompt.token_ids
        if uid < 0:
            raise ValueError(f"uid is {uid}; expected >= 0")
        if not len(ids):
            raise ValueError(f"prompt {prompt.index} is empty; a completion must follow something")
        if ids.min() < 0 or ids.max() >= vocabulary_size:
            raise ValueError(f"prompt {prompt.index} has an id outside the vocabulary of {vocabulary_size}")
        if len(ids) + config.max_new_tokens > max_tokens:
            raise ValueError(
                f"prompt {prompt.index} has {len(ids)} tokens; with rollout.max_new_tokens {config.max_new_tokens} it "
                f"exceeds the servers' context of {max_tokens}"
            )
