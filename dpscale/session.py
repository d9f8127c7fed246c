"""Opening a run directory: what process 0 decides before any process draws a batch.

New run or old, which attempt, from which step, with which plan and secret; and every reason to refuse.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpscale.checkpoint import Checkpoints
from dpscale.config import RunConfig, to_toml
from dpscale.durable import write_atomically
from dpscale.errors import PrivacyError, RunDirectoryError
from dpscale.manifest import Found
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.program import differences, digest
from dpscale.run_directory import RunDirectory
from dpscale.run_record import (
    IDENTITY_SCHEMA,
    SECRET_CHECK,
    check_finished,
    check_plan,
    check_released,
    open_secret,
    read_identity,
)


@dataclass(frozen=True)
class Briefing:
    """What every process must know, the same on all of them.

    `start_step`: steps that are done. `attempt_start`: where the current attempt began. `charged_before`: steps
    charged to earlier attempts. `restore`: whether `start_step` is read from a checkpoint. `promised`: see Ledger.
    """

    plan: PrivacyPlan
    secret: RootSecret
    attempt: int
    start_step: int
    attempt_start: int
    charged_before: int
    restore: bool
    promised: int | None = None

    def charged_at(self, step: int) -> int:
        """Steps that epsilon is computed for when `step` steps of the run are done."""
        return self.charged_before + step - self.attempt_start

    @property
    def last_step(self) -> int:
        """Where the run ends: the planned steps, less what earlier attempts used up of what may be charged."""
        return self.plan.last_step(self.attempt_start, self.charged_before, self.promised)

    def to_json(self) -> dict[str, Any]:
        """For the broadcast to the other processes; it holds the secret and touches neither file nor log."""
        return {
            "plan": self.plan.to_json(),
            "secret": self.secret.for_other_processes(),
            "insecure": self.secret.insecure,
            "attempt": self.attempt,
            "start_step": self.start_step,
            "attempt_start": self.attempt_start,
            "charged_before": self.charged_before,
            "restore": self.restore,
            "promised": self.promised,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Briefing:
        """What `to_json` gave, on another process."""
        secret = RootSecret.from_process_zero(values.pop("secret"), insecure=values.pop("insecure"))
        return cls(plan=PrivacyPlan.from_json(values.pop("plan")), secret=secret, **values)


def open_session(
    directory: RunDirectory,
    config: RunConfig,
    num_examples: int,
    data_fingerprint: bytes,
    program: dict[str, Any],
    checkpoints: Checkpoints,
    *,
    new_attempt: bool,
    report: Callable[[str], None],
) -> tuple[Briefing, Ledger]:
    """Set up a new run, or decide how an old one goes on. Process 0 only; the lease is held.

    Args:
        data_fingerprint: digest of the training data; only its keyed digest is stored.
        program: facts from `program_facts`.
        new_attempt: the user accepts that changed facts start a new attempt, charged on top.
        report: is told, in one line each, what was found and decided.

    Guarantees: the attempt is in the ledger when this returns, before anything of it can be drawn.

    Raises: RunDirectoryError where the plan, the data or the program differ from the run's, with the differences, or a
        file of the run cannot be read or written; PrivacyError where the ledger does not fit the rest.
    """
    try:
        directory.refuse_if_ended()
        directory.remove_leftovers()
        if not directory.identity.exists():
            _set_up(directory, config, num_examples, data_fingerprint, program, checkpoints)
        secret = open_secret(directory, config)
        identity = _identity(directory, secret, data_fingerprint)
        plan = _plan(directory, config, num_examples)
        ledger = Ledger.load(directory.ledger, secret)
        check_plan(ledger, plan, directory)
        check_released(ledger, directory)
        check_finished(ledger, directory)
        _check_program(ledger, identity, directory)
        changed = differences(identity["program"], program)
        if changed and not new_attempt:
            raise RunDirectoryError(
                f"{directory.root} was started with another program, and its noise must not be used again:\n  "
                + "\n  ".join(changed)
                + "\nRestore what changed; or go on with --new-attempt (fresh batches and noise, charged on top); or "
                "choose another --run-dir"
            )
        moved = identity["place"] != directory.place()
        model = directory.read_json(directory.model) if directory.model.exists() else {}
        briefing = _brief(
            ledger, plan, secret, checkpoints, report, moved=moved, changed=changed, asked=new_attempt, model=model
        )
        # Only now: were this written before the new attempt is in the ledger, a kill in between would hide the change.
        if changed or moved:
            directory.write_json(directory.identity, {**identity, "program": program, "place": directory.place()})
            write_atomically(directory.config, to_toml(config))
        if briefing.start_step < briefing.last_step:
            directory.finished.unlink(missing_ok=True)
    except OSError as error:
        raise RunDirectoryError(
            f"the files of {directory.root} cannot be read or written ({error}): free space or repair access, and "
            "start again"
        ) from error
    return briefing, ledger


def ledger_facts(plan: PrivacyPlan, program: dict[str, Any], mesh_size: int, device_kind: str) -> dict[str, Any]:
    """What each range record states beside its steps."""
    return {
        "plan": plan.digest(),
        "program": digest(program),
        "versions": {key.removeprefix("version of "): program[key] for key in program if key.startswith("version of ")},
        "devices": mesh_size,
        "device_kind": device_kind,
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _set_up(
    directory: RunDirectory,
    config: RunConfig,
    num_examples: int,
    data_fingerprint: bytes,
    program: dict[str, Any],
    checkpoints: Checkpoints,
) -> None:
    """Write every file of a new run; run.json comes last, so a crash before it means: set up again."""
    if directory.ledger.exists() or checkpoints.steps():
        raise RunDirectoryError(
            f"{directory.root} has a ledger or checkpoints but no {directory.identity.name}: files are missing. "
            "Restore them, or choose another --run-dir"
        )
    plan = PrivacyPlan.from_config(config, num_examples=num_examples, cached=None)
    directory.checkpoints.mkdir(mode=0o700, exist_ok=True)
    directory.secret.unlink(missing_ok=True)
    if config.privacy.insecure_seed is None:
        RootSecret.create(directory.secret)
    secret = open_secret(directory, config)
    write_atomically(directory.config, to_toml(config))
    write_atomically(directory.plan, plan.to_json())
    directory.write_json(
        directory.identity,
        {
            "schema": IDENTITY_SCHEMA,
            "run_id": secrets.token_hex(8),
            "place": directory.place(),
            "secret": secret.mac("fingerprint", SECRET_CHECK),
            "data": secret.mac("fingerprint", data_fingerprint),
            "program": program,
        },
    )


def _identity(directory: RunDirectory, secret: RootSecret, data_fingerprint: bytes) -> dict[str, Any]:
    """run.json, once it is sure that secret and data are the run's own."""
    identity = read_identity(directory, secret)
    if identity["data"] != secret.mac("fingerprint", data_fingerprint):
        raise RunDirectoryError(
            f"the training data differ from those that {directory.root} was started with: a run has one data set. "
            "Restore the data, or start a new run in another directory"
        )
    return identity


