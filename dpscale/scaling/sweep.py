"""A sweep's directory: what was asked for, the records that came, and what is missing and why. Imports no jax.

SWEEP/sweep.json, config.toml       what was asked for
SWEEP/records/NAME-VARIANT.json     one record a point
SWEEP/jobs/NAME/attempts/           logs, exit codes and crashes of each job
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dpscale.config import RunConfig
from dpscale.data.builtin import BUILTIN
from dpscale.data.made_up import FORMS
from dpscale.data.open import open_source
from dpscale.data.options import SourceOptions
from dpscale.durable import write_atomically
from dpscale.errors import InputError
from dpscale.scaling.point import VARIANTS, Setting, Variant
from dpscale.scaling.record import SHARED_MODE, Record, read_record

SWEEP_FILE = "sweep.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Sweep:
    """What was asked for; `settings` in the order of submission."""

    config_name: str
    variants: tuple[Variant, ...]
    settings: tuple[Setting, ...]

    def save(self, directory: Path) -> None:
        """Write SWEEP/sweep.json."""
        values = {"schema_version": SCHEMA_VERSION, "kind": "scaling sweep", **asdict(self)}
        write_atomically(directory / SWEEP_FILE, json.dumps(values, indent=1) + "\n", SHARED_MODE)

    @classmethod
    def load(cls, directory: Path) -> Sweep | None:
        """What `save` wrote; None for a directory of records made by hand.

        Raises: InputError for another file of that name.
        """
        path = directory / SWEEP_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version {values['schema_version']} instead of {SCHEMA_VERSION}")
            settings = tuple(Setting(**{**one, "modes": tuple(one["modes"])}) for one in values["settings"])
            return cls(values["config_name"], tuple(values["variants"]), settings)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read as a sweep ({error}): remove it to use the records alone"
            ) from error


@dataclass(frozen=True)
class Missing:
    """A point without a record. `why`: the job's last exit code and where to look, as far as is known."""

    name: str
    why: str


@dataclass(frozen=True)
class Collected:
    """Everything that is there. `records` are sorted by devices, batch, variant and repeat. `missing`: what was asked
    for, or by hand what the other points have, and neither `records` nor `unreadable` holds.
    """

    directory: Path
    name: str
    records: tuple[Record, ...]
    missing: tuple[Missing, ...]
    unreadable: tuple[str, ...]


def collect(directory: Path) -> Collected:
    """The records of a sweep, or of a directory that holds records alone, or one record's file.

    Raises: InputError when there is no readable record at all.
    """
    if directory.is_file():
        record = read_record(directory)
        return Collected(directory, record.config_name, (record,), (), ())
    sweep = Sweep.load(directory)
    folder = directory / "records" if (directory / "records").is_dir() else directory
    records: list[Record] = []
    unreadable: dict[str, str] = {}
    for path in sorted(folder.glob("n*-b*-r*-*.json")):
        try:
            records.append(read_record(path))
        except InputError as error:
            unreadable[path.name] = str(error)
    there = {*unreadable, *(record.file_name for record in records)}
    missing = _missing(directory, sweep, there) if sweep else _gaps(records, there)
    if not records:
        reasons = "; ".join([*unreadable.values(), *(f"{one.name}: {one.why}" for one in missing)][:4])
        raise InputError(
            f"{directory} holds no scaling record{f' ({reasons})' if reasons else ''}: make some with dpscale scaling "
            "submit or dpscale scaling measure"
        )
    records.sort(key=lambda r: (r.devices, r.batch, r.variant, r.repeat))
    name = sweep.config_name if sweep else records[0].config_name
    return Collected(directory, name, tuple(records), tuple(missing), tuple(unreadable.values()))


def shuffled(settings: Sequence[Setting], seed: int) -> list[Setting]:
    """In random order, so that a slow hour of the cluster does not fall on one number of devices."""
    order = list(settings)
    random.Random(seed).shuffle(order)
    return order


def data_kind(config: RunConfig, *, declared_public: bool) -> Literal["made up", "built in", "declared public"]:
    """Whose rows a measurement may read: step times follow the sizes of the draws, so private data are refused.

    Raises: InputError for data that nobody declared public.
    """
    spec = config.data.train
    if spec.startswith("made_up"):
        return "made up"
    if spec.partition("/")[0] in BUILTIN and not Path(spec).exists():
        return "built in"
    if declared_public:
        return "declared public"
    raise InputError(
        f"data.train={spec!r} may be private, and step times follow the sizes of the drawn batches: measure on made-up "
        f"rows of the same shape (data.train={FORMS}), or say --public-data if these data are public"
    )


def logical_batch(config: RunConfig) -> tuple[float, int]:
    """The config's expected logical batch and the number of examples; the data set's length is read, no example."""
    source = open_source(config.data.train, SourceOptions.from_config(config.data))
    batch, rate = config.privacy.expected_batch_size, config.privacy.sampling_rate
    return (batch if batch is not None else (rate or 0.0) * len(source)), len(source)


def _gaps(records: Sequence[Record], there: Set[str]) -> list[Missing]:
    """What records made by hand lack: at each count and batch, every kind and every repeat that any other has."""
    there_are = {record.variant for record in records}
    kinds: list[Variant] = [kind for kind in VARIANTS if kind in there_are]
    repeats = sorted({record.repeat for record in records})
    settings = dict.fromkeys(replace(record.setting, repeat=repeat) for record in records for repeat in repeats)
    names = [setting.record_name(kind) for setting in settings for kind in kinds]
    why = "no record, though other points have one of this kind and repeat"
    return [Missing(name.removesuffix(".json"), why) for name in dict.fromkeys(names) if name not in there]


def _missing(directory: Path, sweep: Sweep, there: Set[str]) -> list[Missing]:
    found = []
    for setting in sweep.settings:
        names = [setting.record_name(variant) for variant in sweep.variants]
        why = _why(directory / "jobs" / setting.name)
        found += [Missing(name.removesuffix(".json"), why) for name in names if name not in there]
    return found


def _why(job: Path) -> str:
    ends: list[dict[str, Any]] = []
    for file in sorted((job / "attempts").glob("*.ends")):
        for line in file.read_text(errors="replace").splitlines():
            try:
                ends.append(json.loads(line))
            except ValueError:
                continue
    logs = sorted((job / "attempts").glob("*/crash/*.txt")) + sorted((job / "attempts").glob("job-*.log"))
    where = f", see {logs[0].relative_to(job.parent.parent)}" if logs else ""
    if not ends:
        return "its job has not ended" + (where or ", or never began")
    return f"its job ended with exit code {ends[-1].get('code')}{where}"
