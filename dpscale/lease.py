"""The lease of a run directory: one run at a time, taken over from the dead, refused to the living (PRIVACY.md 31)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dpscale.durable import write_atomically
from dpscale.errors import RunDirectoryError

RENEW_EVERY_S = 30.0
EXPIRES_AFTER_S = 120.0
SETTLE_S = 2.0  # where the file system cannot lock: how long the one who writes last may need between read and write

_HELD: set[Path] = set()  # leases of this process, whose threads share one process number
_HELD_LOCK = threading.Lock()


@dataclass(frozen=True)
class Holder:
    """Who holds the lease. `job` and `restart` are SLURM's, where the run is a job.

    `boot_id` also names the process namespace: another container's process numbers say nothing here.
    """

    host: str
    boot_id: str
    pid: int
    pid_started: str
    job: str | None
    restart: int
    renewed_at: float

    @classmethod
    def this_process(cls) -> Holder:
        """This process, now."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        return cls(
            host=socket.gethostname(),
            boot_id=(boot.read_text().strip() + _pid_namespace()) if boot.exists() else "",
            pid=os.getpid(),
            pid_started=_process_start(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            renewed_at=time.time(),
        )

    def yields_to(self, other: Holder) -> bool:
        """Whether `other` may take the lease from this holder."""
        if self.job is not None and self.job == other.job and other.restart > self.restart:
            return True  # the same job, requeued: SLURM has ended the earlier incarnation
        if self.boot_id and self.boot_id == other.boot_id and self.host == other.host:
            return _process_start(self.pid) != self.pid_started  # dead, or its number belongs to another process
        return other.renewed_at - self.renewed_at > EXPIRES_AFTER_S

    def describe(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        silent_s = time.time() - self.renewed_at
        if silent_s < -RENEW_EVERY_S:
            seen = f"whose clock is {-silent_s:.0f} s ahead of this one's (once it has ended, remove the file lease)"
        else:
            seen = f"seen {silent_s:.0f} s ago"
        return f"process {self.pid} on {self.host}{job}, {seen}"


class Lease:
    """RUN/lease, renewed by a thread while held.

    Raises: RunDirectoryError from `acquire` when another run holds it; the message names the holder. The same from
        `check` when it was lost while held: another run took it over, or it could not be renewed in time.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(os.path.realpath(path.parent)) / path.name  # one directory may have several names
        self._released = threading.Event()
        self._renewer: threading.Thread | None = None
        self._renewed = 0.0  # time.monotonic()
        self._successor: Holder | None = None

    def acquire(self) -> None:
        """Take the lease, or refuse."""
        me = Holder.this_process()
        with _HELD_LOCK, self._one_at_a_time() as is_alone:
            holder = self._read()
            if holder is not None and not (_same(holder, me) and self._path not in _HELD) and not holder.yields_to(me):
                raise RunDirectoryError(
                    f"{self._path.parent} is in use by {holder.describe()}: two runs in one directory would spend the "
                    f"same noise twice. Stop that one, or wait {EXPIRES_AFTER_S:.0f} s after its end, or choose "
                    "another --run-dir"
                )
            self._write(me)
            if not is_alone:
                time.sleep(SETTLE_S)
            winner = self._read()
            if winner is None or not _same(winner, me):
                raise RunDirectoryError(
                    f"{self._path.parent} was taken at the same moment by "
                    f"{winner.describe() if winner else 'another run'}: start again when that one has ended"
                )
            _HELD.add(self._path)
        self._renewed, self._successor = time.monotonic(), None
        self._released.clear()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()

    def check(self) -> None:
        """Raise if the lease was lost. Call it before anything that two runs must not both do."""
        if self._renewer is None:
            return
        me = Holder.this_process()
        with contextlib.suppress(RunDirectoryError):  # unreadable now: the last renewal counts
            holder = self._read()
            self._successor = None if holder is None or _same(holder, me) else holder
        if self._successor is not None:
            raise RunDirectoryError(
                f"{self._path.parent} was taken over by {self._successor.describe()} while this run did not answer: "
                "this one ends, and that one goes on"
            )
        silent_s = time.monotonic() - self._renewed
        if silent_s > EXPIRES_AFTER_S and not self._renew_once():
            raise RunDirectoryError(
                f"the lease {self._path} could not be renewed for {silent_s:.0f} s, so another run may take the "
                "directory: this one ends. Free space or repair access, and start again"
            )

    def release(self) -> None:
        """Give the lease back; does nothing when it is not held, and leaves another run's alone."""
        if self._renewer is None:
            return
        self._released.set()
        self._renewer.join()
        self._renewer = None
        with _HELD_LOCK:
            _HELD.discard(self._path)
        holder = self._read()
        if holder is not None and _same(holder, Holder.this_process()):
            self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_EVERY_S):
            self._renew_once()

    def _renew_once(self) -> bool:
        """Whether the lease is ours and was renewed; what stands in the way may pass, so the caller tries again."""
        me = Holder.this_process()
        try:
            with self._one_at_a_time():
                holder = self._read()
                if holder is not None and not _same(holder, me):
                    self._successor = holder
                    return False
                self._write(me)
        except (RunDirectoryError, OSError):
            return False
        self._renewed = time.monotonic()
        return True

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[bool]:
        """Keep others from between reading and writing; yields False where the file system cannot lock."""
        try:
            descriptor = os.open(self._path.with_name(f".{self._path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            yield False
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                locked = True
            except OSError:
                locked = False
            yield locked
        finally:
            os.close(descriptor)

    def _write(self, holder: Holder) -> None:
        try:
            write_atomically(self._path, json.dumps(asdict(holder)))
        except OSError as error:
            raise RunDirectoryError(
                f"{self._path} cannot be written ({error.strerror}): free space or repair access, and start again"
            ) from error

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunDirectoryError(
                f"{self._path} cannot be read ({error.strerror}): repair access, and start again"
            ) from error
        except (ValueError, TypeError) as error:
            raise RunDirectoryError(
                f"{self._path} is not a lease ({error}): if no run uses this directory, remove that file"
            ) from error


def _same(one: Holder, other: Holder) -> bool:
    """Whether both are the same process."""
    return (one.host, one.boot_id, one.pid, one.pid_started) == (
        other.host,
        other.boot_id,
        other.pid,
        other.pid_started,
    )


def _pid_namespace() -> str:
    try:
        return " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """When a process of this machine started, in the kernel's ticks; "" when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
