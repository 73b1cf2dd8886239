"""`python -m student_trainer.report`: the report of a finished run, with its teacher still up.

Exit codes as student-train: 0 written; 2 the command, a file or the teacher does not fit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import Field, SecretStr, ValidationError

from student_trainer.config import TrainConfig
from student_trainer.data.config import PromptConfig
from student_trainer.data.prompts import load_prompts
from student_trainer.report import collect, compare, curves, html
from student_trainer.report.model import Report
from student_trainer.resume import CONFIG_FILE, FINAL
from student_trainer.rollout.base import RolloutError
from student_trainer.tracking import METRICS_FILE, read_metrics
from teacher_api import settings
from teacher_api.client import TeacherClient
from teacher_api.errors import TeacherError
from teacher_api.settings import Section
from teacher_api.tls import ClientTls
from teacher_api.types import CallMetadata

PROGRAM = "python -m student_trainer.report"
DESCRIPTION = "One HTML file about a run: curves, and completions with each token coloured by its KL to the teacher."
UNUSABLE = 2


class ReportConfig(Section):
    run: str = Field(min_length=1)
    """Output directory of a finished student-train."""
    teacher_url: str = Field(min_length=1)
    """The run's teacher, such as grpc://127.0.0.1:8301."""
    api_key: SecretStr = SecretStr("")
    """Sent to the teacher as a bearer token."""
    tls_cert: str = ""
    """File of a certificate (PEM) for a teacher that asks for one."""
    tls_key: str = ""
    """File of its key."""
    tls_ca: str = ""
    """File of the teacher's authorities; empty: the system's."""
    before: str = ""
    """Model to compare with; empty: the one the run began with."""
    after: str = ""
    """Model to look at; empty: the run's final student."""
    num_prompts: int = Field(8, ge=1, le=200)
    """Prompts shown: the first of the evaluation data, or of the training data where there is none."""
    max_new_tokens: int = Field(0, ge=0)
    """Longest completion; 0: as in training."""
    output: str = ""
    """File to write; empty: report.html in the run's directory."""


def main(arguments: Sequence[str]) -> int:
    try:
        config, _ = settings.load(
            ReportConfig, arguments, prog=PROGRAM, description=DESCRIPTION, env_prefix="PRECEPTOR_REPORT_"
        )
        print(_write(config))
    except (ValueError, OSError, RolloutError, TeacherError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return UNUSABLE
    return 0


def _problems(train: TrainConfig) -> PromptConfig:
    """What the two students are compared on: the problems of evaluation, or the training prompts where there are none.

    Raises:
        ValueError: those are several sources, or text without prompts.
    """
    if train.eval.data is not None:
        return train.eval.data
    if train.data.domains or train.data.format == "packed_text":
        got = "several domains" if train.data.domains else "packed text"
        raise ValueError(f"eval.data: not set, and the run was trained on {got}; expected problems to compare on")
    return train.data


def _write(config: ReportConfig) -> Path:
    run_dir = Path(config.run)
    train = _train_config(run_dir / CONFIG_FILE)
    if train.rollout.environment:
        raise ValueError(
            f"rollout.environment: the run's samples are conversations with {train.rollout.environment}, which this "
            "page does not show; expected a run without (its accuracies and curves are in metrics.jsonl)"
        )
    models = (config.before or train.student.model, config.after or str(run_dir / FINAL))
    data = _problems(train)
    longest = config.max_new_tokens or train.rollout.max_new_tokens
    checkpoints = [compare.load(model, longest) for model in models]
    prompts = load_prompts(data, checkpoints[0].student.tokenizer, limit=config.num_prompts).all()
    tls = ClientTls(config.tls_cert, config.tls_key, config.tls_ca)
    metadata = CallMetadata(experiment="report", priority="interactive")
    with TeacherClient(
        config.teacher_url, api_key=config.api_key.get_secret_value() or None, metadata=metadata, tls=tls
    ) as client:
        info = client.info()
        comparisons = compare.compare(checkpoints, prompts, train.eval.task, client)
    objective = f"{train.loss.objective}, nats per token"
    report = Report(
        title=f"Run {run_dir.resolve().name}",
        subtitle=f"Greedy completions of {models[0]} (before) and {models[1]} (after), scored by {info.model_name}.",
        sides=("before", "after"),
        charts=tuple(curves.from_metrics(read_metrics(run_dir / METRICS_FILE), divergence_name=objective)),
        comparisons=tuple(comparisons),
        exact=collect.is_exact(info),
        config_yaml=settings.dump_yaml(train),
        facts={"teacher": info.model_name, "teacher's fingerprint": info.fingerprint},
    )
    path = Path(config.output) if config.output else run_dir / "report.html"
    html.write(report, path)
    return path


def _train_config(path: Path) -> TrainConfig:
    try:
        return TrainConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ValueError(f"{path}: {error.errors()[0]['msg']} ({error.error_count()} errors)") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
