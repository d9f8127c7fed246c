"""A crash at every write of a run: nothing is charged too little, nothing is lost, and the run ends as if undisturbed.

A fault point is a call that changes a file of the run directory: making, appending, putting on disk, renaming,
removing; Orbax's own are among them. FAULT_POINTS names them all, and a test finds them in an undisturbed run, so that
a write that is added to dpscale cannot go without. At its fault point a run dies: that call and all later ones raise,
in every thread, as after SIGKILL nothing more reaches the disk.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpscale
from dpscale.checkpoint import Checkpoints
from dpscale.config import RunConfig
from dpscale.loop import StepKeys
from dpscale.metrics.recorder import Recorder
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.secret import RootSecret
from dpscale.sampling import PoissonSampler

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own

STEPS = 2
FAULT_POINTS = [
    "make the directory",
    "make .lease.tmp",
    "rename lease",
    "make ckpt",
    "make secret.key",
    "sync secret.key",
    "make .config.toml.tmp",
    "rename config.toml",
    "make .plan.json.tmp",
    "rename plan.json",
    "make .model.json.tmp",
    "rename model.json",
    "make .run.json.tmp",
    "rename run.json",
    "append ledger.jsonl",
    "sync ledger.jsonl",
    "make metrics",
    "make metrics/.pending.jsonl.tmp",
    "rename metrics/pending.jsonl",
    "append metrics/pending.jsonl",
    "write metrics/pending.jsonl",
    "append metrics/public.jsonl",
    "write metrics/public.jsonl",
    "sync metrics/public.jsonl",
    "make .status.json.tmp",
    "rename status.json",
    "Orbax's temporary",
    "Orbax's rename",
    "sync the checkpoint's files",
    "make ckpt/N/.manifest.json.tmp",
    "rename ckpt/N/manifest.json",
    "rename ckpt/.removed-N",
    "remove ckpt/.removed-N",
    "make .report.html.tmp",
    "rename report.html",
    "make .finished.tmp",
    "rename finished",
    "remove lease",
]
AS_ORBAX_LIKES = ("Orbax's temporary", "sync the checkpoint's files")
CONFIG = RunConfig.model_validate(
    {
        "training": {"steps": STEPS, "evaluate_every_steps": 1},
        "privacy": {
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "expected_batch_size": 10,
            "accountant": "rdp",
            "verify": False,  # writes nothing
        },
        "performance": {"physical_batch_size": 2},
        "checkpoint": {"every_steps": 1, "keep": 1},
    }
)
EXAMPLES = 40
DATA = (np.linspace(-1, 1, 3 * EXAMPLES, dtype=np.float32).reshape(-1, 3), np.arange(EXAMPLES, dtype=np.int32) % 2)
VERBS = {
    "mkdir": "make",
    "open": "make",
    "replace": "rename",
    "rename": "rename",
    "fsync": "sync",
    "write": "write",
    "ftruncate": "cut",
    "unlink": "remove",
    "remove": "remove",
    "rmdir": "remove",
}


class Kill(BaseException):
    """Stands for SIGKILL."""


Moment = Literal["before", "after", "half"]


class Watch:
    """Sees every call that changes a file under `root`, and dies at one: (name, how many of that name came before)."""

    def __init__(
        self,
        root: Path,
        patch: pytest.MonkeyPatch,
        die_at: tuple[str, int] | None = None,
        moment: Moment = "before",
        die: Callable[[], Any] = lambda: None,
    ) -> None:
        self.root, self.die_at, self.moment, self.dead = os.path.realpath(root), die_at, moment, False
        self.die = die
        self.seen: Counter[str] = Counter()
        self._lock = threading.RLock()
        for name in VERBS:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Any) -> Any:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            point = self._point(name, args[0] if name in ("replace", "rename") else target, args)
            if point is None:
                return real(target, *args, **kwargs)
            with self._lock:  # so that no other thread writes between death and the next call
                if self.dead:
                    raise Kill
                dies = (point, self.seen[point]) == self.die_at
                self.seen[point] += 1
                if dies and self.moment == "half":
                    os.truncate(self.path_of(target), os.stat(self.path_of(target)).st_size - 20)
                result = real(target, *args, **kwargs) if not dies or self.moment == "after" else None
                self.dead = dies
            if dies:
                self.die()
                raise Kill
            return result

        return call

    def _point(self, name: str, target: Any, args: tuple) -> str | None:
        """The call's name on the list, or None where it changes nothing of the run."""
        path = self.path_of(target)
        place = re.sub(r"\d+", "N", os.path.relpath(path, self.root)).replace(".N.tmp", ".tmp")
        verb = VERBS[name]
        if place.startswith("..") or ".probe." in place or place.endswith(".lock"):
            return None
        if name == "open":
            if not args or not args[0] & (os.O_CREAT | os.O_TRUNC):
                return None
            verb = "append" if args[0] & os.O_APPEND or os.path.exists(path) else "make"
        if (name == "mkdir" and os.path.exists(path)) or (verb == "remove" and not os.path.exists(path)):
            return None
        if name == "fsync" and (os.path.isdir(path) or place.endswith(".tmp")):
            return None  # a directory: its entry was made before; a temporary file: nothing comes before its rename
        if ".orbax-checkpoint-tmp" in place:
            return "Orbax's temporary"
        if place == "ckpt/N":
            return "Orbax's rename"
        if verb == "sync" and place.startswith("ckpt/N/") and "manifest.json" not in place:
            return "sync the checkpoint's files"
        if verb == "remove" and place.startswith("ckpt/.removed"):
            place = "ckpt/.removed-N"
        return "make the directory" if place == "." else f"{verb} {place}"

    @staticmethod
    def path_of(target: Any) -> str:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        return os.path.abspath(os.fspath(target))


