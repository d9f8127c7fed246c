"""Laws of interruption, on whole runs: killed anywhere and called again, a run ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import dpscale
from dpscale.config import RunConfig, to_toml
from dpscale.errors import InputError, PrivacyError, RunDirectoryError
from dpscale.lease import Holder
from dpscale.metrics.recorder import Recorder
from dpscale.metrics.status import read_status
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.run_directory import RunDirectory
from dpscale.run_record import read_run
from dpscale.stopping import StopRequests

pytestmark = pytest.mark.slow  # whole runs, most of them in processes of their own

GENERATOR = np.random.default_rng(5)
FEATURES = GENERATOR.normal(size=(120, 6)).astype(np.float32)
LABELS = (FEATURES[:, 0] > 0).astype(np.int32)
SEED = 7


def config(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "data": {"num_classes": 2, "validation_is": "public"},
        "model": {"name": "mlp", "widths": [4]},
        "optimizer": {"learning_rate": 0.5, "momentum": 0.9},
        "training": {"steps": 12, "evaluate_every_steps": 2},
        "privacy": {
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "expected_batch_size": 40,
            "insecure_seed": SEED,
            "verify": False,  # test_verify.py
            "accountant": "rdp",
        },
        "performance": {"physical_batch_size": 4},
        "checkpoint": {"every_steps": 3},
    }
    for section, given in sections.items():
        values[section] = {k: v for k, v in (values.get(section, {}) | given).items() if v is not None}
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """All these runs have the same few programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("jax_cache")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "plot", lambda self: None)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(run_dir: Path, *, stops=None, new_attempt=False, said=None, **sections):
    return dpscale.train(
        config(**sections),
        run_dir,
        train_data=(FEATURES, LABELS),
        validation_data=(FEATURES[:30], LABELS[:30]),
        report=said.append if said is not None else (lambda line: None),
        progress=False,
        stops=stops,
        new_attempt=new_attempt,
    )


def same(one: Any, other: Any) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def ledger(run_dir: Path, seed: int = SEED) -> Ledger:
    return Ledger.load(run_dir / "ledger.jsonl", RootSecret.from_insecure_seed(seed))


def public(run_dir: Path) -> bytes:
    return (run_dir / "metrics" / "public.jsonl").read_bytes()


class StopAfter(StopRequests):
    """Asks for a stop from the n-th look on; the run ends within two more steps."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def reason(self):
        self.looks -= 1
        return "asked" if self.looks < 0 else None


class Snapshots:
    """Copies of a run directory after every rename and every append: what a kill at that moment leaves behind.

    Causes are copied after their effects (a checkpoint before its record, a record before its metrics), so that a copy
    taken while another thread writes is also a state that a kill can leave.
    """

    def __init__(self, run_dir: Path, place: Path) -> None:
        self.run_dir, self.place, self.taken = run_dir, place, {}
        self._lock = threading.RLock()

    def take(self) -> None:
        with self._lock:
            if not self.run_dir.exists():
                return
            state = self.place / str(len(self.taken))
            state.mkdir(parents=True)
            for name in (
                "finished",
                "status.json",
                "metrics",
                "ledger.jsonl",
                "ckpt",
                "run.json",
                "plan.json",
                "config.toml",
            ):
                _copy(self.run_dir / name, state / name)
            sizes = {str(f.relative_to(state)): f.stat().st_size for f in state.rglob("*") if f.is_file()}
            watched = ("ledger.jsonl", "public.jsonl", "manifest.json", "_METADATA", "run.json", "finished")
            signature = tuple(sorted((name, size) for name, size in sizes.items() if name.endswith(watched)))
            if signature in self.taken.values():
                shutil.rmtree(state)
            else:
                self.taken[state] = signature

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("replace", "rename", "fsync", "write"):
            real = getattr(os, name)

            def watched(*args, real=real, **kwargs):
                result = real(*args, **kwargs)
                self.take()
                return result

            patch.setattr(os, name, watched)


def _copy(source: Path, target: Path) -> None:
    try:
        if source.is_dir():
            target.mkdir(mode=0o700)
            for inner in sorted(source.iterdir()):
                _copy(inner, target / inner.name)
        elif source.exists():
            shutil.copy2(source, target)
    except FileNotFoundError:
        pass  # it was just removed or renamed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and copies of its directory at every moment."""
    place = tmp_path_factory.mktemp("whole")
    snapshots = Snapshots(place / "run", place / "killed")
    with pytest.MonkeyPatch.context() as patch:
        snapshots.watch(patch)
        result = run(place / "run")
    return result, list(snapshots.taken)


