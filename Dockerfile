# A GPU image that trains, and runs `make test`:
#   docker build -t mosaic-bert .
#   docker run --gpus all --ipc=host -v /data:/data mosaic-bert composer main.py yamls/mosaic_bert.yaml data_local=/data/c4
# The base brings torch 2.7.0, the version that requirements.txt pins, built for CUDA 12.6, with nvcc for flash-attn.
FROM pytorch/pytorch:2.7.0-cuda12.6-cudnn9-devel

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# git names the commit in a run's log; make runs the tests. Versions follow the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 bert \
    && mkdir /opt/venv \
    && chown 1000:1000 /opt/venv
USER 1000:1000
WORKDIR /home/bert/mosaic-bert

# Requirements first: a change of the code leaves this layer as it is.
COPY --chown=1000:1000 requirements.txt requirements-dev.txt requirements-onnx.txt requirements-data.txt ./
RUN python -m venv --system-site-packages /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt -r requirements-dev.txt \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps -r requirements-data.txt

COPY --chown=1000:1000 . .

# The Makefile takes this environment for its own, and finds it set up.
ENV VENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN touch /opt/venv/.installed

# Build with --build-arg FLASH_ATTN=1 to have flash-attn too: an hour of compiling.
COPY --chown=1000:1000 requirements-gpu.txt ./
ARG FLASH_ATTN=0
RUN if [ "$FLASH_ATTN" = 1 ]; then pip install --no-cache-dir --no-build-isolation -r requirements-gpu.txt; fi

CMD ["make", "help"]
