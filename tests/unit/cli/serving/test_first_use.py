"""The first ten minutes: one command from a model's name, and mistakes told at once."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from antiphon.apps.serve.deployment_set import Serving, serving_of
from antiphon.apps.serve.kernels import ensure_kernels
from antiphon.cli.serving import first_checks
from antiphon.cli.serving.quick_document import Wishes, document_text, name_of, uri_of
from antiphon.core.document.loading import parse_documents
from antiphon.core.document.spec import ROLES_OF, LLMDeployment, Topology
from antiphon.core.errors import InvalidInput, SpecInvalid


def antiphon(*arguments: object, cwd: Path | None = None) -> tuple[subprocess.CompletedProcess[str], float]:
    started_s = time.monotonic()
    command = [sys.executable, "-m", "antiphon", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)
    return done, time.monotonic() - started_s


def serving(text: str) -> Serving:
    return serving_of(parse_documents(text, "test.yaml"), "test.yaml")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "Tiny_Model-1B"
    directory.mkdir()
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    write_weights(directory / "model.safetensors", 8)
    return directory


def write_weights(path: Path, num_floats: int, num_bytes: int | None = None) -> None:
    """One tensor of float32, with a hole where its values would be; ``num_bytes`` cuts the file."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [num_floats], "data_offsets": [0, 4 * num_floats]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * num_floats if num_bytes is None else num_bytes)


@pytest.mark.parametrize("topology", Topology)
def test_every_topology_has_a_document_for_a_models_name(checkpoint: Path, topology: Topology) -> None:
    wishes = Wishes(topology=topology, dtype="float32", host="127.0.0.1", http_port=0, grpc_port=0, with_keys=True)
    (document,) = parse_documents(document_text(str(checkpoint), wishes), "test.yaml")
    assert isinstance(document, LLMDeployment)
    assert [pool.role for pool in document.spec.pools] == [role.value for role in ROLES_OF[topology]]
    assert document.metadata.name == "tiny-model-1b"
    assert document.spec.model.uri == str(checkpoint)
    assert (document.spec.model.dtype, document.spec.endpoint.http_port) == ("float32", 0)
    assert document.spec.endpoint.api_keys_env == "ANTIPHON_API_KEYS"


