"""A proxy between an S3 client and a real server that does to requests what networks do to them."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Fault = Callable[["Exchange"], None]


@dataclass
class Exchange:
    """One request on its way to the server and, once forwarded, its answer on its way back."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    forward: Callable[[], None]
    status: int = 0
    answer_headers: list[tuple[str, str]] = field(default_factory=list)
    answer: bytes = b""
    bytes_sent_back: int | None = None
    """Cut the connection after so many bytes of the answer's body; -1: before its head."""


def cut_the_request(exchange: Exchange) -> None:
    """The server never hears of it."""
    exchange.bytes_sent_back = -1


def lose_the_answer(exchange: Exchange) -> None:
    exchange.forward()
    exchange.bytes_sent_back = -1


def cut_the_answer(exchange: Exchange) -> None:
    exchange.forward()
    exchange.bytes_sent_back = len(exchange.answer) // 2


def flip_a_bit_of_the_answer(exchange: Exchange) -> None:
    exchange.forward()
    exchange.answer = bytes([exchange.answer[0] ^ 1]) + exchange.answer[1:]


def flip_a_bit_of_the_request(exchange: Exchange) -> None:
    exchange.body = bytes([exchange.body[0] ^ 1]) + exchange.body[1:]
    exchange.forward()


def answer_instead(status: int, code: str) -> Fault:
    def fault(exchange: Exchange) -> None:
        exchange.status = status
        exchange.answer = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        exchange.answer_headers = [("Content-Type", "application/xml")]

    return fault


def held_until(gate: threading.Event) -> Fault:
    """The request is on its way until somebody opens the gate."""

    def fault(exchange: Exchange) -> None:
        assert gate.wait(timeout=120), "nobody opened the gate"
        exchange.forward()

    return fault


@dataclass
class Faults:
    """Which faults meet the next requests; a matching request uses up one of them, but not one that stands."""

    endpoint: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    planned: list[tuple[str, str, Fault]] = field(default_factory=list)
    standing: list[tuple[str, str, Fault]] = field(default_factory=list)
    at: tuple[int, Fault] | None = None
    """A fault for one request whatever it is, and how many come before it."""
    met: int = 0

    def plan(self, method: str, path_part: str, *faults: Fault) -> None:
        with self.lock:
            self.planned.extend((method, path_part, fault) for fault in faults)

    def next_for(self, exchange: Exchange) -> Fault:
        with self.lock:
            if self.at is not None:
                before, fault = self.at
                self.at = (before - 1, fault) if before else None
                if not before:
                    self.met += 1
                    return fault
            for index, (method, path_part, fault) in enumerate(self.planned):
                if method == exchange.method and path_part in exchange.path:
                    del self.planned[index]
                    self.met += 1
                    return fault
            for method, path_part, fault in self.standing:
                if method == exchange.method and path_part in exchange.path:
                    self.met += 1
                    return fault
        return lambda exchange: exchange.forward()


@contextmanager
def faulty_way_to(endpoint: str) -> Iterator[Faults]:
    """A loopback proxy in front of `endpoint`. Signatures stay valid: the Host header is passed on as it came."""
    target = urlsplit(endpoint)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def exchange(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            exchange = Exchange(self.command, self.path, self.headers.items(), body, lambda: forward(exchange))
            faults.next_for(exchange)(exchange)
            if exchange.bytes_sent_back == -1:
                self.close_connection = True
                return
            self.send_response_only(exchange.status)
            for name, value in exchange.answer_headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            lengths = [value for name, value in exchange.answer_headers if name.lower() == "content-length"]
            length = lengths[0] if self.command == "HEAD" and lengths else str(len(exchange.answer))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(exchange.answer[: exchange.bytes_sent_back])
            self.close_connection = exchange.bytes_sent_back is not None

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = exchange  # noqa: N815  # http.server's names

        def log_message(self, *_: object) -> None:
            pass

    def forward(exchange: Exchange) -> None:
        connection = http.client.HTTPConnection(target.hostname, target.port, timeout=30)
        try:
            connection.putrequest(exchange.method, exchange.path, skip_host=True, skip_accept_encoding=True)
            for name, value in exchange.headers:
                if name.lower() != "expect":
                    connection.putheader(name, value)
            connection.endheaders(exchange.body)
            answer = connection.getresponse()
            exchange.status, exchange.answer_headers, exchange.answer = (
                answer.status, answer.getheaders(), answer.read(),
            )  # fmt: skip
        finally:
            connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    faults = Faults(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
