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
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.plan import PrivacyPlan
from dpscale.privacy.secret import RootSecret
from dpscale.program import differences, digest
from dpscale.run_directory import RunDirectory

IDENTITY_SCHEMA = 1


@dataclass(frozen=True)
class Briefing:
    """What every process must know, the same on all of them.

    `start_step`: steps that are done. `attempt_start`: where the current attempt began. `charged_before`: steps
    charged to earlier attempts. `restore`: whether `start_step` is read from a checkpoint.
    """

    plan: PrivacyPlan
    secret: RootSecret
    attempt: int
    start_step: int
    attempt_start: int
    charged_before: int
    restore: bool

    def charged_at(self, step: int) -> int:
        """Steps that epsilon is computed for when `step` steps of the run are done."""
        return self.charged_before + step - self.attempt_start

    @property
    def last_step(self) -> int:
        """Where the run ends: the planned steps, less what earlier attempts used up of an allowed epsilon."""
        if self.plan.epsilon_target is None:
            return self.plan.steps
        return min(self.plan.steps, self.attempt_start + max(0, self.plan.steps - self.charged_before))

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

    Raises: RunDirectoryError where the plan, the data or the program differ from the run's, with the differences.
    """
    if not directory.identity.exists():
        _set_up(directory, config, num_examples, data_fingerprint, program)
    secret = _secret(directory, config)
    identity = directory.read_json(directory.identity)
    old_plan = PrivacyPlan.from_json(directory.read_text(directory.plan))
    plan = PrivacyPlan.from_config(config, num_examples=num_examples, cached=old_plan)
    _refuse_other_plan(directory, old_plan, plan)
    if identity["data"] != secret.mac("fingerprint", data_fingerprint):
        raise RunDirectoryError(
            f"the training data differ from those that {directory.root} was started with: a run has one data set. "
            "Restore the data, or start a new run in another directory"
        )
    ledger = Ledger.load(directory.ledger, secret)
    changed = differences(identity["program"], program)
    if changed and not new_attempt:
        raise RunDirectoryError(
            f"{directory.root} was started with another program, and its noise must not be used again:\n  "
            + "\n  ".join(changed)
            + "\nRestore what changed; or go on with --new-attempt (fresh batches and noise, charged on top); or "
            "choose another --run-dir"
        )
    moved = identity["place"] != directory.place()
    briefing = _brief(ledger, plan, secret, checkpoints, report, moved=moved, anew=bool(changed) or new_attempt)
    if changed or moved:
        directory.write_json(directory.identity, {**identity, "program": program, "place": directory.place()})
        write_atomically(directory.config, to_toml(config))
    return briefing, ledger


def ledger_facts(plan: PrivacyPlan, program: dict[str, Any], mesh_size: int, device_kind: str) -> dict[str, Any]:
    """What each range record states beside its steps."""
    return {
        "plan": plan.digest(),
        "program": digest(program),
        "devices": mesh_size,
        "device_kind": device_kind,
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _set_up(
    directory: RunDirectory, config: RunConfig, num_examples: int, data_fingerprint: bytes, program: dict[str, Any]
) -> None:
    """Write every file of a new run; run.json comes last, so a crash before it means: set up again."""
    if directory.ledger.exists():
        raise RunDirectoryError(
            f"{directory.root} has a ledger but no {directory.identity.name}: files are missing. Restore them, or "
            "choose another --run-dir"
        )
    plan = PrivacyPlan.from_config(config, num_examples=num_examples, cached=None)
    directory.checkpoints.mkdir(mode=0o700, exist_ok=True)
    directory.secret.unlink(missing_ok=True)
    if config.privacy.insecure_seed is None:
        RootSecret.create(directory.secret)
    secret = _secret(directory, config)
    write_atomically(directory.config, to_toml(config))
    write_atomically(directory.plan, plan.to_json())
    directory.write_json(
        directory.identity,
        {
            "schema": IDENTITY_SCHEMA,
            "run_id": secrets.token_hex(8),
            "place": directory.place(),
            "data": secret.mac("fingerprint", data_fingerprint),
            "program": program,
        },
    )


def _secret(directory: RunDirectory, config: RunConfig) -> RootSecret:
    if config.privacy.insecure_seed is not None:
        if directory.secret.exists():
            raise RunDirectoryError(
                f"privacy.insecure_seed is set but {directory.root} has a true secret: remove the key from the config"
            )
        return RootSecret.from_insecure_seed(config.privacy.insecure_seed)
    return RootSecret.load(directory.secret)


def _refuse_other_plan(directory: RunDirectory, old: PrivacyPlan, new: PrivacyPlan) -> None:
    changed = old.differences(new)
    if changed:
        raise RunDirectoryError(
            f"{directory.root} belongs to another privacy plan:\n  "
            + "\n  ".join(changed)
            + "\nA run's plan is fixed at its start: restore the config, or choose another --run-dir"
        )


def _brief(
    ledger: Ledger,
    plan: PrivacyPlan,
    secret: RootSecret,
    checkpoints: Checkpoints,
    report: Callable[[str], None],
    *,
    moved: bool,
    anew: bool,
) -> Briefing:
    """Choose the checkpoint, and decide whether going on from it needs a new attempt (PRIVACY.md, rule 3)."""
    good = checkpoints.newest_good(report)
    start, facts = good if good else (0, {})
    committed = ledger.committed_step
    reasons = []
    if ledger.attempts:
        if committed is not None and start < committed:
            reasons.append(f"step {committed} was committed, but the newest whole checkpoint is of step {start}")
        if moved:
            reasons.append("the run directory was copied or moved")
        if anew:
            reasons.append("the program changed, or a new attempt was asked for")
        if facts.get("ledger_head") and facts["ledger_head"] not in ledger.heads:
            raise PrivacyError(
                f"the checkpoint of step {start} was saved after ledger lines that {ledger.path} does not hold: lines "
                "were lost. Restore the ledger; epsilon cannot be computed without them"
            )
    elif good:
        raise PrivacyError(f"{ledger.path} is missing although step {start} was saved: restore it")
    if not ledger.attempts:
        return Briefing(plan, secret, 0, 0, 0, 0, restore=False)
    current = ledger.attempts[-1]
    if not reasons:
        before = ledger.charged_steps - current.steps
        return Briefing(plan, secret, current.number, start, current.start, before, restore=good is not None)
    # Two copies of one directory must not choose the same number: a copy's is random.
    number = secrets.randbits(62) | 1 << 62 if moved else ledger.next_attempt()
    report(f"new attempt from step {start}, with fresh batches and noise, charged on top: " + "; ".join(reasons))
    return Briefing(plan, secret, number, start, start, ledger.charged_steps, restore=good is not None)
