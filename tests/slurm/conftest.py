"""A real SLURM for these tests, started on this machine and stopped with the last of them.

They wait more than they compute, so two workers of pytest-xdist share a machine well; each has a cluster of its own.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from slurm_runs import Cluster, ends, parameters

ROOT = Path(__file__).resolve().parent.parent.parent
REQUIRED = os.environ.get("DPSCALE_REQUIRE_SLURM") == "1"
HERE = Path(__file__).parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "gw0")


def load_cluster_module():
    spec = importlib.util.spec_from_file_location("local_cluster", ROOT / "slurm" / "local-cluster" / "cluster.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


local_cluster = load_cluster_module()


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[dict[str, str]]:
    missing = local_cluster.missing_programs()
    if missing:
        reason = f"{', '.join(missing)} not installed: {local_cluster.INSTALL}"
        if REQUIRED:
            pytest.fail(reason)
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    first_job = int(time.time()) % 60_000_000 + 1000 * int(WORKER.removeprefix("gw"))
    try:
        yield local_cluster.start(directory, nodes=3, cpus=4, grace_s=40, first_job=first_job)
        local_cluster.stop(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def start_and_stop():
    """The two functions of slurm/local-cluster, for a cluster of another kind."""
    return local_cluster.start, local_cluster.stop


@pytest.fixture
def cluster(session_cluster, tmp_path) -> Iterator[Cluster]:
    """The cluster, for one test of a worker at a time, whoever else tests here: they start several processes each."""
    with open(Path(tempfile.gettempdir()) / f"dpscale-slurm-tests-{os.getuid()}-{WORKER}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = Cluster(session_cluster, tmp_path, sys.executable, local_cluster)
        yield running
        running.cancel_all()


@pytest.fixture(scope="session")
def undisturbed(session_cluster, tmp_path_factory):
    """Parameters of the run that nobody disturbs, submitted with sbatch on two nodes; made once."""
    made: dict[str, np.ndarray] = {}

    def get(cluster: Cluster) -> np.ndarray:
        if "parameters" not in made:
            run = tmp_path_factory.mktemp("undisturbed") / "run"
            job = cluster.submit(run, "--nodes", "2", "--via", "sbatch")
            cluster.wait_for_end(job, run)
            assert [end["code"] for end in ends(run, job)] == [0], cluster.everything(run)
            made["parameters"] = parameters(run)
        return made["parameters"]

    return get
