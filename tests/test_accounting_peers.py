"""Golden tables: epsilon against Opacus' accountants and published figures (`make bench-peers` makes them)."""

import json
from pathlib import Path

import pytest

from dpscale.privacy.accounting import epsilon

TABLE = json.loads((Path(__file__).parent / "golden" / "accounting_opacus.json").read_text())
ROWS = {row["name"]: row for row in TABLE["rows"]}


def ours(row, accountant):
    keys = ("sampling_rate", "noise_multiplier", "steps", "delta")
    return epsilon(**{key: row[key] for key in keys}, accountant=accountant)


@pytest.mark.parametrize("name", ROWS)
def test_pld_agrees_with_opacus_prv_to_1_percent(name):
    row = ROWS[name]
    # Both are upper bounds; Opacus' is allowed an absolute error, too.
    assert ours(row, "pld") == pytest.approx(row["prv"], rel=0.01, abs=2 * TABLE["error_of_prv"])


@pytest.mark.parametrize("name", ROWS)
def test_rdp_agrees_with_opacus_rdp(name):
    row = ROWS[name]
    if row["rdp_order_limited"]:  # dp-accounting tries more orders
        assert ours(row, "rdp") < row["rdp"]
    else:  # equal at whole orders; at others dp-accounting rounds up more
        assert ours(row, "rdp") == pytest.approx(row["rdp"], rel=1e-3)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row["published"]])
def test_published_figures_are_met_by_their_own_rule_and_are_above_ours(name):
    row = ROWS[name]
    assert row["rdp_by_first_rule"] == pytest.approx(row["published"], abs=0.015)  # so these are the published settings
    assert ours(row, "pld") < ours(row, "rdp") < row["published"]


def test_the_table_covers_small_and_large_epsilon_rate_and_noise():
    for key, least, most in (("prv", 0.2, 10), ("sampling_rate", 1e-3, 0.2), ("noise_multiplier", 0.61, 7)):
        values = [row[key] for row in ROWS.values()]
        assert min(values) < least
        assert max(values) > most
