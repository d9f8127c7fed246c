"""Laws of the curves: planted step times come back as the speed-up, the efficiency and the serial part they mean."""

import csv
import io
import re

import numpy as np
import pytest
from scaling_records import planted, record

from dpscale.scaling.curves import curves, law_text, table_lines
from dpscale.scaling.fits import amdahl, centre, gustafson, resampled
from dpscale.scaling.forecast import Asked, forecast
from dpscale.scaling.plots import caveat_of_all, legend_names, prediction_figures, scaling_figures, to_svg
from dpscale.scaling.point import Setting
from dpscale.scaling.prediction_text import prediction_lines
from dpscale.scaling.sweep import collect
from dpscale.sweep_page import sweep_page

SERIAL = {"private": 0.02, "nonprivate": 0.1}
COST = {"private": 1.2, "nonprivate": 1.0}


def by_amdahl(setting, variant):
    s = SERIAL[variant]
    work = setting.batch / 1000
    return COST[variant] * (s + (1 - s) * work / setting.devices)


@pytest.fixture
def sweep(tmp_path):
    planted(tmp_path, [1, 2, 4, 8], by_amdahl, jitter=0.05)
    return tmp_path


def test_strong_scaling_gives_back_the_serial_part_that_was_planted(sweep):
    laws = {(law.variant, law.mode): law for law in curves(collect(sweep)).laws}
    for variant, serial in SERIAL.items():
        law = laws[variant, "strong"]
        assert law.law == "Amdahl"
        assert law.serial.value == pytest.approx(serial, abs=1e-9)
        assert law.serial.low <= serial <= law.serial.high
        assert law.serial.high - law.serial.low > 0.001


def test_speed_up_and_efficiency_are_those_of_the_step_times(sweep):
    rows = curves(collect(sweep)).curve("nonprivate", "strong")
    assert [row.devices for row in rows] == [1, 2, 4, 8]
    for row in rows:
        expected = 1 / (0.1 + 0.9 / row.devices)
        assert row.speed_up.value == pytest.approx(expected)
        assert row.efficiency.value == pytest.approx(expected / row.devices)
        assert row.examples_per_s.value == pytest.approx(1000 * expected)
        assert row.examples_per_s_per_device == pytest.approx(1000 * expected / row.devices)
        assert row.device_hours_per_epoch == pytest.approx(100_000 / (1000 * expected) * row.devices / 3600)


def test_weak_scaling_at_constant_step_time_is_ideal(sweep):
    for row in curves(collect(sweep)).curve("private", "weak"):
        assert row.efficiency.value == pytest.approx(1.0)


def test_the_price_of_privacy_is_the_ratio_of_windows_measured_in_turn(sweep):
    found = {(one.mode, one.devices): one.ratio for one in curves(collect(sweep)).overheads}
    ratio = by_private = 1.2 * (0.02 + 0.98 / 4) / (0.1 + 0.9 / 4)
    assert found["strong", 4].value == pytest.approx(by_private)
    assert found["strong", 4].low == pytest.approx(ratio)  # the same jitter in both: none in the ratio


def test_the_laws_are_exact_on_their_own_formulas():
    devices = [2, 4, 16, 64]
    share = 2 / np.array(devices)
    assert amdahl(devices, 7 * (0.03 + 0.97 * share)) == pytest.approx(0.03)
    assert gustafson(devices, 5 * (0.2 + 0.8 / share)) == pytest.approx(0.2)
    assert amdahl(devices, np.ones(4)) == pytest.approx(1.0)
    both = amdahl(devices, np.stack([0.1 + 0.9 * share, 0.5 + 0.5 * share]))
    np.testing.assert_allclose(both, [0.1, 0.5])


def test_the_interval_of_a_median_is_narrower_with_more_repeats_and_covers_the_truth():
    rng = np.random.default_rng(1)
    few, many = ([list(rng.normal(10, 1, 5)) for _ in range(n)] for n in (2, 40))
    widths = []
    for groups in (few, many):
        draws = resampled(groups, np.random.default_rng(0))
        low, high = np.percentile(draws, [2.5, 97.5])
        widths.append(high - low)
        assert low <= centre(groups) <= high
    assert widths[1] < 0.5 * widths[0]


def test_a_point_that_repeats_differ_in_has_an_interval_that_holds_them(tmp_path):
    planted(tmp_path, [1, 2], lambda setting, variant: 1.0 + 0.5 * (setting.repeat == 2), repeats=2)
    row = curves(collect(tmp_path)).rows[0]
    assert row.examples_per_s.low == pytest.approx(1000 / 1.5)
    assert row.examples_per_s.high == pytest.approx(1000)


def test_the_table_names_every_point_the_laws_and_the_caveat(sweep):
    text = "\n".join(table_lines(curves(collect(sweep))))
    assert "Amdahl, strong private: serial part 2.00%" in text
    assert "up to 8 processes shared 2 cores, which shows overhead only" in text
    assert text.count("\nstrong ") == text.count("\nweak ") == 8


def test_a_busy_machine_is_named_in_the_caveat(tmp_path):
    environment = {"cpu": "a processor", "cores": 2, "load_average": {"before": 4.25, "after": 0.0}, "packages": {}}
    planted(tmp_path, [1], lambda setting, variant: 1.0, environment=environment)
    assert "load average up to 4.2 on 2 cores" in curves(collect(tmp_path)).caveat