def check_that_it_goes_on_as_if_nothing_had_happened(whole, states, tmp_path, monkeypatch) -> None:
    uninterrupted, _ = whole
    monkeypatch.setattr(RunDirectory, "place", lambda self: "here")  # a copy stands for the original
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for state in states:
        here = tmp_path / state.name
        shutil.copytree(state, here)
        if (here / "run.json").exists():
            identity = json.loads((here / "run.json").read_text()) | {"place": "here"}
            (here / "run.json").write_text(json.dumps(identity))
        charged_before = ledger(here).charged_steps
        result = run(here)
        assert same(result.params, uninterrupted.params), state
        assert public(here) == public(uninterrupted.run_dir), state
        assert (result.step, result.epsilon) == (12, uninterrupted.epsilon)
        assert charged_before <= 12
        book = ledger(here)
        assert [(a.number, a.start, a.end, a.committed) for a in book.attempts] == [(0, 0, 12, 12)], state


def test_an_uninterrupted_run_charges_what_it_ran(whole):
    result, states = whole
    assert ledger(result.run_dir).charged_steps == 12
    assert len(states) > 12
    assert {json.loads(line)["step"] for line in public(result.run_dir).splitlines()} == {2, 4, 6, 8, 10, 12}


def test_killed_at_a_few_moments_it_ends_as_if_nothing_had_happened(whole, tmp_path, monkeypatch):
    states = whole[1]
    chosen = states[3 :: len(states) // 4]
    check_that_it_goes_on_as_if_nothing_had_happened(whole, chosen, tmp_path, monkeypatch)


@pytest.mark.slow
def test_killed_between_any_two_writes_it_ends_as_if_nothing_had_happened(whole, tmp_path, monkeypatch):
    check_that_it_goes_on_as_if_nothing_had_happened(whole, whole[1], tmp_path, monkeypatch)


def test_at_no_moment_are_metrics_ahead_of_the_ledger_or_the_ledger_ahead_of_the_checkpoint(whole):
    for state in whole[1]:
        book = ledger(state)
        committed = book.current.committed if book.current else 0
        steps = (
            [json.loads(line)["step"] for line in public(state).splitlines()]
            if (state / "metrics" / "public.jsonl").exists()
            else []
        )
        durable = [int(p.parent.name) for p in state.glob("ckpt/[0-9]*/manifest.json")]
        assert max(steps, default=0) <= committed <= max(durable, default=0) <= book.charged_steps, state


def test_a_finished_run_called_again_does_nothing_and_says_the_same(whole):
    result, _ = whole
    lines = (result.run_dir / "ledger.jsonl").read_bytes()
    records = public(result.run_dir)
    again = run(result.run_dir)
    assert (again.state, again.step, again.epsilon, again.validation) == (
        "finished",
        12,
        result.epsilon,
        result.validation,
    )
    assert same(again.params, result.params)
    assert (result.run_dir / "ledger.jsonl").read_bytes() == lines
    assert public(result.run_dir) == records


def test_a_finished_run_whose_ledger_lost_its_last_line_says_so(whole, tmp_path):
    shutil.copytree(whole[0].run_dir, tmp_path / "run")
    lines = (tmp_path / "run" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(PrivacyError, match="does not hold the line that the run ended with"):
        read_run(tmp_path / "run")
    with pytest.raises(PrivacyError, match="does not hold the line that the run ended with"):
        run(tmp_path / "run")


def test_a_stop_reports_the_steps_that_ran_and_the_run_goes_on_to_the_same_end(whole, tmp_path):
    stopped = run(tmp_path / "run", stops=StopAfter(4), checkpoint={"every_steps": None, "every_s": None})
    assert stopped.state == "stopped"
    assert 4 <= stopped.step < 8
    plan = PrivacyPlan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert stopped.epsilon == plan.epsilon_after(stopped.step)
    assert stopped.epsilon_planned == plan.epsilon_after(12)
    assert ledger(tmp_path / "run").charged_steps == stopped.step
    status = read_status(tmp_path / "run")
    assert status is not None
    assert (status["epsilon"], status["step"]) == (stopped.epsilon, stopped.step)
    assert max(json.loads(line)["step"] for line in public(tmp_path / "run").splitlines()) == stopped.step
    result = run(tmp_path / "run")
    assert same(result.params, whole[0].params)
    assert ledger(tmp_path / "run").charged_steps == 12


def test_falling_back_is_charged_on_top_with_fresh_batches_and_noise(whole, tmp_path):
    shutil.copytree(whole[0].run_dir, tmp_path / "run")
    identity = json.loads((tmp_path / "run" / "run.json").read_text())
    identity["place"] = RunDirectory.at(tmp_path / "run").place()
    (tmp_path / "run" / "run.json").write_text(json.dumps(identity))
    shutil.rmtree(tmp_path / "run" / "ckpt" / "12" / "d")
    said: list[str] = []
    result = run(tmp_path / "run", said=said)
    plan = PrivacyPlan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert result.epsilon == plan.epsilon_after(15)
    assert [(a.number, a.start, a.end) for a in ledger(tmp_path / "run").attempts] == [(0, 0, 12), (1, 9, 12)]
    assert not same(result.params, whole[0].params)
    assert any("step 12 is not usable" in line for line in said)
    assert any("new attempt from step 9" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("reserve", [0, 12])
def test_an_allowed_epsilon_is_never_passed_by_falling_back_and_a_reserve_keeps_the_length(tmp_path, reserve):
    allowed = {"noise_multiplier": None, "epsilon": 2.0, "replay_reserve": reserve}
    result = run(tmp_path / "run", privacy=allowed, stops=StopAfter(5))
    assert result.step < 12
    shutil.rmtree(tmp_path / "run" / "ckpt" / str(result.step) / "d")
    again = run(tmp_path / "run", privacy=allowed)
    book = ledger(tmp_path / "run")
    assert len(book.attempts) == 2
    if reserve:
        assert (again.state, again.step) == ("finished", 12)
        assert 12 < book.charged_steps <= 24
    else:
        assert book.charged_steps == 12
        assert again.step < 12
    assert again.epsilon is not None
    assert result.epsilon < again.epsilon <= 2.0


def test_a_changed_learning_rate_is_refused_then_goes_on_as_a_new_attempt(tmp_path):
    stopped = run(tmp_path / "run", stops=StopAfter(3))
    with pytest.raises(RunDirectoryError, match=r"optimizer.learning_rate: 0.5 -> 0.25"):
        run(tmp_path / "run", optimizer={"learning_rate": 0.25})
    result = run(tmp_path / "run", optimizer={"learning_rate": 0.25}, new_attempt=True)
    attempts = ledger(tmp_path / "run").attempts
    assert [(a.number, a.start, a.end) for a in attempts] == [(0, 0, stopped.step), (1, stopped.step, 12)]
    assert result.step == 12
    with pytest.raises(RunDirectoryError, match=r"optimizer.learning_rate: 0.25 -> 0.5"):
        run(tmp_path / "run")


def test_a_run_whose_directory_was_taken_over_saves_and_charges_nothing_more(tmp_path):
    class TakenOverAfter(StopAfter):
        """Another machine takes the directory while this one is between two records."""

        @property
        def reason(self):
            if super().reason is not None and not (tmp_path / "taken").exists():
                stranger = dataclasses.replace(Holder.this_process(), host="elsewhere", boot_id="x")
                (tmp_path / "run" / "lease").write_text(json.dumps(dataclasses.asdict(stranger)))
                (tmp_path / "taken").write_bytes((tmp_path / "run" / "ledger.jsonl").read_bytes())
            return None

    with pytest.raises(RunDirectoryError, match=r"taken over by process .* on elsewhere"):
        run(tmp_path / "run", stops=TakenOverAfter(1))
    assert not list((tmp_path / "run" / "ckpt").iterdir())
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == (tmp_path / "taken").read_bytes()


def test_two_runs_of_one_config_have_different_noise_and_their_secret_stays_in_its_file(tmp_path, capfd):
    quick = {
        "privacy": {"insecure_seed": None},
        "training": {"steps": 3},
        "metrics": {"sensitive": True, "tensorboard": True},
    }
    first, second = (run(tmp_path / name, said=[], **quick) for name in ("a", "b"))
    assert not same(first.params, second.params)
    text = (tmp_path / "a" / "secret.key").read_text().strip()
    forms = [text.encode(), text.upper().encode(), bytes.fromhex(text), bytes.fromhex(text)[::-1]]
    forms += [str(int(text, 16)).encode(), str(int.from_bytes(bytes.fromhex(text), "little")).encode()]
    out, err = capfd.readouterr()
    assert not any(form in (out + err).encode() for form in forms)
    holders = {
        f.name for f in (tmp_path / "a").rglob("*") if f.is_file() and any(form in f.read_bytes() for form in forms)
    }
    assert holders == {"secret.key"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own, of the failed write
def test_a_full_disk_during_a_checkpoint_loses_nothing_but_time(tmp_path):
    wide = {"model": {"widths": [4000]}, "training": {"steps": 6}}
    expected = run(tmp_path / "whole", **wide)
    first = run(tmp_path / "run", stops=StopAfter(1), **wide)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # bytes; the parameters have 144,000
    try:
        with pytest.raises(InputError, match=f"could not be written .*step {first.step} is whole") as error:
            run(tmp_path / "run", **wide)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        gc.collect()
    assert error.value.exit_code == 2
    assert not (tmp_path / "run" / "lease").exists()
    result = run(tmp_path / "run", **wide)
    assert same(result.params, expected.params)
    assert ledger(tmp_path / "run").charged_steps == 6
    assert not list((tmp_path / "run" / "ckpt").glob("*tmp*"))


CLI_CONFIG = {
    "run": {"name": "crash"},
    "data": {"train": "digits/train", "validation": "digits/validation", "validation_is": "public", "num_classes": 10},
    "model": {"name": "mlp", "widths": [16]},
    "privacy": {"delta": 1e-5, "expected_batch_size": 64},
    "performance": {"physical_batch_size": 16},
}


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    """Starts `dpscale train` in processes of their own; they share a cache of compiled programs."""
    place = tmp_path_factory.mktemp("cli")
    cache = {"performance": {"physical_batch_size": 16, "compilation_cache": str(place / "jax_cache")}}
    (place / "config.toml").write_text(to_toml(config(**(CLI_CONFIG | cache))))

    def start(run_dir: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, "-m", "dpscale", "train", str(place / "config.toml"), "--run-dir", str(run_dir)]
        return subprocess.Popen(
            [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out + err


def final_state(run_dir: Path) -> list[np.ndarray]:
    """All arrays of the checkpoint of step 12, read by Orbax itself."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(run_dir / "ckpt" / "12").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        read = checkpointer.restore(run_dir / "ckpt" / "12", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return jax.tree.leaves(read)


@pytest.fixture(scope="module")
def cli_whole(cli, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("cli_whole") / "run"
    finish(cli(run_dir))
    return run_dir


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_no_bit_of_the_end(cli, cli_whole, tmp_path):
    chance = random.Random(1)
    run_dir, kills = tmp_path / "run", 0
    for _ in range(5):
        process = cli(run_dir)
        lines = len((run_dir / "ledger.jsonl").read_bytes().splitlines()) if (run_dir / "ledger.jsonl").exists() else 0
        target, deadline = lines + chance.randint(1, 4), time.monotonic() + 100
        while process.poll() is None and time.monotonic() < deadline:
            ledger_file = run_dir / "ledger.jsonl"
            if ledger_file.exists() and len(ledger_file.read_bytes().splitlines()) >= target:
                time.sleep(chance.uniform(0, 0.2))
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert "Traceback" not in err
        if process.returncode == 0:
            break
        kills += 1
    finish(cli(run_dir))
    assert kills >= 2
    assert same(final_state(run_dir), final_state(cli_whole))
    assert public(run_dir) == public(cli_whole)
    book = ledger(run_dir)
    assert (len(book.attempts), book.charged_steps) == (1, 12)


@pytest.mark.slow
def test_on_another_number_of_devices_the_draws_are_the_same_and_a_second_run_is_refused(cli, cli_whole, tmp_path):
    run_dir = tmp_path / "run"
    first = cli(run_dir, devices=2)
    while not (run_dir / "ledger.jsonl").exists() and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    assert f"in use by process {first.pid}" in finish(cli(run_dir), code=2)
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    assert first.wait() in (0, 75)
    first.communicate()
    refused = finish(cli(run_dir, "optimizer.learning_rate=0.4"), code=2)
    assert "optimizer.learning_rate: 0.5 -> 0.4" in refused
    finish(cli(run_dir))
    # Other draws or noise would move a parameter by noise_stddev * learning_rate / batch, about 1e-2; sums in another
    # order move it by some last bits of float32, about 1e-6.
    for mine, theirs in zip(final_state(run_dir), final_state(cli_whole), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert len(ledger(run_dir).attempts) == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_then_one_then_two_end_as_one(cli, cli_whole, tmp_path):
    run_dir = tmp_path / "run"
    for processes in ("2", "1", "2"):
        process = cli(run_dir, "--local-processes", processes)
        lines = len((run_dir / "ledger.jsonl").read_bytes().splitlines()) if run_dir.exists() else 0
        while process.poll() is None:
            ledger_file = run_dir / "ledger.jsonl"
            if ledger_file.exists() and len(ledger_file.read_bytes().splitlines()) >= lines + 4:
                break
            time.sleep(0.005)
        if processes != "2" or lines == 0:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=200)
        assert process.returncode in (0, 75), out + err
    finish(cli(run_dir))
    for mine, theirs in zip(final_state(run_dir), final_state(cli_whole), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)  # as above
    assert len(ledger(run_dir).attempts) == 1
    assert ledger(run_dir).charged_steps == 12
