# The worker with torch for CUDA cards: docker build -f deploy/images/worker-gpu.Dockerfile .
# torch's wheels bring their own CUDA libraries: the base needs none, and the node's driver does the rest. Pinning: worker.Dockerfile.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/antiphon
ENV PATH=/opt/antiphon/bin:$PATH
COPY deploy/constraints.txt deploy/images/requirements.lock /src/
RUN pip install --no-cache-dir --require-hashes --no-deps -r /src/requirements.lock
RUN pip install --no-cache-dir -c /src/constraints.txt torch
COPY pyproject.toml README.md LICENSE /src/
COPY platform /src/platform
COPY operators /src/operators
COPY deploy/examples /src/deploy/examples
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[route,convert,operator,nixl]"
RUN python -m antiphon.models.native.library --into /opt/antiphon/kernels
RUN python -m antiphon.transport.native.build --into /opt/antiphon/kernels \
    && python -m antiphon.coe.routing.native.build --into /opt/antiphon/kernels

FROM ${BASE}
# Triton compiles the launchers of its kernels when a worker starts.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 procps && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/antiphon /opt/antiphon
ENV PATH=/opt/antiphon/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp LOGNAME=antiphon \
    ANTIPHON_KERNELS=/opt/antiphon/kernels NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --uid 1000 --no-create-home antiphon
USER 1000:1000
WORKDIR /tmp
