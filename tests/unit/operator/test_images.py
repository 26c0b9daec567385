"""The images: exact bases, and the script that pins them to digests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMAGES = ROOT / "deploy/images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_stands_on_an_exact_base_in_two_stages_and_runs_as_nobody_special(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^ARG BASE=\S+:\d+\.\d+\.\d+\S*$", text, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE}", "${BASE}"]
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", text, re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_is_given_every_path_that_the_wheel_is_made_of(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], project["project"]["readme"], *project["project"]["license-files"]]
    lines = re.findall(r"^COPY (?!--from)(.+) /src/\S*$", path.read_text(), re.MULTILINE)
    copied = [source for line in lines for source in line.split()]
    missing = [each for each in needed if not any(Path(each).is_relative_to(source) for source in copied)]
    assert missing == []


def test_the_operator_runs_on_what_its_image_installs() -> None:
    """torch, Ray and the rest of the data plane are hidden, as they are in the image."""
    hidden = (
        "torch",
        "ray",
        "grpc",
        "fastapi",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "minio",
        "redis",
        "numpy",
        "httpx",
    )
    code = (
        "import sys\n"
        f"for name in {hidden!r}: sys.modules[name] = None\n"
        "import antiphon_operator.cli, antiphon_operator.controller.run, antiphon_operator.planning.preview\n"
        "from antiphon_operator.api.crds import definitions; print(len(definitions()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "4", done.stderr


def test_worker_images_carry_kernels_for_several_instruction_sets_and_name_where_they_are() -> None:
    for name in ("worker", "worker-gpu"):
        text = (IMAGES / f"{name}.Dockerfile").read_text()
        (built,) = re.findall(r"antiphon\.models\.native\.library --into (\S+)", text)
        assert f"ANTIPHON_KERNELS={built}" in text
        for module in ("transport", "coe.routing"):
            assert f"python -m antiphon.{module}.native.build --into {built}" in text
    assert "torch" not in re.findall(r"pip install[^#]*", (IMAGES / "operator.Dockerfile").read_text())[0]


def test_what_a_router_imports_to_serve_is_in_the_worker_image_which_has_no_training() -> None:
    """Everything that only the extra ``coe`` brings is hidden."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in ("worker", "worker-gpu"):
        assert "/src[route," in (IMAGES / f"{name}.Dockerfile").read_text()
    assert set(extras["route"]) < set(extras["coe"])
    hidden = ("sklearn", "scipy", "matplotlib", "onnx", "threadpoolctl")
    code = (
        "import sys\n"
        f"for name in {hidden!r}: sys.modules[name] = None\n"
        "import antiphon.cli.coe, antiphon.cli.serving.serve, antiphon.coe.routing.encoder, onnxruntime; print('served')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "served", done.stderr


def test_a_worker_image_that_does_not_serve_is_not_built() -> None:
    """What is cut out is cut before the check; only bytecode is touched after it."""
    text = (IMAGES / "worker.Dockerfile").read_text()
    remove, check, keep = (text.index(step) for step in ("trim.py remove", "python /src/check.py", "trim.py keep"))
    assert remove < check < keep
    assert "rm -r" not in text[check : text.index("\nFROM", check)].replace("rm -rf /tmp/*", "")


def pin(directory: Path, answer: str) -> subprocess.CompletedProcess[str]:
    for path in (*DOCKERFILES, IMAGES / "pin-bases.sh"):
        shutil.copy(path, directory)
    tools = directory / "bin"
    tools.mkdir()
    (tools / "docker").write_text(f'#!/bin/sh\n[ "$1 $2 $3" = "buildx imagetools inspect" ] && echo "{answer}"\n')
    (tools / "docker").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    script = str(directory / "pin-bases.sh")
    return subprocess.run([script], env=environment, capture_output=True, text=True, timeout=30, check=False)


def test_bases_are_pinned_to_the_digest_of_their_version(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    assert pin(tmp_path, digest).returncode == 0
    for path in DOCKERFILES:
        (line,) = [line for line in (tmp_path / path.name).read_text().splitlines() if line.startswith("ARG BASE=")]
        assert line.endswith(f"@{digest}")


def test_without_a_digest_nothing_is_changed(tmp_path: Path) -> None:
    done = pin(tmp_path, "no such image")
    assert done.returncode == 1
    assert "has no digest" in done.stderr
    assert all((tmp_path / path.name).read_text() == path.read_text() for path in DOCKERFILES)
