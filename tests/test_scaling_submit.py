"""Submitting a sweep, with SLURM's commands replaced by fakes; and the scripts that it hands over."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dpscale.config import config_from_dict, load_config
from dpscale.data.open import open_source
from dpscale.data.options import SourceOptions
from dpscale.errors import InputError
from dpscale.scaling.by_hand import measure_by_hand
from dpscale.scaling.job import Wanted, by_hand, layout, submit_sweep
from dpscale.scaling.options import Effort, MeasureOptions
from dpscale.scaling.point import Setting
from dpscale.scaling.sweep import Sweep, data_kind, logical_batch
from launch.submission import Submission

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "run": {"name": "small"},
    "data": {"train": "made_up:vectors:6400:16:4"},
    "training": {"steps": 4},
    "privacy": {"epsilon": 3.0, "delta": 1e-5, "expected_batch_size": 100},
}
SBATCH = '#!/bin/bash\ncount=$(ls "$FAKE"/script-* 2>/dev/null | wc -l)\ncp "${@: -1}" "$FAKE/script-$count"\n'
SBATCH += "if [[ $1 = --parsable ]]; then echo $((100 + count)); else echo Submitted batch job $((100 + count)); fi\n"


@pytest.fixture
def login(tmp_path, monkeypatch) -> Path:
    """A directory whose fake sbatch keeps every script that it gets."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"sbatch": SBATCH, "scontrol": "#!/bin/bash\nexit 1\n", "srun": "#!/bin/bash\nexit 1\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    return tmp_path


def wanted(**changes) -> Wanted:
    return Wanted(
        **{"devices": (1, 4, 8), "modes": ("strong", "weak"), "variants": ("private",), "repeats": 2} | changes
    )


def asked(via="sbatch", gpus=4) -> Submission:
    return Submission(1, "0:30:00", gpus, 1, None, "generic", via)


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
def test_every_point_is_a_job_with_one_process_for_each_device(login, via):
    sweep = login / "sweep"
    jobs = submit_sweep(config_from_dict(CONFIG), sweep, wanted(), asked(via), dry_run=False)
    assert len(jobs) == 2 * (1 + 2 + 2)
    assert len({job.job for job in jobs}) == len(jobs)
    for job in jobs:
        options = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", job.script))
        devices = int(options["nodes"]) * int(options["ntasks-per-node"])
        assert devices == job.setting.devices
        assert options["gpus-per-node"] == options["ntasks-per-node"]
        assert ("--verb measure" in job.script) == (via == "sbatch")
    kept = Sweep.load(sweep)
    assert kept is not None
    assert [setting.name for setting in kept.settings] == [job.setting.name for job in jobs]
    counts = [job.setting.devices for job in jobs]
    assert counts != sorted(counts), "the order is random, so that no hour of the cluster falls on one count"


def test_a_dry_run_changes_nothing(login):
    before = sorted(login.rglob("*"))
    jobs = submit_sweep(config_from_dict(CONFIG), login / "sweep", wanted(), asked(), dry_run=True)
    assert sorted(login.rglob("*")) == before
    assert all(job.job is None for job in jobs)


def test_the_script_gives_the_task_what_was_asked(login):
    ask = wanted(windows=3, steps=7, cores=2, one_at_a_time=True)
    jobs = submit_sweep(config_from_dict(CONFIG), login / "sweep", ask, asked(), dry_run=True)
    script = next(job.script for job in jobs if job.setting.modes == ("weak",))
    words = shlex.split(script.rsplit("-m launch.runtime ", 1)[1])
    options = [word.removeprefix("--option=") for word in words if word.startswith("--option=")]
    setting = next(job.setting for job in jobs if job.setting.modes == ("weak",))
    assert MeasureOptions.parse(options) == MeasureOptions(
        str(login / "sweep"), setting, ("private",), Effort(windows=3, steps=7), cores=2
    )
    assert words[words.index("--verb") + 1] == "measure"
    assert words[-1] == str(login / "sweep" / "config.toml")
    assert "#SBATCH --dependency=singleton" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_options_of_a_task_survive_the_command_line():
    setting = Setting(3, 1000 / 3, ("strong", "weak"), 2)
    made = MeasureOptions("/a b=c", setting, ("private", "nonprivate"), Effort(2, 3, checkpoint=False), 4, 3, True)
    assert MeasureOptions.parse(made.words()) == made


@pytest.mark.parametrize(
    ("devices", "per_node", "nodes"),
    [(1, 4, (1, 1, 1)), (3, 4, (1, 3, 3)), (4, 4, (1, 4, 4)), (80, 4, (20, 4, 4)), (1024, 8, (128, 8, 8))],
)
def test_devices_fill_whole_nodes(devices, per_node, nodes):
    assert layout(devices, per_node, gpus=True) == nodes
    assert layout(devices, per_node, gpus=False) == (*nodes[:2], 0)


