"""RunRecord: what a run directory says about its privacy, read while the run may go on: no lease, no write, no jax."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpscale.config import RunConfig, load_config
from dpscale.errors import PrivacyError, RunDirectoryError
from dpscale.manifest import Found, read_manifest, saved_steps
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.run_directory import RunDirectory

IDENTITY_SCHEMA = 1
SECRET_CHECK = b"this run's secret"  # its keyed digest tells one secret from another and shows neither


@dataclass(frozen=True)
class RunRecord:
    """A run directory whose files fit each other.

    `saved`: the checkpoints that have a manifest, oldest first. `secret`: None where it was destroyed. `ended` says
    when that was begun, and with which ledger; a secret beside it is one whose destruction was interrupted.
    `ledger_sha256`: of the ledger's whole lines.
    """

    directory: RunDirectory
    config: RunConfig
    plan: PrivacyPlan
    identity: dict[str, Any]
    secret: RootSecret | None
    ended: dict[str, Any] | None
    saved: list[Found]
    ledger: Ledger
    ledger_sha256: str

    @property
    def charged_steps(self) -> int:
        """Steps that epsilon is computed for now."""
        return self.ledger.charged_steps

    @property
    def charged_at_end(self) -> int:
        """Steps that will be charged at the planned end; never below what is charged now."""
        current = self.ledger.current
        if current is None:
            return self.plan.steps
        before = self.charged_steps - current.steps
        last = self.plan.last_step(current.start, before, self.ledger.promised)
        return max(self.charged_steps, before + last - current.start)

    @property
    def chargeable_steps(self) -> int | None:
        """Steps that the run can ever be charged, repeated ones included; None where nothing limits new attempts."""
        if self.ended is not None:
            return self.charged_steps
        return self._allowed_steps

    @property
    def _allowed_steps(self) -> int | None:
        """What the plan's epsilon or an earlier release allowed beforehand; never below what is charged."""
        planned = None if self.plan.epsilon_target is None else self.plan.chargeable_steps
        limits = [steps for steps in (self.ledger.promised, planned) if steps is not None]
        return max(self.charged_steps, min(limits)) if limits else None

    @property
    def covered_steps(self) -> int:
        """Steps whose epsilon holds for a model that is released now; the run keeps to them from then on."""
        return self.steps_to_cover(ends=self.ended is not None)

    def steps_to_cover(self, *, ends: bool) -> int:
        """`covered_steps`, or what they would be if the run ended for good.

        What is charged, where the run came to its planned end in one attempt. Elsewhere all that was allowed
        beforehand, `privacy.replay_reserve` included: going back may have been chosen by looking at results, and a run
        that goes on may still use it up. Of one attempt that ends early, the planned end's, for the stop may have been
        chosen so.
        """
        in_one = len(self.ledger.attempts) == 1
        if in_one and self.is_finished:
            return self.charged_steps
        if in_one and ends:
            return self.charged_at_end
        return max(self.charged_at_end, self._allowed_steps or 0)

    @property
    def committed_step(self) -> int:
        """The last step whose checkpoint is known to be durable."""
        return self.ledger.current.committed if self.ledger.current else 0

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its planned end, so that nobody chose where it stopped."""
        current = self.ledger.current
        if current is None:
            return False
        last = self.plan.last_step(current.start, self.charged_steps - current.steps, self.ledger.promised)
        return current.committed == current.end >= last

    @property
    def is_insecure(self) -> bool:
        """Whether anyone can make the same noise."""
        return self.config.privacy.insecure_seed is not None

    @property
    def checked(self) -> str:
        """Whether the laws were checked on the run's processes before its first step, as a sentence (verify)."""
        lines = self.ledger.records
        first = next((place for place, line in enumerate(lines) if line["kind"] == "open"), len(lines))
        held = [place for place, line in enumerate(lines) if line["kind"] == "verify" and line["held"]]
        failed = sum(line["kind"] == "verify" and not line["held"] for line in lines)
        after = f"; {failed} check(s) failed, and no step was run then" if failed else ""
        if not held or held[0] > first:
            return (
                f"not before the first step (privacy.verify was off){after}"
                if first < len(lines)
                else f"not yet{after}"
            )
        facts = lines[max(place for place in held if place < first)]
        where = f"{facts['devices']} device(s) of {facts['processes']} process(es)"
        again = sum(place > first for place in held)
        more = f", and in part at {again} later start(s)" if again else ""
        return f"{facts['laws']} laws held on {where} before the first step{more}{after}"

    @property
    def verification(self) -> str:
        """How far the ledger could be checked, as a sentence."""
        if self.secret is None:
            return (
                "the chain can no longer be verified, for the secret was destroyed; it was whole then, and the file "
                "has not changed since"
            )
        ended = (
            "" if self.ended is None else "; ended, the secret is not yet destroyed (release --destroy-secret does it)"
        )
        if not self.saved:
            return f"the chain of keyed digests is whole; there is no checkpoint yet to compare it with{ended}"
        return (
            "the chain of keyed digests is whole, and holds every line that the checkpoint of step "
            f"{self.saved[-1].step} was saved after{ended}"
        )


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read the run directory at `path` and check that config, plan, secret, ledger and checkpoints belong together.

    Raises: RunDirectoryError where a file is missing, unreadable or of a newer version; PrivacyError where the ledger
        was altered, lost lines, or is another run's.
    """
    directory = RunDirectory.at(path)
    if not directory.identity.exists():
        raise RunDirectoryError(f"{directory.root} is no run directory (it has no run.json): give one that train made")
    try:
        ended = _read_ended(directory) if directory.ended.exists() else None
        config = load_config(directory.config)
        plan = PrivacyPlan.from_json(directory.read_text(directory.plan))
        secret = open_secret(directory, config) if ended is None else _secret_left(directory, config)
        identity = read_identity(directory, secret)
        saved = _saved(directory)  # before the ledger, which only grows: a line that a checkpoint knows must be there
        data = directory.ledger.read_bytes() if directory.ledger.exists() else b""
    except OSError as error:
        raise RunDirectoryError(f"{directory.root} cannot be read ({error}): repair access, and try again") from error
    ledger = Ledger.parse(directory.ledger, data, secret)
    sha256 = hashlib.sha256(data[: len(data) - ledger.torn_bytes]).hexdigest()
    if ended is not None and ended["ledger_sha256"] != sha256:
        raise PrivacyError(
            f"{directory.ledger} is not the file that it was when the secret was destroyed: it was altered. Restore "
            "it; epsilon cannot be computed from it"
        )
    check_plan(ledger, plan, directory)
    check_released(ledger, directory)
    check_finished(ledger, directory)
    for found in saved:
        ledger.check_saved(found.step, found.facts)
    return RunRecord(directory, config, plan, identity, secret, ended, saved, ledger, sha256)


def open_secret(directory: RunDirectory, config: RunConfig) -> RootSecret:
    """The run's secret, from its file or from the config's insecure seed.

    Raises: RunDirectoryError where it cannot be read, or both are there.
    """
    if config.privacy.insecure_seed is not None:
        if directory.secret.exists():
            raise RunDirectoryError(
                f"privacy.insecure_seed is set but {directory.root} has a true secret: remove the key from the config"
            )
        return RootSecret.from_insecure_seed(config.privacy.insecure_seed)
    return RootSecret.load(directory.secret)


def read_identity(directory: RunDirectory, secret: RootSecret | None) -> dict[str, Any]:
    """run.json, once it is sure that `secret` (where there is one) is the run's own.

    Raises: RunDirectoryError where it is not, or the file is no run.json of this version.
    """
    identity = directory.read_json(directory.identity)
    if identity.get("schema") != IDENTITY_SCHEMA or not {"place", "secret", "data", "program"} <= identity.keys():
        raise RunDirectoryError(
            f"{directory.identity} is not of schema {IDENTITY_SCHEMA}, or lacks keys: use the dpscale that wrote it, "
            "or restore it"
        )
    if secret is not None and identity["secret"] != secret.mac("fingerprint", SECRET_CHECK):
        raise RunDirectoryError(
            f"the secret is not the one that {directory.root} was started with ({directory.secret.name} was replaced, "
            "or privacy.insecure_seed changed): restore it; no other will do"
        )
    return identity


def check_plan(ledger: Ledger, plan: PrivacyPlan, directory: RunDirectory) -> None:
    """Raises: PrivacyError where the ledger charges steps of another plan than plan.json states."""
    if ledger.plans - {plan.digest()}:
        raise PrivacyError(
            f"{directory.ledger} charges steps of another plan than {directory.plan} states: one of the files was "
            "replaced. Restore it; epsilon cannot be computed from both"
        )


def check_released(ledger: Ledger, directory: RunDirectory) -> None:
    """Raises: PrivacyError where the ledger lost the line that holds the run to the card of a released model."""
    if directory.released.exists() and directory.read_json(directory.released).get("ledger_head") not in ledger.heads:
        raise PrivacyError(
            f"{directory.ledger} does not hold the line of the release that {directory.released} notes: lines were "
            "lost (the file was truncated or replaced by an older one). Restore it; the card of what was released may "
            "not be true without it"
        )


def check_finished(ledger: Ledger, directory: RunDirectory) -> None:
    """Raises: PrivacyError where the ledger lost the last line of a run that came to its end."""
    noted = directory.finished.exists() and directory.finished.stat().st_size > 0
    head = directory.read_json(directory.finished).get("ledger_head") if noted else None
    if head is not None and head not in ledger.heads:
        raise PrivacyError(
            f"{directory.ledger} does not hold the line that the run ended with, which {directory.finished} notes: "
            "lines were lost (the file was truncated or replaced by an older one). Restore it"
        )


def _read_ended(directory: RunDirectory) -> dict[str, Any]:
    ended = directory.read_json(directory.ended)
    if ended.get("schema") != 1 or not isinstance(ended.get("ledger_sha256"), str):
        raise RunDirectoryError(f"{directory.ended} is not what `dpscale release` wrote: restore it")
    return ended


def _secret_left(directory: RunDirectory, config: RunConfig) -> RootSecret | None:
    """The secret of an ended run where its destruction was interrupted before it began; None where it is gone."""
    try:
        secret = open_secret(directory, config)
        read_identity(directory, secret)
    except RunDirectoryError:
        return None
    return secret


def _saved(directory: RunDirectory) -> list[Found]:
    """Checkpoints with a manifest; a running run may remove one between two looks."""
    found = []
    for step in saved_steps(directory.checkpoints):
        fault, saved, _ = read_manifest(Path(directory.checkpoints) / str(step))
        if fault is None:
            found.append(saved)
    return found
