"""A sweep on a real SLURM, with a real secret and a hostile name; and the doctor beside it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from slurm_runs import CONFIG, ROOT, durable_step

from launch.status import read_ends

STEPS = ("training.steps=30", "checkpoint.every_steps=5")


def test_each_point_of_a_sweep_is_an_element_of_its_own_and_the_secret_stays_in_its_file(cluster, tmp_path):
    """The last element's own job number is the array's: its requeue must not end the others."""
    config = tmp_path / "sweep's $(touch ran).toml"
    config.write_text(CONFIG.replace("insecure_seed = 5\n", ""))
    base = tmp_path / 'two "words"; it\'s\n$(touch ran)'
    words = ["submit", str(config), *STEPS, "--sweep", "optimizer.learning_rate=0.1,0.5", "--run-dir", str(base)]
    profile = cluster.profile(pace_s=0.2, setup=["export SET_UP=yes"])
    (tmp_path / "data to stage").mkdir()
    (tmp_path / "data to stage" / "part").write_text("some data")
    with open(profile, "a") as site:
        site.write(f'\n[stage]\n"{tmp_path}/data to stage" = "{tmp_path}/on the node"\n[environment]\nSITE = "a b"\n')
    printed = cluster.dpscale(*words, "--tasks-per-node", "2", "--profile", profile, "--via", "sbatch")
    array = printed.split()[2].rstrip(",")
    runs = [base / f"learning_rate={rate}" for rate in ("0.1", "0.5")]
    doctor = examination(cluster, tmp_path)

    cluster.wait_for_step(5, runs[1])
    secrets = [(run / "secret.key").read_text().strip() for run in runs]
    assert len(set(secrets)) == 2
    everything = "".join(cluster.processes(f"SLURM_ARRAY_JOB_ID={array}").values())
    for part in ("launch.runtime", "\0SET_UP=yes\0", "\0SITE=a b\0"):
        assert part in everything
    assert not [secret for secret in secrets if secret in everything], "a secret in an environment or a command line"
    assert "running" in cluster.dpscale("status", str(runs[0]))
    cluster.command("scancel", "--signal=USR2", f"{array}_1")
    for index, run in enumerate(runs):
        cluster.wait_for_end(f"{array}_{index}", run)
        assert (run / "finished").exists(), cluster.everything(run)
        assert "state          finished" in cluster.dpscale("status", str(run))
    said = [[(end["restart"], end["code"], end["decision"]) for end in read_ends(run)] for run in runs]
    assert said == [[(0, 0, "final")], [(0, 75, "requeue"), (1, 0, "final")]]
    assert [durable_step(run) for run in runs] == [30, 30]
    [staged] = (tmp_path / "on the node").iterdir()  # also after the second copy to the same place
    assert staged.read_text() == "some data"

    holders = [file for place in (tmp_path, cluster.files) for file in files_with(place, secrets)]
    assert holders == [run / "secret.key" for run in runs]
    shown = cluster.command("scontrol", "show", "job", "-o")
    assert not [secret for secret in secrets if secret in shown]
    assert not [path for place in (ROOT, tmp_path) for path in place.rglob("ran")]

    code, lines = doctor()
    assert code == 0, lines
    where = re.findall(r"(t[123]) at 127\.0\.0\.1, processes and devices: ([01]) has cpu:", lines)
    assert len({node for node, _ in where}) == 2, lines
    assert {rank for _, rank in where} == {"0", "1"}
    for part in ("2 processes, 2 devices", "KILL comes"):
        assert part in lines
    assert lines.splitlines()[-1] == "fit to train"
    assert all(": " in line for line in lines.splitlines() if line.startswith("warn"))


def examination(cluster, tmp_path):
    """`dpscale doctor` as a job on both nodes, begun now; a function that waits for its exit code and lines."""
    command = [cluster.python, "-m", "dpscale", "doctor", "--nodes", "2", "--directory", str(tmp_path / "runs")]
    begun = subprocess.Popen(command, env=cluster.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def result() -> tuple[int, str]:
        lines = begun.communicate(timeout=60)[0]
        return begun.returncode, lines

    return result


def files_with(directory: Path, secrets: list[str]) -> list[Path]:
    """Files that hold one of the secrets, as text or as bytes."""
    forms = [form for secret in secrets for form in (secret.encode(), bytes.fromhex(secret))]
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if any(form in path.read_bytes() for form in forms)]
