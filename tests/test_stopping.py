"""Requests to stop: none is lost, none is invented."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpscale
import dpscale.checkpoint
from dpscale.checkpoint import Checkpoints
from dpscale.config import RunConfig
from dpscale.evaluate import Evaluator
from dpscale.feed import Feed
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.secret import RootSecret
from dpscale.stopping import StopRequests

train_module = importlib.import_module("dpscale.train")
STEPS = 12
CONFIG = RunConfig.model_validate(
    {
        "data": {"validation_is": "public"},
        "training": {"steps": STEPS, "evaluate_every_steps": 2},
        "privacy": {
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "expected_batch_size": 10,
            "accountant": "rdp",
            "insecure_seed": 3,
            "verify": False,
        },
        "performance": {"physical_batch_size": 2},
        "checkpoint": {"every_steps": 3},
    }
)
SECRET = RootSecret.from_insecure_seed(3)
DATA = (np.linspace(-1, 1, 120, dtype=np.float32).reshape(40, 3), np.arange(40, dtype=np.int32) % 2)
HELD_OUT = (-DATA[0], DATA[1])


@pytest.fixture
def stops():
    requests = StopRequests()
    requests.install()
    yield requests
    requests.restore()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_a_request(stops, number):
    assert stops.reason is None
    os.kill(os.getpid(), number)
    assert number.name in stops.reason


def test_the_deadline_is_a_request_the_margin_before():
    now = time.time()
    early = StopRequests.from_environment({"DPSCALE_DEADLINE": str(now + 100), "DPSCALE_STOP_MARGIN_S": "60"})
    late = StopRequests.from_environment({"DPSCALE_DEADLINE": str(now + 50), "DPSCALE_STOP_MARGIN_S": "60"})
    assert early.reason is None
    assert "time" in (late.reason or "")
    assert StopRequests.from_environment({}).reason is None
    with pytest.raises(dpscale.InputError, match="DPSCALE_DEADLINE"):
        StopRequests.from_environment({"DPSCALE_DEADLINE": "soon"})


def test_a_stop_file_of_an_earlier_run_is_stale_but_not_for_a_requeued_job(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    file = tmp_path / "STOP"
    assert not StopRequests().is_stale(file)
    file.touch()
    os.utime(file, (time.time() - 60,) * 2)
    assert StopRequests().is_stale(file)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not StopRequests().is_stale(file)


def test_a_stop_file_written_after_the_start_is_kept(tmp_path):
    stops = StopRequests()
    file = tmp_path / "STOP"
    file.touch()
    os.utime(file, (time.time() + 1,) * 2)
    assert not stops.is_stale(file)
    stops.watch(file)
    assert "STOP" in (stops.reason or "")


def squared(params, example):
    return jnp.square(jnp.vdot(params["w"], example["features"]) - example["label"])


def run(run_dir, stops=None, *, verify=False):
    stops = stops or StopRequests()
    stops.install()
    return dpscale.train(
        CONFIG.model_copy(update={"privacy": CONFIG.privacy.model_copy(update={"verify": verify})}),
        run_dir,
        model={"w": np.zeros(3, np.float32)},
        loss=squared,
        train_data=DATA,
        validation_data=HELD_OUT,
        report=lambda line: None,
        progress=False,
        stops=stops,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that nobody stops; all runs of this module share its compiled steps."""
    compiled, cache = train_module.compiled_steps, []

    def once(*args):
        if not cache:
            cache.append(compiled(*args))
        return cache[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "compiled_steps", once)
        yield run(tmp_path_factory.mktemp("undisturbed") / "run")


def check_that_it_saved_and_goes_on(result, undisturbed, run_dir, latest):
    """It left soon after the request, with its state on disk, and the rest of the run is the undisturbed one's."""
    assert (result.state, result.wants_requeue) == ("stopped", True)
    assert result.step <= latest
    assert json.loads((run_dir / "ckpt" / str(result.step) / "manifest.json").read_text())["step"] == result.step
    finished = run(run_dir)
    assert (finished.state, finished.epsilon) == ("finished", undisturbed.epsilon)
    jax.tree.map(np.testing.assert_array_equal, finished.params, undisturbed.params)
    book = Ledger.parse(run_dir / "ledger.jsonl", (run_dir / "ledger.jsonl").read_bytes(), SECRET)
    assert (len(book.attempts), book.charged_steps) == (1, STEPS)


# What is under way when the signal comes: (object, its function, how many calls came before, last step that may run).
MOMENTS = {
    "opening the run directory": (train_module, "open_session", 0, 3),
    "compilation": (train_module, "compiled_steps", 0, 3),
    "verification": (train_module, "verify_steps", 0, 3),
    "reading a batch": (Feed, "batches", 4, 8),
    "an evaluation": (Evaluator, "__call__", 1, 8),
    "a checkpoint's start": (Checkpoints, "save", 1, 10),
    "a checkpoint's commit, in another thread": (dpscale.checkpoint, "write_manifest", 0, 10),
    "the wait for a checkpoint": (Checkpoints, "wait", 1, 10),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_is_not_lost(moment, undisturbed, tmp_path, monkeypatch):
    where, name, before, latest = MOMENTS[moment]
    number = signal.SIGUSR2 if list(MOMENTS).index(moment) % 2 else signal.SIGTERM
    real, calls = getattr(where, name), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == before + 1:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupted)
        result = run(tmp_path / "run", verify=name == "verify_steps")
    assert number.name in result.stop_reason
    check_that_it_saved_and_goes_on(result, undisturbed, tmp_path / "run", latest)


@pytest.mark.slow
def test_nor_is_one_that_came_before_training_began_nor_the_deadline(undisturbed, tmp_path):
    early = StopRequests()
    early.install()
    os.kill(os.getpid(), signal.SIGUSR2)
    check_that_it_saved_and_goes_on(run(tmp_path / "early", early), undisturbed, tmp_path / "early", 3)
    late = run(tmp_path / "late", StopRequests(stop_at=time.time()))
    assert late.stop_reason == "the job's time is nearly over"
    check_that_it_saved_and_goes_on(late, undisturbed, tmp_path / "late", 3)


@pytest.mark.slow
def test_nor_is_one_while_a_checkpoint_is_restored(undisturbed, tmp_path, monkeypatch):
    first = run(tmp_path / "run", StopRequests(stop_at=time.time()))
    real = train_module.restore

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "restore", interrupted)
        second = run(tmp_path / "run")
    assert first.step < second.step
    check_that_it_saved_and_goes_on(second, undisturbed, tmp_path / "run", first.step + 3)
