"""Laws of the lease: one run at a time, taken over from the dead, refused to the living."""

import contextlib
import dataclasses
import fcntl
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpscale import lease as lease_module
from dpscale.errors import RunDirectoryError
from dpscale.lease import EXPIRES_AFTER_S, Holder, Lease

ME = Holder.this_process()
COLLECTED_AT = time.time()


def write(path, holder: Holder) -> None:
    path.write_text(json.dumps(dataclasses.asdict(holder)))


def other(**changes) -> Holder:
    """A living process on another machine, seen just now."""
    return dataclasses.replace(ME, **({"host": "elsewhere", "boot_id": "x", "renewed_at": time.time()} | changes))


def test_a_second_run_is_refused_and_told_who_holds_it(tmp_path):
    script = (
        "import sys; from pathlib import Path; from dpscale.lease import Lease\n"
        "Lease(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "lease")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(RunDirectoryError, match=f"in use by process {first.pid} on {ME.host}"):
            Lease(tmp_path / "lease").acquire()
        first.kill()
        first.wait()
        mine = Lease(tmp_path / "lease")
        mine.acquire()  # at once: it is dead
        mine.release()
    assert not (tmp_path / "lease").exists()


def test_two_runs_in_one_process_are_refused_too(tmp_path):
    first = Lease(tmp_path / "lease")
    first.acquire()
    with pytest.raises(RunDirectoryError, match="in use"):
        Lease(tmp_path / "lease").acquire()
    first.release()
    first.acquire()
    first.release()


def test_two_names_of_one_directory_have_one_lease(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    first = Lease(tmp_path / "run" / "lease")
    first.acquire()
    with pytest.raises(RunDirectoryError, match="in use"):
        Lease(tmp_path / "alias" / "lease").acquire()
    first.release()


@pytest.mark.parametrize("left_by_the_dead", [False, True])
def test_of_many_that_start_at_once_one_wins(tmp_path, left_by_the_dead):
    """Each reads, judges and writes; without a lock between them two could read before either writes."""
    script = (
        "import sys; from pathlib import Path; from dpscale.lease import Lease\n"
        "sys.stdin.readline()\n"
        "try: Lease(Path(sys.argv[1])).acquire(); print('held', flush=True)\n"
        "except Exception: print('refused', flush=True)\n"
        "sys.stdin.readline()"
    )
    if left_by_the_dead:
        write(tmp_path / "lease", dataclasses.replace(ME, pid=2**30))
    command = [sys.executable, "-c", script, str(tmp_path / "lease")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **pipes) for _ in range(6)]
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    answers = [run.stdout.readline().strip() for run in runs]
    for run in runs:
        run.communicate("\n")
    assert sorted(answers) == ["held"] + ["refused"] * 5


def test_reading_and_writing_is_one_act(tmp_path, monkeypatch):
    """The winner is slow between reading and writing: the other must not slip in between."""
    real = Lease._write

    def slow(self, holder):
        time.sleep(0.3)
        real(self, holder)

    monkeypatch.setattr(Lease, "_write", slow)
    monkeypatch.setattr(lease_module, "_HELD_LOCK", contextlib.nullcontext())
    leases = [Lease(tmp_path / "lease"), Lease(tmp_path / "lease")]

    def attempt(lease):
        try:
            lease.acquire()
        except RunDirectoryError:
            return "refused"
        return "held"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(attempt, leases)) == ["held", "refused"]
    monkeypatch.undo()
    for lease in leases:
        lease.release()


def test_without_locks_the_last_writer_wins_after_a_pause(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(time, "sleep", lambda s: write(tmp_path / "lease", other()))
    with pytest.raises(RunDirectoryError, match="taken at the same moment"):
        Lease(tmp_path / "lease").acquire()


@pytest.mark.parametrize(
    ("holder", "yields"),
    [
        (other(), False),
        (other(renewed_at=time.time() - EXPIRES_AFTER_S + 30), False),
        (other(renewed_at=time.time() - EXPIRES_AFTER_S - 1), True),
        (other(job="7", restart=0), False),
        (dataclasses.replace(ME, pid=2**30), True),
        (dataclasses.replace(ME, pid=1), True),  # the number was given to another process since
        (dataclasses.replace(ME, pid=2**30, boot_id=ME.boot_id + "x"), False),  # a container, or another boot
    ],
)
def test_who_yields_to_whom(tmp_path, holder, yields):
    # The holders above were made when the tests were collected, which may be minutes ago.
    write(tmp_path / "lease", dataclasses.replace(holder, renewed_at=holder.renewed_at + time.time() - COLLECTED_AT))
    mine = Lease(tmp_path / "lease")
    if not yields:
        with pytest.raises(RunDirectoryError, match="in use by"):
            mine.acquire()
        return
    mine.acquire()
    mine.release()


def test_a_holder_from_the_future_is_said_to_be_one_with_the_remedy(tmp_path):
    """The usual wait would be as long as its clock is ahead."""
    write(tmp_path / "lease", other(renewed_at=time.time() + 86400))
    with pytest.raises(RunDirectoryError, match=r"clock is 86\d\d\d s ahead of this one's .* remove the file lease"):
        Lease(tmp_path / "lease").acquire()


@pytest.mark.parametrize(("restart", "yields"), [("0", False), ("1", False), ("2", True)])
def test_a_requeued_job_takes_over_from_itself(tmp_path, monkeypatch, restart, yields):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    assert other(job="7", restart=1).yields_to(Holder.this_process()) is yields
    assert not other(job="8", restart=1).yields_to(Holder.this_process())


def test_a_run_that_lost_its_lease_ends_and_leaves_the_others_alone(tmp_path):
    mine = Lease(tmp_path / "lease")
    mine.acquire()
    mine.check()
    write(tmp_path / "lease", other())
    with pytest.raises(RunDirectoryError, match="taken over by process"):
        mine.check()
    assert not mine._renew_once()
    mine.release()
    assert json.loads((tmp_path / "lease").read_text())["host"] == "elsewhere"


def test_a_lease_that_cannot_be_renewed_is_lost_when_others_may_take_it(tmp_path, monkeypatch):
    mine = Lease(tmp_path / "lease")
    mine.acquire()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lease_module, "write_atomically", full)
    assert not mine._renew_once()
    mine.check()  # still ours
    mine._renewed -= EXPIRES_AFTER_S + 1
    with pytest.raises(RunDirectoryError, match="could not be renewed"):
        mine.check()
    monkeypatch.undo()
    mine.check()  # it can again, and nobody came
    mine.release()


def test_an_unreadable_lease_is_named(tmp_path):
    (tmp_path / "lease").write_text("{")
    with pytest.raises(RunDirectoryError, match="is not a lease"):
        Lease(tmp_path / "lease").acquire()
