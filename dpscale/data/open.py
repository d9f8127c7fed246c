"""From what a user wrote (a name, a path, a pair of arrays) to an ExampleSource."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpscale.data.array_record import DESCRIPTION, ArrayRecordSource
from dpscale.data.arrays import ArraySource, open_npy_pair, open_npz
from dpscale.data.builtin import BUILTIN, SPLITS, open_builtin
from dpscale.data.cifar import SPLITS as CIFAR_SPLITS
from dpscale.data.cifar import find_layout, open_cifar
from dpscale.data.image_folder import ImageFolderSource
from dpscale.data.made_up import FORMS, MadeUpSource
from dpscale.data.options import SourceOptions
from dpscale.data.parquet import open_tables
from dpscale.data.source import FEATURES, LABEL, ExampleSource
from dpscale.data.tokens import TokenFileSource
from dpscale.data.tsv import TsvSource
from dpscale.data.users import UserSource
from dpscale.errors import InputError, did_you_mean

OPENERS: dict[str, Callable[[Path, SourceOptions], ExampleSource]] = {
    "array_record": ArrayRecordSource,
    "image_folder": ImageFolderSource,
    "parquet": open_tables,
    "cifar": open_cifar,
    "tokens": TokenFileSource,
    "tsv": TsvSource,
}
_BY_SUFFIX = {".parquet": "parquet", ".arrow": "parquet", ".tsv": "tsv", ".bin": "tokens"}


def open_source(spec: str, options: SourceOptions | None = None, **changes: Any) -> ExampleSource:
    """Opens the data set that `spec` names; `changes` are single fields of `options`.

    | spec | data |
    | --- | --- |
    | "mnist5k/train", "mnist5k/validation", "digits/train", "digits/validation" | built in |
    | "made_up:images:N:H:W:C:CLASSES", "made_up:vectors:N:D:CLASSES" | random rows, computed |
    | "FILE.npz" | arrays `features_key` and `labels_key`, read into memory |
    | "FOLDER" | FOLDER/features.npy and FOLDER/labels.npy (named by the two keys), memory-mapped |
    | "A.npy,B.npy" | features and labels, memory-mapped |
    | "FOLDER" | what `dpscale data convert` wrote (ArrayRecord and dataset.json) |
    | "FOLDER" | FOLDER/CLASS/IMAGE.jpg |
    | "FILE.parquet", "FILE.arrow", "FOLDER", "FOLDER/train-*.parquet" | Parquet or Arrow |
    | "cifar-10-python.tar.gz/train", "cifar-100-binary/test", .. | CIFAR, archive or folder |
    | "FILE.bin" | token ids |
    | "FILE.tsv" | text and labels |

    Raises: InputError saying what was seen and what is possible.
    """
    options = replace(options or SourceOptions(), **changes)
    if not spec:
        raise InputError("no data set is named: set data.train, for example to mnist5k/train or a path to an .npz file")
    if options.format not in ("auto", "arrays"):
        return OPENERS[options.format](_existing(spec, options), options)
    if spec.startswith("made_up"):
        return _with_classes(MadeUpSource.parse(spec), options.num_classes)
    name, _, split = spec.partition("/")
    if name in BUILTIN and (split in SPLITS or not Path(spec).exists()):
        if split not in SPLITS:
            raise InputError(f"{spec!r}: {name} has the splits {name}/train and {name}/validation")
        return _with_classes(open_builtin(name, split), options.num_classes)
    return _open_path(spec, options)


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


def check_alike(train: ExampleSource, held_out: ExampleSource) -> None:
    """Refuses a held-out set that a model of the training set cannot be measured on.

    Raises: InputError where shapes, types, kinds of label, classes or vocabularies differ; class folders are
    compared by name, since a missing one would shift the numbers of all that follow.
    """
    a, b = train.metadata, held_out.metadata
    if a.class_names is not None and b.class_names is not None and a.class_names != b.class_names:
        raise InputError(_different_classes(a.name, a.class_names, b.name, b.class_names))
    for what in ("feature_shape", "feature_dtype", "label_kind", "label_shape", "num_classes", "vocabulary_size"):
        ours, theirs = getattr(a, what), getattr(b, what)
        if ours != theirs and not (what == "num_classes" and None in (ours, theirs)):
            raise InputError(
                f"{b.name} has {what.replace('_', ' ')} {theirs}, but the training data {a.name} "
                f"have {ours}: both must "
                "be read in the same way"
            )


def check_apart(train: ExampleSource, held_out: ExampleSource) -> None:
    """Refuses the training examples as held-out ones whose metrics would be shared: no noise covers those metrics.

    Raises: InputError where both have the same content. A part of the training examples is not noticed.
    """
    of_records = train.records if isinstance(train, UserSource) else train
    if of_records.fingerprint_parts() == held_out.fingerprint_parts():
        raise InputError(
            f"the held-out examples are the training examples ({held_out.metadata.name}), but data.validation_is is "
            '"public": metrics on them would be shared without noise. Name examples that are not trained on, or say '
            'data.validation_is = "private"'
        )


def _open_path(spec: str, options: SourceOptions) -> ExampleSource:
    if "," in spec:
        parts = [Path(part.strip()).expanduser() for part in spec.split(",")]
        if len(parts) != 2:
            raise InputError(f"{spec!r} names {len(parts)} files: give features.npy,labels.npy")
        return open_npy_pair(parts[0], parts[1], num_classes=options.num_classes)
    path = Path(spec).expanduser()
    if path.suffix == ".npz":
        if path.is_dir():
            raise InputError(f"{path} is a folder, but an .npz file was expected: name the file in it")
        return open_npz(
            path,
            features_key=options.features_key,
            labels_key=options.labels_key,
            num_classes=options.num_classes,
        )
    found = None if options.format == "arrays" else _format_of(path)
    if found is not None:
        return OPENERS[found](path, options)
    if path.is_dir():
        return _open_folder(path, options)
    if path.suffix == ".npy":
        raise InputError(
            f"{path} is one array, but a data set is two: write {path},LABELS.npy, or name the folder that "
            f"holds {options.features_key}.npy and {options.labels_key}.npy"
        )
    raise InputError(_unknown(spec, path))


def _format_of(path: Path) -> str | None:
    """The format that a path's name and what lies there show; None for arrays and for what is not known."""
    if path.name in CIFAR_SPLITS and not path.is_dir() and find_layout(path.parent) is not None:
        return "cifar"
    if not path.is_dir():
        return _BY_SUFFIX.get(path.suffix) if path.is_file() or "*" in path.name else None
    if (path / DESCRIPTION).exists() or (path / "conversion.json").exists() or any(path.glob("*.array_record")):
        return "array_record"
    if any(path.glob("*.parquet")) or any(path.glob("*.arrow")):
        return "parquet"
    if find_layout(path) is not None or any(path.glob("*.np[yz]")):
        return None
    return "image_folder" if any(item.is_dir() for item in path.iterdir()) else None


