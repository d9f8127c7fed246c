"""Submitting, asking, stopping and resuming, with SLURM's commands replaced by fakes that say what SLURM says."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
[run]
name = "cluster run"
[data]
train = "digits/train"
[training]
steps = 8
[privacy]
epsilon = 3
delta = 1e-4
expected_batch_size = 100
"""
FAKES = {
    "sbatch": 'cat "${@: -1}" >"$FAKE/script"; if [[ $1 = --parsable ]]; then echo 41; '
    "else echo Submitted batch job 41; fi",
    "scontrol": 'cat "$FAKE/job" 2>/dev/null || { echo "slurm_load_jobs error: Invalid job id" >&2; exit 1; }',
    "sacct": 'cat "$FAKE/sacct" 2>/dev/null',
    "scancel": 'echo "$@" >>"$FAKE/cancelled"',
    "srun": "exit 1",
}


# What takes longer to import than a login node's verb may take, and what submitting alone needs.
HEAVY = {"jax", "jaxlib", "dp_accounting", "flax", "optax", "numpy", "scipy", "orbax", "grain", "matplotlib", "rich"}
HEAVY_BUT_FOR_SUBMIT = {"submitit", "asyncio", "launch.profiles"}


class Login:
    """A login node: a directory with a config, SLURM's commands, and the dpscale command."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tools = directory / "bin"
        tools.mkdir()
        for name, body in FAKES.items():
            (tools / name).write_text(f"#!/bin/bash\n{body}\n")
            (tools / name).chmod(0o755)
        self.config = directory / "config.toml"
        self.config.write_text(CONFIG)
        self.run = directory / "runs" / "cluster run"
        self.environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "FAKE": str(directory)}

    def dpscale(self, *words: str, code: int = 0) -> str:
        command = [sys.executable, "-X", "importtime", "-m", "dpscale", *words]
        done = subprocess.run(
            command, env=self.environment, cwd=self.directory, capture_output=True, text=True, timeout=60, check=False
        )
        errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        assert done.returncode == code, done.stdout + "\n".join(errors)
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
        assert not imported & HEAVY, "the login node's verbs import no jax"
        if words[0] in ("status", "logs", "stop"):
            assert not imported & {"dpscale.config", "launch.submit", *HEAVY_BUT_FOR_SUBMIT}
        return done.stdout + "\n".join(errors)

    def job_is(self, state: str, reason: str = "None") -> None:
        text = f"JobId=41 JobName=x JobState={state} Reason={reason} Restarts=1 NodeList=t[1-2] Partition=low"
        (self.directory / "job").write_text(text)


@pytest.fixture
def login(tmp_path):
    return Login(tmp_path)


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_submitting_keeps_a_copy_of_the_config_and_says_what_next(login, via):
    printed = login.dpscale("submit", "config.toml", "privacy.epsilon=2", "--nodes", "2", "--via", via)
    assert printed.startswith("job 41\n")
    assert "dpscale stop 'runs/cluster run'" in printed
    folder = login.run / "attempts" / "submit-1"
    assert "epsilon = 2" in (folder / "config.toml").read_text()
    assert stat.S_IMODE(login.run.stat().st_mode) == 0o700
    script = (login.directory / "script").read_text()
    assert "#SBATCH --nodes=2" in script
    assert "trap dpscale_ended EXIT" in script
    assert "--kill-on-bad-exit=1" in script
    assert json.loads((folder / "submission.json").read_text())["job"] == "41"


def test_a_run_directory_has_the_mode_that_the_profile_says(login):
    (login.directory / "open.toml").write_text('run_directory_mode = "0750"')
    login.dpscale("submit", "config.toml", "--via", "sbatch", "--profile", str(login.directory / "open.toml"))
    assert stat.S_IMODE(login.run.stat().st_mode) == 0o750
    assert stat.S_IMODE((login.run / "attempts").stat().st_mode) == 0o700


def test_submitits_pickle_holds_paths_only(login):
    login.dpscale("submit", "config.toml", "--via", "submitit")
    [file] = login.run.glob("attempts/submit-1/submitit/*.pkl")
    task = pickle.loads(file.read_bytes()).function
    assert vars(task) == {
        "config": str(login.run / "attempts/submit-1/config.toml"),
        "run_dir": str(login.run),
        "new_attempt": False,
    }


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_a_dry_run_prints_the_script_and_changes_nothing(login, via):
    printed = login.dpscale("submit", "config.toml", "--via", via, "--dry-run", "--sbatch-arg=--nice=5")
    assert printed.startswith("#!/bin/bash")
    assert "#SBATCH --nice=5" in printed
    assert not login.run.exists()
    assert not (login.directory / "script").exists()


def test_a_run_is_not_submitted_twice(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    login.job_is("RUNNING")
    assert "job 41 of" in login.dpscale("submit", "config.toml", "--via", "sbatch", code=2)
    login.job_is("COMPLETED")
    login.dpscale("submit", "config.toml", "--via", "sbatch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--profile", "nowhere"), "there is no profile"),
        (("--time", "soon"), "--time soon"),
        (("--gpus-per-node", "4", "--tasks-per-node", "3"), "4 GPUs cannot be shared"),
        (("--sbatch-arg", "-N3"), "long option"),
        (("--sbatch-arg", "--comment=a\nb"), "printable"),
        (("--run-dir", "a%b", "--via", "submitit"), "--via sbatch"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(login, words, message):
    assert message in login.dpscale("submit", "config.toml", *words, code=2)
    assert not (login.directory / "script").exists()


def test_status_reads_slurm_then_accounting_then_files(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    login.job_is("PENDING", "Priority")
    assert "pending (Priority)" in login.dpscale("status", str(login.run))
    (login.directory / "job").unlink()
    for line, shown in {  # SLURM 22.05 with slurmdbd printed all but the last, which no dead node was at hand for
        "COMPLETED|t1|low": ("completed", "job            41 on t1 in partition low"),
        "FAILED|t2|low": ("failed", "on t2"),
        "REQUEUED|t1|low": ("requeued", "on t1"),
        "CANCELLED by 0|None assigned|low": ("cancelled", "job            41 in partition low"),
        "NODE_FAIL|t1|low": ("node_fail", "on t1"),
    }.items():
        (login.directory / "sacct").write_text(line + "\n")
        state, job = shown
        said = login.dpscale("status", str(login.run))
        assert f"state          {state}\n" in said
        assert job in said

    status = {"state": "running", "step": 4, "steps": 8, "epsilon": 1.5, "delta": 1e-4, "checkpoint_step": 3}
    (login.run / "status.json").write_text(json.dumps(status | {"updated_at": "2026-01-01T00:00:00+00:00"}))
    end = {"restart": 0, "code": 75, "durable_step": 3, "advanced": 1, "decision": "requeue", "at": 1}
    (login.run / "attempts" / "41.ends").write_text(json.dumps(end) + '\n{"half')
    shown = login.dpscale("status", str(login.run))
    for part in (
        "not running (its job is node_fail)",
        "step           4 of 8",
        "epsilon 1.500 at delta 0.0001",
        "checkpoint     step 3",
        "restarts       1",
        "exit code 75 at durable step 3: saved its state and was queued again",
    ):
        assert part in shown


def test_the_rate_is_that_between_the_last_two_checkpoints_of_one_incarnation(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    (login.run / "plan.json").write_text('{"expected_batch_size": 100.0}')
    (login.run / "status.json").write_text('{"state": "running", "step": 20, "steps": 40, "epsilon": null}')
    for step, written in ((10, 1000), (20, 1005)):
        manifest = login.run / "ckpt" / str(step) / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        os.utime(manifest, (written,) * 2)
    assert "examples/s     about 200 " in login.dpscale("status", str(login.run))
    (login.run / "attempts" / "41.1").mkdir()
    (login.run / "attempts" / "41.1" / "env.json").touch()
    os.utime(login.run / "attempts" / "41.1" / "env.json", (1002,) * 2)
    assert "examples/s" not in login.dpscale("status", str(login.run))


def test_stop_asks_a_running_job_and_cancels_a_waiting_one(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    login.job_is("RUNNING")
    assert "saves at the end of its step" in login.dpscale("stop", str(login.run))
    assert (login.run / "STOP").exists()
    assert not (login.directory / "cancelled").exists()
    login.job_is("PENDING", "BeginTime")
    login.dpscale("stop", str(login.run))
    assert (login.directory / "cancelled").read_text() == "41\n"


def test_resume_asks_for_the_same_again_but_for_what_is_given(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch", "--nodes", "2", "--time", "2:00:00", "--srun-arg=--label")
    assert "has not started yet" in login.dpscale("resume", str(login.run), code=2)
    (login.run / "run.json").write_text("{}")
    (login.run / "config.toml").write_text(CONFIG)
    (login.run / "STOP").touch()
    login.job_is("COMPLETED")
    login.dpscale("resume", str(login.run), "--nodes", "5")
    script = (login.directory / "script").read_text()
    for part in ("#SBATCH --nodes=5", "#SBATCH --time=2:00:00", "--label", "attempts/submit-2/config.toml"):
        assert part in script
    assert not (login.run / "STOP").exists()
    (login.run / "finished").touch()
    assert "nothing to go on with" in login.dpscale("resume", str(login.run), code=2)


def test_a_run_whose_last_job_died_waits_until_its_lease_has_expired(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    (login.run / "lease").write_text(json.dumps({"renewed_at": time.time() - 60}))
    begin = re.search(r"--begin=now\+(\d+)", login.dpscale("submit", "config.toml", "--via", "sbatch", "--dry-run"))
    assert begin is not None
    assert 50 < int(begin[1]) <= 70
    (login.run / "lease").write_text(json.dumps({"renewed_at": time.time() - 121}))
    assert "--begin" not in login.dpscale("submit", "config.toml", "--via", "sbatch", "--dry-run")


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_a_sweep_is_one_job_array_with_a_run_directory_for_each_point(login, via):
    sweep = ("--sweep", "optimizer.learning_rate=0.1,0.3", "--sweep", "model.name=mlp,cnn")
    printed = login.dpscale("submit", "config.toml", *sweep, "--nodes", "2", "--via", via)
    assert printed.startswith("job array 41, 4 runs")
    runs = sorted(path.name for path in login.run.iterdir())
    assert runs == [f"learning_rate={rate},name={name}" for rate in ("0.1", "0.3") for name in ("cnn", "mlp")]
    point = login.run / "learning_rate=0.3,name=mlp" / "attempts" / "submit-1"
    config = (point / "config.toml").read_text()
    assert "learning_rate = 0.3" in config
    assert 'name = "mlp"' in config
    script = (login.directory / "script").read_text()
    assert "#SBATCH --array=0-3\n" in script
    lines = script.partition("dpscale_max_crashes")[0] + '\nprintf "%s\\n" "$dpscale_run" "$dpscale_config"'
    shown = subprocess.run(["bash", "-c", lines], env={"SLURM_ARRAY_TASK_ID": "2"}, capture_output=True, text=True)
    assert shown.stdout.splitlines() == [str(point.parent.parent), str(point / "config.toml")]
    assert json.loads((point / "submission.json").read_text())["job"] == "41_2"
    if via == "submitit":  # each element finds its own call
        pickled = login.run / "learning_rate=0.1,name=mlp" / "attempts" / "submit-1" / "submitit"
        task = pickle.loads((pickled / "41_2_submitted.pkl").read_bytes()).function
        assert (task.run_dir, task.config) == (str(point.parent.parent), str(point / "config.toml"))
    login.job_is("RUNNING")
    assert "running" in login.dpscale("status", str(point.parent.parent))


@pytest.mark.parametrize(
    "sweep", ["optimizer.learning_rate", "x=1,2", "optimizer.learning_rate=0.1,-1", "a.b=1,1", "run.name=a"]
)
def test_a_wrong_sweep_submits_nothing(login, sweep):
    login.dpscale("submit", "config.toml", "--sweep", sweep, code=2)
    assert not (login.directory / "script").exists()


def test_logs_show_the_newest_incarnation_of_a_rank(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    assert "no log" in login.dpscale("logs", str(login.run), code=2)
    for restart in (0, 1):
        folder = login.run / "attempts" / f"41.{restart}"
        folder.mkdir()
        for rank in (0, 1):
            (folder / f"rank-{rank}.log").write_text(f"restart {restart} rank {rank}\n")
            os.utime(folder / f"rank-{rank}.log", (time.time() + restart,) * 2)
    assert login.dpscale("logs", str(login.run)) == "restart 1 rank 0\n"
    assert login.dpscale("logs", str(login.run), "--rank", "1") == "restart 1 rank 1\n"
    assert "its processes are 0 to 1" in login.dpscale("logs", str(login.run), "--rank", "2", code=2)


def test_following_goes_on_with_the_next_incarnation_leaves_nothing_out_and_ends_with_the_run(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    files = [login.run / "attempts" / f"41.{restart}" / "rank-2.log" for restart in (0, 1)]
    files[0].parent.mkdir()
    files[0].write_bytes("é".encode()[:1])
    command = [sys.executable, "-m", "dpscale", "logs", str(login.run), "--rank", "2", "-f"]
    following = subprocess.Popen(command, env=login.environment, stdout=subprocess.PIPE)
    try:
        time.sleep(2.5)
        with files[0].open("ab") as file:
            file.write("é".encode()[1:] + b" was cut\n")
        files[1].parent.mkdir()
        files[1].write_text("back\n")
        os.utime(files[1], (time.time() + 1,) * 2)
        time.sleep(1.5)
        assert following.poll() is None
        with files[1].open("a") as file:
            file.write("done\n")
        (login.run / "finished").touch()
        assert following.communicate(timeout=20)[0].decode() == "é was cut\nback\ndone\n"
        assert following.returncode == 0
    finally:
        following.kill()


def test_a_restart_that_the_script_could_not_explain_is_counted_and_named(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    for restart in (0, 1, 2):
        (login.run / "attempts" / f"41.{restart}").mkdir()
        (login.run / "attempts" / f"41.{restart}" / "env.json").touch()
    end = {"restart": 1, "code": 75, "durable_step": 3, "advanced": 1, "decision": "requeue", "at": time.time()}
    (login.run / "attempts" / "41.ends").write_text(json.dumps(end) + "\n")
    shown = login.dpscale("status", str(login.run))
    assert "restarts       2" in shown
    assert "job 41, restart 0: its script had no time to say why" in shown
    assert "job 41, restart 1: exit code 75" in shown


def test_a_job_that_waits_to_begin_again_is_counted_as_restarted(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    login.job_is("PENDING", "BeginTime")  # SLURM says Restarts=1; the next incarnation has no files yet
    shown = login.dpscale("status", str(login.run))
    assert "pending (BeginTime)" in shown
    assert "restarts       1\n  job 41, restart 0: its script had no time to say why" in shown


def test_one_element_of_an_array_is_never_asked_for_by_the_arrays_number(login):
    login.dpscale("submit", "config.toml", "--sweep", "optimizer.learning_rate=0.1,0.3")
    point = login.run / "learning_rate=0.3"
    (point / "attempts" / "41.0").mkdir()  # the last element's own number is the array's
    (login.directory / "bin" / "scontrol").write_text(
        '#!/bin/bash\n[[ $3 != 41_1 ]] && exit 1\necho "JobId=41 JobState=RUNNING Reason=None"\n'
    )
    assert "running" in login.dpscale("status", str(point))
    assert "job 41_1 is running" in login.dpscale("stop", str(point))


def test_a_requeued_element_is_cancelled_by_its_index_for_slurm_knows_its_own_number_no_more(login):
    login.dpscale("submit", "config.toml", "--sweep", "optimizer.learning_rate=0.1,0.3")
    point = login.run / "learning_rate=0.1"
    (point / "attempts" / "42.0").mkdir()  # what the element was called when it came into being
    (login.directory / "job").write_text(
        "JobId=42 ArrayJobId=41 ArrayTaskId=0 JobName=x JobState=PENDING Reason=BeginTime Partition=low"
    )
    assert "job            41_0 in partition low" in login.dpscale("status", str(point))
    assert "job 41_0 was waiting: cancelled" in login.dpscale("stop", str(point))
    assert (login.directory / "cancelled").read_text() == "41_0\n"


def test_an_array_that_still_waits_as_a_whole_is_asked_for_by_the_element(login):
    login.dpscale("submit", "config.toml", "--sweep", "optimizer.learning_rate=0.1,0.3")
    (login.directory / "job").write_text("JobId=41 ArrayJobId=41 ArrayTaskId=0-1 JobState=PENDING Reason=Priority")
    assert "job 41_1 was waiting: cancelled" in login.dpscale("stop", str(login.run / "learning_rate=0.3"))
    assert (login.directory / "cancelled").read_text() == "41_1\n"


def test_a_place_that_is_no_run_is_named(login):
    for place in (login.directory, login.config, login.directory / "nowhere"):
        for verb in ("status", "logs", "stop", "resume"):
            assert "is no run's directory" in login.dpscale(verb, str(place), code=2)


@pytest.mark.parametrize("place", ["config.toml", "config.toml/below"])
def test_a_run_directory_that_cannot_be_made_is_named(login, place):
    assert "cannot be written" in login.dpscale("submit", "config.toml", "--run-dir", place, code=2)
    assert not (login.directory / "script").exists()


@pytest.mark.parametrize("text", ['{"nodes": 1, "ti', "[]", '{"nodes": 1}'])
def test_a_damaged_submission_hides_nothing_else_and_resume_names_it(login, text):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    (login.run / "attempts" / "submit-1" / "submission.json").write_text(text)
    (login.run / "attempts" / "40.0").mkdir()
    (login.run / "attempts" / "40.ends").write_text('[1]\n{"at": "x"}\n{"restart": 0}\n"half')
    (login.run / "run.json").touch()
    assert "job            40" in login.dpscale("status", str(login.run))
    login.dpscale("stop", str(login.run))
    assert "submit-1/submission.json cannot be read" in login.dpscale("resume", str(login.run), code=2)


@pytest.mark.parametrize("text", ['{"st', '{"step": "x"}'])
def test_a_damaged_status_is_named_with_its_remedy(login, text):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    (login.run / "status.json").write_text(text)
    assert "status.json is not a run's status" in login.dpscale("status", str(login.run), code=2)


def test_stopping_twice_and_resuming_a_finished_run_are_harmless(login):
    login.dpscale("submit", "config.toml", "--via", "sbatch")
    login.job_is("RUNNING")
    for _ in range(2):
        assert "job 41 is running: it saves" in login.dpscale("stop", str(login.run))
    (login.run / "run.json").touch()
    (login.run / "finished").touch()
    assert "nothing to stop" in login.dpscale("stop", str(login.run))
    assert "has finished" in login.dpscale("resume", str(login.run), code=2)


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
@pytest.mark.parametrize("sweep", [(), ("--sweep", "optimizer.learning_rate=0.1,0.3")])
def test_without_slurm_the_message_says_where_to_go_and_nothing_is_made(login, via, sweep):
    login.environment["PATH"] = "/usr/nowhere"
    for words in ((), ("--dry-run",) if via == "submitit" else ()):
        said = login.dpscale("submit", "config.toml", "--via", via, *sweep, *words, code=2)
        assert "not found: run this on a login node of the cluster" in said
    assert not login.run.exists()


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_what_sbatch_refuses_is_said_in_its_own_words(login, via):
    (login.directory / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: Invalid generic resource (gres) specification' >&2; exit 1\n"
    )
    said = login.dpscale("submit", "config.toml", "--via", via, code=1)
    assert said.splitlines()[-1] == "dpscale: sbatch said: sbatch: error: Invalid generic resource (gres) specification"
    assert "not started" in login.dpscale("status", str(login.run))