@dataclass
class Draws:
    """An independent record of what steps were made with: noise key and examples, by (attempt, step)."""

    file: Path | None = None
    by_step: dict[tuple[int, int], set[bytes]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)

    def watch(self, patch: pytest.MonkeyPatch) -> Draws:
        real = StepKeys.noise

        def noise(keys: StepKeys, step: int) -> np.ndarray:
            key = real(keys, step)
            sampler = PoissonSampler(EXAMPLES, 10 / EXAMPLES, keys.secret.derive("sampling"))
            drawn = key.tobytes() + sampler.digest(step, keys.attempt)
            self.by_step.setdefault((keys.attempt, step), set()).add(drawn)
            self.order.append(step)
            if self.file is not None:
                with self.file.open("a") as record:  # before anything is made with it
                    record.write(f"{keys.attempt}/{step}/{drawn.hex()}\n")
            return key

        patch.setattr(StepKeys, "noise", noise)
        return self


def loss(params: Any, example: Any) -> jax.Array:
    return jnp.square(jnp.vdot(params["w"], example["features"]) - example["label"])


def run(run_dir: Path) -> Any:
    params = {"w": np.zeros(3, np.float32)}
    return dpscale.train(
        CONFIG, run_dir, model=params, loss=loss, train_data=DATA, report=lambda line: None, progress=False
    )


def _same_each_time(patch: pytest.MonkeyPatch) -> None:
    """Every run gets one true secret, and waits for each checkpoint before it goes on."""
    create = RootSecret.create

    def with_known_bytes(path: Path) -> RootSecret:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(os, "urandom", lambda count: bytes(range(count)))
            return create(path)

    patch.setattr(RootSecret, "create", with_known_bytes)
    patch.setattr(Checkpoints, "poll", Checkpoints.wait)
    patch.setattr(Recorder, "plot", lambda self: None)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """All runs of this process share their compiled steps."""
    train = importlib.import_module("dpscale.train")
    compiled, cache = train.compiled_steps, []

    def compiled_once(*args: Any) -> Any:
        if not cache:
            cache.append(compiled(*args))
        return cache[0]

    with pytest.MonkeyPatch.context() as patch:
        _same_each_time(patch)
        patch.setattr(train, "compiled_steps", compiled_once)
        patch.setattr(os, "fsync", lambda descriptor: None)  # processes die here, not machines
        yield


