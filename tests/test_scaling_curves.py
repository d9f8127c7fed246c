"""Laws of the curves: planted step times come back as the speed-up, the efficiency and the serial part they mean."""

import csv
import io

import numpy as np
import pytest
from scaling_records import planted

from dpscale.scaling.curves import curves, law_text, table_lines
from dpscale.scaling.fits import amdahl, centre, gustafson, resampled
from dpscale.scaling.sweep import collect

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


def test_a_law_says_when_more_devices_were_slower(tmp_path):
    planted(tmp_path, [1, 2], lambda setting, variant: float(setting.devices))
    assert "slower with more devices" in law_text(curves(collect(tmp_path)).laws[0])


def test_one_count_alone_gets_no_law(tmp_path):
    planted(tmp_path, [4], lambda setting, variant: 1.0)
    assert curves(collect(tmp_path)).laws == ()


def test_the_csv_has_one_line_a_row_with_the_ends_of_each_interval(sweep):
    found = curves(collect(sweep))
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(lines) == len(found.rows)
    assert float(lines[0]["efficiency_low"]) <= float(lines[0]["efficiency"]) <= float(lines[0]["efficiency_high"])
    assert float(lines[0]["noise_s"]) == pytest.approx(0.04 * 1.2)
