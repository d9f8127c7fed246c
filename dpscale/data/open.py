"""From what a user wrote (a name, a path, a pair of arrays) to an ExampleSource."""

import difflib
from pathlib import Path
from typing import Any

import numpy as np

from dpscale.data.arrays import ArraySource, open_npy_pair, open_npz
from dpscale.data.builtin import BUILTIN, SPLITS, open_builtin
from dpscale.data.made_up import FORMS, MadeUpSource
from dpscale.data.source import FEATURES, LABEL, ExampleSource
from dpscale.errors import InputError


def open_source(
    spec: str,
    *,
    features_key: str = "features",
    labels_key: str = "labels",
    num_classes: int | None = None,
) -> ExampleSource:
    """Opens the data set that `spec` names.

    | spec | data |
    | --- | --- |
    | "mnist5k/train", "mnist5k/validation", "digits/train", "digits/validation" | built in |
    | "made_up:images:N:H:W:C:CLASSES", "made_up:vectors:N:D:CLASSES" | random rows, computed |
    | "FILE.npz" | arrays `features_key` and `labels_key`, read into memory |
    | "FOLDER" | FOLDER/features.npy and FOLDER/labels.npy (named by the two keys), memory-mapped |
    | "A.npy,B.npy" | features and labels, memory-mapped |

    Raises: InputError saying what was seen and what is possible.
    """
    if not spec:
        raise InputError("no data set is named: set data.train, for example to mnist5k/train or a path to an .npz file")
    if spec.startswith("made_up"):
        return _with_classes(MadeUpSource.parse(spec), num_classes)
    name, _, split = spec.partition("/")
    if name in BUILTIN and (split in SPLITS or not Path(spec).exists()):
        if split not in SPLITS:
            raise InputError(f"{spec!r}: {name} has the splits {name}/train and {name}/validation")
        return _with_classes(open_builtin(name, split), num_classes)
    return _open_path(spec, features_key, labels_key, num_classes)


def as_source(data: Any, *, num_classes: int | None = None) -> ExampleSource:
    """An ExampleSource from one, from (features, labels), from {"features": .., "label": ..}, or from a spec.

    Raises: InputError for anything else.
    """
    if isinstance(data, str | Path):
        return open_source(str(data), num_classes=num_classes)
    if isinstance(data, dict) and set(data) == {FEATURES, LABEL}:
        data = (data[FEATURES], data[LABEL])
    if isinstance(data, tuple | list) and len(data) == 2:
        features, labels = (np.asarray(part) if not isinstance(part, np.ndarray) else part for part in data)
        return ArraySource(features, labels, num_classes=num_classes)
    if isinstance(data, ExampleSource):
        return data
    raise InputError(
        f"data of type {type(data).__name__} is not a data set: give (features, labels) as NumPy arrays, "
        '{"features": .., "label": ..}, a path, or an object with len, metadata, rows and fingerprint_parts'
    )


def _open_path(spec: str, features_key: str, labels_key: str, num_classes: int | None) -> ExampleSource:
    if "," in spec:
        parts = [Path(part.strip()).expanduser() for part in spec.split(",")]
        if len(parts) != 2:
            raise InputError(f"{spec!r} names {len(parts)} files: give features.npy,labels.npy")
        return open_npy_pair(parts[0], parts[1], num_classes=num_classes)
    path = Path(spec).expanduser()
    if path.suffix == ".npz":
        if path.is_dir():
            raise InputError(f"{path} is a folder, but an .npz file was expected: name the file in it")
        return open_npz(path, features_key=features_key, labels_key=labels_key, num_classes=num_classes)
    if path.is_dir():
        return _open_folder(path, features_key, labels_key, num_classes)
    if path.suffix == ".npy":
        raise InputError(
            f"{path} is one array, but a data set is two: write {path},LABELS.npy, or name the folder that "
            "holds "
            f"{features_key}.npy and {labels_key}.npy"
        )
    raise InputError(_unknown(spec, path))


def _open_folder(path: Path, features_key: str, labels_key: str, num_classes: int | None) -> ExampleSource:
    files = [path / f"{key}.npy" for key in (features_key, labels_key)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        present = sorted(file.name for file in path.glob("*.np[yz]"))[:10]
        raise InputError(
            f"the folder {path} has no {' and no '.join(missing)}; it holds "
            f"{', '.join(present) or 'no .npy or .npz file'}: "
            "name the arrays with data.features_key and data.labels_key, or give the path of a file"
        )
    return open_npy_pair(files[0], files[1], num_classes=num_classes)


def _with_classes(source: ExampleSource, num_classes: int | None) -> ExampleSource:
    known = source.metadata.num_classes
    if num_classes is not None and known != num_classes:
        raise InputError(
            f"{source.metadata.name} has {known} classes, but data.num_classes={num_classes}: leave it out"
        )
    return source


def _unknown(spec: str, path: Path) -> str:
    if path.exists():
        return f"{path} is not a data set that is known here: give an .npz file, a folder of .npy files, or A.npy,B.npy"
    names = [f"{name}/{split}" for name in BUILTIN for split in SPLITS]
    near = difflib.get_close_matches(spec, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return (
        f"{spec!r} is neither a file or folder here nor a built-in data set: {hint}Built in are "
        f"{', '.join(names)}; "
        f"random rows are {FORMS}"
    )
