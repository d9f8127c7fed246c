"""Law 48 on a whole run: nothing that it compiles holds a key, the secret or a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpscale
from dpscale.config import RunConfig
from dpscale.loop import StepKeys
from dpscale.privacy.secret import RootSecret

FEATURES = np.random.default_rng(7).normal(size=(40, 3)).astype(np.float32)
LABELS = np.arange(40, dtype=np.int32) % 2


def loss(params: Any, example: Any, key: jax.Array) -> jax.Array:
    kept = jax.random.bernoulli(key, 0.9)
    return jnp.square(jnp.vdot(params["w"], example["features"]) - example["label"]) * kept


def spellings(words: np.ndarray) -> set[str]:
    """How a program's text may show 32-bit words: in decimal, signed, and as the bytes of a dense constant."""
    values = [int(word) for word in np.asarray(words, np.uint32)]
    decimal = {str(value) for value in values} | {str(value - 2**32) for value in values if value >= 2**31}
    return decimal | {np.uint32(value).tobytes().hex() for value in values}


@pytest.mark.slow
@pytest.mark.parametrize("residence", ["host", "device"])
def test_no_program_that_a_run_compiles_holds_a_key_or_a_record(residence, tmp_path, monkeypatch):
    used: list[np.ndarray] = []
    for name in ("noise", "examples"):
        real = getattr(StepKeys, name)

        def kept(keys: StepKeys, step: int, real: Any = real) -> np.ndarray:
            used.append(real(keys, step))
            return used[-1]

        monkeypatch.setattr(StepKeys, name, kept)
    config = RunConfig.model_validate(
        {
            "data": {"residence": residence},
            "training": {"steps": 3},
            "privacy": {
                "noise_multiplier": 1.0,
                "delta": 1e-3,
                "expected_batch_size": 20,
                "accountant": "rdp",
                "verify": False,  # its keys come from a secret of its own
            },
            "performance": {"physical_batch_size": 4},
        }
    )
    dumps = tmp_path / "programs"
    jax.clear_caches()  # what an earlier test compiled would not be written out again
    jax.config.update("jax_dump_ir_to", str(dumps))
    try:
        dpscale.train(
            config,
            tmp_path / "run",
            model={"w": np.zeros(3, np.float32)},
            loss=loss,
            train_data=(FEATURES, LABELS),
            report=lambda line: None,
            progress=False,
        )
    finally:
        jax.config.update("jax_dump_ir_to", None)
    texts = [path.read_text(errors="replace").lower() for path in Path(dumps).rglob("*") if path.is_file()]
    assert any("finalize" in text for text in texts)
    assert any("accumulate" in text for text in texts)
    secret = RootSecret.load(tmp_path / "run" / "secret.key").for_other_processes()
    words = np.concatenate(
        [np.frombuffer(bytes.fromhex(secret), np.uint32), *used, FEATURES.view(np.uint32).reshape(-1)]
    )
    forms = spellings(words[words > 2**20])
    for text in texts:
        found = {form for form in forms if form in text}
        assert not found, f"{len(found)} words of a key or a record are in a compiled program"
