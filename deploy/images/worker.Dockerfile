# Head, workers, gateway and router: docker build -f deploy/images/worker.Dockerfile .
# For accelerators: --build-arg BASE=nvidia/cuda:… with Python 3.11. Pinning: see operator.Dockerfile.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
RUN python -m venv /opt/antiphon
ENV PATH=/opt/antiphon/bin:$PATH
COPY deploy/constraints.txt /src/constraints.txt
COPY pyproject.toml README.md LICENSE /src/
COPY platform /src/platform
COPY operators /src/operators
RUN pip install --no-cache-dir -c /src/constraints.txt "/src[coe,convert,operator]"

FROM ${BASE}
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 procps && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/antiphon /opt/antiphon
ENV PATH=/opt/antiphon/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
RUN useradd --uid 1000 --no-create-home antiphon
USER 1000:1000
WORKDIR /tmp