def one_second(setting, variant):
    return 1.0


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"device_kind": "NVIDIA H100", "environment": {}}, "device: NVIDIA H100 / a processor, 2 cores"),
        ({"num_parameters": 7}, "model: mlp of 1,000,000 parameters / mlp of 7 parameters"),
        ({"num_examples": 50_000}, "examples in the data set: 100,000 / 50,000"),
        ({"performance": {"update_sharding": "sharded"}}, "update_sharding: replicated / sharded"),
        ({"batch": 500.0}, "logical batch of strong scaling: 1000 / 500"),
        ({"environment": {"cpu": "a processor", "cores": 2, "packages": {"jax": "1"}}}, "versions: jax 0 / jax 1"),
    ],
)
def test_points_that_are_not_alike_are_named_wherever_their_curve_is_shown(tmp_path, changes, seen):
    """Records of two machines, models or settings in one directory still give a curve, which must say so."""
    planted(tmp_path, [1, 2], one_second, repeats=1, performance={"update_sharding": "replicated"})
    setting = Setting(4, changes.get("batch", 1000.0), ("strong",), 1)
    changes = {"performance": {"update_sharding": "replicated"}, **changes}
    record(setting, "private", 1.0, **changes).save(tmp_path / "records")
    collected = collect(tmp_path)
    found = curves(collected)
    assert found.caveat.startswith(f"NOT ALIKE: the points differ in {seen};")
    assert seen in "\n".join(table_lines(found))
    assert seen in sweep_page(collected, found).html()
    predicted, _ = forecast(tmp_path, Asked(counts=(8,), modes=("strong",), network="localhost"))
    assert seen in "\n".join(prediction_lines(predicted))


def test_points_that_differ_in_count_batch_of_weak_scaling_and_physical_batch_are_alike(tmp_path):
    planted(tmp_path, [1, 2], one_second, performance={"physical_batch_size": 8})
    record(Setting(4, 4000.0, ("weak",), 1), "private", 1.0, performance={"physical_batch_size": 2}).save(
        tmp_path / "records"
    )
    assert "NOT ALIKE" not in curves(collect(tmp_path)).caveat


def test_sweeps_on_one_plot_are_told_apart_and_each_says_where_it_was_measured(tmp_path):
    for name, environment in (("old", {"cpu": "slow", "cores": 2}), ("new", {"cpu": "fast", "cores": 2})):
        planted(tmp_path / name, [1, 2], one_second, repeats=1, environment=environment)
    planted(tmp_path / "other", [1, 16], one_second, repeats=1, config_name="another")
    old, new, other = (curves(collect(tmp_path / name)) for name in ("old", "new", "other"))
    assert legend_names(old, [new]) == ["old", "new"]
    assert legend_names(old, [other]) == ["planted", "another"]
    assert legend_names(old, [new, old]) == ["planted (1)", "planted (2)", "planted (3)"]
    assert caveat_of_all(old, [new]).startswith("Measured: old on slow, 2 cores; new on fast, 2 cores. CPU processes")
    assert caveat_of_all(old, [new]).count("CPU processes") == 1
    figures = scaling_figures(old, [new, other])
    for name in ("strong-throughput", "weak-efficiency"):
        # matplotlib draws letters as shapes, and says in a comment what they are.
        texts = " ".join(re.findall(r"<!-- (.*?) -->", to_svg(name, figures[name])))
        assert all(f"DP-SGD, {label}" in texts for label in ("old", "new", "other"))
        assert "Measured: old on slow, 2 cores; new on fast, 2 cores" in texts
        assert " 16 " in texts, "a count that only the other sweep has"


def test_a_predicted_plot_with_measured_points_also_says_what_those_cannot_show(tmp_path):
    planted(tmp_path, [1, 2], one_second, repeats=1)
    predicted, measured = forecast(tmp_path, Asked(counts=(1, 2, 8), modes=("strong",), network="localhost"))
    cannot = "CPU processes of one machine share memory and caches"
    for beside, said in ((measured, True), (None, False)):
        drawn = to_svg("predicted", prediction_figures(predicted, beside)["predicted-strong"])
        texts = " ".join(re.findall(r"<!-- (.*?) -->", drawn, re.DOTALL))
        assert (cannot in " ".join(texts.split())) is said


def test_a_law_says_when_more_devices_were_slower(tmp_path):
    planted(tmp_path, [1, 2], lambda setting, variant: float(setting.devices))
    text = law_text(curves(collect(tmp_path)).laws[0])
    assert "slower with more devices" in text
    assert "parallel" not in text


def test_one_count_alone_gets_no_law(tmp_path):
    planted(tmp_path, [4], lambda setting, variant: 1.0)
    assert curves(collect(tmp_path)).laws == ()


def test_the_csv_has_one_line_a_row_with_the_ends_of_each_interval(sweep):
    found = curves(collect(sweep))
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(lines) == len(found.rows)
    assert float(lines[0]["efficiency_low"]) <= float(lines[0]["efficiency"]) <= float(lines[0]["efficiency_high"])
    assert float(lines[0]["noise_s"]) == pytest.approx(0.04 * 1.2)
