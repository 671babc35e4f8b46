"""A way to a Prefect server on which some requests vanish: they are taken and never answered."""

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit


def hanging_way_to(api_url: str, *, swallows: bytes) -> str:
    """The URL of a loopback proxy that lives as long as this process.

    A connection is silent from the first request that holds `swallows` on.
    """
    target = urlsplit(api_url)
    assert target.hostname and target.port
    server = socket.create_server(("127.0.0.1", 0))
    upstream = (target.hostname, target.port)
    threading.Thread(target=_accept, args=(server, upstream, swallows), daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}{target.path}"


def _accept(server: socket.socket, target: tuple[str, int], swallows: bytes) -> None:
    with suppress(OSError):
        while True:
            client, _ = server.accept()
            upstream = socket.create_connection(target)
            threading.Thread(target=_pump, args=(client, upstream, swallows), daemon=True).start()
            threading.Thread(target=_pump, args=(upstream, client, None), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, swallows: bytes | None) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if swallows and swallows in data:
                threading.Event().wait()  # as long as this process lives
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
