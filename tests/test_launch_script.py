"""The job's script: no value of a user can run anything in it, and a shell obeys its rules about the end."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpscale.errors import InputError
from launch.profiles import Profile, load_profile, profile_directories
from launch.resources import Resources, format_time, parse_time
from launch.script import HEAD, Job, by_hand, header, job_name, render, sbatch_options

ROOT = Path(__file__).resolve().parent.parent
JOB = Job(
    name="cifar",
    run_dir="/scratch/me/runs/cifar",
    config="/scratch/me/runs/cifar/attempts/submit-1/config.toml",
    python="/home/me/.venv/bin/python",
    working_directory="/home/me/project",
    resources=Resources(nodes=20, time_s=8 * 3600, gpus_per_node=4, tasks_per_node=4, cpus_per_task=8),
    profile=Profile(account="p1", setup=["module load cuda"], environment={"NCCL_SOCKET_IFNAME": "ib0"}),
)
HOSTILE = [
    "a b",
    "it's",
    'say "x"',
    "$(touch pwned)",
    "`touch pwned`",
    "line\nbreak; touch pwned",
    "%j\\",
    "-x",
    "é&;|",
]


def test_the_script_is_the_golden_one():
    golden = ROOT / "tests" / "golden" / "train-job.sbatch"
    assert render(JOB) == golden.read_text()


def test_the_script_for_use_by_hand_is_the_one_in_the_repository():
    assert by_hand() == (ROOT / "slurm" / "train.sbatch").read_text()
    assert HEAD in by_hand()


def run_script(text, tmp_path, **variables):
    """The script's exit code and what its `srun` was given, with SLURM's commands replaced."""
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    fakes = {
        "srun": 'printf "%s\\0" "$@" >"$FAKE/srun.args"; eval "$FAKE_WORK"; exit "${FAKE_CODE:-0}"',
        "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >>"$FAKE/requeued"; exit; fi; '
        'echo "JobId=7 JobState=${FAKE_STATE:-RUNNING Reason=None} Requeue=1 NodeAddr=10.0.0.1"',
        "squeue": "echo 2030-01-01T00:00:00",
    }
    for name, body in fakes.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "FAKE": str(tmp_path),
        "FAKE_WORK": ":",
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "n1",
        **variables,
    }
    done = subprocess.run(
        ["bash", "-c", text], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    given_to_srun = (tmp_path / "srun.args").read_text().split("\0")[:-1] if (tmp_path / "srun.args").exists() else None
    return done, given_to_srun


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_value_runs_anything_and_every_value_arrives(hostile, tmp_path):
    base = tmp_path / "base"
    (base / hostile / "attempts").mkdir(parents=True)
    job = replace(
        JOB,
        name=hostile,
        run_dir=str(base / hostile),
        config=hostile,
        overrides=(f"run.name={hostile}",),
        working_directory=str(tmp_path),
        profile=Profile(environment={"X": hostile}, container=["enter", hostile], srun_args=[f"--comment={hostile}"]),
    )
    done, words = run_script(render(job), tmp_path)
    assert done.returncode == 0, done.stderr
    assert words is not None
    assert words[-3:] == ["--", hostile, f"run.name={hostile}"]
    assert words[words.index("--run-dir") + 1] == str(base / hostile)
    assert ["enter", hostile, JOB.python] == words[words.index("enter") : words.index("enter") + 3]
    assert not list(tmp_path.rglob("pwned"))
    assert all(line.isprintable() for line in render(job).splitlines() if line.startswith("#SBATCH"))


@given(st.text(min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_option_lines_hold_one_option_each_or_are_refused(value):
    try:
        lines = header({"comment": value})
    except InputError:
        return
    assert len("\n".join(lines).splitlines()) == 1
    assert lines[0].startswith("#SBATCH --comment=")


@given(st.text(max_size=60))
def test_job_names_are_plain(name):
    assert job_name(name).isascii()
    assert all(letter.isalnum() or letter in "_.-" for letter in job_name(name))


def ended(tmp_path, code, *, restart=0, work=":", state="RUNNING Reason=None", job=JOB):
    run = tmp_path / "run"
    (run / "attempts").mkdir(parents=True, exist_ok=True)
    job = replace(job, run_dir=str(run), working_directory=str(tmp_path))
    before = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    done, _ = run_script(
        render(job),
        tmp_path,
        FAKE_CODE=str(code),
        FAKE_WORK=work,
        FAKE_STATE=state,
        SLURM_RESTART_COUNT=str(restart),
    )
    after = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else ""
    lines = (run / "attempts" / "7.ends").read_text().splitlines()
    end = json.loads(lines[-1])
    assert done.returncode == end["code"] == code
    assert (after != before) == end["decision"].startswith("requeue")
    return end["decision"]


def saved(step):
    return f"mkdir -p run/ckpt/{step}; touch run/ckpt/{step}/manifest.json"


@pytest.mark.parametrize(
    ("code", "work", "decision"),
    [
        (0, ":", "final"),
        (2, ":", "final"),
        (75, ":", "requeue"),
        (140, ":", "requeue"),  # USR2 before Python could listen
        (13, ":", "gave-up"),  # a crash without a new checkpoint would only repeat itself
        (13, saved(10), "requeue-after-crash"),
        (137, saved(10), "requeue-after-crash"),
        (1, saved(10), "requeue-after-crash"),
        (134, saved(10), "requeue-after-crash"),
        (13, "mkdir -p run/ckpt/10", "gave-up"),  # a checkpoint without a manifest is not durable
        (137, saved(10) + "; touch run/STOP", "final"),
    ],
)
def test_exit_codes_decide(tmp_path, code, work, decision):
    assert ended(tmp_path, code, work=work) == decision


def test_the_number_of_crashes_is_limited(tmp_path):
    decisions = [ended(tmp_path, 13, restart=n, work=saved(n + 1)) for n in range(5)]
    assert decisions == ["requeue-after-crash"] * 3 + ["gave-up"] * 2


def test_saving_without_progress_is_limited_too(tmp_path):
    decisions = [ended(tmp_path, 75, restart=n) for n in range(12)]
    assert decisions == ["requeue"] * 10 + ["gave-up"] * 2
    assert ended(tmp_path, 75, restart=12, work=saved(5)) == "requeue"


def test_a_cancelled_or_preempted_job_is_left_to_slurm_but_not_one_at_its_time_limit(tmp_path):
    assert ended(tmp_path, 75, state="COMPLETING Reason=None") == "slurm-decides"
    assert ended(tmp_path, 75, state="COMPLETING Reason=TimeLimit") == "requeue"  # SLURM does not queue it again


def test_an_element_of_an_array_is_queued_again_as_itself_for_one_of_them_has_the_arrays_number(tmp_path):
    runs = [tmp_path / name for name in ("first", "second")]
    for run in runs:
        (run / "attempts").mkdir(parents=True)
    job = replace(JOB, working_directory=str(tmp_path), points=tuple((str(run), "config.toml") for run in runs))
    element = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    run_script(render(job), tmp_path, FAKE_CODE="75", **element)
    assert (tmp_path / "requeued").read_text() == "7_1\n"
    assert (runs[1] / "attempts" / "7.ends").exists()


@pytest.mark.parametrize(("code", "decision"), [(140, "requeue"), (1, "gave-up")])
def test_a_signal_while_files_are_staged_is_no_crash(tmp_path, code, decision):
    profile = JOB.profile.model_copy(update={"stage": {"/data": "/local"}})
    assert ended(tmp_path, code, job=replace(JOB, profile=profile)) == decision


def test_the_end_of_the_job_is_asked_for_when_nothing_but_the_tasks_is_left_to_do(tmp_path):
    """A job that is preempted before its first step gets no signal, only an earlier end."""
    site = Profile(setup=["module load cuda"], stage={"/data": "/local"})
    for text in (render(replace(JOB, profile=site)), by_hand()):
        lines = [line for line in text.partition("trap dpscale_ended EXIT")[2].splitlines() if line]
        asked = next(number for number, line in enumerate(lines) if line.startswith("dpscale_end=$(squeue"))
        assert lines[asked + 1].startswith("if [[ $dpscale_end == *T* ]]; then export DPSCALE_DEADLINE")
        assert lines[asked + 2].startswith("srun --kill-on-bad-exit")


@pytest.mark.parametrize("marker", ["STOP", "finished"])
def test_a_requeued_job_with_nothing_to_do_ends_at_once(tmp_path, marker):
    run = tmp_path / "run"
    (run / "attempts").mkdir(parents=True)
    (run / marker).touch()
    text = render(replace(JOB, run_dir=str(run), working_directory=str(tmp_path)))
    done, words = run_script(text, tmp_path, SLURM_RESTART_COUNT="1")
    assert (done.returncode, words) == (0, None)


def test_the_tasks_learn_the_deadline_the_margin_and_where_to_meet(tmp_path):
    (tmp_path / "run" / "attempts").mkdir(parents=True)
    text = render(replace(JOB, run_dir=str(tmp_path / "run"), working_directory=str(tmp_path)))
    run_script(text, tmp_path, FAKE_WORK='env >"$FAKE/env"', SLURM_CPUS_PER_TASK="8", TZ="UTC")
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert seen["DPSCALE_DEADLINE"] == "1893456000"  # 2030-01-01 UTC
    assert seen["DPSCALE_STOP_MARGIN_S"] == "180"
    assert (seen["DPSCALE_HEAD_NODE"], seen["DPSCALE_HEAD_ADDRESS"]) == ("n1", "10.0.0.1")
    assert seen["SRUN_CPUS_PER_TASK"] == "8"


def test_options_follow_resources_profile_and_arguments():
    site = Profile(gpu_option="gres", exclusive=True, sbatch_args=["--mail-type=FAIL"])
    options = sbatch_options(replace(JOB, profile=site, sbatch_args=("--nice=5", "--hold")))
    assert options["gres"] == "gpu:4"
    assert "gpus-per-node" not in options
    assert (options["mail-type"], options["nice"], options["hold"], options["exclusive"]) == ("FAIL", "5", None, None)
    assert options["signal"] == "USR2@180"
    for wrong in ("-N5", "mail", "--a b=1"):
        with pytest.raises(InputError, match="long option"):
            sbatch_options(replace(JOB, sbatch_args=(wrong,)))


def test_a_short_job_keeps_most_of_its_time():
    assert replace(JOB, resources=Resources(1, 120)).stop_margin_s == 30


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("2:30", 150), ("8:00:00", 28800), ("1-12", 129600), ("2-00:00:00", 172800), ("1-02:03", 93780)],
)
def test_times_are_read_as_slurm_does(text, seconds):
    assert parse_time(text) == seconds
    assert parse_time(format_time(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "8h", "1:2:3:4", "-5", "1:00:00\n#SBATCH --x"])
def test_other_times_are_refused(text):
    with pytest.raises(InputError, match="--time"):
        parse_time(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nodes": 0},
        {"tasks_per_node": 0},
        {"gpus_per_node": -1},
        {"gpus_per_node": 4, "tasks_per_node": 3},
        {"time_s": 5},
    ],
)
def test_impossible_resources_are_refused(wrong):
    with pytest.raises(InputError):
        Resources(**({"nodes": 1, "time_s": 3600} | wrong))


def test_every_shipped_profile_is_valid():
    shipped = sorted(path.stem for path in profile_directories()[-1].glob("*.toml"))
    assert shipped == ["generic", "lumi-like"]
    for name in shipped:
        assert load_profile(name)


def test_a_wheel_holds_the_profiles_and_the_scripts_for_use_by_hand():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {
        file.resolve() for pattern in tables["package-data"]["launch"] for file in (ROOT / "launch").glob(pattern)
    }
    here = ROOT / "slurm"
    assert packed == {*here.glob("*.sbatch"), *(here / "profiles").iterdir()}
    assert profile_directories()[-1] == ROOT / "launch" / "slurm" / "profiles"  # where the wheel has them


def test_wrong_profiles_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("DPSCALE_PROFILES", str(tmp_path))
    (tmp_path / "mine.toml").write_text('partion = "x"')
    with pytest.raises(InputError, match="did you mean partition"):
        load_profile("mine")
    (tmp_path / "mine.toml").write_text('environment = {"A B" = "x"}')
    with pytest.raises(InputError, match="variable name"):
        load_profile("mine")
    with pytest.raises(InputError, match="did you mean generic"):
        load_profile("genric")
