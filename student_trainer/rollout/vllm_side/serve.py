"""`rollout-serve MODEL [options of vllm serve]`: vLLM's own API server, with what sampling for a trainer needs switched
on. Sets flags and environment, then hands over to vLLM; owns no server.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from student_trainer.rollout.vllm_side.plugin import GLOO, SERVER_PID, Endpoint
from student_trainer.rollout.vllm_side.worker import EXTENSION

PROGRAM = "rollout-serve"
HELP = f"""usage: {PROGRAM} MODEL [options of vllm serve]

Serves samples of a student to student-train (rollout.engine vllm-server), from whatever weights that hands over. MODEL
is the student's directory or hub id; what it has for weights is replaced before the first sample.

Every option of `vllm serve` is taken ({PROGRAM} --help=all lists them), such as --host, --port, --dtype,
--tensor-parallel-size, --max-model-len and --api-key. Weights come over NCCL on GPUs and over gloo on a CPU;
--weight-transfer-config '{{"backend": "gloo"}}' has gloo on GPUs as well."""
REFUSED = {
    "--worker-extension-cls": "it is ours",
    "--max-logprobs": "it is -1",
    "--logprobs-mode": "it is raw_logprobs",
    "--speculative-config": "its tokens are not drawn by our sampler",
    "--api-server-count": "one process knows which weights there are",
    "--headless": "one process knows which weights there are",
    "--grpc": "the trainer speaks HTTP",
}
PLUGIN_GROUPS = (
    "vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop; 2 where the command does not fit."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given in (["-h"], ["--help"]):
        print(HELP)
        return 0 if given else 2
    for argument in given:
        name = argument.partition("=")[0].replace("_", "-")
        if name in REFUSED:
            print(f"{PROGRAM}: {name}: got {argument}, expected none: {REFUSED[name]}", file=sys.stderr)
            return 2
    prepare_environment()
    try:
        import uvloop
        from vllm.entrypoints.launchers.api_server.entry import run_server
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.platforms import current_platform
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        print(f"{PROGRAM}: vLLM 0.32 can't be imported ({error}); install preceptor[vllm]", file=sys.stderr)
        return 2
    parser = make_arg_parser(FlexibleArgumentParser(prog=PROGRAM))
    own = ["--worker-extension-cls", EXTENSION, "--max-logprobs", "-1", "--logprobs-mode", "raw_logprobs"]
    if not any(a.partition("=")[0].replace("_", "-") == "--weight-transfer-config" for a in given):
        backend = "nccl" if current_platform.is_cuda() else GLOO
        own += ["--weight-transfer-config", json.dumps({"backend": backend})]
    args = parser.parse_args([*given, *own])
    args.model = args.model_tag or args.model
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args))
    return 0


def prepare_environment() -> None:
    """Before vLLM is imported; for its processes as well."""
    os.environ[SERVER_PID] = str(os.getpid())
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # our sampler is made for the first one
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # plugins are loaded in a new process only
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    allowed = os.environ.get("VLLM_PLUGINS")
    others = [p.name for group in PLUGIN_GROUPS for p in entry_points(group=group)]
    names = allowed.split(",") if allowed is not None else others
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, Endpoint.name]))


if __name__ == "__main__":
    sys.exit(main())
