"""release(): weights, the model's config and the privacy card leave a run; nothing else does.

DIR/weights.safetensors (names: dpscale.weights), DIR/orbax/ (the same tree), DIR/model.json (what rebuilds the model),
DIR/PRIVACY.md and DIR/privacy.json (the card, with the digests of the other files).
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpscale.config import RunConfig, load_config
from dpscale.durable import sync_directory, write_atomically
from dpscale.errors import InputError, RunDirectoryError
from dpscale.lease import Lease
from dpscale.manifest import Found, inspect
from dpscale.metrics.records import read_records
from dpscale.privacy.card import SCHEMA, Card
from dpscale.privacy.ledger import Ledger
from dpscale.privacy.secret import destroy
from dpscale.run_directory import RunDirectory
from dpscale.run_record import RunRecord, read_run
from dpscale.weights import read_weights, write_weights

WEIGHTS, ORBAX, MODEL, CARD, TEXT = "weights.safetensors", "orbax", "model.json", "privacy.json", "PRIVACY.md"
STATEMENTS = ("privacy.public_data_used", "privacy.hyperparameter_search")
MODEL_KEYS = ("schema", "source", "name", "options", "num_classes", "compute_dtype", "features", "preprocessing")
SHARED_MODE = 0o644


class Release(NamedTuple):
    """`params`: nested dicts of NumPy arrays; `model`: what model.json holds; `card`: what privacy.json holds."""

    params: dict[str, Any]
    model: dict[str, Any]
    card: dict[str, Any]


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

    The released step is committed in the ledger before anything is written, so that no later start replays it.

    Returns: `out`.

    Raises: InputError for an `out` that is not empty, a step that is not saved, statements that are missing, are
        none or contradict the config; RunDirectoryError and PrivacyError where the run's files are damaged or do not
        fit each other.
    """
    directory, out = RunDirectory.at(run_dir), Path(out).expanduser().absolute()
    _refuse_occupied(out)
    if not directory.identity.exists():
        raise RunDirectoryError(f"{directory.root} is no run directory (it has no run.json): give one that train made")
    lease = Lease(directory.lease)
    lease.acquire()
    try:
        record = read_run(directory.root)
        config = _with_statements(record, statements)
        if destroy_secret and record.is_insecure:
            raise InputError("--destroy-secret: this run has no secret, but a fixed seed (privacy.insecure_seed)")
        found = _checkpoint(record, step)
        model = _released_model(directory)
        record = _committed(record, found)
        with _appearing_at_once(out) as stage:
            from dpscale.checkpoint import read_parameters, write_parameters

            averaged = config.training.evaluate_ema
            trained = read_parameters(directory.checkpoints / str(found.step), "ema" if averaged else "params")
            params = _whole(record, trained)
            write_weights(stage / WEIGHTS, params)
            (stage / WEIGHTS).chmod(SHARED_MODE)
            write_parameters(stage / ORBAX, params)
            (stage / ORBAX / "commit_success.txt").unlink(missing_ok=True)  # it names a path of this machine
            _write_json(stage / MODEL, model)
            if destroy_secret:
                _end(record)
            card = _card(record, config, found, model, _digests(stage))
            write_atomically(stage / TEXT, card.to_markdown(), SHARED_MODE)
            card = dataclasses.replace(card, files=_digests(stage))  # with the text's own
            _write_json(stage / CARD, card.to_json())
    finally:
        lease.release()
    report(f"released  {out}")
    report(f"promise   {card.statement}")
    if destroy_secret:
        report("secret    destroyed; backups and snapshots that hold a copy of it must be removed too")
    return out


def load_release(directory: str | os.PathLike[str]) -> Release:
    """Read back what `release` wrote; needs NumPy only.

    `params` suits `dpscale.models.build_model(model["name"], model["num_classes"], **model["options"])` where
    model["source"] is "dpscale.models".

    Raises: InputError where a file, of orbax/ too, is missing, is not the one that the card lists, or is not listed.
    """
    directory = Path(directory).expanduser()
    card = _read_json(directory / CARD)
    if card.get("schema") != SCHEMA or not isinstance(card.get("files"), dict):
        raise InputError(f"{directory / CARD} is no card of schema {SCHEMA}: use the dpscale that wrote it")
    listed, there = card["files"], {name: digest for name, digest in _digests(directory).items() if name != CARD}
    for name in sorted({WEIGHTS, MODEL, TEXT} | listed.keys() | there.keys()):
        if name not in listed:
            raise InputError(f"{directory / name} is not listed in {CARD}, so it is no part of the release: remove it")
        if there.get(name) != listed[name]:
            raise InputError(f"{directory / name} is not the file that {CARD} lists: copy the release again")
    return Release(read_weights(directory / WEIGHTS), _read_json(directory / MODEL), card)


