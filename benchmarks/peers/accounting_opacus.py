"""epsilon by Opacus' PRV and RDP accountants: the table that tests/test_accounting_peers.py holds dpscale to.

    .venv-peers/bin/python benchmarks/peers/accounting_opacus.py

Runs in an environment of its own (torch, opacus; neither jax nor dpscale). The PRV accountant (Gopi et al. 2021, arXiv
2106.02848) is asked for an error of 0.001 in epsilon and gives its upper end; the RDP accountant (Mironov et al. 2019,
arXiv 1908.10530) uses its own orders. `published` is what the source states. Sources before 2020 turned divergences
into epsilon by a looser rule (Mironov 2017, arXiv 1702.07476, proposition 3; the moments accountant's too), which
`rdp_by_first_rule` applies to the same divergences. Writes tests/golden/accounting_opacus.json.
"""

# pyright: reportMissingImports=false
import json
import math
import warnings
from pathlib import Path

import opacus
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.analysis.rdp import compute_rdp

TABLE = Path(__file__).parents[2] / "tests" / "golden" / "accounting_opacus.json"
ERROR_OF_EPSILON = 0.001

# name, source, sampling rate, noise multiplier, steps, delta, published epsilon or None
SETTINGS = [
    ("quickstart", "configs/quickstart.toml", 1024 / 4500, 4.0326, 150, 1e-5, None),
    ("abadi", "Abadi et al. 2016, arXiv 1607.00133, section 3.2", 0.01, 4.0, 10_000, 1e-5, 1.26),
    ("mnist-1.3", "Bu et al. 2020, arXiv 1911.11607, figure 4", 256 / 60_000, 1.3, 4_680, 1e-5, 1.34),
    ("mnist-0.7", "Bu et al. 2020, arXiv 1911.11607, figure 4", 256 / 60_000, 0.7, 16_380, 1e-5, 8.68),
    ("tf-1.12", "github.com/tensorflow/privacy, tutorials/README.md", 256 / 60_000, 1.12, 14_040, 1e-5, 2.92),
    ("tf-0.6", "github.com/tensorflow/privacy, tutorials/README.md", 256 / 60_000, 0.6, 7_020, 1e-5, 9.74),
    ("tf-1.2", "github.com/tensorflow/privacy, tutorials/README.md", 256 / 60_000, 1.2, 2_340, 1e-5, 1.20),
    ("imagenet-like", "the shape of De et al. 2022, arXiv 2204.13650", 0.0128, 2.5, 18_000, 8e-7, None),
    ("tiny-rate", "a pre-training run", 1e-4, 0.6, 50_000, 1e-8, None),
    ("large-rate", "few steps of a large batch", 0.5, 8.0, 40, 1e-6, None),
    ("much-noise", "a small epsilon", 0.02, 10.0, 500, 1e-6, None),
    ("little-noise", "a large epsilon", 0.05, 0.6, 200, 1e-5, None),
]


def prv(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    return float(accountant.get_epsilon(delta, eps_error=ERROR_OF_EPSILON))


def rdp(noise_multiplier: float, rate: float, steps: int, delta: float) -> tuple[float, bool]:
    """(epsilon, whether a larger order than Opacus tries would give less)."""
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        epsilon = float(accountant.get_epsilon(delta))
    return epsilon, any("largest alpha" in str(warning.message) for warning in said)


def rdp_by_first_rule(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    orders = RDPAccountant.DEFAULT_ALPHAS
    divergences = compute_rdp(q=rate, noise_multiplier=noise_multiplier, steps=steps, orders=orders)
    pairs = zip(orders, divergences, strict=True)
    return min(float(divergence) + math.log(1 / delta) / (order - 1) for order, divergence in pairs)


def main() -> None:
    rows = []
    for name, source, rate, sigma, steps, delta, published in SETTINGS:
        row = {"name": name, "source": source, "sampling_rate": rate, "noise_multiplier": sigma, "steps": steps}
        by_rdp, limited = rdp(sigma, rate, steps, delta)
        row |= {"delta": delta, "prv": prv(sigma, rate, steps, delta), "rdp": by_rdp, "rdp_order_limited": limited}
        rows.append(row | {"rdp_by_first_rule": rdp_by_first_rule(sigma, rate, steps, delta), "published": published})
        print(f"{name:<14} PRV {row['prv']:.4f}  RDP {row['rdp']:.4f}  published {published}", flush=True)
    about = {"opacus": opacus.__version__, "torch": torch.__version__, "error_of_prv": ERROR_OF_EPSILON}
    TABLE.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    print(f"written to {TABLE}")


if __name__ == "__main__":
    main()
