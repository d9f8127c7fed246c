"""Examples that cannot be read: an error by default, or rows of zeros that keep their index and add nothing."""

from collections.abc import Callable

import numpy as np

from dpscale.data.options import SourceOptions
from dpscale.data.source import FEATURES, LABEL, VALID, Batch, SourceMetadata, empty_rows
from dpscale.errors import InputError


class CorruptExample(InputError):
    """The stored bytes of one example are not what the format promises. A disk that fails is another matter."""


def read_each(
    indices: np.ndarray,
    read: Callable[[int], tuple[np.ndarray | None, np.ndarray | int | float]],
    metadata: SourceMetadata,
    options: SourceOptions,
) -> Batch:
    """Rows from `read(index) -> (features, label)`, one by one, in the caller's thread.

    Where `read` raises CorruptExample, or gives None for the features: with `on_corrupt = "error"` an error that names
    the example; with "replace" a row of zeros, False in "valid". A row is never left out: that would change the
    sampling rate, and with it the guarantee.
    """
    rows = empty_rows(metadata, len(indices))
    valid = np.ones(len(indices), bool)
    for place, index in enumerate(indices.tolist()):
        try:
            features, label = read(index)
            if features is None:
                raise CorruptExample("it was unreadable when the data set was converted")
        except CorruptExample as error:
            if options.on_corrupt == "error":
                raise unreadable(metadata.name, index, error) from error
            valid[place] = False
            continue
        rows[FEATURES][place], rows[LABEL][place] = features, label
    return rows if options.on_corrupt == "error" else {**rows, VALID: valid}


def unreadable(name: str, index: int, error: Exception) -> InputError:
    """The error for an example that must not be replaced."""
    return CorruptExample(
        f"{name}: example {index} cannot be read ({error}): mend or remove it before the run, or set "
        "data.on_corrupt=replace, so that it keeps its place and contributes nothing. `dpscale "
        "data inspect` counts them"
    )