def _refuse_occupied(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty directory: a release goes into a new one")


def _with_statements(record: RunRecord, statements: Sequence[str]) -> RunConfig:
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
    if config.model.pretrained is not None and (privacy.public_data_used or "").strip().lower() == "none":
        raise InputError(
            f"privacy.public_data_used=none, but the run started from {Path(config.model.pretrained).name} "
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


def _committed(record: RunRecord, found: Found) -> RunRecord:
    """The run with `found` committed in its ledger; the lease is held.

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
    Ledger.load(record.directory.ledger, record.secret).close(current.number, found.step, current.end)
    return read_run(record.directory.root)


def _released_model(directory: RunDirectory) -> dict[str, Any]:
    if not directory.model.exists():
        raise RunDirectoryError(
            f"{directory.model} is missing: start `dpscale train` on this run once more, which writes it (a finished "
            "run makes no step)"
        )
    facts = directory.read_json(directory.model)
    return {key: facts.get(key) for key in MODEL_KEYS}


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


def _card(record: RunRecord, config: RunConfig, found: Found, model: dict[str, Any], files: dict[str, str]) -> Card:
    programs = [line["program"] for line in record.ledger.records if "program" in line]
    facts = record.identity["program"]
    versions = {key.removeprefix("version of "): facts[key] for key in sorted(facts) if key.startswith("version of ")}
    return Card(
        plan=record.plan,
        released_step=found.step,
        averaged=config.training.evaluate_ema,
        charged_steps=record.charged_steps,
        charged_at_end=record.charged_at_end,
        attempts=len(record.ledger.attempts),
        made_from_size=_made_from_size(config),
        finished=record.is_finished,
        insecure=record.is_insecure,
        secret_destroyed=not record.is_insecure and not record.directory.secret.exists(),
        public_data_used=config.privacy.public_data_used,
        hyperparameter_search=config.privacy.hyperparameter_search,
        pretrained_weights=_pretrained(config, model, facts),
        ledger={
            "sha256": record.ledger_sha256,
            "lines": len(record.ledger.records),
            "verification": record.verification,
        },
        program_digest=programs[-1] if programs else "",
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


def _whole(record: RunRecord, trained: Any) -> Any:
    """The plain model: frozen leaves put back, adapters multiplied into their kernels.

    Raises: RunDirectoryError where the frozen leaves are gone or are not the run's.
    """
    from dpscale.models.leaves import join
    from dpscale.models.trainable import merge_lora
    from dpscale.task import weights_digest

    expected, file, model = (
        record.identity["program"].get("frozen weights"),
        record.directory.frozen,
        record.config.model,
    )
    whole = trained
    if expected is not None:
        frozen = read_weights(file)
        if weights_digest(frozen) != expected:
            raise RunDirectoryError(f"{file} does not hold the weights that this run froze: restore it")
        whole = join(trained, frozen)
    return merge_lora(whole, model.lora_alpha / model.lora_rank) if model.lora_rank else whole


def _pretrained(config: RunConfig, model: dict[str, Any], facts: dict[str, Any]) -> str:
    if config.model.pretrained is not None:
        name = Path(config.model.pretrained).name
        digest = facts.get("model.pretrained digest", "unknown")
        return (
            f"{name} ({config.model.pretrained_format}), SHA-256 {digest}; they count as public data: the guarantee "
            "does not cover what they were trained on"
        )
    if model["source"] == "python":
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


@contextlib.contextmanager
def _appearing_at_once(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` when all went well and is removed otherwise.

    Others cannot look into it before; what a killed release left is removed.
    """
    stage = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for left in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
            if left.is_dir():
                shutil.rmtree(left)
        stage.mkdir()
        mode = stage.stat().st_mode & 0o777  # what the user's umask gives
        stage.chmod(0o700)
        yield stage
        _sync(stage)
        stage.chmod(mode)
        os.rename(stage, out)
        sync_directory(out.parent)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}): free space, repair access, or choose another") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Put every file and directory below `directory` on disk."""
    for path in [*directory.rglob("*"), directory]:
        if path.is_dir():
            sync_directory(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n", SHARED_MODE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON ({error}): give a directory that `dpscale release` wrote"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object: give a directory that `dpscale release` wrote")
    return values
