"""Laws of users as the unit: who is drawn, which of their records, and that one user moves a sum by C at most."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpscale
from dpscale.cli import app
from dpscale.config import RunConfig, config_from_dict
from dpscale.data.arrays import ArraySource
from dpscale.data.resident import gather, load_resident
from dpscale.data.source import ExampleSource, empty_rows
from dpscale.data.users import UserSource
from dpscale.errors import InputError
from dpscale.losses import sum_over_records
from dpscale.privacy.sensitivity import SLACK
from dpscale.sampling import PoissonSampler
from dpscale.train import find_source

GENERATOR = np.random.default_rng(3)
USERS = np.repeat(np.arange(40), GENERATOR.integers(1, 9, 40))
GENERATOR.shuffle(USERS)
FEATURES = GENERATOR.normal(size=(len(USERS), 6)).astype(np.float32)
LABELS = (FEATURES[:, 0] > 0).astype(np.int32)
MOST = 3


def source(features=FEATURES, users=USERS, most=MOST) -> UserSource:
    labels = np.arange(len(features), dtype=np.int32)  # a label tells which record it is
    return UserSource(ArraySource(features, labels), users, most)


def test_a_row_holds_a_bounded_set_of_one_users_records_and_says_which_places_are_filled():
    by_user = source()
    assert len(by_user) == 40
    rows = by_user.rows(np.array([7, 0, 7]))
    assert {name: array.shape for name, array in rows.items()} == {
        "features": (3, MOST, 6),
        "label": (3, MOST),
        "present": (3, MOST),
    }
    for row, user in enumerate((7, 0, 7)):
        mine = rows["label"][row][rows["present"][row]]
        assert len(mine) == min(MOST, np.count_nonzero(user == USERS))
        assert set(USERS[mine]) == {user}
        assert len(set(mine)) == len(mine), "no record twice"
        np.testing.assert_array_equal(rows["features"][row], FEATURES[rows["label"][row]])
        assert set(USERS[rows["label"][row]]) == {user}, "what fills up is the user's own"
    for name, array in empty_rows(by_user.metadata, 3).items():
        assert (array.shape, array.dtype) == (rows[name].shape, rows[name].dtype)
    assert by_user.rows(np.empty(0, np.int64))["features"].shape == (0, MOST, 6)


def test_which_records_of_a_user_are_used_does_not_change_with_other_users_data():
    before = source()
    mine = [np.flatnonzero(user == USERS) for user in range(40)]
    for user in (u for u in range(40) if len(mine[u]) > MOST):
        others = np.setdiff1d(np.arange(len(USERS)), mine[user])
        # Others leave, others come (with smaller and larger ids), and all records move to other places in the file.
        strangers = np.r_[np.full(20, -5), np.full(9, 99), np.repeat(np.arange(200, 230), 5)]
        kept = np.sort(np.r_[mine[user], others[:10]])
        users = np.r_[strangers, USERS[kept]]
        features = np.r_[np.zeros((len(strangers), 6), np.float32), FEATURES[kept]]
        after = source(features, users)
        number = int(np.flatnonzero(np.unique(users) == user)[0])
        rows = after.rows(np.array([number]))
        np.testing.assert_array_equal(rows["features"], before.rows(np.array([user]))["features"])


def test_of_many_records_every_one_is_as_likely_to_be_used():
    users = np.repeat(np.arange(4000), 6)
    by_user = UserSource(ArraySource(np.zeros((24000, 1), np.float32), np.zeros(24000, np.int32)), users, 2)
    ordinals = np.concatenate([by_user.records_of(user) - 6 * user for user in range(4000)])
    counts = np.bincount(ordinals, minlength=6)
    expected = 8000 / 6
    assert ((counts - expected) ** 2 / expected).sum() < 25.7  # chi-square, 5 degrees of freedom: 1e-4


def test_an_unreadable_record_of_a_user_is_as_good_as_absent():
    records = ArraySource(FEATURES, LABELS)
    whole = UserSource(records, USERS, MOST)
    bad = whole.records_of(7)[0]
    real = records.rows
    records.rows = lambda indices: {**real(indices), "valid": indices != bad}
    rows = whole.rows(np.array([7, 8]))
    assert "valid" not in rows
    assert rows["present"][0].sum() == len(whole.records_of(7)) - 1
    assert rows["present"][1].sum() == len(whole.records_of(8))


def test_text_ids_are_users_too_and_the_fingerprint_knows_whose_a_record_is():
    names = np.array([f"user-{user}" for user in USERS])
    assert len(source(users=names)) == 40
    swapped = USERS.copy()
    swapped[[0, 1]] = swapped[[1, 0]] if USERS[0] != USERS[1] else (98, 99)
    prints = {source(users=ids).fingerprint_parts() for ids in (USERS, names, swapped)}
    assert len(prints) == 3
    assert source().fingerprint_parts() == source(users=USERS.copy()).fingerprint_parts()


@pytest.mark.parametrize("users", [USERS[:-1], USERS.astype(float), USERS.reshape(-1, 1)], ids=["few", "float", "2-d"])
def test_ids_that_do_not_fit_the_records_are_refused(users):
    with pytest.raises(InputError, match="one for each of"):
        source(users=users)


def linear(params: Any, example: Any) -> jax.Array:
    return jnp.vdot(params["w"], example["features"]) * 3.0 + params["b"] * example["label"]


def contribution(user: dict[str, np.ndarray], method: Any = "auto", loss=linear, clip_norm: float = 0.5) -> np.ndarray:
    params = {"w": jnp.zeros(6), "b": jnp.float32(0)}
    clipped = dpscale.clipped_grad(sum_over_records(loss, uses_key=False), clip_norm, method)
    out = clipped(params, {name: array[None] for name, array in user.items()}, np.ones(1, bool))
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(out.grad_sum)])


def a_user(records: int, places: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    features = scale * np.abs(np.random.default_rng(records).normal(size=(places, 6))).astype(np.float32)
    return {"features": features, "label": np.ones(places, np.float32), "present": np.arange(places) < records}


@pytest.mark.parametrize("records", [1, 2, 5, 16])
@pytest.mark.parametrize("method", ["materialize", "bookkeeping", "ghost"])
def test_a_users_records_are_summed_before_the_norm_so_one_user_moves_the_sum_by_the_clip_norm_at_most(records, method):
    # Row 51. Clipping each record instead would let 16 aligned records move it by 16 C.
    moved = np.linalg.norm(contribution(a_user(records, 16), method))
    assert moved == pytest.approx(0.5, rel=1e-4)
    assert moved <= 0.5 * (1 + SLACK)


def test_below_the_clip_norm_a_users_gradient_is_the_sum_of_the_records_gradients():
    user = a_user(3, 5, scale=1e-2)
    user["label"] *= 1e-2
    expected = np.r_[3e-2, 3.0 * user["features"][:3].sum(0)]
    np.testing.assert_allclose(contribution(user, clip_norm=10.0), expected, rtol=1e-5)


@pytest.mark.parametrize("method", ["materialize", "bookkeeping", "ghost"])
def test_what_stands_in_for_absent_records_changes_no_bit(method):
    clean, dirty = a_user(3, 8), a_user(3, 8)
    dirty["features"][3:], dirty["label"][3:] = 7e5, -3e4
    np.testing.assert_array_equal(contribution(clean, method), contribution(dirty, method))


def test_a_record_that_is_not_finite_takes_its_user_out_and_no_one_else():
    users = [a_user(3, 4), a_user(2, 4), a_user(4, 4)]
    users[1]["features"][1] = np.nan
    clipped = dpscale.clipped_grad(sum_over_records(linear, uses_key=False), 0.5)
    params = {"w": jnp.zeros(6), "b": jnp.float32(0)}
    batch = {name: np.stack([user[name] for user in users]) for name in users[0]}
    out = clipped(params, batch, np.ones(3, bool))
    masked = clipped(params, batch, np.array([True, False, True]))
    assert out.finite.tolist() == [True, False, True]
    jax.tree.map(np.testing.assert_array_equal, out.grad_sum, masked.grad_sum)


def test_each_record_has_a_key_of_its_own():
    def noisy(params, example, key):
        return params["b"] * jax.random.normal(key) + 0 * params["w"][0] + 0 * example["label"]

    summed = sum_over_records(noisy, uses_key=True)
    params = {"w": jnp.zeros(6), "b": jnp.float32(1)}
    key = jax.random.key(0)
    alone = [summed(params, {**a_user(1, 4), "present": np.arange(4) == place}, key) for place in range(4)]
    assert len({float(value) for value in alone}) == 4
    assert float(summed(params, a_user(4, 4), key)) == pytest.approx(sum(map(float, alone)), rel=1e-5)


def test_rows_of_users_on_the_device_are_the_rows_from_the_host():
    by_user = source()
    ids = np.array([3, 17, 3, 39])
    table, readable = load_resident(by_user)
    assert readable is None
    resident = gather(table, {"index": jnp.asarray(ids, jnp.int32)})
    for name, array in by_user.rows(ids).items():
        np.testing.assert_array_equal(np.asarray(resident[name]), array)


def config(**sections: dict[str, Any]) -> RunConfig:
    values: dict[str, Any] = {
        "data": {"num_classes": 2},
        "model": {"name": "mlp", "widths": [4]},
        "optimizer": {"learning_rate": 0.5},
        "training": {"steps": 6},
        "privacy": {
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "expected_batch_size": 10,
            "insecure_seed": 7,
            "accountant": "rdp",
            "unit": "user",
            "max_examples_per_user": MOST,
        },
        "performance": {"physical_batch_size": 1},
        "checkpoint": {"every_steps": 2},
    }
    for section, given in sections.items():
        values[section] = {k: v for k, v in (values.get(section, {}) | given).items() if v is not None}
    return config_from_dict(values)


def run(run_dir: Path, train_data: Any = (FEATURES, LABELS, USERS), **sections):
    return dpscale.train(config(**sections), run_dir, train_data=train_data, report=lambda line: None, progress=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("users") / "run")


def same(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_the_plan_samples_users_and_states_unit_and_bound_and_epsilon_is_that_of_users(plain):
    made = json.loads((plain.run_dir / "plan.json").read_text())
    assert (made["unit"], made["max_examples_per_user"], made["num_examples"]) == ("user", MOST, 40)
    assert made["sampling_rate"] == 10 / 40
    expected = dpscale.epsilon(noise_multiplier=1.0, sampling_rate=10 / 40, steps=6, delta=1e-3, accountant="rdp")
    assert plain.epsilon == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_the_same_users_from_an_npz_file_and_on_the_device_give_the_same_run(plain, tmp_path):
    np.savez(tmp_path / "data.npz", features=FEATURES, labels=LABELS, who=USERS)
    data = {"train": str(tmp_path / "data.npz"), "user_key": "who"}
    assert same(run(tmp_path / "file", None, data=data), plain)
    given = {"features": FEATURES, "label": LABELS, "user": USERS}
    assert same(run(tmp_path / "device", given, data={"residence": "device"}), plain)


def read_back(spec: Path, key: str = "who") -> ExampleSource:
    """The users of a data set on disk, as a run opens them."""
    return find_source(config(data={"train": str(spec), "user_key": key}), None, str(spec), "train")


@pytest.mark.parametrize("ids", [USERS, USERS.astype(str), USERS.astype(np.uint64)], ids=["numbers", "text", "uint64"])
@pytest.mark.parametrize(
    "form", ["parquet", "folder of parquet", "arrow", "converted from parquet", "converted from npz"]
)
def test_users_of_every_format_that_holds_ids_are_those_of_arrays(form, ids, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(FEATURES.reshape(-1)), FEATURES.shape[1])
    table = pa.table({"features": vectors, "labels": LABELS, "who": ids})
    where = tmp_path / "set"
    if form == "arrow":
        where = tmp_path / "set.arrow"
        with pa.OSFile(str(where), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif form == "folder of parquet":
        where.mkdir()
        for part in range(3):
            first, last = (len(ids) * k // 3 for k in (part, part + 1))
            pq.write_table(table.slice(first, last - first), where / f"train-{part}.parquet", row_group_size=5)
    else:
        where = tmp_path / "set.parquet"
        pq.write_table(table, where)
    if form.startswith("converted"):
        if form.endswith("npz"):
            where = tmp_path / "set.npz"
            np.savez(where, features=FEATURES, labels=LABELS, who=ids)
        app(
            ["data", "convert", str(where), str(tmp_path / "new"), "--user-key", "who", "data.num_classes=2"],
            standalone_mode=False,
        )
        where = tmp_path / "new"
    found = read_back(where)
    expected = UserSource(ArraySource(FEATURES, LABELS), ids, MOST)
    assert len(found) == len(expected) == 40
    everyone = np.arange(40)
    for name, array in expected.rows(everyone).items():
        np.testing.assert_array_equal(found.rows(everyone)[name], array)


@pytest.mark.parametrize(
    ("column", "key", "message"),
    [
        ([1.5, 2.5], "who", "column who is of type double, but user ids are whole numbers or text"),
        ([1, None], "who", "row 1 has no user in column who"),
        ([1, 2], "whom", "has no column whom: choose one of"),
    ],
)
def test_a_column_that_cannot_tell_users_apart_is_refused(column, key, message, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(4, np.float32)), 2)
    pq.write_table(pa.table({"features": vectors, "labels": [0, 1], "who": column}), tmp_path / "set.parquet")
    with pytest.raises(InputError, match=message):
        read_back(tmp_path / "set.parquet", key)


@pytest.mark.slow
def test_a_stopped_run_of_users_goes_on_to_the_same_end_and_other_ids_are_other_data(plain, tmp_path):
    from dpscale.stopping import StopRequests

    class AtOnce(StopRequests):
        @property
        def reason(self):
            return "asked"

    stopped = dpscale.train(
        config(),
        tmp_path / "run",
        train_data=(FEATURES, LABELS, USERS),
        report=lambda line: None,
        progress=False,
        stops=AtOnce(),
    )
    assert stopped.step < 6
    with pytest.raises(InputError, match="training data differ"):
        run(tmp_path / "run", (FEATURES, LABELS, np.roll(USERS, 1)))
    with pytest.raises(InputError, match="max_examples_per_user: 3 -> 2"):
        run(tmp_path / "run", privacy={"max_examples_per_user": 2})
    assert same(run(tmp_path / "run"), plain)


def test_each_user_is_drawn_with_the_plans_rate_whatever_the_number_of_records():
    plan = dpscale.PrivacyPlan.from_config(config(), num_examples=len(source()))
    sampler = PoissonSampler(plan.num_examples, plan.sampling_rate, bytes(32))
    drawn = Counter(int(user) for step in range(4000) for user in sampler.indices(step))
    counts = np.array([drawn[user] for user in range(40)])
    deviation = (counts - 1000) / np.sqrt(4000 * 0.25 * 0.75)
    assert np.abs(deviation).max() < 4.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"privacy": {"max_examples_per_user": None}}, "privacy.max_examples_per_user is missing"),
        ({"privacy": {"unit": "example"}}, "privacy.max_examples_per_user is given but privacy.unit='example'"),
        (
            {"privacy": {"unit": "example", "max_examples_per_user": None}, "data": {"user_key": "who"}},
            "data.user_key is given but privacy.unit='example'",
        ),
    ],
    ids=["no bound", "bound without users", "key without users"],
)
def test_a_half_stated_unit_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        config(**change)


@pytest.mark.parametrize(
    ("train_data", "sections", "message"),
    [
        ((FEATURES, LABELS), {}, "belong together, and one is missing"),
        ((FEATURES, LABELS, USERS), {"privacy": {"unit": "person", "max_examples_per_user": None}}, "belong together"),
        (source(most=5), {}, "holds up to 5 records of a user and privacy.max_examples_per_user is 3"),
        (None, {"data": {"train": "digits/train", "num_classes": 10, "user_key": "who"}}, "read from an .npz file"),
        (None, {"data": {"train": "digits/train", "num_classes": 10}}, "belong together"),
    ],
    ids=["no ids", "ids without the unit", "another bound", "no file", "no key"],
)
def test_data_that_do_not_say_whose_a_record_is_are_refused_before_anything_is_written(
    train_data, sections, message, tmp_path
):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", train_data, **sections)
    assert not (tmp_path / "run").exists()
