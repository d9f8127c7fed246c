"""Writes MNIST-5k's scattering features, which configs/mnist_scattering.toml trains on.

    python configs/scattering_features.py [DIRECTORY, default data/mnist5k-scattering]

The features are those of `model.name = "scattering"` with three scales, computed once instead of in each step: a minute
on two cores. Each row is a function of its own image and of constants, so no privacy is spent here. 40 MB.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from dpscale.data.open import open_source
from dpscale.models.scattering import scattering_features

SCALES, ANGLES, GROUPS, AT_ONCE = 3, 8, 31, 250


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "data/mnist5k-scattering")
    root.mkdir(parents=True, exist_ok=True)
    features_of = jax.jit(lambda images: scattering_features(images / 255.0, SCALES, ANGLES, GROUPS))
    for split in ("train", "validation"):
        source = open_source(f"mnist5k/{split}", num_classes=10)
        rows = source.rows(np.arange(len(source)))
        blocks = [features_of(rows["features"][k : k + AT_ONCE]) for k in range(0, len(source), AT_ONCE)]
        np.savez(root / f"{split}.npz", features=np.concatenate(blocks), labels=rows["label"])
        print(f"{root}/{split}.npz: {len(source)} rows of {blocks[0].shape[1]} features")


if __name__ == "__main__":
    main()
