"""Memory of a run by formula: what each part of a step holds on one device. docs/operations.md has the formulas in
words; tests hold them to measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from student_trainer.distributed import BUCKET_BYTES
from student_trainer.planning.shape import Shape
from student_trainer.rollout.continuous import PROMPT_TOKENS

FLOAT32 = 4
OPTIMIZER_VALUES = {"adamw": 2, "muon": 2}
"""float32 values of optimizer state per parameter: AdamW's two moments (Muon keeps one for its matrices)."""
LOSS_BYTES = 24 * 2**20
"""Beside a chunk's logits: blocks of rows of the objective and of the head's product, a few megabytes each."""
SAMPLING_COPIES = 3
"""Arrays as large as the logits of one step of sampling: logits, those below V on their own, probabilities."""
SCORING_CHUNKS = 4 * 256 * 2**20
"""Of the fused path on a GPU: a chunk of logits and up to three times as much beside it (docs/operations.md)."""
TEACHER_FORWARD_TOKENS = 8192
"""Tokens of one forward of the teacher's engine, at most, unless it was told otherwise."""
USABLE = 0.9
"""Share of a device that is planned with: the rest is the driver's, the allocator's and the communication's."""
STRATEGIES = ("ddp", "ddp_sharded", "fsdp2", "zero2", "zero3")
Bytes = dict[str, int]


@dataclass(frozen=True, slots=True)
class Engine:
    """vLLM's in the trainer's process, with weights of its own. On a GPU it sleeps while the student learns."""

    cache_bytes: int  # 0: what the weights leave of most_bytes
    most_bytes: int

    def holds(self, weights: int) -> Bytes:
        return {"engine's weights": weights, "engine's cache": self.cache_bytes or max(0, self.most_bytes - weights)}


@dataclass(frozen=True, slots=True)
class Load:
    """What a step asks of one device."""

    tokens: int  # of a micro-batch
    chunk_rows: int  # scored positions whose logits exist at a time
    teacher_values: int  # of a scored position, in float32 or int32
    decoded: int  # sequences decoded at a time; 0: nothing is sampled
    group: int  # completions of one prompt
    prompt: int  # tokens of the longest prompt
    longest: int  # tokens of the longest sequence
    arithmetic_bytes: int
    gradient_checkpointing: bool
    optimizer: str
    averages: bool  # optim.ema_decay: one more value a trained parameter, kept with the optimizer's
    offloaded: bool  # weights, gradients and state wait on the host (fsdp2)
    on_gpu: bool
    samples_meanwhile: bool = False  # from a copy of the weights, while the student learns (train.schedule async)
    engine: Engine | None = None  # samples, where the trainer's own weights don't


def parts_of(strategy: str, world: int) -> tuple[int, int, int]:
    """Into how many parts weights, gradients and optimizer state are cut."""
    return {
        "ddp": (1, 1, 1),
        "ddp_sharded": (1, 1, world),
        "zero2": (1, world, world),
        "fsdp2": (world, world, world),
        "zero3": (world, world, world),
    }[strategy]


