"""Scattering coefficients by Kymatio, of an image that a formula gives.

    .venv-kymatio/bin/python benchmarks/peers/models_kymatio.py [--out tests/golden/models.json]

Runs in an environment of its own: kymatio 0.3.0, scipy 1.16.3 (it needs one below 1.17). Adds to the file that
benchmarks/peers/models_reference.py writes; the formula is the same. Kymatio takes 3.1415 for pi where it normalises
its wavelets, so that coefficients differ by 3e-5 of their size.
"""

# pyright: reportMissingImports=false
import argparse
import json
from pathlib import Path

import numpy as np
from kymatio.numpy import Scattering2D

SIDE, SCALES, ANGLES = 16, 3, 2


def image() -> np.ndarray:
    """float32[SIDE, SIDE]: the formula of models_reference.py, leaf 1000."""
    index = np.arange(SIDE * SIDE, dtype=np.int64)
    values = ((index * 7919 + 1000 * 104_729 + index // 13) % 1009 - 504) / 1680.0
    return values.reshape(SIDE, SIDE).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/golden/models.json"))
    out = parser.parse_args().out
    whole = json.loads(out.read_text()) if out.exists() else {}
    coefficients = Scattering2D(J=SCALES, shape=(SIDE, SIDE), L=ANGLES)(image())
    whole["scattering"] = {
        "side": SIDE,
        "scales": SCALES,
        "angles": ANGLES,
        "coefficients": np.round(coefficients.astype(float), 7).tolist(),
    }
    print("scattering", coefficients.shape, coefficients[:, 0, 0])
    lines = [f"{json.dumps(name)}: {json.dumps(whole[name])}" for name in sorted(whole)]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
