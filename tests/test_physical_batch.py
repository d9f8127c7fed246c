"""performance.physical_batch_size = "auto": fits the memory, wastes little, and reads no example."""

from __future__ import annotations

import numpy as np
import pytest

from dpscale import physical_batch
from dpscale.config import RunConfig
from dpscale.data.open import as_source
from dpscale.errors import InputError
from dpscale.physical_batch import accumulate_bytes, physical_batch_size
from dpscale.privacy.plan import PrivacyPlan
from dpscale.task import build_task

EXAMPLES = 4000


@pytest.fixture(scope="module")
def setting():
    config = RunConfig.model_validate(
        {
            "data": {"num_classes": 2},
            "model": {"name": "mlp", "widths": [64]},
            "training": {"steps": 2},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-5, "expected_batch_size": 1024},
            # Its memory grows by one gradient a row: easy to say what must fit.
            "performance": {"physical_batch_size": "auto", "clipping_method": "materialize"},
        }
    )
    source = as_source((np.zeros((EXAMPLES, 16), np.float32), np.zeros(EXAMPLES, np.int32)), num_classes=2)
    plan = PrivacyPlan.from_config(config, num_examples=EXAMPLES)
    return config, plan, build_task(config, source.metadata), source


def choose(setting, monkeypatch, memory: int, devices: int = 1) -> int:
    monkeypatch.setattr(physical_batch, "free_bytes", lambda: memory)
    return physical_batch_size(*setting, num_devices=devices)


@pytest.mark.slow
def test_what_is_chosen_fits_the_memory_and_twice_as_much_would_not(setting, monkeypatch):
    needed = accumulate_bytes(*setting, 32)
    chosen = choose(setting, monkeypatch, int(needed / physical_batch.USABLE_FRACTION * 1.2))
    assert chosen == 32
    assert accumulate_bytes(*setting, 64) > needed * 1.2


def test_with_plenty_of_memory_padding_decides(setting, monkeypatch):
    assert choose(setting, monkeypatch, 2**40) == 128  # 256 would pad 11 % of all rows


def test_more_devices_take_fewer_rows_each(setting, monkeypatch):
    assert choose(setting, monkeypatch, 2**40, devices=8) == 128 // 8


def test_a_number_is_taken_as_it_is(setting, monkeypatch):
    config = setting[0].model_copy(
        update={"performance": setting[0].performance.model_copy(update={"physical_batch_size": 37})}
    )
    assert choose((config, *setting[1:]), monkeypatch, 1) == 37


def test_not_even_one_row_is_refused_with_the_remedy(setting, monkeypatch):
    with pytest.raises(InputError, match="ghost"):
        choose(setting, monkeypatch, 1000)


def test_this_machine_has_free_memory():
    assert physical_batch.free_bytes() > 2**20
