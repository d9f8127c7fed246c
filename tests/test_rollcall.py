"""The processes of a run find each other, and nobody else; who does not come is named."""

from __future__ import annotations

import socket
import threading

import pytest

from dpscale.errors import DpscaleError, InputError
from dpscale.rollcall import MissingProcessError, call_the_roll


def free_ports(number):
    sockets = [socket.create_server(("", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def together(calls):
    """The outcome of each call, made at the same time."""
    outcomes: list = [None] * len(calls)

    def run(place, call):
        try:
            outcomes[place] = call()
        except DpscaleError as error:
            outcomes[place] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


def calling(identity, rank, size, ports, timeout_s=10.0, nodes=()):
    return lambda: call_the_roll(identity, rank, size, "127.0.0.1", ports, timeout_s, nodes)


def test_all_processes_learn_one_port():
    ports = free_ports(4)
    outcomes = together([calling("1.0.0", rank, 5, ports) for rank in (3, 1, 0, 4, 2)])
    assert len(set(outcomes)) == 1
    assert isinstance(outcomes[0], int)


def test_every_process_names_the_missing_rank_and_its_node():
    ports = free_ports(4)
    nodes = ("t1", "t1", "t2", "t3")
    outcomes = together([calling("1.0.0", rank, 4, ports, 1.0, nodes) for rank in (0, 1, 3)])
    for outcome in outcomes:
        assert isinstance(outcome, MissingProcessError)
        assert "2 (node t2) of 4 did not come within 1 s" in str(outcome)


def test_without_process_zero_the_others_name_its_node():
    [outcome] = together([calling("1.0.0", 1, 2, free_ports(2), 0.5, ("t7", "t8"))])
    assert isinstance(outcome, MissingProcessError)
    assert "process 0 (node t7)" in str(outcome)


def test_two_sets_of_processes_with_the_same_ports_stay_apart():
    ports = free_ports(4)
    outcomes = together([calling(identity, rank, 3, ports) for rank in range(3) for identity in ("1.0.0", "2.0.0")])
    assert len(set(outcomes[0::2])) == len(set(outcomes[1::2])) == 1
    assert all(isinstance(outcome, int) for outcome in outcomes)


def test_noise_on_the_port_does_no_harm():
    ports = free_ports(1)

    def shout():
        for _ in range(50):
            try:
                with socket.create_connection(("127.0.0.1", ports[0]), timeout=1) as peer:
                    peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return
            except OSError:
                threading.Event().wait(0.05)

    outcomes = together([shout, calling("1.0.0", 0, 2, ports), calling("1.0.0", 1, 2, ports)])
    assert outcomes[1] == outcomes[2]
    assert isinstance(outcomes[1], int)


def test_taken_ports_are_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=str(port)):
            call_the_roll("1.0.0", 0, 2, "127.0.0.1", [port], 1.0)