@dataclass
class Undisturbed:
    result: Any
    draws: Draws
    seen: Counter[str]
    public: bytes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Undisturbed:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        watch, draws = Watch(run_dir, patch), Draws().watch(patch)
        result = run(run_dir)
    return Undisturbed(result, draws, watch.seen, (run_dir / "metrics" / "public.jsonl").read_bytes())


def test_every_call_that_changes_a_file_of_a_run_is_a_fault_point(undisturbed):
    assert set(undisturbed.seen) == set(FAULT_POINTS)


def charged(run_dir: Path) -> list[range]:
    """The steps that the ledger charges, by attempt; none where it or the secret is not there yet."""
    path = run_dir / "ledger.jsonl"
    if not path.exists():
        return []
    book = Ledger.parse(path, path.read_bytes(), RootSecret.load(run_dir / "secret.key"))
    assert [attempt.number for attempt in book.attempts] in ([], [0])
    return [range(attempt.start, attempt.end) for attempt in book.attempts]


def durable_step(run_dir: Path) -> int:
    return max((int(path.parent.name) for path in run_dir.glob("ckpt/[0-9]*/manifest.json")), default=0)


def check_what_a_death_left(run_dir: Path, drawn: Iterable[tuple[int, int]]) -> int:
    """The ledger holds all that was drawn, and nothing left the run too early; gives the last durable step."""
    for attempt, step in drawn:
        assert step in charged(run_dir)[attempt], f"step {step} was drawn and is not charged"
    public = run_dir / "metrics" / "public.jsonl"
    released = [json.loads(line)["step"] for line in public.read_bytes().splitlines()] if public.exists() else []
    saved = durable_step(run_dir)
    assert max(released, default=0) <= saved, "a metric left the run before a checkpoint was durable"
    return saved


