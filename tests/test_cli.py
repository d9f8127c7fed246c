"""The command line as its users type it: output, exit codes, and one clear message for every mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
[run]
name = "small"
[data]
train = "digits/train"
validation = "digits/validation"
validation_is = "public"
[model]
name = "mlp"
widths = [16]
[optimizer]
learning_rate = 0.5
[training]
steps = 4
evaluate_every_steps = 2
[privacy]
epsilon = 3.0
delta = 1e-4
expected_batch_size = 100
[checkpoint]
every_steps = 2
"""


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return path


def dpscale(*arguments, cwd=None, timeout_s=240) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "dpscale", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout_s)


def refused(*arguments, **keywords) -> str:
    """The message of a command that must end with exit code 2 and no traceback."""
    done = dpscale(*arguments, **keywords)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("dpscale: ")
    return done.stderr


@pytest.mark.slow
def test_train_trains_and_says_what_was_reached_and_where_it_is(config, tmp_path):
    done = dpscale("train", config, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["finished"] == "4 steps"
    assert lines["accuracy"].endswith("% on held-out examples")
    assert lines["privacy"] == "epsilon 3.000 at delta 0.0001"
    for what in ("checkpoint", "metrics", "plot", "report"):
        assert Path(lines[what]).exists()
    again = dpscale("train", config, "--run-dir", tmp_path / "run")
    assert again.returncode == 0
    assert lines["verified:"].startswith("24 laws on 1 devices")  # once: a finished run has no step to verify
    assert again.stdout.splitlines()[1:] == done.stdout.splitlines()[1:]

    other = refused("train", config, "privacy.clip_norm=2", "--run-dir", tmp_path / "run")
    assert "clip_norm: 1.0 -> 2.0" in other
    other = refused("train", config, "optimizer.learning_rate=0.1", "--run-dir", tmp_path / "run")
    assert "optimizer.learning_rate: 0.5 -> 0.1" in other


@pytest.mark.slow
def test_plan_shows_the_run_before_it_runs_and_leaves_nothing_behind(config, tmp_path):
    done = dpscale(
        "plan",
        config,
        "privacy.replay_reserve=3",
        "privacy.constant_time=true",
        "privacy.max_batch_size=150",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for word in (
        "replay reserve    3 steps on top: 3.000",
        "more rows than without",
        "sampling rate q   0.06",
        "noise multiplier",
        "after step 4",
        "3.000",
        "padding",
        "memory",
        "time",
    ):
        assert word in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


@pytest.mark.slow
def test_the_calculator_inverts_itself():
    setting = ["--batch-size", "100", "--examples", "1600", "--steps", "50", "--delta", "1e-5"]
    noise = dpscale("privacy", "noise", "--epsilon", "2", *setting)
    assert noise.returncode == 0, noise.stderr
    multiplier = noise.stdout.split()[2]
    epsilon = dpscale("privacy", "epsilon", "--noise-multiplier", multiplier, *setting)
    assert 1.99 < float(epsilon.stdout.split()[1]) <= 2.0001
    rdp = dpscale("privacy", "epsilon", "--noise-multiplier", multiplier, "--accountant", "rdp", *setting)
    assert float(rdp.stdout.split()[1]) > 2.0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train"], "Missing argument 'CONFIG'"),
        (["trian"], "Did you mean 'train'?"),
        (["train", "missing.toml"], "missing.toml cannot be read"),
        (["train", "{tmp}"], "is a directory"),
        (["train", "{config}", "privacy.epsilon=-3"], "privacy.epsilon=-3"),
        (["train", "{config}", "privacy.epsylon=3"], "did you mean epsilon"),
        (["plan", "{config}", "privacy.expected_batch_size=6000"], "larger than the data set (1621 examples)"),
        (["plan", "{config}", "data.train=nothere.npz"], "nothere.npz"),
        (["plan", "{config}", "data.train=digits/tarin"], "digits has the splits digits/train and digits/validation"),
        (["privacy", "noise", "--epsilon", "0", "--steps", "1", "--delta", "0.1", "-q", "0.1"], "epsilon=0"),
        (["privacy", "noise", "--epsilon", "1", "--steps", "1", "--delta", "2", "-q", "0.1"], "delta=2"),
        (["privacy", "noise", "--epsilon", "1", "--steps", "1", "--delta", "0.1"], "sampling rate is missing"),
        (
            ["privacy", "epsilon", "--steps", "1", "--delta", "0.1", "-q", "2", "--noise-multiplier", "1"],
            "sampling_rate=2",
        ),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_2(arguments, part, config, tmp_path):
    message = refused(*(text.format(tmp=tmp_path, config=config) for text in arguments), cwd=tmp_path)
    assert part in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.name=resnot", "model.name='resnot' is unknown"),
        ("model.width=[3]", "did you mean widths"),
        ("data.num_classes=3", "data.num_classes=3"),
    ],
)
def test_a_mistake_that_shows_only_in_building_gets_the_same(override, part, config, tmp_path):
    assert part in refused("train", config, override, "--run-dir", tmp_path / "run")


@pytest.mark.slow
def test_a_run_directory_that_cannot_be_used_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("train", config, "--run-dir", tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert "thesis.tex" in refused("train", config, "--run-dir", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").exists()


def test_debug_shows_the_traceback(tmp_path):
    done = dpscale("train", tmp_path, "--debug")
    assert "Traceback" in done.stderr
    assert done.returncode != 0


def test_help_has_an_example_for_every_verb():
    for verb in (["train"], ["plan"], ["verify"], ["audit"], ["privacy", "epsilon"], ["privacy", "noise"]):
        assert "Example: dpscale" in dpscale(*verb, "--help").stdout


def test_help_config_lists_every_section():
    text = dpscale("train", "--help-config").stdout
    assert all(f"[{section}]" in text for section in ("data", "model", "privacy", "performance"))


def test_help_answers_without_jax():
    code = "import sys, dpscale.cli; sys.exit('jax' in sys.modules or 'dp_accounting' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_the_options_of_the_named_verb_are_built_and_every_verb_is_listed_where_none_is_named():
    code = "import dpscale.cli as cli; print(*({verb!r}, *cli.command_line([{verb!r}]).commands))"
    listed = {}
    for verb in ("status", "submit", "privacy", "stauts"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(verb=verb)], capture_output=True, text=True, check=True
        )
        listed[verb] = done.stdout.split()[1:]
    assert (listed["status"], listed["submit"]) == (["status"], ["submit"])
    assert {"status", "train", "privacy", "data"} <= set(listed["privacy"])
    assert listed["privacy"] == listed["stauts"]
    assert "Did you mean 'status'" in refused("stauts")
