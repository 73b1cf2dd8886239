# The images of `teacher-serve`, built from the repository's root:
#     docker build -f deploy/teacher.Dockerfile --target gpu -t preceptor-teacher:gpu .   vLLM, for NVIDIA GPUs
#     docker build -f deploy/teacher.Dockerfile --target cpu -t preceptor-teacher:cpu .   the torch backend alone

FROM python:3.11-slim-bookworm AS build
ENV PATH=/opt/preceptor/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/preceptor
WORKDIR /src
COPY requirements/server.txt requirements/
RUN pip install --no-deps -r requirements/server.txt

FROM build AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY teacher_api teacher_api
COPY teacher_server teacher_server
COPY student_trainer student_trainer
RUN pip wheel --no-deps --no-build-isolation -w /wheels .

FROM build AS build-cpu
ARG TORCH_INDEX_URL=
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
COPY --from=wheel /wheels /wheels
RUN pip install --no-deps /wheels/*.whl

FROM build AS build-gpu
RUN pip install -c requirements/server.txt vllm==0.32.0
COPY --from=wheel /wheels /wheels
RUN pip install --no-deps /wheels/*.whl

# What both images have beside their environment: a user, and the directories that it may write to (volumes): models from
# the hub and what is compiled in /cache, accounts and kept scores in /state.
FROM python:3.11-slim-bookworm AS runtime
RUN useradd --uid 10001 --user-group --home-dir /cache --create-home preceptor && \
    install -d -o 10001 -g 10001 /state
ENV HOME=/cache PATH=/opt/preceptor/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/huggingface NUMBA_CACHE_DIR=/cache/numba \
    TEACHER_HOST=0.0.0.0 TEACHER_METRICS_HOST=0.0.0.0 TEACHER_METRICS_PORT=9464 TEACHER_PROBE_PORT=8302
WORKDIR /cache
VOLUME /cache /state
EXPOSE 8300 8301 8302 9464
# A large model loads for minutes; the start period counts no failure, and ends with the first success.
HEALTHCHECK --interval=10s --timeout=5s --start-period=1800s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8302/readyz', timeout=4)"]
ENTRYPOINT ["teacher-serve"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/preceptor /opt/preceptor
ENV TEACHER_BACKEND=torch
USER 10001:10001

FROM runtime AS gpu
# Triton, in vLLM, compiles what starts its kernels.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build-gpu /opt/preceptor /opt/preceptor
ENV TEACHER_BACKEND=vllm NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