def check_that_it_goes_on(undisturbed: Undisturbed, run_dir: Path, saved: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        again = Draws().watch(patch)
        result = run(run_dir)
    first = again.order[0] if again.order else STEPS
    assert first >= saved, "work was lost"
    assert again.order == list(range(first, STEPS))
    assert again.by_step.items() <= undisturbed.draws.by_step.items(), "other draws or noise than undisturbed"
    assert charged(run_dir) == [range(STEPS)], "a replay of uncommitted steps is free, and all else is charged once"
    assert (result.state, result.step, result.epsilon) == ("finished", STEPS, undisturbed.result.epsilon)
    assert (run_dir / "metrics" / "public.jsonl").read_bytes() == undisturbed.public
    assert (run_dir / "finished").exists()
    left = [path.name for path in run_dir.rglob("*") if "tmp" in path.name or "removed" in path.name]
    assert not left, "a crash's leftovers stay"
    return result


def check_a_death(undisturbed: Undisturbed, run_dir: Path, point: str, nth: int, moment: Moment) -> None:
    with pytest.MonkeyPatch.context() as patch:
        watch, draws = Watch(run_dir, patch, (point, nth), moment), Draws().watch(patch)
        with contextlib.suppress(Kill, dpscale.DpscaleError):
            run(run_dir)
        if point in AS_ORBAX_LIKES and watch.seen[point] <= nth:
            return  # Orbax divided this checkpoint into fewer files than the undisturbed one
        assert watch.dead, f"{point} did not come {nth + 1} times"
        gc.collect()  # what Orbax left half done complains here, not in another test
    assert draws.by_step.items() <= undisturbed.draws.by_step.items()
    saved = check_what_a_death_left(run_dir, draws.by_step)
    result = check_that_it_goes_on(undisturbed, run_dir, saved)
    jax.tree.map(np.testing.assert_array_equal, result.params, undisturbed.result.params)


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_dying_before_a_write_loses_nothing_and_charges_no_less_than_was_drawn(undisturbed, point, tmp_path):
    check_a_death(undisturbed, tmp_path / "run", point, min(1, undisturbed.seen[point] - 1), "before")


def test_a_checkpoint_that_is_durable_late_lowers_no_charge_of_what_was_begun_meanwhile(undisturbed, tmp_path):
    """It is found out about at the next save only, when steps beyond it were drawn."""
    run_dir, close, late = tmp_path / "run", Ledger.close, []
    with pytest.MonkeyPatch.context() as patch:
        draws = Draws().watch(patch)

        def closed(ledger: Ledger, attempt: int, step: int, ran_to: int) -> None:
            close(ledger, attempt, step, ran_to)
            check_what_a_death_left(run_dir, draws.by_step)
            late.extend(drawn for _, drawn in draws.by_step if drawn >= step)

        patch.setattr(Ledger, "close", closed)
        patch.setattr(Checkpoints, "poll", lambda self: None)
        result = run(run_dir)
    assert late, "no checkpoint was late"
    assert charged(run_dir) == [range(STEPS)]
    assert result.epsilon == undisturbed.result.epsilon


def test_a_ledger_line_that_was_half_written_is_as_good_as_none(undisturbed, tmp_path):
    for nth in range(undisturbed.seen["sync ledger.jsonl"]):
        check_a_death(undisturbed, tmp_path / str(nth), "sync ledger.jsonl", nth, "half")


@pytest.mark.slow
@pytest.mark.parametrize("point", FAULT_POINTS)
def test_nor_does_dying_after_any_write_however_often_its_fault_point_has_come(undisturbed, point, tmp_path):
    # After one is before the next: this is every state of the files, where the test above takes one of each kind.
    for nth in range(undisturbed.seen[point]):
        check_a_death(undisturbed, tmp_path / str(nth), point, nth, "after")


def killed_process(run_dir: str, drawn: str, point: str, nth: str) -> None:
    """What a process of the test below does: train, note every draw elsewhere, and be killed at a fault point."""
    with pytest.MonkeyPatch.context() as patch:
        _same_each_time(patch)
        Watch(Path(run_dir), patch, (point, int(nth)), die=lambda: os.kill(os.getpid(), signal.SIGKILL))
        draws = Draws(Path(drawn)).watch(patch)
        run(Path(run_dir))
    raise AssertionError(f"{point} did not come; {draws.order}")


def start(processes: int, run_dir: Path, drawn: Path, point: str, nth: int) -> list[subprocess.Popen]:
    """The run in one or two processes of four devices each; only the first writes, and is killed."""
    code = "import sys; from test_crash_points import killed_process; killed_process(*sys.argv[1:])"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        if processes > 1:
            environment |= {
                "DPSCALE_COORDINATOR": f"127.0.0.1:{port}",
                "DPSCALE_NUM_PROCESSES": str(processes),
                "DPSCALE_PROCESS_ID": str(rank),
            }
        arguments = [str(run_dir), f"{drawn}.{rank}", point if rank == 0 else "nowhere", str(nth)]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    return started


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
@pytest.mark.parametrize(
    ("point", "nth"),
    [("sync ledger.jsonl", 3), ("rename ckpt/N/manifest.json", 0), ("write metrics/public.jsonl", 1)],
)
def test_a_real_sigkill_of_one_or_two_processes_loses_nothing_either(undisturbed, processes, point, nth, tmp_path):
    run_dir, drawn = tmp_path / "run", tmp_path / "drawn"
    started = start(processes, run_dir, drawn, point, nth)
    try:
        _, complaint = started[0].communicate(timeout=200)
        assert started[0].returncode == -signal.SIGKILL, complaint
    finally:
        for process in started:  # those that wait for the dead one
            process.kill()
            process.communicate()
    records = [set(Path(f"{drawn}.{rank}").read_text().split()) for rank in range(processes)]
    assert records[0], "no step had begun: that point comes too early to test anything"
    expected = {f"{attempt}/{step}/{one.hex()}" for (attempt, step), (one,) in undisturbed.draws.by_step.items()}
    assert set().union(*records) <= expected
    steps = [(int(line.split("/")[0]), int(line.split("/")[1])) for line in set().union(*records)]
    saved = check_what_a_death_left(run_dir, steps)
    result = check_that_it_goes_on(undisturbed, run_dir, saved)
    # Other draws or noise would move a parameter by about 1e-1; sums in another order by some last bits.
    np.testing.assert_allclose(result.params["w"], undisturbed.result.params["w"], atol=1e-5)
