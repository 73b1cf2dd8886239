"""How the student samples: the `rollout` section of the configuration."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from teacher_api.settings import Section

EngineName = Literal["torch", "vllm"]


class VllmConfig(Section):
    """With engine vllm: the engine in each training process."""

    gpu_memory_utilization: float = Field(default=0.4, gt=0.0, le=1.0)
    """Share of a GPU's memory for its weights and key-value cache, which it gives back while the student learns. On a
    CPU the cache is kv_cache_gib alone."""
    kv_cache_gib: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Its key-value cache, in GiB; 0: what gpu_memory_utilization leaves on a GPU, 1 on a CPU."""
    max_model_len: int = Field(default=0, ge=0)
    """Most tokens of a prompt and its completion; 0: the longest that can come up in the run."""
    enforce_eager: bool = False
    """Neither compile nor capture CUDA graphs: a faster start, slower sampling."""
    logprob_tolerance: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Largest difference, in nats, between its logprobs of a known text and the trainer's own that a hand-over of
    weights may leave; 0: 0.002 in float32, 0.3 in bfloat16."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Other arguments of vLLM's engine, by any name it knows, such as quantization or kv_cache_dtype."""


class RolloutConfig(Section):
    engine: EngineName = "torch"
    """torch: the training weights themselves, decoded with a key-value cache in the trainer's process. vllm: an engine
    of vLLM in the trainer's process, which gets the weights of each update from memory."""
    vllm: VllmConfig = VllmConfig()

    max_new_tokens: int = Field(default=256, ge=1)
    """Longest completion, in tokens, the end token included."""

    temperature: float = Field(default=1.0, gt=0.0, le=100.0)
    """Divides the student's logits before sampling. 1 samples from the policy that is trained; anything else makes the
    on-policy estimate biased."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens that holds this much probability; 1: from all. Biases the estimate."""

    top_k: int = Field(default=0, ge=0)
    """Sample from this many most likely tokens (more where the last ones tie); 0: from all. Biases the estimate."""

    greedy: bool = False
    """Take the most likely token instead of sampling, as evaluation does."""

    group_size: int = Field(default=1, ge=1)
    """Completions per prompt."""

    batch_sequences: int = Field(default=128, ge=1)
    """Most sequences decoded at once; bounds the cache's memory. Which tokens a sample gets does not depend on it."""

    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion besides the model's own end tokens; kept as its last token."""

    @model_validator(mode="after")
    def _greedy_alone(self) -> Self:
        if self.greedy and not self.is_untempered:
            raise ValueError("greedy takes the most likely token: remove temperature, top_p and top_k")
        return self

    @model_validator(mode="after")
    def _sections_of_the_engine_chosen(self) -> Self:
        if self.engine != "vllm" and self.vllm != VllmConfig():
            got = self.vllm.model_dump(exclude_defaults=True)
            raise ValueError(f"vllm: got {got} with engine {self.engine}, expected none")
        return self

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens that the student's distribution allows are never sampled."""
        return self.greedy or self.top_p < 1.0 or self.top_k > 0

    @property
    def is_untempered(self) -> bool:
        """Whether the behaviour policy, greedy apart, is the student's own distribution over the vocabulary."""
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0
