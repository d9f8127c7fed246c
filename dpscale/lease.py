"""The lease of a run directory: one run at a time, taken over from the dead, refused to the living (PRIVACY.md 31)."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from dpscale.durable import write_atomically
from dpscale.errors import RunDirectoryError

RENEW_EVERY_S = 30.0
EXPIRES_AFTER_S = 120.0


@dataclass(frozen=True)
class Holder:
    """Who holds the lease. `job` and `restart` are SLURM's, where the run is a job."""

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
            boot_id=boot.read_text().strip() if boot.exists() else "",
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
        return f"process {self.pid} on {self.host}{job}, seen {time.time() - self.renewed_at:.0f} s ago"


class Lease:
    """RUN/lease, renewed by a thread while held.

    Raises: RunDirectoryError from `acquire` when another run holds it; the message names the holder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._released = threading.Event()
        self._renewer: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease, or refuse; taking over is settled by reading back who wrote last."""
        me = Holder.this_process()
        holder = self._read()
        if holder is not None and holder.pid == me.pid and holder.pid_started == me.pid_started:
            holder = None
        if holder is not None and not holder.yields_to(me):
            raise RunDirectoryError(
                f"{self._path.parent} is in use by {holder.describe()}: two runs in one directory would spend the "
                f"same noise twice. Stop that one, or wait {EXPIRES_AFTER_S:.0f} s after its end, or choose another "
                "--run-dir"
            )
        self._write(me)
        winner = self._read()
        if winner is None or (winner.host, winner.pid) != (me.host, me.pid):
            raise RunDirectoryError(
                f"{self._path.parent} was taken at the same moment by "
                f"{winner.describe() if winner else 'another run'}: start again when that one has ended"
            )
        self._released.clear()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()

    def release(self) -> None:
        """Give the lease back; does nothing when it is not held."""
        if self._renewer is None:
            return
        self._released.set()
        self._renewer.join()
        self._renewer = None
        self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_EVERY_S):
            self._write(Holder.this_process())

    def _write(self, holder: Holder) -> None:
        write_atomically(self._path, json.dumps(asdict(holder)))

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(self._path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise RunDirectoryError(
                f"{self._path} is not a lease ({error}): if no run uses this directory, remove that file"
            ) from error


def _process_start(pid: int) -> str:
    """When a process of this machine started, in the kernel's ticks; "" when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
