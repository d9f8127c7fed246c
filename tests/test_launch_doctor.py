"""The doctor finds what would break training, and says what to do about it."""

from __future__ import annotations

import os
import time

import pytest

from launch.doctor import check_file_system, check_packages, check_python, check_slurm


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
