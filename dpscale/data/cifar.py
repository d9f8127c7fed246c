"""CIFAR-10 and CIFAR-100 as published: binary or Python-pickle version, the .tar.gz archive or its folder."""

import pickle
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dpscale.data.arrays import ArraySource
from dpscale.data.options import SourceOptions
from dpscale.errors import InputError

SPLITS = ("train", "test")
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    """One published version: its folder, the files of both splits, and where a label is."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_bytes: int  # in front of each binary image; 0: pickles
    labels: Mapping[str, tuple[str | int, int]]  # data.labels_key -> (pickle's key or byte, classes)


_FINE = {"fine_labels": 100, "coarse_labels": 20}
LAYOUTS = (
    _Layout(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
        ("test_batch.bin",),
        1,
        {"labels": (0, 10)},
    ),
    _Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{k}" for k in range(1, 6)),
        ("test_batch",),
        0,
        {"labels": ("labels", 10)},
    ),
    _Layout(
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
        2,
        {"labels": (1, 100), "fine_labels": (1, 100), "coarse_labels": (0, 20)},
    ),
    _Layout(
        "cifar-100-python",
        ("train",),
        ("test",),
        0,
        {"labels": ("fine_labels", 100)} | {name: (name, classes) for name, classes in _FINE.items()},
    ),
)


def open_cifar(path: Path, options: SourceOptions) -> ArraySource:
    """PLACE/train or PLACE/test, PLACE being the folder or the archive: uint8[N, 32, 32, 3] in memory, 3 KB an image.

    Archives are read without extracting them, and pickles without running what they name: arrays, lists and text only.
    `labels_key` chooses CIFAR-100's "fine_labels" (the default) or "coarse_labels".

    Raises: InputError for a split or files that are missing, of the wrong size, or that hold anything else.
    """
    place, split = path.parent, path.name
    if split not in SPLITS:
        raise InputError(f"{path}: CIFAR has the splits {' and '.join(SPLITS)}: give {place}/train or {place}/test")
    layout = find_layout(place)
    if layout is None:
        raise InputError(
            f"{place} is no CIFAR folder or archive: expected the files of {', '.join(x.folder for x in LAYOUTS)}"
        )
    if options.labels_key not in layout.labels:
        raise InputError(
            f"{layout.folder} has no labels {options.labels_key!r}: set data.labels_key to one of "
            f"{', '.join(layout.labels)}"
        )
    key, classes = layout.labels[options.labels_key]
    if options.num_classes not in (None, classes):
        raise InputError(f"{path} has {classes} classes, but data.num_classes={options.num_classes}: leave it out")
    parts = [
        _from_binary(data, layout.label_bytes, int(key), name) if layout.label_bytes else _from_pickle(data, key, name)
        for name, data in _files(place, layout.train if split == "train" else layout.test)
    ]
    images = np.concatenate([images for images, _ in parts])
    # Stored as three planes of 32 rows each.
    images = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ArraySource(images, np.concatenate([labels for _, labels in parts]), num_classes=classes, name=str(path))


def find_layout(place: Path) -> _Layout | None:
    """The published version that a folder or an archive holds, or None."""
    try:
        for name in _file_names(place):
            for layout in LAYOUTS:
                if name in (*layout.train, *layout.test):
                    return layout
    except (OSError, EOFError, tarfile.TarError):
        return None
    return None


def _is_archive(place: Path) -> bool:
    return place.is_file() and place.name.endswith((".tar.gz", ".tgz", ".tar"))


def _file_names(place: Path) -> Iterator[str]:
    """One by one, since an archive must be unpacked to see its next name."""
    if _is_archive(place):
        with tarfile.open(place) as archive:
            yield from (Path(member.name).name for member in archive if member.isfile())
    elif place.is_dir():
        yield from (item.name for item in place.iterdir() if item.is_file())


def _files(place: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    found: dict[str, bytes] = {}
    try:
        if _is_archive(place):
            with tarfile.open(place) as archive:
                for member in archive:
                    file = archive.extractfile(member) if Path(member.name).name in wanted else None
                    if file is not None:
                        found[Path(member.name).name] = file.read()
        else:
            found = {name: (place / name).read_bytes() for name in wanted if (place / name).is_file()}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"{place} cannot be read ({error}): it is damaged or truncated; fetch it again") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(f"{place} holds no {', '.join(missing)}: a part of CIFAR is not CIFAR; fetch it again")
    return ((f"{place}/{name}", found[name]) for name in wanted)


def _from_binary(data: bytes, label_bytes: int, label_at: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    record = label_bytes + _PIXELS
    if not data or len(data) % record:
        raise InputError(
            f"{name} has {len(data)} bytes, which is no whole number of records of {record}: fetch it again"
        )
    table = np.frombuffer(data, np.uint8).reshape(-1, record)
    return table[:, label_bytes:], table[:, label_at].astype(np.int32)


def _from_pickle(data: bytes, key: str | int, name: str) -> tuple[np.ndarray, np.ndarray]:
    content = _load(data, name)
    images = content.get(b"data") if isinstance(content, dict) else None
    labels = content.get(str(key).encode()) if isinstance(content, dict) else None
    if (
        not isinstance(images, np.ndarray)
        or (images.dtype, images.shape[1:]) != (np.uint8, (_PIXELS,))
        or not isinstance(labels, list)
        or len(labels) != len(images)
    ):
        raise InputError(
            f"{name} is no CIFAR batch: expected uint8[N, {_PIXELS}] under 'data' and N labels under {key!r}"
        )
    return images, np.array(labels, np.int32)


class _Restricted(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain Python values. Any other name in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("multiarray", "_reconstruct"): _empty_array,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode,
        }
        owner = "multiarray" if module in ("numpy.core.multiarray", "numpy._core.multiarray") else module
        try:
            return allowed[owner, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def _empty_array(subtype: type, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What a pickled array is rebuilt in."""
    return np.ndarray(shape, dtype)


def _encode(text: str, encoding: str) -> bytes:
    """How a newer Python pickles bytes for an older one."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes to {encoding}")
    return text.encode("latin1")


def _load(data: bytes, name: str) -> Any:
    try:
        return _Restricted(BytesIO(data), encoding="bytes").load()
    # Damaged pickles raise nearly anything.
    except Exception as error:
        raise InputError(
            f"{name} cannot be unpickled ({error}): only arrays, lists and text are taken, since "
            "anything else could run "
            "code. Fetch it again, or take the binary version"
        ) from error
