"""Time of a step by formula: operations and bytes of sampling, scoring and learning, over the rates of a machine. All
completions are taken to be as long as they may be, so that a real step is faster; communication is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_trainer.planning.memory import FLOAT32, cache_bytes, sampling_pair
from student_trainer.planning.shape import Shape


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches, not what it could."""

    flop_s: float
    bytes_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """A step's samples on one device."""

    sequences: int
    prompt: int  # tokens
    new_tokens: int
    group: int  # completions of one prompt
    decoded: int  # sequences decoded at a time; 0: nothing is sampled
    shares_prompt: bool
    recomputes: bool  # gradient checkpointing
    casts: bool  # bfloat16 arithmetic on float32 weights
    keeps_casts: bool = False  # of the trained weights, for as long as a step is sampled
    engine_bytes: int = 0  # of a number of an engine's own weights and cache (vLLM's); 0: the student's own are decoded
    elsewhere: bool = False  # sampled by servers

    @property
    def tokens(self) -> int:
        return self.sequences * (self.prompt + self.new_tokens)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of a step's parts on each device; all devices work at a time."""

    sample: float
    score: float
    learn: float

    @property
    def total(self) -> float:
        return self.sample + self.score + self.learn

    def slowest(self) -> str:
        named = {"sampling": self.sample, "scoring": self.score, "learning": self.learn}
        return max(named, key=lambda name: named[name])


def told(seconds: Seconds, step: Step, world: int) -> str:
    """In words, of a step on `world` devices."""
    new = world * step.sequences * step.new_tokens
    parts = {"sampling": seconds.sample, "scoring": seconds.score, "learning": seconds.learn}
    each = ", ".join(f"{name} {new / s:,.0f}" for name, s in parts.items() if s)
    return (
        f"completion tokens per second: {each}, all together {new / seconds.total:,.0f}; a step of whole-length "
        f"completions takes {seconds.total:.3g} s, most of it {seconds.slowest()}"
        + ("; the servers' sampling is not counted" if step.elsewhere else "")
    )


def forward_flop(shape: Shape, sequences: int, length: int, *, computed: int) -> float:
    """Operations of a trunk's forward: two per active parameter and computed token, and four per query number and
    token that a token attends to, which is half the sequence on average."""
    products = 2.0 * shape.active * computed
    return products + 4.0 * shape.layers * shape.queries * (length / 2) * sequences * length


def head_flop(shape: Shape, rows: int) -> float:
    return 2.0 * shape.hidden * shape.width * rows


def learning(shape: Shape, step: Step, rates: Rates) -> float:
    """Seconds of forward, backward and update. Backward: once more for the states, and for the weights' gradients as
    far as they are trained."""
    length = step.prompt + step.new_tokens
    shared = step.sequences // step.group * (step.group - 1) * step.prompt if step.shares_prompt else 0
    trunk = forward_flop(shape, step.sequences, length, computed=step.tokens - shared)
    head = head_flop(shape, step.sequences * step.new_tokens)
    trained = shape.trained / shape.parameters
    flop = trunk * (2 + trained + step.recomputes) + head * (2 + trained)
    return flop / rates.flop_s + UPDATE_BYTES * shape.trained / rates.bytes_s


UPDATE_BYTES = 40
"""AdamW reads weight, gradient and two moments and writes three of them, after the norm and clipping have read the
gradient twice and written it once."""


def sampling(shape: Shape, step: Step, rates: Rates) -> float:
    """Seconds to decode all samples: the prompts (a group's once, where sequences come and go), then for each token all
    weights and the cache from memory, or the products if those take longer. Completions of one length come and go
    together: as many passes as there are times that all slots are filled."""
    if not step.decoded:
        return 0.0
    passes = -(-step.sequences // step.decoded)
    rows = -(-step.sequences // passes)
    weights, pair = shape.parameters * _weight_bytes(shape, step), sampling_pair(shape, 2 if step.casts else FLOAT32)
    if step.engine_bytes:
        pair = 2 * step.engine_bytes
    read = weights + rows * (step.prompt + step.new_tokens / 2) * cache_bytes(shape, pair)
    flop = 2.0 * shape.active * rows + head_flop(shape, rows)
    computed = rows / step.group if shape.continuous or step.engine_bytes else rows
    prompts = computed * forward_flop(shape, 1, step.prompt, computed=step.prompt) / rates.flop_s
    return passes * (prompts + step.new_tokens * max(read / rates.bytes_s, flop / rates.flop_s))


def _weight_bytes(shape: Shape, step: Step) -> float:
    """Moved for a weight in one pass of sampling. Cast for each pass: read, write half, read half."""
    if step.engine_bytes:
        return step.engine_bytes
    if not step.casts:
        return FLOAT32
    kept = shape.trained / shape.parameters if step.keeps_casts else 0.0
    return 2 * kept + 2 * FLOAT32 * (1 - kept)


def scoring(teacher: Shape, step: Step, rates: Rates, *, trainers: int, devices: int) -> float:
    """Seconds of the teacher for the samples of all trainers: a prompt once for its completions."""
    sequences = step.sequences * trainers
    spared = sequences // step.group * (step.group - 1) * step.prompt
    length = step.prompt + step.new_tokens
    flop = forward_flop(teacher, sequences, length, computed=sequences * length - spared)
    return (flop + head_flop(teacher, sequences * step.new_tokens)) / (rates.flop_s * devices)
