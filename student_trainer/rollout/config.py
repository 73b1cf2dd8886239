"""How the student samples: the `rollout` section of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from student_trainer.rollout.calls import check_options, function_of
from teacher_api.settings import Section

EngineName = Literal["torch", "vllm", "vllm-server"]
CPU_CACHE_GIB = 1.0


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


class ServerConfig(Section):
    """With engine vllm-server: servers that `rollout-serve` started, on this machine or others."""

    urls: tuple[str, ...] = ()
    """http://host:port or https://… of each. Samples are spread over those that answer; one that comes back gets the
    current weights first."""
    api_key: SecretStr = SecretStr("")
    """Sent as a bearer token, as the servers' --api-key has it. Better in the environment
    (STUDENT_ROLLOUT__SERVER__API_KEY) than in a file."""
    timeout_s: float = Field(600.0, gt=0, le=86_400)
    """How long all servers may be away at a time, or fail at every completion: after that the run stops at its
    checkpoint, with exit code 75."""
    attempt_timeout_s: float = Field(300.0, gt=0, le=86_400)
    """Longest wait for one completion, or for one hand-over of weights, before it is given up and the server taken for
    hung; the completion is sampled elsewhere."""
    start_timeout_s: float = Field(300.0, gt=0, le=86_400)
    """How long to wait at the start for the first server that isn't there or is still loading."""
    address: str = ""
    """Of this machine, as the servers reach it for weights; empty: the one from which it reaches them."""
    logprob_tolerance: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Largest difference, in nats, between a server's logprobs of a known text and the trainer's own that a hand-over
    of weights may leave; 0: 0.002 in float32, 0.3 in bfloat16 and float16."""

    @field_validator("urls", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("urls")
    @classmethod
    def _bases(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
                raise ValueError(f"got {url!r}, expected http://host:port or https://host:port")
        bases = tuple(url.rstrip("/") for url in urls)
        if len(set(bases)) < len(bases):
            raise ValueError(f"got {list(bases)}, expected each server once")
        return bases


CONVERSATION = ("environment", "environment_options", "environment_timeout_s", "max_turns", "max_total_tokens")
"""Keys of what makes a sample a conversation."""


class RolloutConfig(Section):
    engine: EngineName = "torch"
    """torch: the training weights themselves, decoded with a key-value cache in the trainer's process. vllm: an engine
    of vLLM in the trainer's process, which gets the weights of each update from memory. vllm-server: servers of vLLM on
    GPUs of their own, or other machines, which get them over the network (rollout.server)."""
    vllm: VllmConfig = VllmConfig()
    server: ServerConfig = ServerConfig()

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
    """Most sequences decoded at once, by each server where there are several; bounds the cache's memory. Which tokens a
    sample gets does not depend on it."""

    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Token ids of the student's tokenizer that end a completion besides the model's own end tokens; kept as its last
    token."""

    environment: str = ""
    """What answers the student's turns, so that a sample is a conversation: package.module:function of your own, or
    calculator. It gets the messages so far and returns those to append, such as a tool's result; none end the
    conversation. Only the student's tokens are trained on. Empty: a sample is one turn."""

    environment_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of that function. They are part of the experiment: its checkpoints and its model card show
    them, so a secret has its place in the process' environment."""

    environment_timeout_s: float = Field(default=60.0, gt=0.0, le=86_400.0)
    """Longest time of one call of it; the run ends with an error after that."""

    max_turns: int = Field(default=8, ge=2)
    """With an environment: most turns of the student. rollout.max_new_tokens is the limit of each."""

    max_total_tokens: int = Field(default=0, ge=0)
    """With an environment: longest conversation after the prompt, in tokens, the environment's included. A turn begins
    only where rollout.max_new_tokens are left of it. 0: max_turns times max_new_tokens."""

    @field_validator("environment")
    @classmethod
    def _known(cls, name: str) -> str:
        if name:
            function_of(name)
        return name

    @model_validator(mode="after")
    def _conversations(self) -> Self:
        if not self.environment:
            for key, got in self.conversation.items():
                raise ValueError(f"{key}: got {got} without environment, expected none: a sample is one turn")
            return self
        check_options(self.environment, self.environment_options)
        if self.max_total_tokens and self.max_total_tokens <= self.max_new_tokens:
            raise ValueError(
                f"max_total_tokens: got {self.max_total_tokens} with max_new_tokens {self.max_new_tokens}, expected "
                "more: there would be no second turn"
            )
        return self

    @model_validator(mode="after")
    def _greedy_alone(self) -> Self:
        if self.greedy and not self.is_untempered:
            raise ValueError("greedy takes the most likely token: remove temperature, top_p and top_k")
        return self

    @model_validator(mode="after")
    def _sections_of_the_engine_chosen(self) -> Self:
        for name, engine in (("vllm", "vllm"), ("server", "vllm-server")):
            section: Section = getattr(self, name)
            if self.engine != engine and section != type(section)():
                got = section.model_dump(mode="json", exclude_defaults=True)  # secrets as asterisks
                raise ValueError(f"{name}: got {got} with engine {self.engine}, expected none")
        if self.engine == "vllm-server" and not self.server.urls:
            raise ValueError("server.urls: got none with engine vllm-server, expected the servers' (rollout-serve)")
        return self

    @property
    def is_elsewhere(self) -> bool:
        """Whether the engine computes on devices of its own, so that it can go on while the student learns."""
        return self.engine not in ("torch", "vllm")

    @property
    def conversation(self) -> dict[str, Any]:
        """What is set of the environment and its limits, by key."""
        return self.model_dump(mode="json", include=set(CONVERSATION), exclude_defaults=True)

    @property
    def longest_completion(self) -> int:
        """Most tokens that sampling adds to a prompt."""
        if not self.environment:
            return self.max_new_tokens
        return self.max_total_tokens or self.max_turns * self.max_new_tokens

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens that the student's distribution allows are never sampled."""
        return self.greedy or self.top_p < 1.0 or self.top_k > 0

    @property
    def is_untempered(self) -> bool:
        """Whether the behaviour policy, greedy apart, is the student's own distribution over the vocabulary."""
        return self.temperature == 1.0 and self.top_p == 1.0 and self.top_k == 0
