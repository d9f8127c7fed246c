"""An unreadable example that is replaced keeps its index, adds exactly zero, and shows in no public number."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import dpscale
from dpscale.batching import BatchLayout
from dpscale.config import config_from_dict
from dpscale.data import as_source
from dpscale.data.corrupt import CorruptExample, read_each
from dpscale.data.loader import EveryExample, Loader
from dpscale.data.options import SourceOptions
from dpscale.data.resident import load_resident
from dpscale.data.source import SourceMetadata
from dpscale.errors import InputError
from dpscale.evaluate import Evaluator
from dpscale.mesh import data_mesh, place_replicated
from dpscale.sampling import PoissonSampler

RNG = np.random.default_rng(2)
COUNT, BAD = 60, [0, 7, 31, 59]


class Replacing:
    """A source that gives zeros, and says so, for the examples in BAD."""

    def __init__(self, valid_dtype=bool):
        features = RNG.standard_normal((COUNT, 3)).astype(np.float32)
        self._inner, self._dtype = as_source((features, np.arange(COUNT, dtype=np.float32))), valid_dtype
        self.metadata, self.fingerprint_parts = self._inner.metadata, self._inner.fingerprint_parts

    def __len__(self):
        return COUNT

    def rows(self, indices):
        rows = self._inner.rows(indices)
        valid = ~np.isin(indices, BAD)
        rows["features"][~valid], rows["label"][~valid] = 0, 0
        return {**rows, "valid": valid.astype(self._dtype)}


SOURCE = Replacing()
SAMPLER = PoissonSampler(COUNT, 0.4, bytes(range(32)))


def loaded(**options):
    with Loader(
        SOURCE, SAMPLER, BatchLayout(4, 2), [0, 1], planned_accumulations=3, stop_step=8, num_threads=2, **options
    ) as loader:
        return [(logical.step, logical.num_examples, list(logical)) for logical in loader]


@pytest.mark.parametrize("resident", [False, True])
def test_replaced_rows_are_masked_and_keep_their_index_in_the_draw(resident):
    readable = load_resident(SOURCE)[1] if resident else None
    met = 0
    for step, drawn, batches in loaded(resident=resident, readable=readable):
        draw = SAMPLER.indices(step)
        ids = np.concatenate([batch.ids for batch in batches])
        mask = np.concatenate([batch.mask for batch in batches])
        assert drawn == len(draw)
        np.testing.assert_array_equal(ids[: len(draw)], draw)  # nobody moved up
        np.testing.assert_array_equal(mask[: len(draw)], ~np.isin(draw, BAD))
        assert not mask[len(draw) :].any()
        met += np.isin(draw, BAD).sum()
        for batch in batches:
            assert "valid" not in batch.arrays
    assert met > 5


def test_held_out_means_are_over_the_examples_that_could_be_read():
    mesh = data_mesh()
    means = Evaluator(mesh, lambda params, example: {"label": example["label"]}, SOURCE, 4)(
        place_replicated(mesh, {"w": jnp.zeros(1)})
    )
    assert means["label"] == pytest.approx(np.delete(np.arange(COUNT), BAD).mean(), rel=1e-6)


def test_what_is_no_flag_is_refused():
    with (
        pytest.raises(InputError, match=r"gave uint8\[8\] for 'valid': it must be bool\[8\]"),
        Loader(Replacing(np.uint8), EveryExample(COUNT), BatchLayout(8, 1), [0], planned_accumulations=1) as loader,
    ):
        next(iter(loader))


def test_only_damaged_content_is_replaced_and_nothing_else():
    metadata = SourceMetadata("here", (2,), np.dtype(np.float32), "class")
    options = SourceOptions(on_corrupt="replace")

    def read(index):
        if index == 1:
            raise CorruptExample("bad bytes")
        if index == 2:
            raise OSError("the disk is gone")
        return np.ones(2), 5

    rows = read_each(np.array([0, 1]), read, metadata, options)
    assert rows["valid"].tolist() == [True, False]
    assert rows["features"].tolist() == [[1, 1], [0, 0]]
    assert rows["label"].tolist() == [5, 0]
    with pytest.raises(OSError, match="disk is gone"):  # a failing disk must not look like an empty data set
        read_each(np.array([0, 2]), read, metadata, options)
    with pytest.raises(InputError, match=r"here: example 1 cannot be read \(bad bytes\).*data.on_corrupt=replace"):
        read_each(np.array([0, 1]), read, metadata, SourceOptions())


def image_folder(root, broken):
    for number, name in enumerate(["ant", "bee"]):
        (root / name).mkdir(parents=True)
        for k in range(8):
            pixels = np.full((6, 6, 3), 120 * number + 3 * k, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    for name in broken:
        (root / name).write_bytes(b"\x89PNG, and then nothing")
    return str(root)


def run(folder, run_dir, **data):
    config = config_from_dict(
        {
            "data": {"train": folder, "image_size": 4, "on_corrupt": "replace", "num_threads": 2, **data},
            "model": {"name": "mlp", "widths": [3]},
            "training": {"steps": 2},
            "privacy": {"noise_multiplier": 1.0, "delta": 1e-3, "sampling_rate": 1.0, "insecure_seed": 3},
            "performance": {"physical_batch_size": 2},
            "metrics": {"sensitive": True},
        }
    )
    result = dpscale.train(config, run_dir, report=lambda line: None, progress=False)
    logs = [(run_dir / "metrics" / f"{name}.jsonl").read_text().splitlines() for name in ("public", "sensitive")]
    return result, [[json.loads(line) for line in log] for log in logs]


@pytest.mark.slow
def test_a_run_goes_on_over_a_corrupt_image_and_only_the_sensitive_stream_counts_it(tmp_path):
    broken = ["ant/3.png", "bee/0.png", "bee/7.png"]
    folder = image_folder(tmp_path / "images", broken)
    with pytest.raises(InputError, match=r"example 3 .*ant/3.png"):
        run(folder, tmp_path / "error", on_corrupt="error")
    result, (public, sensitive) = run(folder, tmp_path / "host")
    assert result.state == "finished"
    assert [line["batch_size"] for line in sensitive] == [13, 13]  # 16 were drawn
    # What the broken files hold changes nothing, nor does it where the data set lives on the device.
    for name in broken:
        (tmp_path / "images" / name).write_bytes(b"something else")
    other, _ = run(folder, tmp_path / "other")
    resident, _ = run(folder, tmp_path / "device", residence="device")
    for a, b, c in zip(*(jax.tree.leaves(x.params) for x in (result, other, resident)), strict=True):
        np.testing.assert_array_equal(a, b)
        # Two programs: rows as an argument, and rows gathered from a table.
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-6)
    # Mended files: the sums change, and no public number does.
    whole, (public_whole, sensitive_whole) = run(image_folder(tmp_path / "mended", []), tmp_path / "whole")
    assert [line["batch_size"] for line in sensitive_whole] == [16, 16]
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(whole.params), strict=True)
    )
    times = ("time", "utc", "seconds", "elapsed_s")
    without = [[{k: v for k, v in line.items() if k not in times} for line in log] for log in (public, public_whole)]
    assert without[0] == without[1]
    assert threading.active_count() < 50