def _existing(spec: str, options: SourceOptions) -> Path:
    path = Path(spec).expanduser()
    if options.format not in ("cifar", "parquet") and not path.exists():
        raise InputError(f"{path} does not exist: data.format={options.format} needs a path that is there")
    return path


def _open_folder(path: Path, options: SourceOptions) -> ExampleSource:
    if find_layout(path) is not None:
        raise InputError(f"{path} holds CIFAR: name a split, {path}/train or {path}/test")
    files = [path / f"{key}.npy" for key in (options.features_key, options.labels_key)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        present = sorted(file.name for file in path.glob("*.np[yz]"))[:10]
        raise InputError(
            f"the folder {path} has no {' and no '.join(missing)}; it holds "
            f"{', '.join(present) or 'no .npy or .npz file'}: "
            "name the arrays with data.features_key and data.labels_key, or give the path of a file"
        )
    return open_npy_pair(files[0], files[1], num_classes=options.num_classes)


def _with_classes(source: ExampleSource, num_classes: int | None) -> ExampleSource:
    known = source.metadata.num_classes
    if num_classes is not None and known != num_classes:
        raise InputError(
            f"{source.metadata.name} has {known} classes, but data.num_classes={num_classes}: leave it out"
        )
    return source


def _different_classes(train: str, ours: tuple[str, ...], held_out: str, theirs: tuple[str, ...]) -> str:
    missing, extra = [c for c in ours if c not in theirs], [c for c in theirs if c not in ours]
    parts = [f"{held_out} lacks {', '.join(missing[:5])}"] if missing else []
    parts += [f"{held_out} also has {', '.join(extra[:5])}"] if extra else []
    return (
        f"the classes of {train} ({len(ours)}) and {held_out} ({len(theirs)}) differ: "
        f"{'; '.join(parts) or 'their order is another'}. Labels are numbers in the order of the "
        "names, so both need the "
        "same ones: make an empty folder for a class without images, or remove the extra one"
    )


def _unknown(spec: str, path: Path) -> str:
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return f"{path} is an archive: CIFAR's is read as {path}/train and {path}/test, any other must be unpacked"
    if path.exists():
        return (
            f"{path} is not a data set that is known here: give an .npz, .parquet, .arrow, .tsv or "
            ".bin file, a folder of "
            ".npy files, of class folders, or of a conversion, or A.npy,B.npy; or say what it is with data.format"
        )
    place = path.parent
    if find_layout(place) is not None:
        return f"{place} holds CIFAR, whose splits are {' and '.join(CIFAR_SPLITS)}: {path.name!r} is none of them"
    if place.is_file():
        return (
            f"{place} is a file, but no archive of CIFAR that can be read: it is damaged, cut short or something else "
            "(a web page that was saved under its name?). Fetch it again, or name another file"
        )
    names = [f"{name}/{split}" for name in BUILTIN for split in SPLITS]
    return (
        f"{spec!r} is neither a file or folder here nor a built-in data set: {did_you_mean(spec, names)}built in are "
        f"{', '.join(names)}; "
        f"random rows are {FORMS}"
    )
