"""Laws of the network model and of predicted steps."""

import dataclasses

import numpy as np
import pytest
from scaling_records import record

from dpscale.errors import InputError
from dpscale.sampling import PoissonSampler
from dpscale.scaling.forecast import Asked, forecast
from dpscale.scaling.network import SHIPPED, all_reduce, load_network
from dpscale.scaling.point import Setting, settings
from dpscale.scaling.predict import fit_network, predict, step
from dpscale.scaling.prediction_text import prediction_lines
from dpscale.scaling.workload import Assumed, Workload, assumed_workloads, draws_of, measured_workloads

VIT_BYTES = 344e6
ASSUMED = Assumed(300.0, 86_000_000, 25_000.0, 1_281_167, 64, 1.1, "a test")
PUHTI = load_network("puhti-v100")


def test_the_wire_of_twenty_nodes_takes_what_the_published_figure_says():
    limit = all_reduce(PUHTI, 80, VIT_BYTES).limit_s
    inside = 2 * 3 / 4 * VIT_BYTES / 150e9
    assert limit - inside == pytest.approx(26.1e-3, rel=0.01)


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED.glob("*.toml")])
def test_every_shipped_profile_is_whole_and_a_reduction_never_beats_the_wire(name):
    network = load_network(name)
    assert network.intra.source
    assert network.inter.source
    for devices in (2, 8, 64, 1024):
        for message in (1e4, 1e6, 1e9):
            reduction = all_reduce(network, devices, message)
            assert reduction.seconds >= reduction.limit_s > 0
    assert all_reduce(network, 1, 1e9).seconds == 0


def test_small_messages_get_a_smaller_share_of_the_bandwidth():
    rates = [message / all_reduce(PUHTI, 80, message).wire_s for message in (1e5, 1e6, 1e7, 1e8, 1e9)]
    assert rates == sorted(rates)
    assert rates[-1] > 50 * rates[0]
    half = PUHTI.inter.half_mib * 2**20
    assert PUHTI.inter.wire_s(half, half) == pytest.approx(2 * half / (25e9 * 0.9))


def test_the_tree_wins_where_latency_counts():
    assert all_reduce(PUHTI, 4096, 1e4).algorithm == "tree"
    # Within one hop more, the ring moves (p - 1) / p of what the tree moves.
    assert all_reduce(PUHTI, 8, 1e9).algorithm == "ring"


def test_an_unknown_profile_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean h100"):
        load_network("h10")


