"""Scores in an engine with too few key-value blocks for what runs, in this process; writes the answers and how often
a sequence was preempted."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

BLOCKS = 12  # of 128 tokens; eight sequences of 400 tokens want 32


def main() -> None:
    checkpoint, vocabulary, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", PRECEPTOR_VLLM_SERVER_PID=str(os.getpid()))
    from test_vllm_fused import preempted_jobs
    from vllm import LLM, PoolingParams

    from teacher_server.vllm_plugin.request import TASK, Asked, fields_of, unpack

    llm = LLM(
        str(checkpoint),
        dtype="float32",
        runner="pooling",
        hf_overrides={"architectures": ["TeacherQwen3ForCausalLM"], "head_dtype": "model"},
        additional_config={"tokenizer_size": vocabulary},
        scheduler_cls="teacher_server.vllm_plugin.scheduler.TeacherScheduler",
        enforce_eager=True,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        max_num_batched_tokens=512,
        long_prefill_token_threshold=64,  # all eight advance together
        max_num_seqs=8,
        num_gpu_blocks_override=BLOCKS,
        kv_cache_memory_bytes=1 << 28,  # else vLLM wants most of the machine's memory to be free
        scheduler_reserve_full_isl=False,
    )
    scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[union-attr]
    preempt, count = scheduler._preempt_request, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    jobs = preempted_jobs(vocabulary)
    outputs = llm.encode(
        [{"prompt_token_ids": j.token_ids.tolist()} for j in jobs],
        [PoolingParams(task=TASK, skip_reading_prefix_cache=False, extra_kwargs=Asked.of(j).to_extra()) for j in jobs],
        pooling_task=TASK,
        use_tqdm=False,
    )
    arrays = {}
    for n, (asked, output) in enumerate(zip(jobs, outputs, strict=True)):
        layout = fields_of(Asked.of(asked), vocabulary, 32, "float32")
        for name, values in unpack(output.outputs.data.numpy(), layout).items():
            arrays[f"{n}/{name}"] = values
    np.savez(out, **arrays)
    print(json.dumps({"preemptions": count}))


if __name__ == "__main__":
    main()
