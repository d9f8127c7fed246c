"""Processes: what each is told by its launcher, and that they agree or all fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from srun_environment import srun_environment

from dpscale.distributed import Membership, StartupLimits
from dpscale.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


def test_alone_unless_told_otherwise():
    assert Membership.from_environment({}) == Membership(0, 1, None)
    assert Membership.from_environment(srun_environment("1", 0, 1)).num_processes == 1


def test_a_launcher_that_names_the_coordinator_comes_first():
    told = {"DPSCALE_COORDINATOR": "h:1", "DPSCALE_NUM_PROCESSES": "2", "DPSCALE_PROCESS_ID": "1"}
    assert Membership.from_environment(srun_environment("1", 0, 4) | told) == Membership(1, 2, "h:1")


def test_srun_gives_place_and_devices():
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    member = Membership.from_environment(srun_environment("9", 1, 2) | gpus)
    assert (member.process_id, member.num_processes, member.local_device_ids) == (1, 2, (2, 3))
    assert member.task is not None
    assert member.task.job == "9"


@pytest.mark.parametrize(
    "told",
    [
        {"DPSCALE_COORDINATOR": "h:1"},
        {"DPSCALE_COORDINATOR": "h:1", "DPSCALE_NUM_PROCESSES": "2", "DPSCALE_PROCESS_ID": "2"},
        {"DPSCALE_COORDINATOR": "h:1", "DPSCALE_NUM_PROCESSES": "two", "DPSCALE_PROCESS_ID": "0"},
    ],
)
def test_half_a_launcher_is_refused(told):
    with pytest.raises(InputError, match="sets all three"):
        Membership.from_environment(told)


def test_limits_come_from_the_environment():
    assert StartupLimits.from_environment({}) == StartupLimits(900.0, 30.0, 30.0)
    assert StartupLimits.from_environment({"DPSCALE_HEARTBEAT_TIMEOUT_S": "10"}).heartbeat_s == 10.0
    with pytest.raises(InputError, match="DPSCALE_INIT_TIMEOUT_S=-1"):
        StartupLimits.from_environment({"DPSCALE_INIT_TIMEOUT_S": "-1"})


def run_together(code, job, size=2):
    """The same Python text in `size` processes that believe to be tasks of one srun: (exit code, output) of each."""
    base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=base | srun_environment(job, rank, size) | {"JAX_PLATFORMS": "cpu", "DPSCALE_INIT_TIMEOUT_S": "60"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_of_one_srun_meet_agree_and_fail_together():
    ended = run_together(
        """
        import signal, sys
        from dpscale.distributed import *
        from dpscale.errors import DivergedError, InputError
        import jax
        signal.signal(signal.SIGTERM, lambda *_: None)
        ours = signal.getsignal(signal.SIGTERM)
        initialize(Membership.from_environment())
        assert signal.getsignal(signal.SIGTERM) is ours
        me = jax.process_index()
        assert jax.process_count() == 2
        assert decided_by_process_zero(lambda: {"by": me, "text": "x" * 10**5}) == {"by": 0, "text": "x" * 10**5}
        def refuse():
            raise InputError("no")
        try:
            decided_by_process_zero(refuse)
        except InputError as error:
            print("refused", error)
        check_agreement("a", b"same", "")
        try:
            check_agreement("the draw", bytes([me]), "Look.")
        except DivergedError as error:
            print("diverged", error)
        import numpy as np
        from dpscale.mesh import data_mesh, place_replicated
        from dpscale.replicas import ReplicaCheck
        from dpscale.scaling.parts import over_processes
        mesh = data_mesh()
        replicas = ReplicaCheck(mesh)
        same = {"w": np.arange(5, dtype=np.float32)}
        odd = {"w": np.arange(5, dtype=np.float32) + me * 1e-6}
        def check(params, draw):
            leaf = place_replicated(mesh, params)
            return replicas.send(leaf, draw)
        sent = [check(same, bytes(16)), check(odd, bytes(16)), check(same, bytes([me] * 16))]
        print("alike", sent[0].agreed().hex())
        for one in sent[1:]:
            try:
                one.agreed()
            except DivergedError as error:
                print("unlike", error)
        print("slowest", over_processes(np.array([1.0 + me, 5.0 - me, 2.0])).tolist())
        leave()
        """,
        job=str(100 + os.getpid() % 400),
    )
    for code, output in ended:
        assert code == 0, output
        assert "refused no" in output
        assert "diverged the draw of process(es) [1] differs" in output
        assert "unlike the parameters of device(s) [1] (process(es) [1]) differ from device 0's" in output
        assert "unlike the draw of device(s) [1] (process(es) [1]) differ from device 0's" in output
        assert "slowest [2.0, 5.0, 2.0]" in output
    alike = [re.search(r"^alike (\w+)", output, re.MULTILINE) for _, output in ended]
    assert alike[0] is not None
    assert alike[1] is not None
    assert alike[0][1] == alike[1][1]