def test_devices_that_do_not_fill_their_nodes_are_refused():
    with pytest.raises(InputError, match="6 devices are not whole nodes of 4"):
        layout(6, 4, gpus=True)


def test_a_batch_beyond_the_data_set_and_private_data_are_refused_before_anything_is_submitted(login):
    with pytest.raises(InputError, match=r"weak scaling to 128 devices takes a logical batch of 12800"):
        submit_sweep(config_from_dict(CONFIG), login / "s", wanted(devices=(1, 128)), asked(), dry_run=False)
    private = config_from_dict(CONFIG | {"data": {"train": "patients.npz"}})
    with pytest.raises(InputError, match="may be private"):
        submit_sweep(private, login / "s", wanted(), asked(), dry_run=False)
    with pytest.raises(InputError, match="may be private"):
        measure_by_hand(
            private,
            "x.toml",
            (),
            login / "s",
            modes=("strong",),
            variants=("private",),
            base=1,
            repeat=1,
            local_processes=1,
            effort=Effort(1, 1),
            cores=0,
            declared_public=False,
        )
    assert not (login / "s").exists()


def test_another_sweep_is_not_mixed_into_a_directory(login):
    submit_sweep(config_from_dict(CONFIG), login / "sweep", wanted(devices=(1,)), asked(), dry_run=False)
    with pytest.raises(InputError, match="asks for other points"):
        submit_sweep(config_from_dict(CONFIG), login / "sweep", wanted(devices=(2,)), asked(), dry_run=False)


def test_a_second_submission_makes_up_for_the_missing_points_only(login):
    sweep, ask = login / "sweep", wanted(devices=(1, 4), modes=("strong",), repeats=1)
    first = submit_sweep(config_from_dict(CONFIG), sweep, ask, asked(), dry_run=False)
    (sweep / "records").mkdir()
    (sweep / "records" / first[0].setting.record_name("private")).write_text("{}")
    again = submit_sweep(config_from_dict(CONFIG), sweep, ask, asked(), dry_run=False)
    assert [job.setting for job in again] == [first[1].setting]


def test_the_shipped_setting_is_the_one_that_the_readme_predicts_and_reaches_80_devices(login):
    config = load_config(ROOT / "configs" / "scaling" / "vit_b16.toml")
    assert logical_batch(config)[0] == 25_000
    assert (config.model.name, config.performance.update_sharding) == ("vit_b16", "sharded")
    assert data_kind(config, declared_public=False) == "made up"
    assert open_source(config.data.train, SourceOptions.from_config(config.data)).metadata.feature_shape == (
        224,
        224,
        3,
    )
    jobs = submit_sweep(config, login / "s", wanted(devices=(1, 80), repeats=1), asked(), dry_run=True)
    assert {(job.setting.devices, job.setting.batch) for job in jobs} == {(1, 25e3), (80, 25e3), (80, 2e6)}


def test_no_gpus_can_be_asked_of_a_profile_that_has_some(login):
    profile = login / "site.toml"
    profile.write_text("gpus_per_node = 4\ntasks_per_node = 2\n")
    ask = wanted(devices=(2,), modes=("strong",), repeats=1)
    for gpus, expected in ((0, False), (None, True)):
        submission = Submission(1, "0:30:00", gpus, 1, None, str(profile), "sbatch")
        (job,) = submit_sweep(config_from_dict(CONFIG), login / "sweep", ask, submission, dry_run=True)
        assert ("--gpus-per-node=2" in job.script) == expected


def test_the_script_by_hand_is_the_one_that_is_shipped():
    shipped = (ROOT / "slurm" / "scaling.sbatch").read_text()
    assert shipped == by_hand()
    subprocess.run(["bash", "-n"], input=shipped, text=True, check=True)


def test_the_verb_submits_without_jax(login):
    path = login / "config.json"
    path.write_text("")
    (login / "config.toml").write_text(
        '[run]\nname = "small"\n[data]\ntrain = "made_up:vectors:6400:16:4"\n[training]\nsteps = 4\n'
        "[privacy]\nepsilon = 3\ndelta = 1e-5\nexpected_batch_size = 100\n"
    )
    code = "import sys\nfrom dpscale.__main__ import main\nsys.argv = ['dpscale', *sys.argv[1:]]\n"
    code += "try: main()\nfinally: assert not {'jax', 'dp_accounting', 'matplotlib'} & set(sys.modules), 'heavy'"
    words = [
        "scaling",
        "submit",
        "config.toml",
        "--gpus",
        "1..2",
        "--repeats",
        "1",
        "--per-node",
        "2",
        "--out",
        "sweep",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--via", "sbatch"],
        cwd=login,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "job 102" in done.stdout
    assert "dpscale scaling curves" in done.stdout
    assert json.loads((login / "sweep" / "sweep.json").read_text())["variants"] == ["private", "nonprivate"]
    script = (login / "script-0").read_text()
    assert "gpus-per-node" not in script
