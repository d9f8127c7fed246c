"""Run directories made by the real parts (session, ledger, checkpoints), without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpscale import manifest
from dpscale.checkpoint import Checkpoints
from dpscale.config import config_from_dict
from dpscale.data.open import open_source
from dpscale.privacy.ledger import Ledger
from dpscale.run_directory import RunDirectory
from dpscale.session import Briefing, ledger_facts, open_session
from dpscale.state import TrainState

STEPS, EVERY = 12, 3
PROGRAM = {"optimizer.learning_rate": 0.5, "version of jax": "0.10.2"}
MODEL: dict[str, Any] = {
    "schema": 1,
    "source": "dpscale.models",
    "name": "mlp",
    "options": {"widths": [4]},
    "num_classes": 10,
    "compute_dtype": "float32",
    "features": {"shape": [8, 8, 1], "dtype": "float32"},
    "preprocessing": {"full_scale": 16.0, "mean": [0.0], "std": [1.0]},
}
FACTS = MODEL | {"averaged": False, "lora_scale": None, "pretrained": None, "program": PROGRAM}
NOISE: dict[str, Any] = {"noise_multiplier": 2.0, "delta": 1e-4, "expected_batch_size": 100}


def config(data: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **privacy: Any):
    data = {"train": "digits/train"} | (data or {})
    model = {"name": "mlp", "widths": [4]}
    return config_from_dict(
        {"data": data, "model": model, "training": {"steps": STEPS} | (training or {}), "privacy": NOISE | privacy}
    )


class MadeRun:
    """A run that was started in `root` and did nothing yet."""

    def __init__(self, root: Path, facts: dict[str, Any] | None = None, **sections: Any) -> None:
        self.facts = FACTS | (facts or {})
        self.directory = RunDirectory.at(root)
        self.config = config(**sections)
        self.start()

    def start(self, *, new_attempt: bool = False) -> None:
        """Open the run directory, as each call of train does."""
        self.directory.prepare()
        source = open_source("digits/train")
        self.checkpoints = Checkpoints(self.directory.checkpoints, 10)
        self.briefing: Briefing
        self.ledger: Ledger
        self.briefing, self.ledger = open_session(
            self.directory,
            self.config,
            len(source),
            source.fingerprint_parts(),
            self.facts["program"],
            self.checkpoints,
            new_attempt=new_attempt,
            report=lambda line: None,
        )
        self.checkpoints.close()
        self.directory.write_json(self.directory.model, self.facts)

    def open(self, start: int, end: int, devices: int = 1) -> None:
        """The range record of steps [start, end)."""
        facts = ledger_facts(self.briefing.plan, self.facts["program"], devices, "cpu")
        self.ledger.open_range(self.briefing.attempt, start, end, facts)

    def save(self, step: int, ran_to: int | None = None) -> None:
        """A stand-in for the checkpoint of `step` with a true manifest, and its closing record."""
        path = self.directory.checkpoints / str(step)
        path.mkdir(parents=True)
        (path / "weights").write_bytes(b"stands for weights")
        manifest.write_manifest(path, step, {"attempt": self.briefing.attempt, "ledger_head": self.ledger.head})
        self.ledger.close(self.briefing.attempt, step, step if ran_to is None else ran_to)

    def save_state(self, step: int, state: TrainState) -> None:
        """A true checkpoint of `state`, and its closing record."""
        self.checkpoints = Checkpoints(self.directory.checkpoints, 10)
        facts = {"attempt": self.briefing.attempt, "ledger_head": self.ledger.head, "model": self.facts}
        self.checkpoints.save(step, state, facts)
        self.checkpoints.close()
        self.ledger.close(self.briefing.attempt, step, step)

    def run(self, end: int) -> MadeRun:
        """Run and save every EVERY steps up to `end`."""
        for start in range(0, end, EVERY):
            self.open(start, start + EVERY)
            self.save(start + EVERY)
        return self


def made_run(root: Path, end: int = 6, **options: Any) -> MadeRun:
    """A run that stopped after `end` of STEPS steps."""
    return MadeRun(root, **options).run(end)
