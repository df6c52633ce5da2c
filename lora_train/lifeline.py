"""A connection from every process of a run to process 0, which its kernel closes when it dies.

So a death is known at once, whatever the process was doing, and a process that merely waits for a
slow file system is not taken for dead. When a whole node is lost, the kernels' keep-alive notices.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading

from torch.distributed import Store

_CONNECT_SECONDS = 60.0
# a node that is gone answers none of these probes
_IDLE_SECONDS, _INTERVAL_SECONDS, _NUM_PROBES = 10, 5, 4
_RANK = struct.Struct("!I")


class Lifeline:
    """One end of the connections: process 0 has one of every other, those have one.

    Args:
        store: of the run; tells the port.
        rank: of this process.
        host: of process 0.
    """

    def __init__(self, store: Store, rank: int, host: str) -> None:
        self.closed: set[int] = set()
        """Processes whose connection has closed."""
        if rank == 0:
            self._socket = socket.create_server(("", 0), backlog=1024)
            store.set("lifeline", str(self._socket.getsockname()[1]))
            work = self._watch_others
        else:
            store.wait(["lifeline"])
            address = (host, int(store.get("lifeline")))
            self._socket = socket.create_connection(address, _CONNECT_SECONDS)
            _keep_alive(self._socket)
            self._socket.sendall(_RANK.pack(rank))
            self._socket.settimeout(None)
            work = self._watch_main
        threading.Thread(target=work, name="lifeline", daemon=True).start()

    def _watch_main(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.recv(1)  # nothing is ever sent
        self.closed.add(0)

    def _watch_others(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._socket:
                        connection, _ = self._socket.accept()
                        _keep_alive(connection)
                        selector.register(connection, selectors.EVENT_READ)
                        continue
                    connection = key.fileobj  # type: ignore[assignment]
                    rank = _receive_rank(connection) if key.data is None else None
                    if rank is not None:
                        selector.modify(connection, selectors.EVENT_READ, rank)
                        continue
                    selector.unregister(connection)
                    connection.close()
                    if key.data is not None:
                        self.closed.add(key.data)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, _IDLE_SECONDS),
        (socket.TCP_KEEPINTVL, _INTERVAL_SECONDS),
        (socket.TCP_KEEPCNT, _NUM_PROBES),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _receive_rank(connection: socket.socket) -> int | None:
    """The rank, which comes first and in one piece; None from whoever is no process of the run."""
    try:
        said = connection.recv(_RANK.size)
    except OSError:
        return None
    return _RANK.unpack(said)[0] if len(said) == _RANK.size else None
