"""Starting a real API server: order, arguments, readiness, last words and stopping; stand-ins where programs are missing."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

from antiphon.core.errors import DeadlineExceeded, Unavailable
from antiphon_operator.testing.real_api import ApiServer, find_assets

# Both stand-ins read their arguments as the real programs do and fail on what is missing.
PRELUDE = """
    import http.server, json, pathlib, ssl, sys, time, urllib.request
    options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
"""
ETCD = """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

    port = int(options["listen-client-urls"].rsplit(":", 1)[1])
    assert options["advertise-client-urls"] == options["listen-client-urls"]
    assert options["initial-cluster"] == "default=" + options["listen-peer-urls"]
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
API_SERVER = """
    urllib.request.urlopen(options["etcd-servers"] + "/health", timeout=5).read()
    assert pathlib.Path(options["service-account-key-file"]).exists()
    tokens = dict(line.split(",")[:2] for line in open(options["token-auth-file"]))
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            user = tokens.get(self.headers["Authorization"].removeprefix("Bearer "))
            starting = asked.count("/readyz") < 3
            code = 401 if user is None else 500 if starting and self.path == "/readyz" else 200
            body = json.dumps({"user": user, "asked": asked}).encode()
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(options["tls-cert-file"], options["tls-private-key-file"])
    server = http.server.ThreadingHTTPServer((options["bind-address"], int(options["secure-port"])), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()
"""


def program(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(PRELUDE)}\n{textwrap.dedent(text)}")
    path.chmod(0o755)


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    program(tmp_path, "etcd", ETCD)
    program(tmp_path, "kube-apiserver", API_SERVER)
    return tmp_path


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_both_programs_are_needed(tmp_path: Path) -> None:
    assert find_assets({}) is None
    program(tmp_path, "etcd", ETCD)
    assert find_assets({"KUBEBUILDER_ASSETS": str(tmp_path)}) is None
    program(tmp_path, "kube-apiserver", API_SERVER)
    assert find_assets({"KUBEBUILDER_ASSETS": str(tmp_path)}) == tmp_path


def test_a_server_is_usable_once_it_says_ready_and_gone_when_closed(assets: Path) -> None:
    with ApiServer(assets, users=("operator",)) as server:
        seen = server.request("GET", "/version")
        assert seen["user"] == "admin"
        assert seen["asked"][:4] == ["/readyz", "/readyz", "/readyz", "/api/v1/namespaces/default"]
        assert "certificate-authority" in server.kubeconfig("operator")
        pids = server.pids
        assert len(pids) == 2
    assert not any(runs(pid) for pid in pids)
    server.close()


def test_a_real_etcd_takes_the_arguments(assets: Path) -> None:
    etcd = shutil.which("etcd")
    if etcd is None:
        pytest.skip("etcd is not installed")
    (assets / "etcd").unlink()
    (assets / "etcd").symlink_to(etcd)
    with ApiServer(assets) as server:
        assert server.request("GET", "/version")["user"] == "admin"


def test_a_program_that_ends_is_told_with_its_last_words(assets: Path) -> None:
    program(assets, "kube-apiserver", "sys.exit('no such flag: --secure-port')")
    server = ApiServer(assets)
    with pytest.raises(Unavailable, match="kube-apiserver ended with 1: no such flag"):
        server.start()
    assert server.pids == ()


def test_a_port_that_was_taken_meanwhile_is_tried_again(assets: Path) -> None:
    mark = assets / "tried"
    once = f"""
    mark = pathlib.Path({str(mark)!r})
    if not mark.exists():
        mark.write_text("")
        sys.exit("listen tcp 127.0.0.1: bind: address already in use")
    """
    program(assets, "kube-apiserver", textwrap.dedent(once) + textwrap.dedent(API_SERVER))
    with ApiServer(assets) as server:
        assert server.request("GET", "/version")["user"] == "admin"


def test_a_server_that_is_never_ready_is_given_up_at_the_deadline(assets: Path) -> None:
    program(assets, "kube-apiserver", "time.sleep(60)")
    server = ApiServer(assets, start_timeout_s=1.0)
    with pytest.raises(DeadlineExceeded, match="kube-apiserver was not ready within 1 s"):
        server.start()
    assert server.pids == ()
