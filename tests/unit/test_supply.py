"""What an installation is made of: licences that may be, a bill that has all of it, and a table of holes whose tests exist."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import httpx
import pytest

ROOT = Path(__file__).parents[2]
SUPPLY = ROOT / "deploy/supply"
SECURITY = (ROOT / "deploy/docs/security.md").read_text()


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"supply_{name}", SUPPLY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_everything_that_is_needed_has_a_licence_that_may_be() -> None:
    table = tomllib.loads((SUPPLY / "licences.toml").read_text())
    wrong = {}
    for part in script("sbom").components():
        if part.name in table["excepted"]:
            continue
        choices = re.split(r"\s+OR\s+", part.licence.replace("(", "").replace(")", ""))
        if not any(all(each in table["allowed"] for each in re.split(r"\s+AND\s+", choice)) for choice in choices):
            wrong[part.name] = part.licence
    assert not wrong, wrong


def test_the_bill_has_every_package_that_antiphon_names_and_is_the_same_each_time() -> None:
    made = [
        subprocess.run([sys.executable, str(SUPPLY / "sbom.py")], capture_output=True, text=True, timeout=60, check=True).stdout
        for _ in range(2)
    ]
    assert made[0] == made[1]
    bill = json.loads(made[0])
    assert (bill["bomFormat"], bill["metadata"]["component"]["name"]) == ("CycloneDX", "antiphon")
    named = {each["name"] for each in bill["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[\[><=]", need)[0].lower().replace("_", "-") for need in project["dependencies"]}
    assert wanted <= named
    refs = {each["bom-ref"] for each in [bill["metadata"]["component"], *bill["components"]]}
    assert {ref for entry in bill["dependencies"] for ref in [entry["ref"], *entry["dependsOn"]]} == refs
    assert all(each["purl"] == f"pkg:pypi/{each['name']}@{each['version']}" for each in bill["components"])


def test_every_runtime_dependency_is_pinned() -> None:
    pins = {name.lower().replace("_", "-") for name, _ in script("audit").pinned((ROOT / "deploy/constraints.txt").read_text())}
    missing = {part.name for part in script("sbom").components() if part.name != "antiphon"} - pins
    # What torch brings for cards comes with torch's own pins.
    assert not {name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))}, missing


def test_images_install_by_hash_what_is_pinned_and_all_of_it() -> None:
    lock = (ROOT / "deploy/images/requirements.lock").read_text()
    assert "://" not in lock
    pins = dict(script("audit").pinned((ROOT / "deploy/constraints.txt").read_text()))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    locked = {}
    for entry in script("lock").entries(lock):
        matched = re.match(r"([a-z0-9-]+)==([^ ;]+)", entry)
        assert matched is not None, entry
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry), matched[1]
        locked[matched[1]] = matched[2]
    assert {name: pins.get(name) for name in locked} == locked
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for extra in script("lock").EXTRAS for need in project["optional-dependencies"][extra]]
    wanted = {re.split(r"[\[><=;]", need)[0].strip().lower().replace("_", "-") for need in [*project["dependencies"], *extras]}
    assert wanted - {"torch"} <= locked.keys()
    for name in ("worker", "worker-gpu", "operator"):
        assert "--require-hashes" in (ROOT / f"deploy/images/{name}.Dockerfile").read_text()


def test_the_operators_image_installs_what_its_packages_need_by_the_same_hashes() -> None:
    lock = script("lock")
    whole = (ROOT / "deploy/images/requirements.lock").read_text()
    assert (ROOT / "deploy/images/operator.lock").read_text() == lock.operators(whole)
    names = {entry.partition("==")[0] for entry in lock.entries(lock.operators(whole))}
    assert names == lock.needed(lock.OPERATOR)
    assert not names & {"torch", "ray", "transformers", "grpcio"}


@pytest.mark.parametrize(
    ("results", "ignored", "status", "told"),
    [
        ([{}, {}], {}, 0, "2 packages, nothing"),
        ([{}, {"vulns": [{"id": "CVE-1"}, {"id": "CVE-2"}]}], {"CVE-1": "not used"}, 1, "b==2: CVE-2"),
        ([{}, {"vulns": [{"id": "CVE-1"}]}], {"CVE-1": "not used"}, 0, "nothing"),
        ([{}], {}, 0, "SKIPPED"),
        (None, {}, 0, "SKIPPED"),
    ],
)
def test_an_audit_names_what_is_published_and_says_when_it_could_not_ask(
    capsys: pytest.CaptureFixture[str], results: list[object] | None, ignored: dict[str, str], status: int, told: str
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert len(json.loads(request.content)["queries"]) == 2
        if results is None:
            raise httpx.ConnectError("no network")
        return httpx.Response(200, json={"results": results})

    audit = script("audit")
    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        assert audit.audit(client, audit.pinned("a==1\n# words\nb==2  # more\n"), ignored) == status
    assert told in capsys.readouterr().out


def test_every_test_in_the_table_of_published_holes_exists() -> None:
    table = SECURITY[SECURITY.index("## Published holes") :]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        assert len(row) == 4, row
        named = re.findall(r"`(tests/[^`]+)`", row[3])
        assert named, f"{row[0].strip()}: no test is named"
        for path in named:
            file, _, test = path.partition("::")
            assert (ROOT / file).is_file(), path
            if test:
                assert re.search(rf"^(async )?def {re.escape(test)}\(", (ROOT / file).read_text(), re.MULTILINE), path


def test_files_and_tests_that_the_page_names_exist() -> None:
    for path in set(re.findall(r"`((?:tests|platform|deploy)/[\w./-]+\.\w+)`", SECURITY)):
        assert (ROOT / path).exists(), path


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    """Neither sockets nor model files: no pickle and its kin, no torch.load, no eval, no code that comes with a checkpoint."""
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "joblib"}
    found = []
    for path in [*ROOT.glob("platform/**/*.py"), *ROOT.glob("operators/**/*.py")]:
        if "testing" in path.parts:
            continue  # copies values of its own by marshal
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong = modules & {name.split(".")[0] for name in names}
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                wrong |= {called} & {"eval", "exec", "torch.load", "yaml.unsafe_load", "yaml.full_load", "__import__"}
                loader = keywords.get("Loader", "")
                wrong |= {"yaml.load"} if called == "yaml.load" and loader in ("", "yaml.Loader", "yaml.UnsafeLoader") else set()
                wrong |= {"trust_remote_code"} if keywords.get("trust_remote_code", "False") != "False" else set()
                wrong |= {"allow_pickle"} if keywords.get("allow_pickle", "False") != "False" else set()
            found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in wrong]
    assert not found, found


def test_no_two_packages_bring_the_same_file() -> None:
    """Which of the two is there would hang on the order of installing."""
    owners: dict[str, set[str]] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]  # read from its file each time that it is asked for
        for file in distribution.files or ():
            if file.suffix == ".py" and ".." not in file.parts:
                owners.setdefault(str(file), set()).add(name)
    # Both are namespaces' empty beginnings of one project.
    assert not {file: names for file, names in owners.items() if len(names) > 1 and names != {"opencensus", "opencensus-context"}}
