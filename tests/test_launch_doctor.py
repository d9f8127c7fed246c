"""The doctor finds what would break training, and says what to do about it."""

from __future__ import annotations

import os
import platform
import time

import numpy as np
import pytest

from dpscale.distributed import Membership
from dpscale.errors import InputError
from launch.doctor import (
    Finding,
    check_devices,
    check_file_system,
    check_packages,
    check_processes,
    check_python,
    check_slurm,
    examine,
)


def test_a_good_directory_is_good_and_nothing_is_left_in_it(tmp_path):
    assert [finding.level for finding in check_file_system(tmp_path / "runs")] in (["ok"], ["warn"])  # slow disks warn
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_directory_that_cannot_be_made_fails(tmp_path):
    (tmp_path / "file").touch()
    [finding] = check_file_system(tmp_path / "file" / "runs")
    assert (finding.level, finding.remedy) == ("fail", "choose another with --directory")


def test_a_clock_that_differs_fails(tmp_path, monkeypatch):
    now = time.time
    monkeypatch.setattr("launch.doctor.time.time", lambda: now() + 60)
    assert any(finding.level == "fail" and "clock" in finding.what for finding in check_file_system(tmp_path))


def test_a_file_system_without_modes_fails(tmp_path, monkeypatch):
    write = __import__("dpscale.durable").durable.write_atomically

    def without_modes(path, data):
        write(path, data)
        path.chmod(0o666)

    monkeypatch.setattr("dpscale.durable.write_atomically", without_modes)
    assert any("mode 666" in finding.what for finding in check_file_system(tmp_path))


def test_this_environment_is_fit():
    assert (check_python().level, check_packages().level) == ("ok", "ok")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("SLURM_VERSION = 22.05\nJobRequeue = 1\nProctrackType = proctrack/cgroup", []),
        ("SLURM_VERSION = 22.05\nJobRequeue = 0\nProctrackType = proctrack/cgroup", ["not requeued by default"]),
        ("SLURM_VERSION = 22.05\nJobRequeue = 1\nProctrackType = proctrack/linuxproc", ["linuxproc"]),
        ("JobRequeue = 1\nProctrackType = proctrack/cgroup\nKillWait = 5 sec", ["KILL comes 5 s after TERM"]),
        ("JobRequeue = 1\nProctrackType = proctrack/cgroup\nKillWait = 30 sec", []),
    ],
)
def test_what_slurm_cannot_do_is_a_warning(tmp_path, monkeypatch, settings, words):
    tool = tmp_path / "scontrol"
    tool.write_text(f"#!/bin/bash\ncat <<'END'\n{settings}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    warnings = [finding.what for finding in check_slurm() if finding.level == "warn"]
    assert len(warnings) == len(words)
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


def test_slurm_that_does_not_answer_is_a_failure_inside_a_job_only(tmp_path, monkeypatch):
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/bash\necho unable to contact >&2; exit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert [finding.level for finding in check_slurm()] == ["warn"]
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert [finding.level for finding in check_slurm()] == ["fail"]


def test_an_old_python_and_missing_packages_fail(monkeypatch):
    monkeypatch.setattr("launch.doctor.sys.version_info", (3, 10, 0))
    assert (check_python().level, check_python().remedy) == ("fail", "dpscale needs 3.11 or newer")
    monkeypatch.setattr("launch.doctor.PACKAGES", ("jax", "no-such-package"))
    assert (check_packages().level, check_packages().what) == ("fail", "packages missing: no-such-package")


def test_a_laptop_without_slurm_is_warned_only(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [(finding.level, finding.remedy) for finding in check_slurm()] == [
        ("warn", "fine on a laptop; on a cluster load its module")
    ]


def test_a_busy_file_system_is_a_warning_and_one_that_shows_old_content_fails(tmp_path, monkeypatch):
    write = __import__("dpscale.durable").durable.write_atomically
    monkeypatch.setattr("launch.doctor.SLOW_RENAME_S", -1.0)
    monkeypatch.setattr("dpscale.durable.write_atomically", lambda path, data: write(path, "0"))
    stale, slow = check_file_system(tmp_path)
    assert (stale.level, stale.what) == ("fail", f"{tmp_path}: a renamed file shows old content")
    assert (slow.level, slow.remedy) == ("warn", "a busy file system: save less often")


def test_a_gpu_that_jax_does_not_use_fails(monkeypatch):
    assert [finding.level for finding in check_devices(1)] == ["ok"]
    monkeypatch.setattr("launch.doctor.shutil.which", lambda name: f"/usr/bin/{name}")
    assert [finding.what for finding in check_devices(1) if finding.level == "fail"] == [
        "a GPU is here, but jax uses the CPU"
    ]


def test_processes_with_unequal_devices_fail_and_a_slow_collective_is_a_warning(monkeypatch):
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda value: np.asarray([value, 99]))
    monkeypatch.setattr("launch.doctor.SLOW_COLLECTIVE_S", -1.0)
    _, unequal, slow = check_devices(2)
    assert (unequal.level, unequal.remedy) == ("fail", "ask for as many on each node")
    assert unequal.what.endswith(", 99]")
    assert (slow.level, slow.remedy) == ("warn", "set the network interface in the profile (NCCL_SOCKET_IFNAME)")


def test_processes_that_do_not_find_each_other_are_a_finding_too(tmp_path, monkeypatch):
    def fail(membership):
        raise InputError("process(es) 1 (node t2) of 2 did not come")

    monkeypatch.setattr("dpscale.distributed.initialize", fail)
    lines: list[str] = []
    assert examine(tmp_path / "runs", lines.append) == 1
    assert "fail  the processes do not find each other: process(es) 1 (node t2) of 2 did not come" in lines


def test_a_finding_that_is_not_good_has_a_remedy():
    with pytest.raises(ValueError, match="needs a remedy"):
        Finding("warn", "something is odd")


def test_processes_devices_and_addresses_are_shown_and_clocks_compared(monkeypatch):
    [alone] = check_processes(Membership())
    assert f"{platform.node()} at 127.0.0.1, processes and devices: 0 has cpu:0 cpu:1" in alone.what

    def two(value):
        seen = {"node": "n2", "address": "10.0.0.2", "devices": ["cuda:0"]}
        return [value, seen | {"clock": value["clock"] - 60} if value else None]

    monkeypatch.setattr("dpscale.distributed.gathered", two)
    _, there, clocks = check_processes(Membership())
    assert there.what == "n2 at 10.0.0.2, processes and devices: 1 has cuda:0"
    assert (clocks.level, clocks.what) == ("fail", f"the clocks of n2 and {platform.node()} differ by 60 s")


def test_the_exit_code_and_the_last_line_say_whether_to_train(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    lines: list[str] = []
    assert examine(tmp_path / "runs", lines.append) == 0
    assert lines[-1] == "fit to train"
    (tmp_path / "file").touch()
    assert examine(tmp_path / "file" / "runs", lines.append) == 1
    assert lines[-1] == "not fit to train"
    assert any(line.startswith("fail") and "choose another with --directory" in line for line in lines)
