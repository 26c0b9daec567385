# Head, workers, gateway, router and downloads: docker build -f deploy/images/worker.Dockerfile .
# On processors alone, for amd64 and arm64 (docker buildx build --platform linux/amd64,linux/arm64 …). For cards: worker-gpu.Dockerfile.
# The base is an exact version; deploy/images/pin-bases.sh pins it to the digest that version has, as a release does.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/antiphon
ENV PATH=/opt/antiphon/bin:$PATH
COPY deploy/constraints.txt deploy/images/requirements.lock /src/
# By version and by hash, whatever index or mirror it comes from.
RUN pip install --no-cache-dir --require-hashes --no-deps -r /src/requirements.lock
# torch for processors only: the default one brings some gigabytes of CUDA libraries along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir -c /src/constraints.txt --index-url ${TORCH_INDEX} torch
# For every instruction set, the newest that a machine has is taken when a worker starts; a kernel that does not compile ends the build.
COPY platform /src/platform
RUN export PYTHONPATH=/src/platform PYTHONDONTWRITEBYTECODE=1 && python -m antiphon.models.native.library --into /opt/antiphon/kernels \
    && python -m antiphon.transport.native.build --into /opt/antiphon/kernels \
    && python -m antiphon.coe.routing.native.build --into /opt/antiphon/kernels
COPY pyproject.toml README.md LICENSE /src/
COPY operators /src/operators
COPY deploy/examples /src/deploy/examples
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[route,convert,operator]"
# Nothing that no start needs; then all that the image is for is run once, and what that imported starts from bytecode.
COPY deploy/images/trim.py deploy/images/check.py /src/
RUN python /src/trim.py remove /opt/antiphon
RUN cd /tmp && HOME=/tmp LOGNAME=antiphon ANTIPHON_KERNELS=/opt/antiphon/kernels python /src/check.py \
    && python /src/trim.py keep /opt/antiphon && rm -rf /tmp/*

FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 procps && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/antiphon /opt/antiphon
ENV PATH=/opt/antiphon/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp LOGNAME=antiphon \
    ANTIPHON_KERNELS=/opt/antiphon/kernels
RUN useradd --uid 1000 --no-create-home antiphon
USER 1000:1000
WORKDIR /tmp
