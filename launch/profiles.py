"""Site profiles: what one cluster wants, in a TOML file of its own, so that configs and commands name no site."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from dpscale.config import nearest
from dpscale.errors import InputError

SHIPPED = Path(__file__).resolve().parent / "slurm" / "profiles"  # launch/slurm is a link; a wheel has the files
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Profile(BaseModel):
    """One site. Every key has a default that asks SLURM for nothing special; `setup` lines are shell, all else data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    partition: str | None = Field(None, description="--partition")
    account: str | None = Field(None, description="--account")
    qos: str | None = Field(None, description="--qos")
    constraint: str | None = Field(None, description="--constraint")
    gpus_per_node: int = Field(0, ge=0, description="GPUs asked for when the command does not say")
    gpu_option: Literal["gpus-per-node", "gres"] = Field("gpus-per-node", description="how this site takes GPUs")
    tasks_per_node: Count | None = Field(None, description="processes a node; default: one for each GPU")
    cpus_per_task: Count | None = Field(None, description="--cpus-per-task")
    mem_per_node: str | None = Field(None, description="--mem")
    exclusive: bool = Field(False, description="--exclusive: whole nodes")
    max_time: str | None = Field(None, description="the partition's longest job: a longer --time is refused at once")
    setup: list[str] = Field([], description="shell lines before the run: module load, source .../activate")
    environment: dict[str, str] = Field({}, description="variables of the tasks: network, NCCL or RCCL, caches")
    container: list[str] = Field([], description="words before python: apptainer exec --nv image.sif")
    python: str | None = Field(None, description="the interpreter; default: the one that submits")
    stage: dict[str, str] = Field({}, description="source = node-local destination, copied once on every node")
    sbatch_args: list[str] = Field([], description="further options of sbatch: --mail-type=FAIL")
    srun_args: list[str] = Field([], description="further options of srun: --cpu-bind=cores")
    stop_margin_s: Seconds = Field(180.0, description="saving begins this long before the end of the job")
    init_timeout_s: Seconds = Field(900.0, description="for all processes to come")
    heartbeat_timeout_s: Seconds = Field(30.0, description="a process without a sign of life for so long is dead")
    shutdown_timeout_s: Seconds = Field(30.0, description="for all processes to leave")
    step_limit_s: Seconds = Field(300.0, description="a step longer than this, and 20 medians, is a hang")
    max_crashes: int = Field(3, ge=0, description="a job that crashed more often is not queued again")
    run_directory_mode: Literal["0700", "0750", "0770"] = Field("0700", description="of a new run directory")

    def variables(self) -> dict[str, str]:
        """The environment of the tasks, the limits included."""
        limits = {
            "DPSCALE_INIT_TIMEOUT_S": self.init_timeout_s,
            "DPSCALE_HEARTBEAT_TIMEOUT_S": self.heartbeat_timeout_s,
            "DPSCALE_SHUTDOWN_TIMEOUT_S": self.shutdown_timeout_s,
            "DPSCALE_STEP_LIMIT_S": self.step_limit_s,
        }
        return {**{name: f"{value:g}" for name, value in limits.items()}, **self.environment}


def load_profile(name: str) -> Profile:
    """The profile of that name, or in that file (a path that ends in .toml).

    A name is looked for in $DPSCALE_PROFILES, then ~/.config/dpscale/profiles, then the profiles shipped with dpscale.

    Raises: InputError when there is none, or it holds anything wrong; every error is named with its key.
    """
    path = Path(name).expanduser() if name.endswith(".toml") else _find(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"profile {path} cannot be read ({error}): give a readable TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"profile {path} is not valid TOML: {error}") from error
    try:
        profile = Profile.model_validate(values)
    except pydantic.ValidationError as error:
        raise InputError(f"profile {path}: " + "; ".join(_explain(item) for item in error.errors())) from None
    for variable in profile.environment:
        if not variable.isidentifier() or not variable.isascii():
            raise InputError(f"profile {path}: environment.{variable!r} is no variable name: use letters, digits and _")
    return profile


def profile_directories() -> list[Path]:
    """Where profiles are looked for, in order."""
    own = os.environ.get("DPSCALE_PROFILES")
    return [*([Path(own)] if own else []), Path("~/.config/dpscale/profiles").expanduser(), SHIPPED]


def _find(name: str) -> Path:
    known = {}
    for directory in reversed(profile_directories()):
        known |= {file.stem: file for file in sorted(directory.glob("*.toml"))}
    if name not in known:
        raise InputError(
            f"there is no profile {name!r}: {nearest(name, list(known))} Or write one to "
            f"{profile_directories()[-2] / (name + '.toml')} (start from {SHIPPED / 'generic.toml'})"
        )
    return known[name]


def _explain(item) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{place} is not a known key: {nearest(place, list(Profile.model_fields))}"
    return f"{place}={item['input']!r}: {item['msg'][0].lower() + item['msg'][1:]}"
