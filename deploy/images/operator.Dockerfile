# The operator: docker build -f deploy/images/operator.Dockerfile .
# The base is an exact version; deploy/images/pin-bases.sh pins it to the digest that version has, as a release does.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
RUN python -m venv /opt/antiphon
ENV PATH=/opt/antiphon/bin:$PATH
COPY deploy/constraints.txt /src/constraints.txt
# What the running operator imports, and nothing of the data plane: no torch, no Ray; downloads run in the worker's image.
RUN pip install --no-cache-dir -c /src/constraints.txt \
    kopf lightkube prometheus_client pydantic pyyaml typer jsonpatch aiohttp hatchling
COPY pyproject.toml README.md LICENSE /src/
COPY platform /src/platform
COPY operators /src/operators
COPY deploy/examples /src/deploy/examples
RUN pip install --no-cache-dir --no-deps --no-build-isolation /src && pip uninstall --yes hatchling pip \
    && find /opt/antiphon -name "__pycache__" -type d -prune -exec rm -rf {} +

FROM ${BASE}
COPY --from=build /opt/antiphon /opt/antiphon
ENV PATH=/opt/antiphon/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp LOGNAME=antiphon
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["antiphon-operator"]
CMD ["run"]
