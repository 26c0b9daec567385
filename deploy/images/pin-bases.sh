#!/bin/sh
# Pins the base of every Dockerfile here to the digest that its tag has now: deploy/images/pin-bases.sh
# Needs docker with buildx and a way to the registry; run it for a release, and commit what it changes.
set -eu
cd "$(dirname "$0")"
for file in *.Dockerfile; do
  base=$(sed -n 's/^ARG BASE=\([^@]*\).*/\1/p' "$file")
  digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$base")
  case $digest in
    sha256:*) ;;
    *) echo "$file: $base has no digest: $digest" >&2; exit 1 ;;
  esac
  sed "s|^ARG BASE=.*|ARG BASE=$base@$digest|" "$file" > "$file.new"
  mv "$file.new" "$file"
  echo "$file: $base@$digest"
done
