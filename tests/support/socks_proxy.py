"""A SOCKS5 proxy on loopback, without authentication."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socketserver import BaseRequestHandler, ThreadingTCPServer


@dataclass
class Proxy:
    """Where it listens, and to which addresses it has connected."""

    url: str = ""
    targets: list[tuple[str, int]] = field(default_factory=list)


@contextmanager
def socks_proxy() -> Iterator[Proxy]:
    """Run a proxy."""
    proxy = Proxy()

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            client: socket.socket = self.request
            client.recv(1 + 1 + 255)  # version, number of methods, methods
            client.sendall(b"\x05\x00")
            _, _, _, kind = client.recv(4)
            length = 4 if kind == 1 else client.recv(1)[0]  # an address, or a name
            host = socket.inet_ntoa(client.recv(4)) if kind == 1 else client.recv(length).decode()
            (port,) = struct.unpack(">H", client.recv(2))
            proxy.targets.append((host, port))
            with socket.create_connection((host, port)) as server:
                client.sendall(b"\x05\x00\x00\x01" + bytes(6))
                back = threading.Thread(target=_copy, args=(server, client), daemon=True)
                back.start()
                _copy(client, server)
                back.join()

    class Server(ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.url = f"socks5://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield proxy
        server.shutdown()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while block := source.recv(1 << 16):
            target.sendall(block)
        target.shutdown(socket.SHUT_WR)
