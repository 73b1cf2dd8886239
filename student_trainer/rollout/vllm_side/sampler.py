"""Draws tokens inside vLLM exactly as the embedded sampler does (rollout/sampling.py): one distribution for all,
every token a function of logits, seed and uid, and a record that tells log b from log q.

Shape legend: B rows of a step, W the model's logit width, C columns of a record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from student_trainer.rollout import sampling
from student_trainer.rollout.vllm_side.request import KEY, UNKNOWN, Draws

FORGET_OVER = 4096
"""Requests remembered before those that ended are looked for."""


@dataclass(frozen=True, slots=True)
class _Asked:
    draws: Draws
    uniforms_N: npt.NDArray[np.float64]

    @property
    def policy(self) -> tuple[int, float, float, int, bool]:
        d = self.draws
        return d.vocabulary_size, d.temperature, d.top_p, d.top_k, d.greedy


class RolloutSampler(Sampler):  # type: ignore[misc]
    """In place of the runner's own sampler, which it leaves to requests that are not ours.

    Args:
        runner: vLLM's V1 model runner, which knows the requests of each row.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner.sampler.logprobs_mode)
        self._runner = runner
        self._asked: dict[str, _Asked | None] = {}
        self.version = UNKNOWN
        """Of the weights, recorded with every token."""

    def forward(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> SamplerOutput:
        batch = self._runner.input_batch
        rows = [self._lookup(request) for request in batch.req_ids[: len(logits)]]
        ours = [b for b, asked in enumerate(rows) if asked is not None]
        if not ours:  # other people's requests, and vLLM's own trial runs
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        if len(ours) < len(logits):
            theirs = super().forward(logits.clone(), sampling_metadata, *args, **kwargs)
            return self._mixed(theirs, self._drawn(logits, rows, sampling_metadata.max_num_logprobs), ours)
        return self._drawn(logits, rows, sampling_metadata.max_num_logprobs)

    def _drawn(self, logits: Tensor, rows: list[_Asked | None], most: int) -> SamplerOutput:
        """Rows that are not ours hold nothing of meaning."""
        num_rows, device = len(logits), logits.device
        token_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        ids_BC = torch.zeros((num_rows, 1 + most), dtype=torch.int32, device=device)
        logprobs_BC = torch.zeros((num_rows, 1 + most), device=device)
        for members in _by_policy(rows):
            first = rows[members[0]]
            assert first is not None, "_by_policy leaves others out"
            alike = len(members) == num_rows
            index = torch.tensor(members, device=device)
            part = logits if alike else logits[index]
            drawn = self._draw(part, first.draws, members, rows)
            kept = sampling.most_likely(part, most, vocabulary_size=first.draws.vocabulary_size)
            token_B[index] = drawn.token_B
            ids_BC[index, 1 : 1 + kept.shape[1]] = kept
            logprobs_BC[index, 0], logprobs_BC[index, 1] = drawn.full_logprob_B, drawn.behaviour_logprob_B
        ids_BC[:, 0] = token_B.int()
        version_B = torch.full((num_rows,), self.version, dtype=torch.int64, device=device)
        return SamplerOutput(token_B.int().unsqueeze(-1), LogprobsTensors(ids_BC, logprobs_BC, version_B))

    def _draw(self, logits: Tensor, draws: Draws, members: list[int], rows: list[_Asked | None]) -> sampling.Draw:
        if draws.greedy:
            return sampling.draw_greedy(logits, vocabulary_size=draws.vocabulary_size)
        uniform_B = torch.tensor([self._uniform(b, rows[b]) for b in members], dtype=torch.float64)
        return sampling.draw(
            logits,
            uniform_B.to(logits.device),
            vocabulary_size=draws.vocabulary_size,
            temperature=draws.temperature,
            top_k=draws.top_k,
            top_p=draws.top_p,
        )

    def _uniform(self, row: int, asked: _Asked | None) -> float:
        assert asked is not None, "_by_policy leaves others out"
        prompt = int(self._runner.input_batch.num_prompt_tokens[row])
        # Tokens up to and including those of this step; short of the prompt while that is read in pieces, when vLLM
        # throws away what is drawn.
        place = int(self._runner.optimistic_seq_lens_cpu[row]) - prompt
        return float(asked.uniforms_N[max(0, min(place, len(asked.uniforms_N) - 1))])

    def _lookup(self, request: str) -> _Asked | None:
        if request not in self._asked:
            if len(self._asked) > FORGET_OVER:
                self._asked = {name: a for name, a in self._asked.items() if name in self._runner.requests}
            given = (getattr(self._runner.requests[request].sampling_params, "extra_args", None) or {}).get(KEY)
            if given is None:
                self._asked[request] = None
            else:
                draws = Draws(**given)
                self._asked[request] = _Asked(
                    draws, sampling.uniforms(draws.seed, [draws.uid], draws.max_new_tokens)[0]
                )
        return self._asked[request]

    @staticmethod
    def _mixed(theirs: SamplerOutput, mine: SamplerOutput, ours: list[int]) -> SamplerOutput:
        """Our rows of `mine`, the others of `theirs`."""
        index = torch.tensor(ours, device=mine.sampled_token_ids.device)
        theirs.sampled_token_ids[index] = mine.sampled_token_ids[index]
        if theirs.logprobs_tensors is not None and mine.logprobs_tensors is not None:
            for their, my in zip(theirs.logprobs_tensors[:3], mine.logprobs_tensors[:3], strict=True):
                their[index] = my[index].to(their.dtype)
        return theirs


def _by_policy(rows: list[_Asked | None]) -> list[list[int]]:
    """Rows of ours, those together that are drawn alike."""
    found: dict[tuple[int, float, float, int, bool], list[int]] = {}
    for row, asked in enumerate(rows):
        if asked is not None:
            found.setdefault(asked.policy, []).append(row)
    return list(found.values())
