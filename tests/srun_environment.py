"""What srun tells a task, for tests without SLURM: all tasks on this machine, which is reached by its number."""

from __future__ import annotations


def srun_environment(job: str, rank: int, size: int, restart: int = 0) -> dict[str, str]:
    """Variables of task `rank` of `size` on one node."""
    return {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_RESTART_COUNT": str(restart),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_STEP_TASKS_PER_NODE": str(size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "DPSCALE_HEAD_NODE": "127.0.0.1",
        "DPSCALE_HEAD_ADDRESS": "127.0.0.1",
    }
