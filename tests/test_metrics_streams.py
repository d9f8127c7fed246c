"""Laws of the metric streams: output commit under crashes, the whitelist, file modes."""

import json
import math
import os
import signal
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from dpscale.errors import PrivacyError, RunDirectoryError
from dpscale.metrics.records import encode, read_records
from dpscale.metrics.streams import PUBLIC_KEYS, SENSITIVE_KEYS, PublicStream, SensitiveStream

STEPS, CHECKPOINT_EVERY = 7, 3
CALLS = ("open", "write", "fsync", "ftruncate", "replace", "mkdir")


class Crash(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it and tidy up."""


@dataclass
class System:
    """Counts the system calls of the streams and ends the process at one of them."""

    patch: pytest.MonkeyPatch
    fail_at: int = -1
    how: str = "before"  # or "after", or "half" (a write that got only part of its bytes out)
    error: BaseException = field(default_factory=Crash)
    calls: int = 0

    def __post_init__(self):
        for name in CALLS:
            self.patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, real):
        def call(*args, **kwargs):
            index, self.calls = self.calls, self.calls + 1
            if index == self.fail_at and self.how == "before":
                raise self.error
            if index == self.fail_at and self.how == "half" and name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise self.error
            # The order of calls is what is tested; waiting for the disk is not.
            result = None if name == "fsync" else real(*args, **kwargs)
            if index == self.fail_at:
                raise self.error
            return result

        return call


@dataclass
class Run:
    """A training loop as the streams see it: each step writes, every third is followed by a durable checkpoint."""

    directory: Path
    durable: int | None = None
    heard: list[list[dict]] = field(default_factory=list)  # one list a life

    def live(self):
        stream = PublicStream(self.directory, validation_is="public")
        heard: list[dict] = []
        self.heard.append(heard)
        stream.on_commit(heard.append)
        stream.recover(self.durable)
        for step in range((self.durable or 0) + 1, STEPS + 1):
            stream.write(step, epsilon=step / 10)
            if step % 2 == 0:
                stream.write(step, validation_accuracy=step / 100)
            if step % CHECKPOINT_EVERY == 0 or step == STEPS:
                self.durable = step
                stream.commit(step)
        stream.close()

    @property
    def public(self) -> bytes:
        path = self.directory / "metrics" / "public.jsonl"
        return path.read_bytes() if path.exists() else b""

    def assert_nothing_beyond_the_checkpoint_is_public(self):
        steps = [json.loads(line)["step"] for line in self.public.split(b"\n")[:-1]]
        assert max(steps, default=0) <= (self.durable or 0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("uninterrupted"))
    with pytest.MonkeyPatch.context() as patch:
        system = System(patch)
        run.live()
    assert run.public.count(b"\n") == STEPS + STEPS // 2
    return run, system.calls


@pytest.mark.parametrize("how", ["before", "after", "half"])
def test_a_crash_at_any_system_call_neither_loses_nor_doubles_a_record(tmp_path, uninterrupted, how):
    whole, calls = uninterrupted
    assert calls > 40  # or the crashes below miss what they are for
    for index in range(calls):
        run = Run(tmp_path / str(index))
        run.directory.mkdir()
        crashed_run(run, index, how)
        run.live()
        assert_equals_uninterrupted(run, whole, index)


def test_a_second_crash_during_recovery_neither_loses_nor_doubles_a_record(tmp_path, uninterrupted):
    whole, calls = uninterrupted
    how = "half"
    for first in range(0, calls, 5):
        for second in range(14):  # a recovery takes fewer calls than that
            run = Run(tmp_path / f"{first}-{second}")
            run.directory.mkdir()
            crashed_run(run, first, how)
            crashed_run(run, second, how)
            run.live()
            assert_equals_uninterrupted(run, whole, (first, second))


@pytest.mark.parametrize("how", ["before", "after", "half"])
def test_a_full_disk_loses_nothing_and_the_call_can_be_repeated(tmp_path, uninterrupted, how):
    whole, calls = uninterrupted
    for index in range(calls):
        directory = tmp_path / str(index)
        directory.mkdir()
        heard = []
        with pytest.MonkeyPatch.context() as patch:
            System(patch, index, how, OSError(28, "No space left on device"))
            stream = PublicStream(directory, validation_is="public")
            stream.on_commit(heard.append)
            repeated(stream.recover, None)
            for step in range(1, STEPS + 1):
                repeated(stream.write, step, epsilon=step / 10)
                if step % 2 == 0:
                    repeated(stream.write, step, validation_accuracy=step / 100)
                if step % CHECKPOINT_EVERY == 0 or step == STEPS:
                    repeated(stream.commit, step)
            stream.close()
        assert (directory / "metrics" / "public.jsonl").read_bytes() == whole.public, index
        assert heard == whole.heard[0]


def crashed_run(run: Run, index: int, how: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        System(patch, index, how)
        try:
            run.live()
        except Crash:
            run.assert_nothing_beyond_the_checkpoint_is_public()


def repeated(action, *args, **kwargs):
    try:
        action(*args, **kwargs)
    except RunDirectoryError:
        action(*args, **kwargs)


def assert_equals_uninterrupted(run: Run, whole: Run, where) -> None:
    assert run.public == whole.public, f"crash at call {where}"
    pending = (run.directory / "metrics" / "pending.jsonl").read_bytes()
    assert pending == b'{"public_bytes": %d}\n' % len(whole.public)
    everything = {json.dumps(record, sort_keys=True) for life in run.heard for record in life}
    assert everything == {json.dumps(record, sort_keys=True) for record in whole.heard[0]}
    for life in run.heard:
        assert len(life) == len({json.dumps(record, sort_keys=True) for record in life})


def public_steps(directory: Path) -> list[int]:
    return [int(record["step"] or 0) for record in read_records(directory / "metrics" / "public.jsonl")]


def test_nothing_of_a_step_is_public_before_the_commit_of_that_step_or_a_later_one(tmp_path):
    stream = PublicStream(tmp_path)
    for step in range(6):
        stream.write(step, epsilon=0.1)
    assert public_steps(tmp_path) == []
    for committed in (0, 3, 2, 3):
        stream.commit(committed)
        assert public_steps(tmp_path) == list(range(max(committed, 3) + 1 if committed else 1))
    stream.commit(100)
    assert public_steps(tmp_path) == list(range(6))


def test_sigkill_loses_no_record_whose_write_returned(tmp_path):
    program = (
        "import os, signal, sys\n"
        "from dpscale.metrics.streams import PublicStream, SensitiveStream\n"
        "public, sensitive = PublicStream(sys.argv[1]), SensitiveStream(sys.argv[1], enabled=True)\n"
        "for step in range(5):\n"
        "    public.write(step, epsilon=0.5)\n"
        "    sensitive.write(step, train_loss=1.0)\n"
        "assert 'jax' not in sys.modules\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    PublicStream(tmp_path).recover(4)
    assert public_steps(tmp_path) == [0, 1, 2, 3, 4]
    assert len(read_records(tmp_path / "metrics" / "sensitive.jsonl")) == 5


def test_commit_is_idempotent_and_listeners_hear_each_record_once(tmp_path):
    stream = PublicStream(tmp_path)
    heard = []
    stream.on_commit(heard.append)
    stream.write(1, epsilon=0.5)
    stream.write(1, epsilon=0.5)
    assert heard == []
    for _ in range(3):
        stream.commit(1)
    assert heard == [{"step": 1, "epsilon": 0.5}] * 2
    assert public_steps(tmp_path) == [1, 1]


def test_a_listener_that_fails_costs_no_other_listener_a_record(tmp_path):
    stream = PublicStream(tmp_path)
    heard = []

    def failing(record):
        raise RuntimeError("listener")

    stream.on_commit(failing)
    stream.on_commit(heard.append)
    stream.write(1, epsilon=0.5)
    with pytest.raises(RuntimeError, match="listener"):
        stream.commit(1)
    stream.commit(1)
    assert [record["step"] for record in heard] == [1]
    assert public_steps(tmp_path) == [1]


def test_recover_promotes_what_the_checkpoint_covers_and_drops_the_rest(tmp_path):
    stream = PublicStream(tmp_path)
    for step in range(1, 6):
        stream.write(step, epsilon=step)
    again = PublicStream(tmp_path)
    again.recover(3)
    again.commit(100)
    assert public_steps(tmp_path) == [1, 2, 3]


def test_what_was_released_stays_when_a_new_attempt_goes_back_behind_it(tmp_path):
    stream = PublicStream(tmp_path)
    for step in (1, 2, 3):
        stream.write(step, attempt=0)
    stream.commit(3)
    again = PublicStream(tmp_path)
    again.recover(1)
    for step in (2, 3):
        again.write(step, attempt=1)
    again.commit(3)
    assert public_steps(tmp_path) == [1, 2, 3, 2, 3]


def test_equal_records_are_kept_as_often_as_they_were_written_across_a_crash_in_commit(tmp_path):
    stream = PublicStream(tmp_path)
    stream.write(1, epsilon=0.5)
    stream.commit(1)
    for _ in range(3):
        stream.write(1, epsilon=0.5)
    public = tmp_path / "metrics" / "public.jsonl"
    with public.open("ab") as file:  # a commit that was killed within the second of three lines
        line = encode(1, {"epsilon": 0.5})
        file.write(line + line[:7])
    PublicStream(tmp_path).recover(1)
    assert public.read_bytes() == line * 4


@pytest.mark.parametrize("tail", [b'{"epsilon": 0.5, "st', b'{"epsilon": 0.5, "step": 2}', b"\0" * 64])
def test_a_torn_last_line_of_either_file_is_cut_off(tmp_path, tail):
    stream = PublicStream(tmp_path)
    stream.write(1, epsilon=0.5)
    stream.commit(1)
    stream.write(2, epsilon=0.7)
    for name in ("pending.jsonl", "public.jsonl"):
        with (tmp_path / "metrics" / name).open("ab") as file:
            file.write(tail)
    again = PublicStream(tmp_path)
    again.recover(2)
    again.write(3, epsilon=0.9)
    again.commit(3)
    assert read_records(tmp_path / "metrics" / "public.jsonl") == [
        {"step": 1, "epsilon": 0.5},
        {"step": 2, "epsilon": 0.7},
        {"step": 3, "epsilon": 0.9},
    ]


def test_recovery_cuts_off_a_torn_public_line_even_when_it_commits_nothing(tmp_path):
    stream = PublicStream(tmp_path)
    stream.write(1, epsilon=0.5)
    stream.commit(1)
    public = tmp_path / "metrics" / "public.jsonl"
    whole = public.read_bytes()
    public.write_bytes(whole + b'{"epsi')
    PublicStream(tmp_path).recover(None)
    assert public.read_bytes() == whole


def test_a_write_that_ran_out_of_disk_does_not_spoil_the_next_one_for_recovery(tmp_path):
    stream = PublicStream(tmp_path)
    for step in (1, 2):
        stream.write(step, epsilon=0.5)
    with pytest.MonkeyPatch.context() as patch:
        System(patch, 0, "half", OSError(28, "No space left on device"))
        with pytest.raises(RunDirectoryError, match="No space left"):
            stream.write(3, epsilon=0.5)
        stream.write(3, epsilon=0.5)
    PublicStream(tmp_path).recover(3)
    assert public_steps(tmp_path) == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_the_file(tmp_path):
    stream = PublicStream(tmp_path)
    stream.write(1, epsilon=0.5)
    with (tmp_path / "metrics" / "pending.jsonl").open("ab") as file:
        file.write(b"garbage\n")
    with pytest.raises(RunDirectoryError, match=r"pending\.jsonl"):
        PublicStream(tmp_path).recover(1)


def test_a_lost_or_shortened_file_does_not_stop_a_resume(tmp_path):
    stream = PublicStream(tmp_path)
    for step in (1, 2, 3):
        stream.write(step, epsilon=0.5)
    stream.commit(2)
    (tmp_path / "metrics" / "public.jsonl").unlink()
    PublicStream(tmp_path).recover(3)
    assert public_steps(tmp_path) == [3]
    (tmp_path / "metrics" / "pending.jsonl").unlink()
    PublicStream(tmp_path).recover(3)
    assert public_steps(tmp_path) == [3]


def test_writing_over_another_process_records_without_recovery_is_a_programming_error(tmp_path):
    PublicStream(tmp_path).write(1, epsilon=0.5)
    with pytest.raises(AssertionError, match="recover"):
        PublicStream(tmp_path).write(2, epsilon=0.5)


@pytest.mark.parametrize("key", sorted((SENSITIVE_KEYS.keys() - PUBLIC_KEYS.keys()) | {"Epsilon", "loss", ""}))
@pytest.mark.parametrize("enabled", [True, False])
def test_a_key_that_is_not_on_the_whitelist_never_gets_into_the_public_stream(tmp_path, key, enabled):
    stream = PublicStream(tmp_path, validation_is="public", enabled=enabled)
    with pytest.raises(PrivacyError, match="sensitive") as error:
        stream.write(1, epsilon=0.5, **{key: 1.0})
    assert repr(key) in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("validation_is", [None, "private"])
@pytest.mark.parametrize("key", ["validation_accuracy", "validation_loss", "validation_examples"])
def test_metrics_of_held_out_data_not_declared_public_are_refused(tmp_path, validation_is, key):
    with pytest.raises(PrivacyError, match=key):
        PublicStream(tmp_path, validation_is=validation_is).write(1, **{key: 1.0})


def test_every_public_key_is_accepted_where_held_out_data_are_public(tmp_path):
    stream = PublicStream(tmp_path, validation_is="public")
    stream.write(1, **{key: 1 for key in PUBLIC_KEYS if key != "step"})
    stream.commit(1)
    assert read_records(tmp_path / "metrics" / "public.jsonl") == [dict.fromkeys(PUBLIC_KEYS, 1)]


def test_public_records_of_neighbouring_data_sets_are_equal_and_sensitive_ones_are_not(tmp_path):
    """A step with and without one record that changes the batch's size, its loss and its count of NaNs."""
    metrics = {}
    for name, losses in (("with", [0.5, 2.0, math.nan]), ("without", [0.5, 2.0])):
        directory = tmp_path / name
        directory.mkdir()
        public, sensitive = PublicStream(directory), SensitiveStream(directory, enabled=True)
        public.write(1, epsilon=0.5, delta=1e-5, learning_rate=0.1, attempt=0)
        sensitive.write(
            1,
            train_loss=np.mean(losses),
            batch_size=len(losses),
            nonfinite_examples=sum(map(math.isnan, losses)),
        )
        public.commit(1)
        metrics[name] = [(directory / "metrics" / f"{s}.jsonl").read_bytes() for s in ("public", "sensitive")]
    assert metrics["with"][0] == metrics["without"][0]
    assert metrics["with"][1] != metrics["without"][1]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_files_have_mode_0600_whatever_the_umask(tmp_path):
    seen = {}
    previous = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            real = os.open

            def watched(path, flags, *args, **kwargs):
                descriptor = real(path, flags, *args, **kwargs)
                if flags & os.O_CREAT:
                    seen.setdefault(Path(path).name, stat.S_IMODE(os.fstat(descriptor).st_mode))
                return descriptor

            patch.setattr(os, "open", watched)
            public, sensitive = PublicStream(tmp_path), SensitiveStream(tmp_path, enabled=True)
            for step in (1, 2, 3):
                public.write(step, epsilon=0.5)
                sensitive.write(step, train_loss=1.0)
            public.commit(1)
            sensitive.recover(1)
    finally:
        os.umask(previous)
    directory = tmp_path / "metrics"
    assert mode(directory) == 0o700
    assert {path.name: mode(path) for path in directory.iterdir()} == {
        "pending.jsonl": 0o600,
        "public.jsonl": 0o644,
        "sensitive.jsonl": 0o600,
    }
    private = {name: bits for name, bits in seen.items() if "public" not in name}
    assert {name.strip(".").split(".")[0] for name in private if name.endswith(".tmp")} == {"pending", "sensitive"}
    assert set(private.values()) == {0o600}


def test_a_private_file_that_others_can_read_is_closed_to_them(tmp_path):
    SensitiveStream(tmp_path, enabled=True).write(1, train_loss=1.0)
    path = tmp_path / "metrics" / "sensitive.jsonl"
    path.chmod(0o644)
    SensitiveStream(tmp_path, enabled=True).write(2, train_loss=1.0)
    assert mode(path) == 0o600


def test_the_sensitive_stream_is_off_by_default_and_then_leaves_no_trace(tmp_path):
    stream = SensitiveStream(tmp_path)
    stream.write(1, train_loss=1.0)
    stream.recover(0)
    stream.close()
    assert list(tmp_path.iterdir()) == []


def test_a_disabled_public_stream_leaves_no_trace(tmp_path):
    stream = PublicStream(tmp_path, enabled=False)
    stream.recover(3)
    stream.write(4, epsilon=0.5)
    stream.commit(4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("restored", "kept"), [(2, [1, 2]), (None, []), (9, [1, 2, 3])])
def test_sensitive_records_beyond_the_restored_step_are_dropped(tmp_path, restored, kept):
    stream = SensitiveStream(tmp_path, enabled=True)
    for step in (1, 2, 3):
        stream.write(step, train_loss=1.0)
    path = tmp_path / "metrics" / "sensitive.jsonl"
    with path.open("ab") as file:
        file.write(b'{"step": 1')  # torn by SIGKILL
    again = SensitiveStream(tmp_path, enabled=True)
    again.recover(restored)
    again.write(7, train_loss=1.0)
    assert [record["step"] for record in read_records(path)] == [*kept, 7]


def test_a_sensitive_write_that_ran_out_of_disk_leaves_no_torn_line(tmp_path):
    stream = SensitiveStream(tmp_path, enabled=True)
    stream.write(1, train_loss=1.0)
    with pytest.MonkeyPatch.context() as patch:
        System(patch, 0, "half", OSError(28, "No space left on device"))
        with pytest.raises(RunDirectoryError, match="No space left"):
            stream.write(2, train_loss=1.0)
        stream.write(2, train_loss=1.0)
    assert [r["step"] for r in read_records(tmp_path / "metrics" / "sensitive.jsonl")] == [1, 2]


def test_a_record_is_one_line_of_strict_json_with_sorted_names():
    values = {
        "b": np.float32(0.5),
        "a": np.int64(3),
        "nan": math.nan,
        "inf": -math.inf,
        "nothing": None,
        "array": np.array(2.5),
    }
    line = encode(7, values)
    assert line == b'{"a": 3, "array": 2.5, "b": 0.5, "inf": null, "nan": null, "nothing": null, "step": 7}\n'
    assert line == encode(7, dict(reversed(values.items())))


@pytest.mark.parametrize("value", ["text", np.ones(3), [1.0], {"a": 1}])
def test_only_numbers_get_into_a_record(value):
    with pytest.raises(TypeError, match="not a number"):
        encode(1, {"epsilon": value})


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_step_is_an_integer_from_0_on(tmp_path, step, error):
    with pytest.raises(error):
        PublicStream(tmp_path).write(step, epsilon=0.5)


def test_a_run_directory_that_cannot_be_written_is_said_with_its_remedy(tmp_path):
    with pytest.raises(RunDirectoryError, match="free some space or mend the permissions"):
        PublicStream(tmp_path / "missing").write(1, epsilon=0.5)
