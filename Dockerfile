# anyshard in a container, for CPUs or for NVIDIA GPUs:
#
#     docker build --target cpu -t anyshard:cpu .
#     docker build --target cuda -t anyshard:cuda .
#
# Both hold the pinned packages of constraints.txt with DeepSpeed's operators for the CPU built, and end in `anyshard doctor`.
# Enroot and pyxis take them as they are: launch.slurm.container_image=anyshard:cuda launch.slurm.python=/opt/anyshard/.venv/bin/python

ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${PYTHON_IMAGE} AS cpu
# the compiler stays: DeepSpeed builds operators for the processor that it finds
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libaio-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/anyshard
COPY . .
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu \
    DS_ACCELERATOR=cpu \
    PIP_NO_CACHE_DIR=1
RUN python3 tools/setup.py
ENV PATH=/opt/anyshard/.venv/bin:${PATH} \
    TORCH_EXTENSIONS_DIR=/opt/anyshard/.venv/torch_extensions
RUN anyshard doctor
ENTRYPOINT ["anyshard"]

FROM ${CUDA_IMAGE} AS cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libaio-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/anyshard
COPY . .
# the default index has the CUDA build of torch; operators for the GPU are built where there is one, at the first run
ENV TORCH_INDEX=https://pypi.org/simple \
    PIP_NO_CACHE_DIR=1
RUN python3 tools/setup.py
ENV PATH=/opt/anyshard/.venv/bin:${PATH} \
    TORCH_EXTENSIONS_DIR=/opt/anyshard/.venv/torch_extensions
# no GPU answers while an image is built
RUN DS_ACCELERATOR=cpu anyshard doctor
ENTRYPOINT ["anyshard"]
