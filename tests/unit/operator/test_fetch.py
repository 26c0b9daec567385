"""Downloads over HTTP, from servers on loopback that speak the hub's and S3's protocols."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": os.urandom(300_000), "sub/tokenizer.json": b"{}"}
COMMIT = "a" * 40
DEADLINE_S = 60


def digest(files: dict[str, bytes]) -> str:
    lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items()))
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


class Handler(http.server.BaseHTTPRequestHandler):
    """A hub with the repository org/tiny, and a bucket "weights" with the same files below "tiny/"."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization", "")))  # type: ignore[attr-defined]
        path = urllib.parse.unquote(url.path)
        if path.startswith("/api/models/org/tiny"):
            names = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in FILES.items()]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self.answer(json.dumps(names if "/tree/" in path else info).encode(), "application/json")
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/"):
            self.file(path.removeprefix(f"/org/tiny/resolve/{COMMIT}/"), {"X-Repo-Commit": COMMIT})
        elif path.rstrip("/") == "/weights" and "location" in query:
            self.answer(b'<LocationConstraint xmlns="http://s3.amazonaws.com/doc/2006-03-01/"/>', "application/xml")
        elif path.rstrip("/") == "/weights":
            keys = [name for name in FILES if f"tiny/{name}".startswith(query["prefix"][0])]
            items = "".join(
                f"<Contents><Key>tiny/{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f'<ETag>"{hashlib.md5(FILES[name]).hexdigest()}"</ETag><Size>{len(FILES[name])}</Size></Contents>'
                for name in keys
            )
            head = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>weights</Name>'
            self.answer(f"{head}<IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode(), "application/xml")
        elif path.startswith("/weights/tiny/"):
            self.file(path.removeprefix("/weights/tiny/"), {})
        else:
            self.answer(b'{"error": "not found"}', "application/json", 404)

    def file(self, name: str, headers: dict[str, str]) -> None:
        data = FILES.get(name)
        if data is None:
            self.answer(b"", "text/plain", 404)
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(
            data, "application/octet-stream", 200, {"ETag": etag, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", **headers}
        )

    def answer(self, body: bytes, kind: str, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def address(server: http.server.ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def fetch(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the Job's container runs, in a process of its own: the hub's address is read when its library is imported."""
    command = [sys.executable, "-m", "antiphon_operator", "fetch", *arguments]
    command += ["--into", str(tmp_path / "claim/w"), "--result", str(tmp_path / "result")]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def present(tmp_path: Path) -> dict[str, bytes]:
    root = tmp_path / "claim/w"
    paths = [p for p in root.rglob("*") if p.is_file() and ".cache" not in p.relative_to(root).parts]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in paths}


def test_a_repository_of_the_hub_arrives_whole_and_checked(server: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    token = "hf_" + "s" * 12
    wanted = ["--uri", "hf://org/tiny", "--digest", digest(FILES)]
    done = fetch(tmp_path, *wanted, HF_ENDPOINT=address(server), HF_TOKEN=token)
    assert done.returncode == 0, done.stderr
    assert present(tmp_path) == FILES
    result = json.loads((tmp_path / "result").read_text())
    assert result == {"digest": digest(FILES), "sizeBytes": sum(map(len, FILES.values()))}
    assert any(token in authorization for _, _, authorization in server.seen)  # type: ignore[attr-defined]
    assert token not in done.stdout + done.stderr


def test_objects_of_a_bucket_arrive_whole_and_are_not_fetched_twice(
    server: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "s3cr3t" * 5}
    wanted = ["--uri", "s3://weights/tiny", "--endpoint-url", address(server), "--digest", digest(FILES)]
    done = fetch(tmp_path, *wanted, **keys)
    assert done.returncode == 0, done.stderr
    assert present(tmp_path) == FILES
    assert any("Credential=somebody/" in authorization for _, _, authorization in server.seen)  # type: ignore[attr-defined]
    assert keys["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    server.seen.clear()  # type: ignore[attr-defined]
    assert fetch(tmp_path, *wanted, **keys).returncode == 0
    assert server.seen == []  # type: ignore[attr-defined]


def test_what_is_not_there_or_not_what_was_asked_for_is_told_in_a_line(
    server: http.server.ThreadingHTTPServer, tmp_path: Path
) -> None:
    missing = fetch(tmp_path, "--uri", "hf://org/none", HF_ENDPOINT=address(server))
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: hf://org/none")
    assert "Traceback" not in missing.stderr
    other = fetch(
        tmp_path, "--uri", "s3://weights/tiny", "--endpoint-url", address(server), "--digest", "sha256:" + "0" * 64,
    )  # fmt: skip
    assert other.returncode == 1
    assert "was asked for" in other.stderr
    assert not (tmp_path / "claim/w").exists()
