"""A real S3 server in a process of its own, and a real HTTP proxy before it that does what networks do."""

import contextlib
import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cag_store.backends.object_client import ObjectOptions

BUCKET = "shelf"
QUICK = ObjectOptions(max_retries=2, backoff_s=0.01)
IMPATIENT = ObjectOptions(max_retries=4, backoff_s=0.01, read_timeout_s=1.0, request_timeout_s=2.0)
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "a-very-secret-word",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """moto's S3 with an empty bucket; gives its port."""
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {**os.environ, **ENVIRONMENT}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            make_bucket(port, process)
            yield port
        finally:
            process.kill()


def make_bucket(port: int, process: subprocess.Popen) -> None:
    for _ in range(1200):
        with contextlib.suppress(OSError):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request, timeout=60).read()
            return
        assert process.poll() is None, "the S3 server ended"
        time.sleep(0.05)
    raise AssertionError("the S3 server did not start")


@dataclass
class Request:
    """What a client asks."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Response:
    """What the server answered; a plan may change it.

    `length` is the Content-Length that is told; `cut`: send only half of the body, then hang up; `reset`: hang up
    at once.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    length: int
    cut: bool = False
    reset: bool = False


Plan = Callable[[Request, Callable[[Request], Response]], Response]


def forward(request: Request, ask: Callable[[Request], Response]) -> Response:
    """The plan without faults."""
    return ask(request)


@dataclass
class Proxy:
    """An HTTP proxy before `upstream`. `plan` sees each request and makes its response."""

    upstream: int
    plan: Plan = forward
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    def ask(self, request: Request) -> Response:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        with contextlib.closing(connection):
            connection.request(request.method, request.path, request.body or None, request.headers)
            answer = connection.getresponse()
            body = answer.read()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP}
            return Response(answer.status, headers, body, int(answer.getheader("Content-Length", len(body))))

    @contextlib.contextmanager
    def serving(self) -> Iterator["Proxy"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        server.block_on_close = False
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError, TimeoutError):
                super().handle_one_request()
                return
            self.close_connection = True

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = Request(self.command, self.path, dict(self.headers.items()), body)
            proxy.requests.append(request)
            self.send(proxy.plan(request, proxy.ask))

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

        def send(self, response: Response) -> None:
            if response.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(response.length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.body[: len(response.body) // 2] if response.cut else response.body)
            self.close_connection = self.close_connection or response.cut

        def log_message(self, *_: object) -> None:
            pass

    return Handler
