"""Laws of a sweep's points, of its directory, and of what may be measured."""

import dataclasses
import json

import pytest
from scaling_records import planted, record

from dpscale.config import config_from_dict
from dpscale.errors import InputError
from dpscale.scaling.environment import share_of_cores, shown_variables
from dpscale.scaling.point import Setting, parse_counts, parse_names, settings
from dpscale.scaling.record import read_record
from dpscale.scaling.sweep import Sweep, collect, data_kind, logical_batch, shuffled

SETTING = Setting(2, 1000.0, ("strong",), 1)


def config(train: str, **privacy):
    privacy = {"enabled": False, "expected_batch_size": 100} | privacy
    return config_from_dict({"data": {"train": train}, "training": {"steps": 2}, "privacy": privacy})


def test_weak_scaling_grows_the_batch_and_both_modes_share_the_smallest_count():
    made = settings([4, 2], ("strong", "weak"), 100.0, 1)
    assert made == [
        Setting(2, 100.0, ("strong", "weak"), 1),
        Setting(4, 100.0, ("strong",), 1),
        Setting(4, 200.0, ("weak",), 1),
    ]


def test_each_repeat_and_each_variant_has_a_name_of_its_own():
    made = settings([1, 2, 4], ("strong", "weak"), 333.3, 3)
    names = [one.record_name(variant) for one in made for variant in ("private", "nonprivate")]
    assert len(set(names)) == len(names) == 2 * 3 * 5


@pytest.mark.parametrize(
    ("text", "counts"),
    [("1,2,4", [1, 2, 4]), ("8..1024", [8, 16, 32, 64, 128, 256, 512, 1024]), ("4,8..20", [4, 8, 16, 20])],
)
def test_counts_are_lists_and_doublings(text, counts):
    assert parse_counts(text) == counts


@pytest.mark.parametrize("text", ["", "0", "8..4", "a", "1,,2", "1...3"])
def test_other_counts_are_refused(text):
    with pytest.raises(InputError, match=r"doublings|backwards"):
        parse_counts(text)


def test_unknown_modes_are_refused_with_the_known_ones():
    with pytest.raises(InputError, match="none of strong, weak"):
        parse_names("strong,week", ("strong", "weak"), "--mode")


def test_made_up_and_built_in_rows_may_be_timed_and_others_only_when_declared_public():
    assert data_kind(config("made_up:vectors:10:2:2"), declared_public=False) == "made up"
    assert data_kind(config("digits/train"), declared_public=False) == "built in"
    assert data_kind(config("patients.npz"), declared_public=True) == "declared public"
    with pytest.raises(InputError, match=r"made_up:images.*--public-data"):
        data_kind(config("patients.npz"), declared_public=False)


def test_a_file_named_like_a_built_in_data_set_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="may be private"):
        data_kind(config("digits/train"), declared_public=False)


def test_the_logical_batch_follows_the_rate_where_the_config_gives_one():
    assert logical_batch(config("made_up:vectors:200:2:2")) == (100.0, 200)
    rate = config("made_up:vectors:200:2:2", expected_batch_size=None, sampling_rate=0.25)
    assert logical_batch(rate) == (50.0, 200)


def test_points_are_shuffled_the_same_way_for_one_seed():
    made = settings([1, 2, 4, 8], ("strong", "weak"), 8.0, 3)
    assert shuffled(made, 1) == shuffled(made, 1) != made
    assert sorted(shuffled(made, 1), key=str) == sorted(made, key=str)


@pytest.mark.parametrize(
    ("allowed", "cores", "rank", "processes", "own"),
    [
        ([0, 1], 1, 1, 2, (1,)),
        ([3], 1, 1, 2, (3,)),
        ([0, 1, 2, 3], 2, 1, 2, (2, 3)),
        ([0, 1], 2, 0, 2, (0, 1)),
        ([0, 1], 1, 2, 3, None),
    ],
)
def test_cores_are_shared_as_the_table_says(allowed, cores, rank, processes, own):
    assert share_of_cores(allowed, cores, rank, processes) == own


