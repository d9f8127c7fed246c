"""What a task reads from SLURM's variables: its place, ports, devices."""

from __future__ import annotations

import pytest

from dpscale.errors import InputError
from dpscale.slurm import (
    PORTS_PER_JOB,
    SlurmTask,
    expand_counts,
    expand_node_list,
    local_device_ids,
    node_address,
    nodes_of_ranks,
    visible_devices,
)

# As srun of SLURM 22.05 sets them for rank 1 of four tasks on two nodes.
STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "t[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_DISTRIBUTION": "block",
}


def test_a_task_reads_its_place():
    task = SlurmTask.from_environment(STEP)
    assert task is not None
    assert (task.rank, task.num_tasks, task.local_id, task.local_tasks) == (1, 4, 1, 2)
    assert task.nodes == ("t1", "t2")
    assert task.rank_nodes == ("t1", "t1", "t2", "t2")
    assert task.identity == "41.0.0"


def test_the_batch_script_itself_is_no_task():
    batch = {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert SlurmTask.from_environment(batch) is None


@pytest.mark.parametrize(
    ("distribution", "placed"),
    [
        ("block", ("t1", "t1", "t1", "t2", "t3", "t3")),
        ("block:cyclic", ("t1", "t1", "t1", "t2", "t3", "t3")),
        ("cyclic,pack", ("t1", "t2", "t3", "t1", "t3", "t1")),
        ("arbitrary", ()),  # not known, so not claimed
    ],
)
def test_nodes_of_ranks(distribution, placed):
    assert nodes_of_ranks(("t1", "t2", "t3"), (3, 1, 2), distribution) == placed


@pytest.mark.parametrize(
    "change",
    [{"SLURM_PROCID": "x"}, {"SLURM_STEP_TASKS_PER_NODE": "2"}, {"SLURM_STEP_NUM_TASKS": "5"}, {"SLURM_NODEID": "7"}],
)
def test_contradicting_variables_are_refused(change):
    with pytest.raises(InputError, match="srun"):
        SlurmTask.from_environment(STEP | change)


def test_neighbouring_jobs_and_a_jobs_own_steps_and_restarts_start_at_different_ports():
    def ports(job, step=0, restart=0):
        change = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restart)}
        task = SlurmTask.from_environment(STEP | change)
        assert task is not None
        return task.ports

    jobs = [set(ports(job)) for job in range(1000, 1567)]
    assert sum(map(len, jobs)) == len(set().union(*jobs))
    assert all(61000 <= port <= 65535 for job in jobs for port in job)
    firsts = {ports(7, step)[0] for step in range(PORTS_PER_JOB)}
    assert len(firsts) == PORTS_PER_JOB
    assert ports(7, restart=1)[0] != ports(7)[0]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("t1", ("t1",)),
        ("t[1-2]", ("t1", "t2")),
        ("nid[001099-001101,001105],gpu3", ("nid001099", "nid001100", "nid001101", "nid001105", "gpu3")),
        ("a[1,3]-ib,b", ("a1-ib", "a3-ib", "b")),
    ],
)
def test_node_lists_expand(text, names):
    assert expand_node_list(text) == names


def test_counts_expand():
    assert expand_counts("2(x3),1") == (2, 2, 2, 1)


@pytest.mark.parametrize(
    ("visible", "local_tasks", "local_id", "own"),
    [
        (None, 4, 2, None),  # the site binds nothing, or there are no GPUs
        (0, 4, 2, None),
        (1, 4, 2, (0,)),  # --gpus-per-task=1
        (1, 1, 0, (0,)),
        (4, 4, 0, (0,)),
        (4, 4, 3, (3,)),
        (8, 4, 1, (2, 3)),
        (4, 1, 0, (0, 1, 2, 3)),
    ],
)
def test_devices_of_a_task(visible, local_tasks, local_id, own):
    assert local_device_ids(visible, local_tasks, local_id) == own


@pytest.mark.parametrize(("visible", "local_tasks"), [(3, 2), (2, 4), (4, 3)])
def test_devices_that_cannot_be_shared_are_refused(visible, local_tasks):
    with pytest.raises(InputError, match="gpus-per-node"):
        local_device_ids(visible, local_tasks, 0)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "GPU-6f1c,GPU-77aa"}, 2),
        ({"ROCR_VISIBLE_DEVICES": "5"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_visible_devices_are_counted(values, count):
    assert visible_devices(values) == count


def test_an_address_falls_back_to_the_name(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert node_address("t1") == "t1"
