"""Roll call: the processes of a run find each other before jax starts, and say who is missing when they cannot.

jax ends a process (abort) when a peer does not come, without saying which. Here process 0 listens, every other process
reports its number and its host, and only when all are there does process 0 name the port of jax's coordinator, a free
one that it has just found. Processes of another job, step or restart are told to go away: two jobs on one node do not
disturb each other. Every process of a set calls at the same `ports`, in the same order.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence

from dpscale.errors import DpscaleError, InputError

RETRY_S = 0.2
REPLY_TIMEOUT_S = 20.0
LINE_BYTES = 65536


class MissingProcessError(DpscaleError):
    """Not every process of the run came to the roll call in time."""


def call_the_roll(
    identity: str,
    rank: int,
    num_processes: int,
    host: str,
    ports: Sequence[int],
    timeout_s: float,
    rank_nodes: Sequence[str] = (),
) -> int:
    """Meet the other processes; the port of jax's coordinator on `host`, the same for all.

    Args:
        identity: of this set of processes; equal on all of them, different from any other set's.
        host: address of process 0.
        ports: where process 0 may listen; the first free one is taken.
        timeout_s: how long to wait for the last process.
        rank_nodes: the node of each rank, for the message.

    Raises: MissingProcessError on every process, naming the missing ranks and their nodes; InputError on process 0
        when all `ports` are taken.
    """
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        return _host(identity, num_processes, ports, deadline, timeout_s, rank_nodes)
    return _report(identity, rank, host, ports, deadline, timeout_s, rank_nodes)


def _host(
    identity: str,
    num_processes: int,
    ports: Sequence[int],
    deadline: float,
    timeout_s: float,
    rank_nodes: Sequence[str],
) -> int:
    present: dict[int, socket.socket] = {}
    with _listen(ports) as listener:
        try:
            while len(present) < num_processes - 1 and time.monotonic() < deadline:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    peer, _ = listener.accept()
                except TimeoutError:
                    break
                _welcome(peer, identity, present)
            missing = [rank for rank in range(1, num_processes) if rank not in present]
            port = _free_port()
            for peer in present.values():
                _send(peer, {"missing": missing} if missing else {"port": port})
        finally:
            for peer in present.values():
                peer.close()
    if missing:
        raise _missing(missing, num_processes, timeout_s, rank_nodes)
    return port


def _welcome(peer: socket.socket, identity: str, present: dict[int, socket.socket]) -> None:
    """Read one report; a stranger is sent away, a process that reports again replaces its earlier connection."""
    peer.settimeout(REPLY_TIMEOUT_S)
    try:
        said = _receive(peer)
        if said.get("identity") != identity:
            _send(peer, {"stranger": True})
            peer.close()
            return
        _send(peer, {"welcome": True})
    except (OSError, ValueError):
        peer.close()
        return
    earlier = present.pop(int(said["rank"]), None)
    if earlier is not None:
        earlier.close()
    present[int(said["rank"])] = peer


def _report(
    identity: str,
    rank: int,
    host: str,
    ports: Sequence[int],
    deadline: float,
    timeout_s: float,
    rank_nodes: Sequence[str],
) -> int:
    fault: Exception | None = None
    while time.monotonic() < deadline:
        for port in ports:
            try:
                with socket.create_connection((host, port), timeout=min(REPLY_TIMEOUT_S, timeout_s)) as peer:
                    _send(peer, {"identity": identity, "rank": rank})
                    if "welcome" not in _receive(peer):
                        continue
                    # The host gives up at its own deadline and says so; a little later it is gone.
                    peer.settimeout(max(0.0, deadline - time.monotonic()) + REPLY_TIMEOUT_S)
                    verdict = _receive(peer)
            except (OSError, ValueError) as error:
                fault = error
                continue
            if "missing" in verdict:
                raise _missing(verdict["missing"], len(rank_nodes), timeout_s, rank_nodes)
            return int(verdict["port"])
        time.sleep(RETRY_S)
    node = f" (node {rank_nodes[0]})" if rank_nodes else ""
    raise MissingProcessError(
        f"process {rank} did not reach process 0{node} at {host}, ports {min(ports)} to {max(ports)}, within "
        f"{timeout_s:.0f} s ({fault}): look into process 0's log; if it runs, the nodes must reach each other there"
    )


def _missing(
    missing: Sequence[int], num_processes: int, timeout_s: float, rank_nodes: Sequence[str]
) -> MissingProcessError:
    named = ", ".join(f"{rank} (node {rank_nodes[rank]})" if rank_nodes else str(rank) for rank in missing)
    of = f" of {num_processes}" if num_processes else ""
    return MissingProcessError(
        f"process(es) {named}{of} did not come within {timeout_s:.0f} s: every process must start and reach "
        "process 0. Look into their logs, and at those nodes"
    )


def _listen(ports: Sequence[int]) -> socket.socket:
    fault: OSError | None = None
    for port in ports:
        try:
            return socket.create_server(("", port), backlog=1024)
        except OSError as error:
            fault = error
    raise InputError(f"ports {', '.join(map(str, ports))} are all taken on process 0's node ({fault}): start again")


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]


def _send(peer: socket.socket, message: dict) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer: socket.socket) -> dict:
    line = b""
    while not line.endswith(b"\n"):
        piece = peer.recv(1)  # lines are short, and the next one must stay in the socket
        if not piece or len(line) > LINE_BYTES:
            raise ValueError("the connection ended")
        line += piece
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not a message of a roll call")
    return message