def test_a_wrong_profile_names_the_key(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("devices_per_node = 0")
    with pytest.raises(InputError, match=r"devices_per_node.*intra"):
        load_network(str(path))


def test_accumulations_are_the_mean_over_poisson_draws():
    workload = assumed_workloads(dataclasses.replace(ASSUMED, batch=500.0, num_examples=5000), PUHTI)["private"]
    draws = draws_of(workload, 4, "strong", 1)
    sizes = np.random.default_rng(0).binomial(5000, 0.1, 200_000)
    simulated = np.mean(np.ceil(sizes / (4 * draws.physical_batch_size)))
    assert draws.accumulations == pytest.approx(simulated, rel=2e-3)


@pytest.mark.parametrize("devices", [1, 8, 80, 300, 1024])
def test_the_chosen_physical_batch_wastes_least_and_fits_the_device(devices):
    workload = assumed_workloads(ASSUMED, PUHTI)["private"]
    chosen = draws_of(workload, devices, "strong", 1)
    assert chosen.physical_batch_size <= 64
    assert chosen.rows * devices >= 25_000
    sizes, probabilities = PoissonSampler(1_281_167, 25_000 / 1_281_167, bytes(32)).size_distribution()
    unchanged = 64 * float(probabilities @ -(-sizes // (64 * devices)))
    assert chosen.rows <= unchanged
    assert chosen.rows <= 1.04 * 25_000 / devices


def test_weak_scaling_keeps_the_sampling_rate():
    workload = assumed_workloads(ASSUMED, PUHTI)["private"]
    assert draws_of(workload, 64, "weak", 8).rows * 8 == pytest.approx(
        draws_of(workload, 8, "strong", 8).rows * 8, rel=0.03
    )


def test_a_step_is_the_sum_of_its_parts_and_reducing_every_batch_costs_more():
    both = assumed_workloads(ASSUMED, PUHTI)
    once = step(both["nonprivate"], PUHTI, 80, "strong", "nonprivate")
    every = step(both["nonprivate"], PUHTI, 80, "strong", "reduce every batch")
    parts = ("compute_s", "padding_s", "latency_s", "wire_s", "noise_s", "update_s", "host_s")
    assert once.step_s == pytest.approx(sum(getattr(once, part) for part in parts))
    assert every.step_s - once.step_s == pytest.approx(
        (once.accumulations - 1) * all_reduce(PUHTI, 80, VIT_BYTES).seconds
    )
    assert once.efficiency < once.limit <= 1
    assert once.noise_s == 0 < step(both["private"], PUHTI, 80, "strong", "private").noise_s


def test_cutting_the_update_over_devices_divides_noise_and_update():
    workload = assumed_workloads(ASSUMED, PUHTI)["private"]
    whole = step(workload, PUHTI, 80, "strong", "private")
    cut = step(dataclasses.replace(workload, sharded=True), PUHTI, 80, "strong", "private")
    assert cut.noise_s == pytest.approx(whole.noise_s / 80)
    assert cut.efficiency > whole.efficiency


def fitted_records(latency: float, wire: float):
    """Records whose steps take what the model says, with these factors on the network."""
    base = Setting(1, 1000.0, ("strong", "weak"), 1)
    one = record(base, "private", 1.0, num_parameters=10_000_000)
    workload = measured_workloads([one])["private"]
    made = [one]
    for setting in settings([1, 4, 16, 64], ("strong",), 1000.0, 1)[1:]:
        rows = made[0].physical_batch_size * setting.devices
        accumulations = -(-1000 // rows)
        seconds = workload.row_s * accumulations * 50 + workload.noise_s + workload.update_s + workload.host_s
        reduction = all_reduce(PUHTI, setting.devices, one.reduced_bytes)
        seconds += latency * reduction.latency_s + wire * reduction.wire_s
        made.append(record(setting, "private", seconds, num_parameters=10_000_000))
    return made, {"private": workload}


def test_the_fit_finds_the_factors_that_were_planted_and_leaves_nothing():
    records, workloads = fitted_records(3.0, 1.7)
    fit = fit_network(workloads, PUHTI, records)
    assert fit is not None
    assert (fit.latency, fit.wire) == (pytest.approx(3.0, rel=1e-3), pytest.approx(1.7, rel=1e-3))
    assert fit.rms_after < 1e-6 < fit.rms_before
    assert len(fit.residuals) == 3


def test_the_fit_is_never_below_zero():
    records, workloads = fitted_records(-1.0, -1.0)
    fit = fit_network(workloads, PUHTI, records)
    assert fit is not None
    assert (fit.latency, fit.wire) == (0.0, 0.0)
    assert fit.rms_after > 0


def test_a_prediction_from_one_device_says_that_nothing_checks_it():
    records, workloads = fitted_records(1.0, 1.0)
    found = predict(workloads, PUHTI, [1, 8], ("strong",), records[:1])
    assert found.fit is None
    assert any("not fitted" in line for line in prediction_lines(found))


def test_what_would_help_comes_with_the_largest_first():
    found = predict(assumed_workloads(ASSUMED, PUHTI), PUHTI, [8, 1024], ("strong",))
    shares = [float(line.split("%")[0]) for line in found.help if " of the step: " in line]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) >= 3


def test_it_says_where_privacy_scales_worse_than_sgd_and_that_the_sharded_update_mends_it():
    both = assumed_workloads(ASSUMED, PUHTI)
    whole = predict(both, PUHTI, [8, 1024], ("strong", "weak"))
    worst = whole.curve("nonprivate", "strong")[1].efficiency - whole.curve("private", "strong")[1].efficiency
    assert worst > 0
    assert f"strong: DP-SGD keeps {100 * worst:.1f} points less of ideal than SGD at 1024 devices" in whole.help[-2]
    assert "update_sharding" in whole.help[-2]
    cut = {variant: dataclasses.replace(one, sharded=True) for variant, one in both.items()}
    expected = [
        f"{mode}: DP-SGD keeps at least as much of ideal as SGD does, at every count" for mode in ("strong", "weak")
    ]
    assert list(predict(cut, PUHTI, [8, 1024], ("strong", "weak")).help[-2:]) == expected


def test_an_assumed_speed_is_never_shown_as_measured():
    asked = Asked((1, 80), ("strong",), "puhti-v100", batch=25_000.0, examples_per_s=300.0, num_parameters=86_000_000)
    found, measured = forecast(None, asked)
    lines = prediction_lines(found)
    assert measured is None
    assert not found.measured
    assert any("NOT measured" in line for line in lines)
    assert all("ASSUMED" in source for source in found.sources[:2])
    assert "recalled" in lines[-1]
    assert "69.2 %" in lines[-1]


def test_a_prediction_needs_records_or_a_whole_assumption(tmp_path):
    with pytest.raises(InputError, match="neither is"):
        forecast(None, Asked((8,), ("strong",), "h100"))
    with pytest.raises(InputError, match="--parameters and --batch-size"):
        forecast(None, Asked((8,), ("strong",), "h100", examples_per_s=1.0))
    with pytest.raises(InputError, match="both are"):
        forecast(tmp_path, Asked((8,), ("strong",), "h100", examples_per_s=1.0))
    with pytest.raises(InputError, match="at most that many"):
        forecast(None, Asked((8,), ("strong",), "h100", 2e9, None, 1.0, 1.1, 10))


def test_measured_workloads_are_those_of_the_smallest_count():
    records, _ = fitted_records(1.0, 1.0)
    workload = measured_workloads(records)["private"]
    assert isinstance(workload, Workload)
    assert workload.measured
    assert workload.row_s == pytest.approx(0.8 / 1000)
    assert workload.noise_s == pytest.approx(0.04)
