"""Canaries: records that take the place of others, whose gradients are unit vectors of a leaf made for them.

One parameter a canary is added to the model, in a leaf of its own. Canary i's loss is norm * canary[i], so that its
gradient is norm along that coordinate and zero elsewhere; a canary that the coin left out has the loss 0, and is a
record that contributes nothing, as the neighbouring relation has it. The leaf stands beside the model's under one
clip norm and in one vector of noise, nothing of size canaries x parameters is ever made, and what a step releases
along a canary's direction is one coordinate of its noisy gradient: no score could see more of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpscale.data.source import LABEL, VALID, Batch, ExampleSource, SourceMetadata
from dpscale.errors import InputError
from dpscale.privacy.secret import RootSecret
from dpscale.task import Task

CANARY, MODEL = "canary", "model"
MAX_CANARIES = 2**24  # their numbers travel with labels, which may be float32


def fair_coins(secret: RootSecret, canaries: int) -> np.ndarray:
    """bool[canaries]: which are included; from the secret, and independent of sampling and noise."""
    stream = hashlib.shake_256(secret.derive("audit")).digest(-(-canaries // 8))
    return np.unpackbits(np.frombuffer(stream, np.uint8))[:canaries].astype(bool)


class CanarySource:
    """`source` with some of its records, evenly spaced, turned into canaries; it keeps its length.

    `included`: bool[canaries]. So the sampling rate, the noise and the number of steps are those of the plan itself.
    Where the rows are users, a canary is a user, and all records of its row carry its code. A row's label is
    [its values, code]: code 0 for a record of the data, i + 1 for canary i if included, else -(i + 1).
    Canaries keep the features of the record in whose place they are.

    Raises: InputError for more canaries than records, or labels that this cannot carry.
    """

    def __init__(self, source: ExampleSource, included: np.ndarray) -> None:
        count = len(included)
        if not 2 <= count <= min(len(source), MAX_CANARIES):
            raise InputError(
                f"{count} canaries among {len(source)} examples: each takes the place of one, so choose 2 to "
                f"{min(len(source), MAX_CANARIES)}; 1000 is a good number"
            )
        self._source = source
        self._places = np.arange(count, dtype=np.int64) * len(source) // count
        self._codes = np.where(included, 1, -1) * np.arange(1, count + 1)
        size = math.prod(source.metadata.label_shape)
        self._metadata = dataclasses.replace(source.metadata, label_shape=(size + 1,))

    @property
    def metadata(self) -> SourceMetadata:
        """The data's own, with longer labels."""
        return self._metadata

    def __len__(self) -> int:
        """Number of examples: the data's own."""
        return len(self._source)

    def rows(self, indices: np.ndarray) -> Batch:
        """The examples at `indices`, int64[n]."""
        read = self._source.rows(indices)
        place = np.minimum(np.searchsorted(self._places, indices), len(self._places) - 1)
        is_canary = self._places[place] == indices
        records = () if self._metadata.records is None else (self._metadata.records,)
        label = np.zeros((len(indices), *records, *self._metadata.label_shape), self._metadata.label_dtype)
        label[..., :-1] = read[LABEL].reshape(*label.shape[:-1], -1)
        code = np.where(is_canary, self._codes[place], 0)
        label[..., -1] = code.reshape(-1, *(1 for _ in records))
        if VALID in read:  # a canary does not need the record in whose place it is
            read = read | {VALID: read[VALID] | is_canary}
        return read | {LABEL: label}

    def fingerprint_parts(self) -> bytes:
        """The data's own."""
        return self._source.fingerprint_parts()


def canary_task(task: Task, metadata: SourceMetadata, canaries: int, norm: float) -> Task:
    """`task` with a leaf of `canaries` zeros, whose loss of a canary's row is `norm` times its coordinate.

    `metadata`: the data's own, whose labels the wrapped loss gets back.
    """

    def loss(params: Any, example: Any, *key: jax.Array) -> jax.Array:
        packed = example[LABEL]
        label = packed[..., :-1].reshape(*packed.shape[:-1], *metadata.label_shape)
        code = packed[..., -1].reshape(-1)[0].astype(jnp.int32)  # the same in all records of a user
        own = task.loss(params[MODEL], {**example, LABEL: label}, *key)
        place = jnp.clip(jnp.abs(code) - 1, 0, canaries - 1)
        planted = norm * jnp.where(code > 0, params[CANARY][place], 0.0)
        return jnp.where(code == 0, own, planted.astype(own.dtype))

    params = {CANARY: jnp.zeros(canaries, jnp.float32), MODEL: task.params}
    wrapped = loss if task.uses_key else lambda params, example: loss(params, example)
    return Task(params, wrapped, task.uses_key, task.metrics)