def _check_program(ledger: Ledger, identity: dict[str, Any], directory: RunDirectory) -> None:
    """Raises: PrivacyError where run.json no longer states the program that the current attempt's steps were run with.

    Otherwise an edit of that file would let another program use the attempt's noise again.
    """
    current, known = ledger.current, digest(identity["program"])
    for line in ledger.records:
        of_now = current is not None and line["kind"] == "open" and line["attempt"] == current.number
        if of_now and line.get("program", known) != known:
            raise PrivacyError(
                f"{directory.identity} states another program than {directory.ledger} charged steps of: it was edited "
                "or replaced. Restore it; or start a new run in another directory"
            )


def _plan(directory: RunDirectory, config: RunConfig, num_examples: int) -> PrivacyPlan:
    """The run's plan, which the config must still ask for."""
    old = PrivacyPlan.from_json(directory.read_text(directory.plan))
    plan = PrivacyPlan.from_config(config, num_examples=num_examples, cached=old)
    changed = old.differences(plan)
    if changed:
        raise RunDirectoryError(
            f"{directory.root} belongs to another privacy plan:\n  "
            + "\n  ".join(changed)
            + "\nA run's plan is fixed at its start: restore the config, or choose another --run-dir"
        )
    return plan


def _brief(
    ledger: Ledger,
    plan: PrivacyPlan,
    secret: RootSecret,
    checkpoints: Checkpoints,
    report: Callable[[str], None],
    *,
    moved: bool,
    changed: list[str],
    asked: bool,
    model: dict[str, Any],
) -> Briefing:
    """Choose the checkpoint, and decide whether going on from it needs a new attempt (PRIVACY.md, rule 3).

    Args:
        model: what the last start wrote of its model, for a checkpoint that it left without a manifest.
    """
    current = ledger.current
    found = checkpoints.newest_good(report, committed=current.committed if current else 0)
    start = found.step if found else 0
    _refuse_what_does_not_fit(ledger, found, asked)
    reasons = []
    if current is not None:
        if start < current.committed:
            reasons.append(
                f"step {current.committed} was committed, but the newest whole checkpoint is of step {start}"
            )
        elif found and found.attempt not in (None, current.number) and start != current.start:
            reasons.append(f"the checkpoint of step {start} was saved by attempt {found.attempt}, which was left")
        elif found and start > current.committed:
            # The last run died before it could write this; what was saved may have been seen.
            checkpoints.adopt(found, {"attempt": current.number, "ledger_head": ledger.head, "model": model})
            ledger.close(current.number, start, current.end)
            report(f"step {start} was saved just before the last run ended: it is now on record")
        if asked:
            reasons.append("; ".join(["a new attempt was asked for", *changed]))
    if moved:
        reasons.append("the run directory was copied or moved")
    if current is None or reasons:
        before = ledger.charged_steps
        # Two copies of one directory must not choose the same number: a copy's is random.
        number = secrets.randbits(62) | 1 << 62 if moved else ledger.next_attempt()
        ledger.begin(number, start, reasons)
        if current is not None:
            report(f"new attempt from step {start}, fresh batches and noise, charged on top: {'; '.join(reasons)}")
        attempt_start = start
    else:
        before = ledger.charged_steps - current.steps
        number, attempt_start = current.number, current.start
    briefing = Briefing(plan, secret, number, start, attempt_start, before, found is not None, ledger.promised)
    if briefing.last_step < plan.steps:
        report(_why_it_ends_early(briefing))
    return briefing


def _why_it_ends_early(briefing: Briefing) -> str:
    plan, promised = briefing.plan, briefing.promised
    by_release = promised is not None and (plan.epsilon_target is None or promised < plan.chargeable_steps)
    if by_release:
        limit = f"the card of a released model covers {promised} steps, which"
    else:
        limit = f"epsilon {plan.epsilon_target:g}"
    return (
        f"{briefing.charged_before} steps of earlier attempts are charged: {limit} allows steps up to "
        f"{briefing.last_step} of {plan.steps}"
    )


def _refuse_what_does_not_fit(ledger: Ledger, found: Found | None, asked: bool) -> None:
    """Raise where checkpoint and ledger cannot both be whole."""
    current = ledger.current
    if found is None:
        if current is not None and current.committed > 0 and not asked:
            raise RunDirectoryError(
                f"step {current.committed} was committed in {ledger.path}, but no checkpoint is left: restore one, or "
                "start from step 0 with --new-attempt (charged on top), or choose another --run-dir"
            )
        return
    ledger.check_saved(found.step, found.facts)