def phases(shape: Shape, load: Load, parts: tuple[int, int, int], world: int) -> dict[str, Bytes]:
    """Bytes on one device by what holds them, in each phase of a step; the peak is the largest sum.

    Args:
        parts: into how many weights, gradients and optimizer state are cut (`parts_of`).
    """
    weights, gradients, optimizer = parts
    held = {
        "weights": FLOAT32 * shape.parameters // weights,
        "optimizer": FLOAT32 * shape.trained * (OPTIMIZER_VALUES[load.optimizer] + load.averages) // optimizer,
    }
    own = {"gradients": FLOAT32 * shape.trained // gradients}
    is_cut = weights > 1
    if load.offloaded and is_cut:
        held = own = {}
    learning = {
        "activations": activations(shape, load),
        "cast weights": 2 * shape.active if load.arithmetic_bytes < FLOAT32 else 0,
        "logits": FLOAT32 * min(load.chunk_rows, load.tokens) * shape.width + LOSS_BYTES,
        "hidden rows": 2 * FLOAT32 * load.tokens * shape.hidden,  # and their gradient
        "teacher scores": FLOAT32 * load.tokens * load.teacher_values,
        # fsdp2, zero3: the root stays whole from forward to backward, and two layers are; gradients until they are cut.
        "gathered": FLOAT32 * (2 * shape.embeddings + 3 * shape.largest_layer) if is_cut else 0,
    }
    sum_of_ranks = 2 * max(BUCKET_BYTES, FLOAT32 * shape.largest_parameter) if world > 1 and not is_cut else 0
    per_update = FLOAT32 * (shape.trained // optimizer if load.on_gpu else 2 * shape.largest_parameter)
    found = {
        "learn": {**held, **own, **learning},
        "update": {**held, **own, "temporaries": max(sum_of_ranks, per_update)},
    }
    stays: Bytes = {}
    if load.decoded or load.engine:
        engine = load.engine.holds(load.arithmetic_bytes * shape.parameters) if load.engine else {}
        sampling = {"gathered": FLOAT32 * shape.parameters if is_cut else 0, **(engine or _decoding(shape, load))}
        if load.samples_meanwhile:
            stays = {**sampling, "copied weights": FLOAT32 * shape.trained}
        else:
            found["sample"] = {**held, **sampling}
            stays = {} if load.on_gpu else engine
    found = {name: {**stays, **parts} for name, parts in found.items()}
    return {name: {k: v for k, v in held.items() if v} for name, held in found.items()}


def _decoding(shape: Shape, load: Load) -> Bytes:
    """What the embedded engine holds while it samples: in bfloat16 autocast keeps what it cast of weights that require
    a gradient until all is sampled, of a copy's it keeps none."""
    cast = 2 * (shape.active + shape.hidden * shape.width) * shape.trained // shape.parameters
    return {
        "cast weights": cast if load.arithmetic_bytes < FLOAT32 and not load.samples_meanwhile else 0,
        "cache": load.decoded * load.longest * cache_bytes(shape, sampling_pair(shape, load.arithmetic_bytes)),
        "prompts": one_forward(shape, prompt_tokens(shape, load), load.arithmetic_bytes),
        "logits of sampling": SAMPLING_COPIES * FLOAT32 * load.decoded * shape.width,
    }


def peak(found: dict[str, Bytes]) -> tuple[str, int]:
    """The phase that needs most, and how much."""
    phase = max(found, key=lambda name: sum(found[name].values()))
    return phase, sum(found[phase].values())


def activations(shape: Shape, load: Load) -> int:
    """Estimate of what the backward pass keeps for one micro-batch, from what eager autograd saves in a layer, per
    token: 6 hidden states around the norms and the residual stream, 2 (q + k) around norms of queries and keys, 5 of
    attention's width (queries, keys and values repeated for every head, output), 4 of the feed-forward's (gate, its
    activation, up, product); the norms' in float32. With gradient checkpointing one hidden state per layer, and one
    layer twice: its activations, and their gradients with what the allocator holds on to."""
    in_float32 = FLOAT32 * (6 * shape.hidden + 2 * (shape.queries + shape.keys))
    one_layer = load.tokens * (in_float32 + load.arithmetic_bytes * (5 * shape.queries + 4 * shape.inner))
    if load.gradient_checkpointing:
        return shape.layers * load.tokens * shape.hidden * load.arithmetic_bytes + 2 * one_layer
    return shape.layers * one_layer


def cache_bytes(shape: Shape, pair_bytes: int) -> int:
    """Of a token's keys and values in all layers; `pair_bytes`: of one key's and one value's number."""
    return shape.layers * shape.keys * pair_bytes


def sampling_pair(shape: Shape, arithmetic_bytes: int) -> int:
    """Bytes of one key's and one value's number in the sampler's cache: slots keep both as attention takes them,
    transformers' cache keeps keys as rotated, in float32."""
    return (arithmetic_bytes if shape.continuous else FLOAT32) + arithmetic_bytes


def prompt_tokens(shape: Shape, load: Load) -> int:
    """Of prompts in one forward of sampling: each prompt once, and so many at a time, where sequences come and go."""
    if not shape.continuous:
        return load.decoded * load.prompt
    return min(-(-load.decoded // load.group) * load.prompt, max(PROMPT_TOKENS, load.prompt))


def one_forward(shape: Shape, tokens: int, number_bytes: int) -> int:
    """What a forward pass that keeps nothing has at once: the residual stream, its norm, and a layer's middle; twice,
    with what the allocator holds on to."""
    return 2 * tokens * number_bytes * (3 * shape.hidden + max(3 * shape.inner, 3 * shape.queries))


def teacher(shape: Shape, in_flight: int, longest: int, row_values: int, devices: int) -> Bytes:
    """Bytes on one of `devices` that share a teacher (tensor parallel, vLLM's fused path).

    Args:
        in_flight: sequences being scored at a time.
        row_values: ids and values that a scored position is answered with.
    """
    rows = in_flight * longest
    return {
        "weights": shape.parameters * shape.dtype_bytes // devices,
        "cache": rows * cache_bytes(shape, 2 * shape.dtype_bytes) // devices,
        "forward": one_forward(shape, TEACHER_FORWARD_TOKENS, shape.dtype_bytes),
        "scoring chunk": SCORING_CHUNKS,
        "answers": 3 * rows * (8 + 4 * row_values),
    }
