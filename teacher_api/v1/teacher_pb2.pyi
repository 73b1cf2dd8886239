from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_UINT16: _ClassVar[DType]
    DTYPE_UINT24: _ClassVar[DType]
    DTYPE_UINT32: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPRESSION_NONE: _ClassVar[Compression]
    COMPRESSION_ZSTD: _ClassVar[Compression]
DTYPE_UNSPECIFIED: DType
DTYPE_UINT16: DType
DTYPE_UINT24: DType
DTYPE_UINT32: DType
DTYPE_FLOAT16: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT32: DType
COMPRESSION_NONE: Compression
COMPRESSION_ZSTD: Compression

class Array(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Range(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Candidates(_message.Message):
    __slots__ = ("ids", "row_offsets")
    IDS_FIELD_NUMBER: _ClassVar[int]
    ROW_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    ids: Array
    row_offsets: Array
    def __init__(self, ids: _Optional[_Union[Array, _Mapping]] = ..., row_offsets: _Optional[_Union[Array, _Mapping]] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("id", "prompt_index", "token_ids", "ranges", "candidates")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    id: str
    prompt_index: int
    token_ids: Array
    ranges: _containers.RepeatedCompositeFieldContainer[Range]
    candidates: Candidates
    def __init__(self, id: _Optional[str] = ..., prompt_index: _Optional[int] = ..., token_ids: _Optional[_Union[Array, _Mapping]] = ..., ranges: _Optional[_Iterable[_Union[Range, _Mapping]]] = ..., candidates: _Optional[_Union[Candidates, _Mapping]] = ...) -> None: ...

class ScoreOptions(_message.Message):
    __slots__ = ("top_k", "full_vocabulary", "temperature", "value_type", "entropy", "rank", "hidden", "hidden_type")
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    FULL_VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    VALUE_TYPE_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_TYPE_FIELD_NUMBER: _ClassVar[int]
    top_k: int
    full_vocabulary: bool
    temperature: float
    value_type: DType
    entropy: bool
    rank: bool
    hidden: bool
    hidden_type: DType
    def __init__(self, top_k: _Optional[int] = ..., full_vocabulary: bool = ..., temperature: _Optional[float] = ..., value_type: _Optional[_Union[DType, str]] = ..., entropy: bool = ..., rank: bool = ..., hidden: bool = ..., hidden_type: _Optional[_Union[DType, str]] = ...) -> None: ...

class CallMetadata(_message.Message):
    __slots__ = ("tenant", "experiment", "run", "priority")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    EXPERIMENT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    experiment: str
    run: str
    priority: str
    def __init__(self, tenant: _Optional[str] = ..., experiment: _Optional[str] = ..., run: _Optional[str] = ..., priority: _Optional[str] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("prompts", "completions", "options", "expect_fingerprint", "metadata", "timeout_s", "teacher", "compression", "packed")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    EXPECT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedCompositeFieldContainer[Array]
    completions: _containers.RepeatedCompositeFieldContainer[Completion]
    options: ScoreOptions
    expect_fingerprint: str
    metadata: CallMetadata
    timeout_s: float
    teacher: str
    compression: Compression
    packed: bytes
    def __init__(self, prompts: _Optional[_Iterable[_Union[Array, _Mapping]]] = ..., completions: _Optional[_Iterable[_Union[Completion, _Mapping]]] = ..., options: _Optional[_Union[ScoreOptions, _Mapping]] = ..., expect_fingerprint: _Optional[str] = ..., metadata: _Optional[_Union[CallMetadata, _Mapping]] = ..., timeout_s: _Optional[float] = ..., teacher: _Optional[str] = ..., compression: _Optional[_Union[Compression, str]] = ..., packed: _Optional[bytes] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("kind", "message", "field", "retryable", "retry_after_s", "request_id")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    field: str
    retryable: bool
    retry_after_s: float
    request_id: str
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., retryable: bool = ..., retry_after_s: _Optional[float] = ..., request_id: _Optional[str] = ...) -> None: ...

class ScoreRows(_message.Message):
    __slots__ = ("completion_id", "row_offset", "num_rows", "total_rows", "error", "token_logprob", "log_tail", "topk_ids", "topk_logprob", "candidate_logprob", "entropy", "rank", "hidden", "computed_tokens", "cached_tokens")
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    ROW_OFFSET_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROWS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TOKEN_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    LOG_TAIL_FIELD_NUMBER: _ClassVar[int]
    TOPK_IDS_FIELD_NUMBER: _ClassVar[int]
    TOPK_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    row_offset: int
    num_rows: int
    total_rows: int
    error: Error
    token_logprob: Array
    log_tail: Array
    topk_ids: Array
    topk_logprob: Array
    candidate_logprob: Array
    entropy: Array
    rank: Array
    hidden: Array
    computed_tokens: int
    cached_tokens: int
    def __init__(self, completion_id: _Optional[str] = ..., row_offset: _Optional[int] = ..., num_rows: _Optional[int] = ..., total_rows: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., token_logprob: _Optional[_Union[Array, _Mapping]] = ..., log_tail: _Optional[_Union[Array, _Mapping]] = ..., topk_ids: _Optional[_Union[Array, _Mapping]] = ..., topk_logprob: _Optional[_Union[Array, _Mapping]] = ..., candidate_logprob: _Optional[_Union[Array, _Mapping]] = ..., entropy: _Optional[_Union[Array, _Mapping]] = ..., rank: _Optional[_Union[Array, _Mapping]] = ..., hidden: _Optional[_Union[Array, _Mapping]] = ..., computed_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class ScoreFrame(_message.Message):
    __slots__ = ("completion_id", "rows", "checksum", "compression")
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    rows: bytes
    checksum: bytes
    compression: Compression
    def __init__(self, completion_id: _Optional[str] = ..., rows: _Optional[bytes] = ..., checksum: _Optional[bytes] = ..., compression: _Optional[_Union[Compression, str]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("fingerprint", "request_id", "frames")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    request_id: str
    frames: _containers.RepeatedCompositeFieldContainer[ScoreFrame]
    def __init__(self, fingerprint: _Optional[str] = ..., request_id: _Optional[str] = ..., frames: _Optional[_Iterable[_Union[ScoreFrame, _Mapping]]] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ("teacher",)
    TEACHER_FIELD_NUMBER: _ClassVar[int]
    teacher: str
    def __init__(self, teacher: _Optional[str] = ...) -> None: ...

class GetHeadRequest(_message.Message):
    __slots__ = ("expect_fingerprint",)
    EXPECT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    expect_fingerprint: str
    def __init__(self, expect_fingerprint: _Optional[str] = ...) -> None: ...

class HeadChunk(_message.Message):
    __slots__ = ("offset", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class TeacherInfo(_message.Message):
    __slots__ = ("api_version", "server_version", "features", "fingerprint", "model_name", "model_revision", "weights_digest", "tokenizer_fingerprint", "tokenizer_size", "logit_width", "max_sequence_tokens", "max_top_k", "max_candidates", "max_request_bytes", "max_response_bytes", "dtype", "quantisation", "head_dtype", "engine", "engine_version", "scoring_path", "tokenizer_parts", "max_completions", "hidden_size", "head_digest", "head_bytes", "teachers", "scoring_path_note", "batch_tokens", "checksum")
    class TokenizerPartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    API_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_REVISION_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOGIT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RESPONSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTISATION_FIELD_NUMBER: _ClassVar[int]
    HEAD_DTYPE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SCORING_PATH_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_PARTS_FIELD_NUMBER: _ClassVar[int]
    MAX_COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HEAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEACHERS_FIELD_NUMBER: _ClassVar[int]
    SCORING_PATH_NOTE_FIELD_NUMBER: _ClassVar[int]
    BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    api_version: int
    server_version: str
    features: _containers.RepeatedScalarFieldContainer[str]
    fingerprint: str
    model_name: str
    model_revision: str
    weights_digest: str
    tokenizer_fingerprint: str
    tokenizer_size: int
    logit_width: int
    max_sequence_tokens: int
    max_top_k: int
    max_candidates: int
    max_request_bytes: int
    max_response_bytes: int
    dtype: str
    quantisation: str
    head_dtype: str
    engine: str
    engine_version: str
    scoring_path: str
    tokenizer_parts: _containers.ScalarMap[str, str]
    max_completions: int
    hidden_size: int
    head_digest: str
    head_bytes: int
    teachers: _containers.RepeatedScalarFieldContainer[str]
    scoring_path_note: str
    batch_tokens: int
    checksum: bytes
    def __init__(self, api_version: _Optional[int] = ..., server_version: _Optional[str] = ..., features: _Optional[_Iterable[str]] = ..., fingerprint: _Optional[str] = ..., model_name: _Optional[str] = ..., model_revision: _Optional[str] = ..., weights_digest: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., tokenizer_size: _Optional[int] = ..., logit_width: _Optional[int] = ..., max_sequence_tokens: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_candidates: _Optional[int] = ..., max_request_bytes: _Optional[int] = ..., max_response_bytes: _Optional[int] = ..., dtype: _Optional[str] = ..., quantisation: _Optional[str] = ..., head_dtype: _Optional[str] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., scoring_path: _Optional[str] = ..., tokenizer_parts: _Optional[_Mapping[str, str]] = ..., max_completions: _Optional[int] = ..., hidden_size: _Optional[int] = ..., head_digest: _Optional[str] = ..., head_bytes: _Optional[int] = ..., teachers: _Optional[_Iterable[str]] = ..., scoring_path_note: _Optional[str] = ..., batch_tokens: _Optional[int] = ..., checksum: _Optional[bytes] = ...) -> None: ...
