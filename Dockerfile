# A GPU image that trains, and runs `make test`:
#   docker build -t mosaic-bert .
#   docker run --gpus all --ipc=host -v /data:/data mosaic-bert composer main.py yamls/mosaic_bert.yaml data_local=/data/c4
# The current stack. The base is CUDA's own, because an image of torch exists for some of its versions only: pip brings
# torch with its CUDA 13 libraries, and the base nvcc for flash-attn. The host needs driver 580 or newer.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# git names the commit in a run's log; make runs the tests; g++ and Python's headers build Triton's launchers. Versions
# follow the base image's release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Ubuntu's image has a user with id 1000.
RUN useradd --create-home --uid 1001 bert \
    && mkdir /opt/venv \
    && chown 1001:1001 /opt/venv
USER 1001:1001
WORKDIR /home/bert/mosaic-bert

# Requirements first: a change of the code leaves this layer as it is.
COPY --chown=1001:1001 requirements-current.txt requirements-composer.txt requirements-dev.txt requirements-onnx.txt \
    requirements-data.txt ./
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -r requirements-current.txt -r requirements-dev.txt \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps -r requirements-composer.txt -r requirements-data.txt

COPY --chown=1001:1001 . .

# The Makefile takes this environment for its own, and finds it set up.
ENV VENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN echo current > /opt/venv/.installed

# Build with --build-arg FLASH_ATTN=1 to have flash-attn too: an hour of compiling.
COPY --chown=1001:1001 requirements-gpu.txt ./
ARG FLASH_ATTN=0
RUN if [ "$FLASH_ATTN" = 1 ]; then \
        pip install --no-cache-dir ninja==1.13.0 wheel==0.46.3 \
        && pip install --no-cache-dir --no-build-isolation -r requirements-gpu.txt; \
    fi

CMD ["make", "help"]