def test_only_listed_variables_are_recorded():
    values = {"NCCL_ALGO": "Ring", "XLA_FLAGS": "", "AWS_SECRET_ACCESS_KEY": "x", "NCCL_TOKEN": "y", "HOME": "/z"}
    assert shown_variables(values) == {"NCCL_ALGO": "Ring", "XLA_FLAGS": ""}


def test_a_record_is_read_back_equal(tmp_path):
    made = record(SETTING, "private", 0.5)
    assert read_record(made.save(tmp_path)) == made


@pytest.mark.parametrize("damage", ["", "[]", '{"schema_version": 2}', '{"schema_version": 1}'])
def test_a_damaged_record_is_named_with_its_remedy(tmp_path, damage):
    path = tmp_path / "n1-b1-r1-private.json"
    path.write_text(damage)
    with pytest.raises(InputError, match=r"n1-b1-r1-private\.json.*(measure again|wrote it)"):
        read_record(path)


def test_missing_and_failed_points_are_named_and_the_others_are_used(tmp_path):
    planted(tmp_path, [1, 2], lambda setting, variant: 1.0, repeats=1)
    Sweep("planted", ("private", "nonprivate"), tuple(settings([1, 2], ("strong", "weak"), 1000.0, 1))).save(tmp_path)
    (tmp_path / "records" / "n2-b2000-r1-private.json").unlink()
    (tmp_path / "records" / "n1-b1000-r1-nonprivate.json").write_text("{")
    attempts = tmp_path / "jobs" / "n2-b2000-r1" / "attempts"
    attempts.mkdir(parents=True)
    (attempts / "7.ends").write_text(json.dumps({"code": 137}) + "\n")
    (attempts / "job-7.log").write_text("killed")
    found = collect(tmp_path)
    assert {one.name: one.why for one in found.missing} == {
        "n2-b2000-r1-private": "its job ended with exit code 137, see jobs/n2-b2000-r1/attempts/job-7.log",
    }
    assert len(found.records) == 4
    assert ["n1-b1000-r1-nonprivate.json" in text for text in found.unreadable] == [True]


def test_records_made_by_hand_need_no_sweep_file(tmp_path):
    planted(tmp_path, [1], lambda setting, variant: 1.0, repeats=1)
    assert collect(tmp_path).missing == ()
    assert len(collect(tmp_path / "records").records) == 2
    assert len(collect(tmp_path / "records" / "n1-b1000-r1-private.json").records) == 1


def test_of_records_made_by_hand_the_kinds_and_repeats_that_others_have_are_named(tmp_path):
    planted(tmp_path, [1, 2], lambda setting, variant: 1.0, repeats=2)
    for name in ("n1-b1000-r1-private", "n2-b2000-r2-private", "n2-b2000-r2-nonprivate"):
        (tmp_path / "records" / f"{name}.json").unlink()
    (tmp_path / "records" / "n2-b1000-r1-private.json").write_text('{"schema')
    found = collect(tmp_path)
    assert [one.name for one in found.missing] == [
        "n1-b1000-r1-private",
        "n2-b2000-r2-private",
        "n2-b2000-r2-nonprivate",
    ]
    assert all("other points have one" in one.why for one in found.missing)
    assert ["n2-b1000-r1-private.json" in text for text in found.unreadable] == [True]


def test_an_empty_directory_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match="dpscale scaling submit"):
        collect(tmp_path)


def test_a_sweep_is_read_back_equal(tmp_path):
    made = Sweep("x", ("private",), tuple(settings([1, 3], ("weak",), 10.0, 2)))
    made.save(tmp_path)
    assert Sweep.load(tmp_path) == made
    (tmp_path / "sweep.json").write_text(json.dumps({**dataclasses.asdict(made), "schema_version": 9}))
    with pytest.raises(InputError, match="schema_version 9"):
        Sweep.load(tmp_path)
