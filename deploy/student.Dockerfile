# The image of `student-train`, `student-eval` and the client's commands, built from the repository's root:
#     docker build -f deploy/student.Dockerfile -t preceptor-student .
# For GPUs and CPUs alike: the torch that pip finds decides, or TORCH_INDEX_URL. It samples from the student's own weights
# or from rollout servers; an engine of vLLM in the trainer's process is not in it.

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX_URL=
ENV PATH=/opt/preceptor/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/preceptor
WORKDIR /src
COPY requirements/train.txt requirements/
# hadolint ignore=DL3013
RUN pip install --no-deps -r requirements/train.txt && \
    pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY teacher_api teacher_api
COPY teacher_server teacher_server
COPY student_trainer student_trainer
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm AS student
RUN useradd --uid 10001 --user-group --home-dir /cache --create-home preceptor && install -d -o 10001 -g 10001 /runs
COPY --from=build /opt/preceptor /opt/preceptor
ENV HOME=/cache PATH=/opt/preceptor/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /runs
VOLUME /cache /runs
USER 10001:10001
ENTRYPOINT ["student-train"]
