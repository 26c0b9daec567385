"""The peers' runner: takes turns, says who is absent and why, and goes on."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench/peers"

FAKE = """
import sys
from peer_line import answer, decode_figures, keep_stdout
private = keep_stdout()
print("what a library prints goes elsewhere")

class Fake:
    def facts(self):
        return {"version": "1"}
    def decode(self, batch, num_prompt, num_generated):
        if batch == int(sys.argv[2]):
            raise MemoryError("too much")
        return decode_figures(batch, batch * num_generated, float(sys.argv[1]))
    def prefill(self, num_prompt):
        return {"tokens_per_s": 1.0, "ttft_s": float(num_prompt)}

answer(Fake(), private)
"""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("peers")
    for name in ("peers", "peer_environments"):
        sys.modules.pop(name, None)


@pytest.fixture
def setup(peers, tmp_path):
    return peers.Setup(
        checkpoint=Path("some-model"), gguf=None, cores=(0,), cache=tmp_path / "cache", num_prompt=4, num_generated=10
    )


@pytest.fixture
def with_fakes(peers, monkeypatch):
    """Systems by name: seconds a decode takes, and the batch it fails at."""

    def use(systems):
        def command(name, _setup):
            seconds, fails_at = systems[name]
            return [sys.executable, "-c", FAKE, str(seconds), str(fails_at)], {"PYTHONPATH": str(BENCH)}

        monkeypatch.setattr(peers, "_command", command)

    return use


def test_systems_take_turns_in_rotating_order_and_medians_are_held_against_the_best_peer(peers, setup, with_fakes):
    with_fakes({"vllm-cpu": (2.0, 0), "llama-cpp": (4.0, 0), "monolith": (1.0, 0)})
    figures = [peers.Figure(kind="decode", size=8)]
    lines = list(peers.measure(setup, ["vllm-cpu", "llama-cpp", "monolith"], figures, 2, 60))
    assert [line["system"] for line in lines] == ["vllm-cpu", "llama-cpp", "monolith", "llama-cpp", "monolith", "vllm-cpu"]
    found = {line["system"]: line for line in peers.medians(lines)}
    assert found["monolith"]["tokens_per_s"] == pytest.approx(80)
    assert found["monolith"]["to_best_peer"] == pytest.approx(2)
    assert found["llama-cpp"]["to_best_peer"] == pytest.approx(0.5)
    assert "monolith" in peers.table(list(found.values()))


def test_modes_of_a_peer_are_systems_of_their_own_and_the_best_of_them_is_the_peer(peers, setup, with_fakes):
    with_fakes({"transformers": (4.0, 0), "transformers/eager": (2.0, 0), "1A1F": (1.0, 0)})
    lines = list(peers.measure(setup, ["transformers", "transformers/eager", "1A1F"], [peers.Figure(kind="decode", size=8)], 1, 60))
    found = {line["system"]: line["to_best_peer"] for line in peers.medians(lines)}
    assert found == {"transformers": 0.5, "transformers/eager": 1.0, "1A1F": 2.0}


def test_a_figure_that_fails_is_said_and_not_asked_again_while_others_go_on(peers, setup, with_fakes):
    with_fakes({"vllm-cpu": (1.0, 64)})
    figures = [peers.Figure(kind="decode", size=64), peers.Figure(kind="decode", size=1), peers.Figure(kind="prefill", size=7)]
    lines = list(peers.measure(setup, ["vllm-cpu"], figures, 2, 60))
    assert [("absent" in line, line["size"]) for line in lines] == [(True, 64), (False, 1), (False, 7), (False, 1), (False, 7)]
    assert "MemoryError: too much" in lines[0]["absent"]


def test_a_system_that_does_not_start_gets_a_line_that_says_why(peers, setup, monkeypatch):
    monkeypatch.setattr(peers, "_command", lambda name, setup: ([sys.executable, "-c", "raise SystemExit('no such weights')"], {}))
    (line,) = peers.measure(setup, ["vllm-cpu"], [peers.Figure(kind="decode", size=1)], 1, 60)
    assert line["system"] == "vllm-cpu"
    assert "no such weights" in line["absent"]


def test_an_environment_that_cannot_be_made_is_an_absent_peer_and_leaves_its_log(peers, tmp_path):
    environments = importlib.import_module("peer_environments")
    home = tmp_path / "broken"
    home.mkdir()
    (home / "venv").write_text("in the way")
    with pytest.raises(environments.PeerAbsent, match=r"install\.log"):
        environments.python_of(environments.Recipe(name="broken", requirements=("numpy",)), tmp_path)
    assert "venv" in (home / "install.log").read_text()
    assert not (home / "made-by.json").exists()


def test_llama_cpp_without_a_gguf_file_says_what_it_needs(peers, setup):
    with pytest.raises(peers.PeerAbsent, match="--gguf"):
        peers._bf16_gguf("python", setup)


def test_a_picture_is_drawn_of_the_medians(peers, tmp_path):
    lines = [
        {"bench": "peers", "model": "m", "kind": kind, "size": size, "system": system, "tokens_per_s": 10.0 * size}
        for kind, size in (("decode", 1), ("decode", 8), ("prefill", 1024))
        for system in ("vllm-cpu", "monolith")
    ]
    importlib.import_module("peer_picture").draw(peers.medians(lines), tmp_path / "peers.svg")
    assert "tokens per second" in (tmp_path / "peers.svg").read_text()
