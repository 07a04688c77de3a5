"""A Hub on 127.0.0.1, made of the standard library, for tests of push and pull.

It keeps repositories, commits, branches and pull requests in memory and speaks the routes that the
Hub client uses. Large files live on a "CDN": the same server under its other name, `localhost`, so
that a test can see that no token is sent there. Every request is logged; faults are injected by
a regular expression over `METHOD path` or by the number of the request.

Only the LFS transport is spoken: tests set `HF_HUB_DISABLE_XET=1` (see `environment`).
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import re
import socket
import threading
import time
import urllib.parse

from tests.hub_routes import RULES, Answer, Blob, Call, Repo


@dataclasses.dataclass(frozen=True)
class Request:
    """One line of the log."""

    method: str
    path: str
    host: str
    headers: dict
    fault: object = None

    @property
    def token(self):
        return self.headers.get("authorization")


@dataclasses.dataclass
class Fault:
    """What happens to the `nth` request that matches (and to the following `times - 1`)."""

    pattern: str
    nth: int
    kind: object
    times: int
    seen: int = 0

    def hits(self, line):
        if not re.search(self.pattern, line):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


class HubEmulator:
    """`with HubEmulator() as hub:` serves `hub.url` until the block ends."""

    def __init__(self, token="hf_" + "emulatortoken0123456789", user="me"):
        self.token, self.user = token, user
        self.repos, self.objects, self.log, self.faults = {}, {}, [], []
        self.page_size = 1000
        self.ignored = set()  # names that a .gitignore of the repository would exclude
        self._lock = threading.RLock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()

    def install(self, monkeypatch, home):
        """Point the client in this process here, whenever it was imported; its pauses between attempts are skipped."""
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        pause = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: pause(min(seconds, 0.001)))

    def environment(self, home):
        """The variables that point any Hub client, in this process or another, at this server."""
        return {
            "HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost",
        }  # fmt: skip

    def repo(self, name, files=None, **options):
        """Make a repository that holds `files` on main; safetensors and gguf are kept as LFS."""
        repo = self.repos[name] = Repo(name, **options)
        if files:
            repo.commit("main", {p: Blob(d, p.endswith((".safetensors", ".gguf"))) for p, d in files.items()})
        return repo

    def fault(self, pattern=".", nth=1, kind=503, times=1):
        """Inject: a status, `drop` (before), `drop-after` (done, answer lost), `truncate`, `bitflip`, `no-range`."""
        self.faults.append(Fault(pattern, nth, kind, times))

    def requests(self, pattern="."):
        """The log's lines that match `METHOD path`."""
        return [line for line in self.log if re.search(pattern, f"{line.method} {line.path}")]

    def answer(self, method, target, host, headers, body):
        """`(status, headers, body)` of one request."""
        url = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(url.query))
        try:
            for verb, pattern, function in RULES:
                match = pattern.match(url.path) if verb in (method, "GET" if method == "HEAD" else method) else None
                if match:
                    named = {key: urllib.parse.unquote(value or "") for key, value in match.groupdict().items()}
                    with self._lock:
                        return function(Call(self, method, host, headers, query, body), **named)
        except Answer as early:
            return early.status, early.headers, json.dumps({"error": early.headers.get("X-Error-Message", "")}).encode()
        return 404, {}, b'{"error": "no such route in the emulator"}'


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    hub = None

    def log_message(self, *_args):
        pass

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _serve(self):
        body = self._body()
        headers = {key.lower(): value for key, value in self.headers.items()}
        line = f"{self.command} {self.path}"
        with self.hub._lock:
            fault = next((f.kind for f in self.hub.faults if f.hits(line)), None)
            host = headers.get("host", "").split(":")[0]
            self.hub.log.append(Request(self.command, self.path, host, headers, fault))
        if fault == "drop":
            return self._hang_up()
        if isinstance(fault, int):
            return self._send(fault, {}, b"<html>down</html>")
        if fault == "no-range":
            headers.pop("range", None)
        status, answer_headers, data = self.hub.answer(self.command, self.path, host, headers, body)
        if fault == "drop-after":
            return self._hang_up()
        if fault == "bitflip" and data:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        return self._send(status, answer_headers, data, cut=fault == "truncate")

    def _send(self, status, headers, data, *, cut=False):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve
