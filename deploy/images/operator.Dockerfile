# The operator: docker build -f deploy/images/operator.Dockerfile .
# The base is an exact version; deploy/images/pin-bases.sh pins it to the digest that version has, as a release does.
ARG BASE=python:3.11.14-slim-bookworm

FROM ${BASE} AS build
RUN python -m venv /opt/antiphon
ENV PATH=/opt/antiphon/bin:$PATH
COPY deploy/constraints.txt deploy/images/operator.lock /src/
# By version and by hash, whatever index or mirror it comes from; hatchling builds and goes.
RUN pip install --no-cache-dir --require-hashes --no-deps -r /src/operator.lock && pip install --no-cache-dir -c /src/constraints.txt hatchling
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
