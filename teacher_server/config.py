"""The server's one configuration section: every field is a flag, a TEACHER_ environment variable and a YAML key.
Defaults live here and nowhere else; checks that need a loaded model are made in service.py."""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from teacher_api.settings import Section
from teacher_server.cache_config import CacheConfig
from teacher_server.tenants import Tenant, check_tenants

MIB = 1 << 20
VLLM_MASTER_PORT = 29501  # vLLM's default

USED_BY = {
    "revision": ("torch", "vllm"),
    "dtype": ("torch", "vllm"),
    "device": ("torch",),
    "threads": ("torch",),
    "batch_tokens": ("torch", "fake"),
    "batch_sequences": ("torch", "fake"),
    "head_chunk_rows": ("torch", "vllm"),
    "scoring_path": ("vllm",),
    "engine_start_timeout_s": ("vllm",),
    "vllm": ("vllm",),
    "lora": ("vllm", "fake"),
    "share_head": ("torch", "vllm"),
    "head_keys": ("torch", "vllm"),
    "generate_vllm": ("vllm",),
    "fake_": ("fake",),
}
"""Fields that only some backends read; given to another one they are refused rather than ignored."""
ENGINE_FIELDS = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "quantization",
    "kv_cache_dtype",
    "gpu_memory_utilization",
    "max_num_seqs",
    "max_num_batched_tokens",
    "nnodes",
    "node_rank",
    "master_addr",
    "master_port",
)
"""Fields that are vLLM's engine arguments by name; None: as vLLM or the backend chooses."""
USED_BY |= dict.fromkeys(ENGINE_FIELDS, ("vllm",))
SHORTCUTS = {"api-key": "api_keys", "max-model-len": "max_sequence_tokens"}
"""Further flags and environment variables; vLLM's users know the second."""
TEACHER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class ServerConfig(Section):
    # --- what is served -------------------------------------------------------------------------------------------
    model: str = Field(min_length=1)
    """Directory of a Hugging Face checkpoint, or a hub id. The fake backend also takes any name."""
    revision: str = ""
    """Branch, tag or commit of a hub model; empty: its default."""
    backend: Literal["torch", "vllm", "fake"] = "torch"
    """Engine that scores. `fake` invents a deterministic distribution, for tests."""
    control: Literal["none", "shuffle", "random"] = "none"
    """Scientific control: the model's scores permuted over the vocabulary, or replaced by noise. Part of the
    fingerprint, so that no run takes such a teacher for the real one."""
    model_name: str = ""
    """Name shown to clients; empty: the last part of `model`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the model; auto: as the checkpoint is stored (backend torch on a CPU: float32)."""
    device: str = "auto"
    """Torch device; auto: a GPU where one is visible."""
    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of the model's arithmetic; 0: the library's choice."""
    reference: bool = False
    """One sequence per forward on one thread count: slower, and bit-identical whatever else is being scored."""
    scoring_path: Literal["auto", "fused", "prompt-logprobs"] = "auto"
    """How vLLM is asked: inside its model runner, from its prompt logprobs, or the first of them that passes a check
    at start. The log and /v1/info say which it is."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Engine arguments handed to vLLM as they are, by any name it knows: --vllm.cpu_offload_gb 8."""
    tensor_parallel_size: int | None = Field(default=None, ge=1)
    """Processes that share each layer of the model (vLLM's own option, as are the next seven)."""
    pipeline_parallel_size: int | None = Field(default=None, ge=1)
    """Groups of layers that run one after another, in processes of their own."""
    data_parallel_size: int | None = Field(default=None, ge=1)
    """Copies of the model, each of which scores its share of the sequences."""
    quantization: str | None = Field(default=None, min_length=1)
    """How the weights are quantised where the checkpoint doesn't say, such as fp8."""
    kv_cache_dtype: str | None = Field(default=None, min_length=1)
    """Type of the key-value cache, such as fp8."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU's memory that the engine takes."""
    max_num_seqs: int | None = Field(default=None, ge=1)
    """Most sequences of one engine step."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of one engine step; longer sequences go in pieces."""
    nnodes: int | None = Field(default=None, ge=1)
    """Machines that one engine spans (vLLM's own option, as are the next three). Each runs this command, with the same
    options but for `node_rank`; the server is on the first."""
    node_rank: int | None = Field(default=None, ge=0)
    """Which of them this is: 0 is the first."""
    master_addr: str | None = Field(default=None, min_length=1)
    """Name or address of the first, as the others reach it."""
    master_port: int | None = Field(default=None, ge=1, le=65535)
    """Port there at which they meet; vLLM opens more, at numbers of its own choice."""
    engine_start_timeout_s: float = Field(default=1800.0, gt=0, le=86400)
    """Longest start of a vLLM engine, and longest check of its answers; then it is stopped with an error."""
    lora: dict[str, str] = Field(default_factory=dict)
    """Further teachers on the same base: name -> directory of a LoRA adapter (--lora.math DIR). Requests choose one by
    `teacher`; each has a fingerprint of its own. Backend fake: any text in place of a directory."""

    # --- text that the teacher writes -----------------------------------------------------------------------------
    generate: bool = False
    """Also write text: /v1/completions then takes max_tokens above 1, temperature, top_p, n, stop and their like.
    Backend vllm starts a second engine for it, with weights and key-value cache of its own."""
    max_generated_tokens: int = Field(default=4096, ge=1)
    """Most tokens that one completion may be asked to have."""
    max_generations: int = Field(default=32, ge=1, le=4096)
    """Completions written at a time; others wait their turn. It bounds the memory of writing, and what it takes from
    scoring."""
    generate_vllm: dict[str, Any] = Field(default_factory=dict)
    """Engine arguments of the second engine alone, such as gpu_memory_utilization; what is not among them is as for the
    first."""

    # --- limits, each refused by name when exceeded ---------------------------------------------------------------
    max_sequence_tokens: int = Field(default=0, ge=0)
    """Longest sequence, prompt included; 0: what the model was made for."""
    max_top_k: int = Field(default=256, ge=0)
    """Largest top-k; never more than the tokenizer's size."""
    max_candidates: int = Field(default=1024, ge=0)
    """Most candidate ids of one row."""
    max_completions: int = Field(default=512, ge=1, le=65536)
    """Most completions in one request."""
    max_request_bytes: int = Field(default=64 * MIB, ge=1024, le=1024 * MIB)
    """Largest request body or gRPC message."""
    receiving_bytes: int = Field(default=1024 * MIB, ge=1024)
    """Bytes of HTTP bodies being received at a time, over all connections; beyond it callers get `overloaded`."""
    max_calls: int = Field(default=1024, ge=1, le=1 << 20)
    """gRPC calls open at a time, streams and health checks among them; beyond it callers get RESOURCE_EXHAUSTED."""
    max_response_bytes: int = Field(default=256 * MIB, ge=1024, le=1024 * MIB)
    """Largest answer of the unary call; larger ones go over the stream."""
    max_completion_bytes: int = Field(default=2048 * MIB, ge=1024)
    """Largest answer to one completion over the stream: the server holds one such in memory per sequence in work."""
    queue_tokens: int = Field(default=2_000_000, ge=1)
    """Tokens accepted and not yet answered; beyond it callers get `overloaded` with a time to come back."""
    queue_bytes: int = Field(default=4096 * MIB, ge=1024)
    """Bytes of answers accepted and not yet delivered, by the same rule."""
    stream_sequences: int = Field(default=64, ge=1, le=65536)
    """Sequences of one stream in work at a time; the next message is read when there is room."""
    max_streams: int = Field(default=256, ge=1, le=65536)
    """Streams open at a time; each holds one message and `stream_sequences` sequences."""
    default_timeout_s: float = Field(default=600.0, gt=0, le=86400)
    """Deadline of a call whose caller names none."""
    header_s: float = Field(default=7.0, gt=0, le=3600)
    """A connection whose handshake, or whose HTTP headers, are not complete after this long is closed."""
    body_idle_s: float = Field(default=7.0, gt=0, le=3600)
    """A request body that sends nothing for this long is given up."""
    body_bytes_per_s: int = Field(default=MIB // 4, ge=1)
    """So is one that, after `body_idle_s`, has come more slowly than this on the whole. (gRPC, which knows only whole
    messages: a first one that has not come when one of `max_request_bytes` would have.)"""
    answer_idle_s: float = Field(default=60.0, gt=0, le=3600)
    """A call whose caller takes nothing of its answer for this long is given up: the answer counts as in work until
    it has left. (gRPC's unary call: this long for each MiB of it.)"""

    cache: CacheConfig = Field(default_factory=CacheConfig)
    """Answers kept and given again: size, directory, and who shares them."""

    # --- batches --------------------------------------------------------------------------------------------------
    batch_tokens: int = Field(default=8192, ge=1)
    """Padded tokens of one forward: number of sequences times the longest."""
    batch_sequences: int = Field(default=64, ge=1, le=4096)
    """Most sequences of one forward."""
    head_chunk_rows: int = Field(default=0, ge=0)
    """Rows that go through the output head at a time; 0: chosen from the vocabulary, about 32 MiB."""

    # --- where it listens, and who may call -----------------------------------------------------------------------
    host: str = "127.0.0.1"
    """Address to listen on; loopback unless said otherwise."""
    http_port: int = Field(default=8300, ge=0, le=65535)
    """Port of HTTP; 0: a free one, printed when ready."""
    grpc_port: int = Field(default=8301, ge=0, le=65535)
    """Port of gRPC; 0: a free one, printed when ready."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of Prometheus metrics, at /metrics; 0: a free one, printed when ready; none: there are no metrics."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics port, which asks for no key: whoever reaches it sees model, load, and what each
    tenant has done."""
    probe_port: int | None = Field(default=None, ge=0, le=65535)
    """A further port that answers the probes alone, without TLS and without a key, on `host`; 0: a free one. For probes
    that have no certificate where callers need one."""
    tls_cert: str = ""
    """PEM file with this server's certificate and those between it and its root; both ports speak TLS then."""
    tls_key: str = ""
    """PEM file with its key, without a password."""
    tls_client_ca: str = ""
    """PEM file with the roots of which a caller must have a certificate (mTLS); empty: callers need none."""
    api_keys: tuple[SecretStr, ...] = ()
    """Keys of which a caller must send one as `authorization: Bearer …`; none: everybody may call. Better given as
    TEACHER_API_KEYS or in a file than on the command line, where other users of the machine can read them."""
    tenants: dict[str, Tenant] = Field(default_factory=dict)
    """Who shares the server, by name: keys, weight, rate. In YAML, or as TEACHER_TENANTS in JSON."""
    tenants_file: str = ""
    """The same in a YAML file of its own, under `tenants:`, which is read again when it changes."""
    anonymous: bool = False
    """Also listen on an address that is not loopback when there are no keys: whoever reaches it may then call."""
    usage_file: str = ""
    """SQLite file that keeps what each tenant's experiments used, over restarts; empty: kept until the server ends."""
    contended_s: float = Field(default=0.05, gt=0, le=3600)
    """While one of several callers uses less than its share, or they are few: seconds of work that the engine is given
    at a time, so that none waits much longer for what others sent before. Up to ten times as much while there are many,
    who all wait for their turns anyway; alone, a caller gets whole batches."""
    share_head: Literal["none", "all", "keys"] = "none"
    """Who may download the model's output head, which with hidden states gives the teacher's whole distribution:
    nobody, everybody who may call, or the callers with one of `head_keys`."""
    head_keys: tuple[SecretStr, ...] = ()
    """Keys that may download the output head, and whatever `api_keys` may."""
    announce_file: str = ""
    """File that gets the ready line as JSON, for a parent that starts this server on free ports."""

    # --- life -----------------------------------------------------------------------------------------------------
    lame_duck_s: float = Field(default=2.0, ge=0, le=3600)
    """After SIGTERM: still serving while the probes already say no, so that load balancers look away."""
    grace_s: float = Field(default=30.0, ge=0, le=3600)
    """Then: time for the calls in flight to end before they are cut."""
    stall_s: float = Field(default=300.0, gt=0, le=86400)
    """/livez fails when work waits and no forward has finished for this long."""
    hang_s: float = Field(default=8.0, gt=0, le=86400)
    """/readyz says no when work waits and no forward has finished for this long, nor for three times as long as the
    longest of late took; or for `stall_s`, where that is less."""
    high_water: float = Field(default=0.9, gt=0, le=1)
    """/readyz says no while more than this share of `queue_tokens` or `queue_bytes` is taken."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """Form of the log on stderr; auto: console on a terminal, JSON elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe line to be logged; at info one line for each request."""
    otlp_endpoint: str = ""
    """Collector that gets traces of requests, down to the engine's forwards, over OTLP/HTTP, such as
    http://collector:4318 (extra `trace`). Empty: none is sent."""
    trace_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are traced, of those whose callers do not trace; a caller's own trace is followed."""

    # --- the fake backend -----------------------------------------------------------------------------------------
    fake_vocabulary: int = Field(default=512, ge=2, le=1 << 20)
    """Tokenizer size of the fake model when `model` is not a directory with a tokenizer."""
    fake_latency_s: float = Field(default=0.0, ge=0, le=3600)
    """Time each fake batch takes."""
    fake_poison_token: int = Field(default=-1, ge=-1)
    """A sequence with this id makes its whole batch fail; -1: none. The same for the others."""
    fake_nan_token: int = Field(default=-1, ge=-1)
    """A sequence with this id is answered with NaN."""
    fake_short_token: int = Field(default=-1, ge=-1)
    """A sequence with this id is answered with one row too few."""
    fake_hang_token: int = Field(default=-1, ge=-1)
    """A sequence with this id is never answered."""
    fake_death_token: int = Field(default=-1, ge=-1)
    """A sequence with this id kills the engine."""
    fake_restart_s: float = Field(default=1.0, ge=0, le=3600)
    """Time after which a killed engine is up again."""

    @field_validator("api_keys", "head_keys")
    @classmethod
    def _long_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value()) < 8 for key in keys):
            raise ValueError("an API key has fewer than 8 characters")
        return keys

    @model_validator(mode="after")
    def _engine_arguments_once(self) -> ServerConfig:
        for name in ENGINE_FIELDS:
            if getattr(self, name) is not None and name in self.vllm:
                raise ValueError(f"{name} is given twice, also as vllm.{name}; expected one of them")
        return self

    @model_validator(mode="after")
    def _nodes_fit(self) -> ServerConfig:
        nodes, rank = self.nnodes or 1, self.node_rank
        places = {"node_rank": rank, "master_addr": self.master_addr, "master_port": self.master_port}
        if nodes == 1:
            for name, value in places.items():
                if value is not None:
                    raise ValueError(f"{name} has no meaning without nnodes above 1")
            return self
        if rank is None or self.master_addr is None:
            raise ValueError(f"nnodes is {nodes}; expected node_rank and master_addr beside it")
        if rank >= nodes:
            raise ValueError(f"node_rank is {rank}; expected 0 to {nodes - 1}, for nnodes is {nodes}")
        if self.scoring_path == "auto":
            raise ValueError(
                f"nnodes is {nodes} and scoring_path auto; expected fused or prompt-logprobs: the other nodes can't "
                "follow a choice that the first makes at its start"
            )
        if self.generate or (self.data_parallel_size or 1) > 1:
            raise ValueError(
                f"nnodes is {nodes}; expected neither generate nor data_parallel_size: one engine spans them"
            )
        return self

    @model_validator(mode="after")
    def _teachers_have_names(self) -> ServerConfig:
        for name, place in self.lora.items():
            if not TEACHER_NAME.fullmatch(name):
                raise ValueError(
                    f"lora: got the name {name[:128]!r}; expected 1 to 128 letters, digits, dots, dashes or underscores"
                )
            if name == self.display_name:
                raise ValueError(f"lora.{name}: the base is called so; expected another name, or set model_name")
            if not place:
                raise ValueError(f"lora.{name}: empty; expected the directory of an adapter")
        return self

    @model_validator(mode="after")
    def _known_callers(self) -> ServerConfig:
        check_tenants(self.tenants)
        if self.tenants and self.tenants_file:
            raise ValueError("tenants and tenants_file are both given; expected one of them")
        is_open = not self.needs_key
        if is_open and not (self.anonymous or _is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} is reached from elsewhere, and there are no keys; expected api_keys, tenants or "
                "tenants_file, a loopback address, or --anonymous to let everybody call"
            )
        if self.anonymous and not is_open:
            raise ValueError("anonymous has no meaning beside keys")
        return self

    @property
    def needs_key(self) -> bool:
        """Whether callers must have a key."""
        return bool(self.api_keys or self.tenants_file or any(tenant.keys for tenant in self.tenants.values()))

    @model_validator(mode="after")
    def _fits(self) -> ServerConfig:
        if self.max_sequence_tokens > self.queue_tokens:
            raise ValueError(
                f"max_sequence_tokens {self.max_sequence_tokens} exceeds queue_tokens {self.queue_tokens}: "
                "such a sequence could never be accepted"
            )
        if self.max_request_bytes > self.receiving_bytes:
            raise ValueError(
                f"max_request_bytes {self.max_request_bytes} exceeds receiving_bytes {self.receiving_bytes}: "
                "such a body could never be received"
            )
        if (self.share_head == "keys") != bool(self.head_keys):
            raise ValueError(
                f"share_head is {self.share_head} and there are {len(self.head_keys)} head_keys; "
                "expected share_head keys and at least one of them, or neither"
            )
        if self.share_head != "none" and self.control != "none":
            raise ValueError(f"share_head has no meaning for control {self.control}: its scores come from no head")
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together; expected both of them, or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca has no meaning without tls_cert")
        if "trace_share" in self.model_fields_set and not self.otlp_endpoint:
            raise ValueError("trace_share has no meaning without otlp_endpoint")
        if "metrics_host" in self.model_fields_set and self.metrics_port is None:
            raise ValueError("metrics_host has no meaning without metrics_port")
        if self.reference and self.backend == "vllm":
            raise ValueError("reference needs backend torch: vLLM's results depend on what else is being scored")
        for name in ("max_generated_tokens", "max_generations", "generate_vllm"):
            if name in self.model_fields_set and not self.generate:
                raise ValueError(f"{name} has no meaning without generate")
        if self.generate and self.control != "none":
            raise ValueError(
                f"control {self.control} writes no text: its scores are not the model's; leave generate out"
            )
        if self.generate and self.reference:
            raise ValueError("reference is for scoring alone: what else the model does must not touch its results")
        for name in sorted(self.model_fields_set):
            backends = USED_BY.get("fake_" if name.startswith("fake_") else name)
            if backends is not None and self.backend not in backends:
                raise ValueError(f"{name} has no meaning for backend {self.backend}; it is for {', '.join(backends)}")
        return self

    @property
    def engine_arguments(self) -> dict[str, Any]:
        """What is handed to vLLM by name, however it was given."""
        named = {name: getattr(self, name) for name in ENGINE_FIELDS}
        return {**self.vllm, **{name: value for name, value in named.items() if value is not None}}

    @property
    def engine_port(self) -> int:
        """Where the nodes of an engine meet."""
        return self.master_port if self.master_port is not None else VLLM_MASTER_PORT

    @property
    def display_name(self) -> str:
        return self.model_name or self.model.rstrip("/").rsplit("/", 1)[-1]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
