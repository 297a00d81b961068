# The server as an image, from the wheel. TORCH_INDEX picks PyTorch's build: CPU, or for NVIDIA GPUs
# https://download.pytorch.org/whl/cu128 (run with --gpus all).
FROM python:3.12-slim AS build
# The wheel brings the CPU kernels, compiled here for each level of processors.
# Not pinned: Debian keeps only the newest version of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# A compiler for torch.compile; without it, steps run uncompiled around the wheel's kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# The range is pyproject.toml's: another version would be replaced below by PyPI's build.
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch>=2.9,<2.16"
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[server,structured]" && rm -r /wheels
RUN useradd --uid 10001 --create-home --home-dir /cache qwen3fast
USER 10001
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache/compiled
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready')"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "qwen3fast", "serve", "--host", "0.0.0.0"]
CMD ["--model", "tiny"]