@pytest.mark.parametrize(
    ("model", "uri"),
    [
        ("hf://org/name", "hf://org/name"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "hf://HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("pypi://a@1/b.gguf", "pypi://a@1/b.gguf"),
    ],
)
def test_names_become_uris(model: str, uri: str) -> None:
    assert uri_of(model) == uri
    (document,) = parse_documents(document_text(model, Wishes()), "test.yaml")
    assert isinstance(document, LLMDeployment)


def test_a_model_that_is_nowhere_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such directory or file"):
        uri_of("./nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InvalidInput, match="neither a checkpoint directory"):
        uri_of(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
    ("uri", "name"), [("hf://a/Q.4_K-M", "q-4-k-m"), ("/x/135M.gguf", "m-135m"), ("/x/" + "a" * 90, "a" * 40), ("/x/天", "m")]
)
def test_any_uri_gives_a_name(uri: str, name: str) -> None:
    assert name_of(uri) == name


def test_a_dry_run_prints_a_document_that_validates(checkpoint: Path, tmp_path: Path) -> None:
    done, _ = antiphon("serve", checkpoint, "--topology", "afd", "--port", "0", "--dry-run")
    assert done.returncode == 0, done.stderr
    (tmp_path / "made.yaml").write_text(done.stdout)
    assert antiphon("validate", "-f", tmp_path / "made.yaml")[0].returncode == 0


def test_init_writes_a_document_and_never_over_one(checkpoint: Path, tmp_path: Path) -> None:
    done, _ = antiphon("init", checkpoint, "-o", "mine.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "# auto = the checkpoint's" in (tmp_path / "mine.yaml").read_text()
    again, _ = antiphon("init", checkpoint, "-o", "mine.yaml", cwd=tmp_path)
    assert again.returncode == 1
    assert "mine.yaml is there already" in again.stderr


def test_examples_are_listed_and_printed() -> None:
    listed, _ = antiphon("examples")
    assert "smollm2-afd" in listed.stdout
    printed, _ = antiphon("examples", "smollm2-afd")
    assert parse_documents(printed.stdout, "example")
    missing, _ = antiphon("examples", "smollm2-adf")
    assert "did you mean smollm2-afd?" in missing.stderr


def test_a_mistyped_verb_is_told_the_near_one() -> None:
    done, _ = antiphon("srve")
    assert done.returncode == 2
    assert "did you mean serve?" in done.stderr


def test_a_port_that_is_taken_is_told_before_anything_starts(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done, spent_s = antiphon("serve", checkpoint, "--port", port, "--grpc-port", "0")
    assert done.returncode == 1
    assert f"spec.endpoint.httpPort: port {port} of 127.0.0.1 is taken; --port 0 takes any free one" in done.stderr
    assert spent_s < 30  # of a machine that does much else; nothing of Ray or torch is imported
    code = "import sys, antiphon.cli.serving.serve; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_wrong_fields_are_told_with_file_and_line(tmp_path: Path, checkpoint: Path) -> None:
    text = document_text(str(checkpoint), Wishes()).replace("replicas: 1", "replicas: x")
    (tmp_path / "wrong.yaml").write_text(text)
    done, _ = antiphon("serve", tmp_path / "wrong.yaml")
    line = text[: text.index("replicas: x")].count("\n") + 1
    assert f"wrong.yaml:{line}: spec.pools[0].replicas: expected an integer" in done.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_told(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(SpecInvalid, match=r"tokenizer\.json|config\.json|no weights"):
        first_checks.check(serving(document_text(str(checkpoint), Wishes(http_port=0, grpc_port=0))))


def broken(checkpoint: Path, how: str) -> str:
    """A checkpoint that can't be served, and what is to be said of it."""
    weights, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    match how:
        case "cut short":
            write_weights(weights, 1000, 2000)
            return f"{weights} is not whole: it has 2,000 bytes, its header says"
        case "empty":
            weights.write_bytes(b"")
            return f"{weights} is not a whole safetensors file: it has 0 bytes"
        case "no header":
            weights.write_bytes((9).to_bytes(8, "little") + b"not json!")
            return f"{weights} is not a safetensors file"
        case "larger than memory":
            write_weights(weights, 2**40)
            return f"{checkpoint}: the weights take 2048.0 GiB in memory, this machine has"
        case "index without files":
            weights.unlink()
            index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
            return f"{index} names model-1.safetensors and 1 more of 2, which is not there"
        case "tokenizer is no JSON":
            (checkpoint / "tokenizer.json").write_text("{")
            return f"{checkpoint / 'tokenizer.json'}: can't be read as JSON"
        case "a link to nowhere":
            weights.unlink()
            weights.symlink_to("/nowhere/blob")
            return f"{checkpoint} has no weights (model.safetensors, or"
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    ["cut short", "empty", "no header", "larger than memory", "index without files", "tokenizer is no JSON", "a link to nowhere"],
)
def test_a_checkpoint_that_can_not_be_served_is_told_by_its_file(checkpoint: Path, how: str) -> None:
    said = broken(checkpoint, how)
    with pytest.raises(SpecInvalid) as told:
        first_checks.check(serving(document_text(str(checkpoint), Wishes(http_port=0, grpc_port=0))))
    assert str(told.value).startswith(f"tiny-model-1b: spec.model.uri: {said}")


def test_what_nobody_may_read_is_told_by_its_file(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, **_: object) -> None:  # the superuser, who runs tests in containers, may read everything
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    asked = serving(document_text(str(checkpoint), Wishes(http_port=0, grpc_port=0)))
    monkeypatch.setattr("antiphon.cli.serving.checkpoint_files.os.stat", refuse)
    with pytest.raises(SpecInvalid, match=r"spec\.model\.uri: .*Tiny_Model-1B can't be read: Permission denied"):
        first_checks.check(asked)
    with pytest.raises(InvalidInput, match="Tiny_Model-1B can't be read: Permission denied"):
        uri_of(str(checkpoint))


def test_without_a_compiler_a_start_ends_at_once_with_the_ways_on(checkpoint: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "ANTIPHON_CACHE": str(tmp_path), "RAY_ADDRESS": ""}
    for name in ("CXX", "ANTIPHON_KERNELS", "ANTIPHON_NATIVE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "antiphon", "serve", str(checkpoint), "--port", "0", "--grpc-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: kernels: no C++ compiler (c++, g++ or clang++) on PATH builds them: `apt-get install g++`")
    assert "ANTIPHON_NATIVE=0 to go without: models run on torch alone, several times slower" in line
    assert "Starting" not in done.stdout


def test_going_without_kernels_is_said_with_its_cost(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setenv("ANTIPHON_NATIVE", "0")
    monkeypatch.setenv("PATH", "/nowhere")
    first_checks.check(serving(document_text(str(checkpoint), Wishes(http_port=0, grpc_port=0))))
    said: list[str] = []
    ensure_kernels(said.append)
    assert said == ["No kernels, models run on torch alone, several times slower: ANTIPHON_NATIVE=0 turns them off"]


@pytest.mark.parametrize("cache", ["{memory: 900000Gi}", "{numBlocks: 90000000, blockSizeTokens: 256}"])
def test_a_cache_beyond_the_machines_memory_is_told(checkpoint: Path, cache: str) -> None:
    text = document_text(str(checkpoint), Wishes(http_port=0, grpc_port=0)).replace("{memory: 1Gi}", cache)
    with pytest.raises(SpecInvalid, match=r"spec\.cache\.(memory|numBlocks): .*don't fit into this machine"):
        first_checks.check(serving(text))


@pytest.mark.parametrize(
    ("num_blocks", "missing", "said"),
    [(90_000_000, None, "spec.cache.numBlocks: .*don't fit"), (64, "tokenizer.json", "spec.model.uri: .*has no tokenizer.json")],
)
def test_a_model_that_had_to_be_fetched_is_looked_at_before_anything_starts(
    checkpoint: Path, num_blocks: int, missing: str | None, said: str
) -> None:
    text = document_text(str(checkpoint), Wishes(http_port=0, grpc_port=0))
    text = text.replace(str(checkpoint), "hf://org/tiny").replace(
        "{memory: 1Gi}", f"{{numBlocks: {num_blocks}, blockSizeTokens: 256}}"
    )
    asked = serving(text)
    first_checks.check(asked)  # nothing is known of it yet
    if missing is not None:
        (checkpoint / missing).unlink()
    (name,) = asked.models
    with pytest.raises(SpecInvalid, match=said):
        first_checks.check_checkpoints(replace(asked, checkpoints={name: str(checkpoint)}))


def test_a_good_document_passes_and_too_few_open_files_are_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = serving(document_text(str(checkpoint), Wishes(http_port=0, grpc_port=0)))
    first_checks.check(good)
    monkeypatch.setattr(first_checks.resource, "getrlimit", lambda which: (256, 256))
    with pytest.raises(SpecInvalid, match="ulimit -n 1024"):
        first_checks.check(good)


def test_options_of_a_model_are_refused_beside_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("")
    done, _ = antiphon("serve", tmp_path / "a.yaml", "--topology", "pd")
    assert "--topology is for a model" in done.stderr
    assert "what to serve?" in antiphon("serve")[0].stderr


def test_verbs_that_ask_a_gateway_say_what_to_start() -> None:
    for verb in (("status", "--endpoint", "127.0.0.1:9"), ("keys", "usage", "http://127.0.0.1:9")):
        done, _ = antiphon(*verb)
        assert done.returncode == 1
        assert done.stderr == f"error: no connection to {verb[-1]}: connection refused; is `antiphon serve` running?\n"
