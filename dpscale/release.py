"""release(): weights, the model's config and the privacy card leave a run; nothing else does.

DIR/weights.safetensors (names: dpscale.weights), DIR/orbax/ (the same tree), DIR/model.json (what rebuilds the model),
DIR/PRIVACY.md and DIR/privacy.json (the card, with the digests of the other files).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpscale.config import RunConfig, load_config
from dpscale.durable import write_atomically
from dpscale.errors import InputError, RunDirectoryError
from dpscale.lease import Lease
from dpscale.manifest import Found, inspect
from dpscale.metrics.records import read_records
from dpscale.privacy.card import Card
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.secret import destroy
from dpscale.release_files import (
    CARD,
    MODEL,
    ORBAX,
    SHARED_MODE,
    TEXT,
    WEIGHTS,
    appearing_at_once,
    digests,
    refuse_occupied,
    write_json,
)
from dpscale.run_directory import RunDirectory
from dpscale.run_record import RunRecord, read_run
from dpscale.weights import read_weights, write_weights

STATEMENTS = ("privacy.public_data_used", "privacy.hyperparameter_search")
MODEL_KEYS = ("schema", "source", "name", "options", "num_classes", "compute_dtype", "features", "preprocessing")
FACTS = {*MODEL_KEYS, "averaged", "lora_scale", "pretrained", "program"}  # of a checkpoint's manifest


def release(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: int | None = None,
    destroy_secret: bool = False,
    statements: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> Path:
    """Write the weights of a run, its model's config and its privacy card to the new directory `out`.

    Args:
        step: of which checkpoint; None: the newest.
        destroy_secret: end the run for good: its secret is overwritten and removed.
        statements: what only the owner knows and the config does not say, as "privacy.public_data_used=.." and
            "privacy.hyperparameter_search=none" (or public, private).

    Guarantees: nothing else than the above leaves: no key, no optimizer state, nothing computed from a training batch
    before noise. `out` appears at once and whole, or not at all. The run directory's lease is held meanwhile.

    The released step is committed in the ledger before anything is written, so that no later start replays it, and
    the ledger notes how many steps the card's epsilon covers, so that no later start is charged more: the card stays
    true. All that is said of the model is what the start that saved the checkpoint noted, not what the config says now.

    Returns: `out`.

    Raises: InputError for an `out` that is not empty, a step that is not saved, statements that are missing, are
        none or contradict the config; RunDirectoryError and PrivacyError where the run's files are damaged or do not
        fit each other.
    """
    directory, out = RunDirectory.at(run_dir), Path(out).expanduser().absolute()
    refuse_occupied(out)
    if not directory.identity.exists():
        raise RunDirectoryError(f"{directory.root} is no run directory (it has no run.json): give one that train made")
    lease = Lease(directory.lease)
    lease.acquire()
    try:
        record = read_run(directory.root)
        if destroy_secret and record.is_insecure:
            raise InputError("--destroy-secret: this run has no secret, but a fixed seed (privacy.insecure_seed)")
        found = _checkpoint(record, step)
        facts = _facts(record, found)
        config = _with_statements(record, facts, statements)
        record = _committed(record, found, lease)
        with appearing_at_once(out) as stage:
            _write_model(stage, record, found, facts)
            record = _promised(record, found, lease, ends=destroy_secret)
            if destroy_secret:
                _end(record)
            card = _card(record, config, found, facts, digests(stage))
            write_atomically(stage / TEXT, card.to_markdown(), SHARED_MODE)
            card = dataclasses.replace(card, files=digests(stage))  # with the text's own
            write_json(stage / CARD, card.to_json())
            lease.check()
    finally:
        lease.release()
    report(f"released  {out}")
    report(f"promise   {card.statement}")
    if destroy_secret:
        report("secret    destroyed; backups and snapshots that hold a copy of it must be removed too")
    return out


def _facts(record: RunRecord, found: Found) -> dict[str, Any]:
    """What the start that saved the checkpoint noted of the model and the program; it is what the ledger says ran.

    Raises: RunDirectoryError where it is not there or another program's.
    """
    from dpscale.program import digest

    facts = found.facts.get("model")
    if not isinstance(facts, dict) or not facts.keys() >= FACTS or not isinstance(facts["program"], dict):
        raise RunDirectoryError(
            f"the manifest of step {found.step} does not say what a release must (model, program, ..): another version "
            "of dpscale saved it, or it was edited. Choose another step with --step, or use the version that saved it"
        )
    ledger = record.ledger
    until = ledger.heads.index(found.facts["ledger_head"]) + 1 if found.facts.get("ledger_head") in ledger.heads else 0
    ran = [line.get("program") for line in ledger.records[:until] if line["kind"] == "open"]
    if ran and ran[-1] != digest(facts["program"]):
        raise RunDirectoryError(
            f"the manifest of step {found.step} describes another program than {ledger.path} says was run: one of the "
            "files was edited or replaced. Restore it, or choose another step with --step"
        )
    return facts


def _with_statements(record: RunRecord, facts: dict[str, Any], statements: Sequence[str]) -> RunConfig:
    """The run's config with the owner's statements, which must all be there where a guarantee is stated."""
    for statement in statements:
        if statement.partition("=")[0].strip() not in STATEMENTS:
            raise InputError(
                f"{statement!r} cannot be said at the release of a run: only {' and '.join(STATEMENTS)} can"
            )
    config = load_config(record.directory.config, statements)
    privacy = config.privacy
    values = (privacy.public_data_used, privacy.hyperparameter_search)
    missing = [name for name, value in zip(STATEMENTS, values, strict=True) if value is None]
    if missing and record.plan.enabled and not record.is_insecure:
        raise InputError(
            f"{' and '.join(missing)}: not stated, but the card must say it and only you know. Add to the command, or "
            f'to [privacy] in {record.directory.config}: {STATEMENTS[0]}="none" (or which), {STATEMENTS[1]}=none (or '
            "public: on public data only; private: on the private data)"
        )
    if facts["pretrained"] is not None and (privacy.public_data_used or "").strip().lower() == "none":
        raise InputError(
            f"privacy.public_data_used=none, but the run started from {facts['pretrained']['file']} "
            "(model.pretrained), and pre-trained weights count as public data: say what they were trained on, as "
            'privacy.public_data_used="ImageNet-21k (pre-training)"'
        )
    return config


def _checkpoint(record: RunRecord, step: int | None) -> Found:
    """The checkpoint to release: durable, whole, and charged."""
    saved = {found.step: found for found in record.saved}
    if not saved:
        raise InputError(f"{record.directory.checkpoints} has no finished checkpoint: nothing can be released yet")
    if step is not None and step not in saved:
        raise InputError(f"step {step} is not saved: there are checkpoints of steps {', '.join(map(str, saved))}")
    found = saved[max(saved) if step is None else step]
    fault, _ = inspect(record.directory.checkpoints / str(found.step))
    if fault is not None:
        raise RunDirectoryError(
            f"the checkpoint of step {found.step} is damaged ({fault}): restore it, or choose another with --step"
        )
    return found


def _committed(record: RunRecord, found: Found, lease: Lease) -> RunRecord:
    """The run with `found` committed in its ledger.

    Were it released uncommitted and its files lost, the same attempt would run the released steps again: with the same
    noise, and uncharged.

    Raises: RunDirectoryError where the run has ended, for its ledger can no longer be written.
    """
    current = record.ledger.current
    if current is None or found.attempt not in (None, current.number) or found.step <= current.committed:
        return record
    if record.ended is not None or record.secret is None:
        raise RunDirectoryError(
            f"step {found.step} is saved but not committed in {record.directory.ledger}, and the run has ended, so it "
            f"cannot be any more: choose a step up to {current.committed} with --step"
        )
    lease.check()
    Ledger.load(record.directory.ledger, record.secret).close(current.number, found.step, current.end)
    return read_run(record.directory.root)


def _promised(record: RunRecord, found: Found, lease: Lease, *, ends: bool) -> RunRecord:
    """The run held by its ledger to the steps that the card is about to cover; one that ends has no other to run."""
    if record.ended is not None or record.secret is None or not record.plan.enabled or record.is_insecure:
        return record
    lease.check()
    ledger = Ledger.load(record.directory.ledger, record.secret)
    ledger.release(found.step, record.steps_to_cover(ends=ends))
    record.directory.write_json(record.directory.released, {"schema": 1, "ledger_head": ledger.head})
    return read_run(record.directory.root)


def _write_model(stage: Path, record: RunRecord, found: Found, facts: dict[str, Any]) -> None:
    from dpscale.checkpoint import read_parameters, write_parameters

    path = record.directory.checkpoints / str(found.step)
    params = _whole(record, facts, read_parameters(path, "ema" if facts["averaged"] else "params"))
    write_weights(stage / WEIGHTS, params)
    (stage / WEIGHTS).chmod(SHARED_MODE)
    write_parameters(stage / ORBAX, params)
    (stage / ORBAX / "commit_success.txt").unlink(missing_ok=True)  # it names a path of this machine
    write_json(stage / MODEL, {key: facts[key] for key in MODEL_KEYS})


def _end(record: RunRecord) -> None:
    """Mark the run as ended, then destroy the secret; a crash in between leaves a run that nobody goes on with."""
    directory = record.directory
    if record.ended is None:
        directory.write_json(
            directory.ended,
            {
                "schema": 1,
                "by": "dpscale release --destroy-secret",
                "time": round(time.time(), 3),
                "ledger_sha256": record.ledger_sha256,
                "charged_steps": record.charged_steps,
            },
        )
    destroy(directory.secret)


def _card(record: RunRecord, config: RunConfig, found: Found, facts: dict[str, Any], files: dict[str, str]) -> Card:
    from dpscale.program import digest

    program = facts["program"]
    versions = {
        key.removeprefix("version of "): program[key] for key in sorted(program) if key.startswith("version of ")
    }
    return Card(
        plan=record.plan,
        released_step=found.step,
        averaged=facts["averaged"],
        charged_steps=record.charged_steps,
        covered_steps=record.covered_steps,
        attempts=len(record.ledger.attempts),
        made_from_size=_made_from_size(config),
        finished=record.is_finished,
        insecure=record.is_insecure,
        secret_destroyed=not record.is_insecure and not record.directory.secret.exists(),
        public_data_used=config.privacy.public_data_used,
        hyperparameter_search=config.privacy.hyperparameter_search,
        pretrained_weights=_pretrained(facts),
        ledger={
            "sha256": record.ledger_sha256,
            "lines": len(record.ledger.records),
            "verification": record.verification,
        },
        checked=record.checked,
        program_digest=digest(program),
        versions=versions | {"dp-accounting": importlib.metadata.version("dp-accounting")},
        public_results=_public_results(record, found),
        files=files,
    )


def _made_from_size(config: RunConfig) -> tuple[str, ...]:
    """What of the plan was made from the number of records, as dpscale.privacy.plan does it."""
    if config.privacy.expected_batch_size is None:
        return ("the divisor",)  # rate x N; steps from epochs follow from the given rate alone
    rate = ("the sampling rate",)
    return (*rate, "the number of steps") if config.training.epochs is not None else rate


def _whole(record: RunRecord, facts: dict[str, Any], trained: Any) -> Any:
    """The plain model: frozen leaves put back, adapters multiplied into their kernels.

    Raises: RunDirectoryError where the frozen leaves are gone or are not the run's.
    """
    from dpscale.models.leaves import join
    from dpscale.models.trainable import merge_lora
    from dpscale.task import has_digest

    expected, whole = facts["program"].get("frozen weights"), trained
    if expected is not None:
        file = record.directory.frozen(expected)
        if not has_digest(file, expected):
            raise RunDirectoryError(
                f"{file} is missing or does not hold the weights that this step was trained with frozen: restore it, "
                "or start `dpscale train` on this run once more, which writes it"
            )
        whole = join(trained, read_weights(file))
    return whole if facts["lora_scale"] is None else merge_lora(whole, facts["lora_scale"])


def _pretrained(facts: dict[str, Any]) -> str:
    origin = facts["pretrained"]
    if origin is not None:
        digest = facts["program"].get("model.pretrained digest", "unknown")
        return (
            f"{origin['file']} ({origin['format']}), SHA-256 {digest}; they count as public data: the guarantee does "
            "not cover what they were trained on"
        )
    if facts["source"] == "python":
        return "not known to dpscale, for the model came from Python: see the public data used"
    return "none: random initial weights"


def _public_results(record: RunRecord, found: Found) -> dict[str, float]:
    """Held-out metrics of the released step, where the held-out data are public."""
    path = record.directory.root / "metrics" / "public.jsonl"
    if record.config.data.validation_is != "public":
        return {}
    for line in reversed(read_records(path)):
        if line["step"] == found.step and line.get("attempt") == found.attempt:
            return {key: value for key, value in line.items() if key.startswith("validation_") and value is not None}
    return {}
