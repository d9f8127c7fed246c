"""Each format gives the examples that were stored, by index; what cannot be read is an error, or marked padding."""

import io
import json
import os
import pickle
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpscale.data import open_source
from dpscale.data.open import check_alike
from dpscale.errors import InputError

RNG = np.random.default_rng(5)


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def solid(colour, height=12, width=12):
    return np.full((height, width, 3), colour, np.uint8)


def every(source):
    return source.rows(np.arange(len(source)))


@pytest.fixture
def images(tmp_path):
    """Three classes; pixel values tell class and position."""
    root = tmp_path / "images"
    for number, name in enumerate(["ant", "bee", "cat"]):
        (root / name).mkdir(parents=True)
        for k in range(number + 1):
            (root / name / f"{k}.png").write_bytes(encoded(solid(50 * number + k)))
    return root


# Image folders.


def test_an_image_folder_gives_each_image_with_the_class_of_its_folder(images):
    source = open_source(str(images), image_size=8)
    assert source.metadata.class_names == ("ant", "bee", "cat")
    assert (len(source), source.metadata.num_classes, source.metadata.feature_shape) == (6, 3, (8, 8, 3))
    rows = every(source)
    assert rows["label"].tolist() == [0, 1, 1, 2, 2, 2]
    np.testing.assert_array_equal(rows["features"][:, 4, 4, 0], [0, 50, 51, 100, 101, 102])
    wanted = np.array([5, 0, 5])
    np.testing.assert_array_equal(source.rows(wanted)["features"], rows["features"][wanted])
    assert "valid" not in rows


def test_an_empty_class_keeps_its_number(images):
    (images / "bat").mkdir()
    source = open_source(str(images), image_size=8)
    assert source.metadata.class_names == ("ant", "bat", "bee", "cat")
    assert every(source)["label"].tolist() == [0, 2, 2, 3, 3, 3]


def test_images_are_scaled_by_the_shorter_side_and_cropped_at_the_centre(tmp_path):
    # Columns of a 64 x 128 image: the left and right quarters are black, the middle half is 200.
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 200
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "wide.png").write_bytes(encoded(pixels))
    whole = every(open_source(str(tmp_path), image_size=16))["features"][0]
    np.testing.assert_array_equal(whole[:, 1:-1], 200)  # the outermost pixels mix with what lies beside them
    # A crop of 16 of a shorter side of 32 takes the central quarter's rows; one of them is another colour.
    pixels[40] = 0
    (tmp_path / "all" / "wide.png").write_bytes(encoded(pixels))
    crop = every(open_source(str(tmp_path), image_size=16, image_resize=32))["features"][0]
    dark = (crop[:, 8, 0] < 150).nonzero()[0]
    assert dark.tolist() == [12]  # row 40 of 64 is row 20 of 32, of which the crop holds 8 to 23


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_8_bit_kind_of_image_becomes_rgb(tmp_path, mode):
    (tmp_path / "x").mkdir()
    Image.fromarray(solid(255)).convert(mode).save(tmp_path / "x" / "image.tif")
    np.testing.assert_array_equal(every(open_source(str(tmp_path), image_size=4))["features"], 255)


def broken_images(images):
    whole = encoded(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    (images / "ant" / "9.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "bee" / "8.png").write_bytes(b"")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(images / "cat" / "0.png")


def test_a_corrupt_image_is_an_error_that_names_it(images):
    broken_images(images)
    source = open_source(str(images), image_size=8)
    for index, pattern in (
        (1, r"example 1 .*ant/9.jpg.*truncated"),
        (4, "bee/8.png.*no whole image: of no format"),
        (5, "8 bits"),
    ):
        with pytest.raises(InputError, match=pattern) as raised:
            source.rows(np.array([0, index]))
        assert "data.on_corrupt=replace" in str(raised.value)


def test_a_replaced_image_keeps_its_index_and_is_marked(images):
    broken_images(images)
    source = open_source(str(images), image_size=8, on_corrupt="replace")
    rows = every(source)
    assert rows["valid"].tolist() == [True, False, True, True, False, False, True, True]
    assert not rows["features"][~rows["valid"]].any()
    assert len(source) == 8


def test_a_file_that_vanished_is_an_error_even_where_corrupt_ones_are_replaced(images):
    source = open_source(str(images), image_size=8, on_corrupt="replace")
    (images / "cat" / "1.png").unlink()
    with pytest.raises(InputError, match=r"cat/1.png cannot be read .*must not change"):
        every(source)


def test_the_fingerprint_of_a_folder_follows_names_and_content(images):
    def fingerprint(**options):
        return open_source(str(images), **{"image_size": 8, **options}).fingerprint_parts()

    seen = [fingerprint(), fingerprint(image_size=9), fingerprint(image_resize=10)]
    (images / "cat" / "2.png").rename(images / "cat" / "3.png")
    seen.append(fingerprint())
    (images / "ant" / "0.png").write_bytes(encoded(solid(77)))
    seen.append(fingerprint())
    assert len(set(seen)) == 5
    assert fingerprint() == seen[-1]


def test_a_missing_class_folder_is_seen_where_the_number_of_classes_is_said(images):
    with pytest.raises(InputError, match=r"but data\.num_classes=1000: .* an empty one where it has no images"):
        open_source(str(images), image_size=8, num_classes=1000)


def test_classes_that_differ_between_training_and_validation_are_refused_by_name(images, tmp_path):
    train = open_source(str(images), image_size=8)
    other = tmp_path / "validation"
    for name in ("ant", "cat"):
        (other / name).mkdir(parents=True)
        (other / name / "0.png").write_bytes(encoded(solid(1)))
    with pytest.raises(InputError, match=r"\(3\) and .*\(2\) differ: .* lacks bee"):
        check_alike(train, open_source(str(other), image_size=8))
    (other / "bee").mkdir()
    check_alike(train, open_source(str(other), image_size=8))
    with pytest.raises(InputError, match=r"feature shape \(9, 9, 3\).*have \(8, 8, 3\)"):
        check_alike(train, open_source(str(other), image_size=9))
    (other / "dog").mkdir()
    with pytest.raises(InputError, match="also has dog"):
        check_alike(train, open_source(str(other), image_size=8))


# CIFAR.


def cifar_content(count, classes):
    images = RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, RNG.integers(0, classes, count)


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def cifar10_binary(folder):
    images, labels = cifar_content(12, 10)
    table = np.concatenate([labels[:, None].astype(np.uint8), planes(images)], 1)
    for k in range(5):
        (folder / f"data_batch_{k + 1}.bin").write_bytes(table[2 * k : 2 * k + 2].tobytes())
    (folder / "test_batch.bin").write_bytes(table[10:].tobytes())
    return images, labels


def cifar10_python(folder):
    images, labels = cifar_content(12, 10)

    def batch(rows):
        # As the published files: protocol 2, byte keys.
        return pickle.dumps({b"data": planes(images[rows]), b"labels": labels[rows].tolist()}, 2)

    for k in range(5):
        (folder / f"data_batch_{k + 1}").write_bytes(batch(slice(2 * k, 2 * k + 2)))
    (folder / "test_batch").write_bytes(batch(slice(10, 12)))
    return images, labels


def packed(folder):
    archive = folder.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    return archive


@pytest.mark.parametrize("make", [cifar10_binary, cifar10_python])
@pytest.mark.parametrize("pack", [packed, lambda folder: folder])
def test_cifar_gives_the_images_of_either_version_from_folder_or_archive(tmp_path, make, pack):
    folder = tmp_path / "cifar"
    folder.mkdir()
    (folder / "readme.html").write_text("hello")
    images, labels = make(folder)
    place = pack(folder)
    for split, rows in (("train", slice(0, 10)), ("test", slice(10, 12))):
        source = open_source(f"{place}/{split}")
        np.testing.assert_array_equal(every(source)["features"], images[rows])
        np.testing.assert_array_equal(every(source)["label"], labels[rows])
        assert source.metadata.num_classes == 10


def test_cifar_100_has_fine_and_coarse_labels_in_both_versions(tmp_path):
    images, fine = cifar_content(4, 100)
    coarse = np.array([3, 19, 0, 7])
    table = np.concatenate([coarse[:, None], fine[:, None], planes(images)], 1).astype(np.uint8)
    for name in ("binary", "python"):
        (tmp_path / name).mkdir()
    content = {b"data": planes(images), b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
    for split in ("train", "test"):
        (tmp_path / "binary" / f"{split}.bin").write_bytes(table.tobytes())
        (tmp_path / "python" / split).write_bytes(pickle.dumps(content, 2))
    for place in (tmp_path / "binary", tmp_path / "python"):
        np.testing.assert_array_equal(every(open_source(f"{place}/train"))["label"], fine)
        source = open_source(f"{place}/test", labels_key="coarse_labels")
        np.testing.assert_array_equal(every(source)["label"], coarse)
        assert source.metadata.num_classes == 20
        with pytest.raises(InputError, match=r"set data.labels_key to one of"):
            open_source(f"{place}/train", labels_key="medium")


def test_a_pickle_that_names_anything_but_arrays_is_refused_without_being_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    cifar10_python(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Trap(), b"labels": []}))
    with pytest.raises(InputError, match=r"data_batch_3 cannot be unpickled .*mkdir"):
        open_source(f"{tmp_path}/train")
    assert not (tmp_path / "trapped").exists()


def test_what_was_fetched_in_place_of_an_archive_and_splits_that_are_not_there_are_named(tmp_path):
    page = tmp_path / "cifar-100-python.tar.gz"
    page.write_text("<html>404</html>")
    with pytest.raises(
        InputError, match=r"cifar-100-python.tar.gz is a file, but no archive of CIFAR .* Fetch it again"
    ):
        open_source(f"{page}/train")
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"")
    with pytest.raises(InputError, match="splits are train and test: 'validation' is none"):
        open_source(f"{tmp_path}/cifar-100-python/validation")


def test_a_damaged_cifar_is_refused(tmp_path):
    folder = tmp_path / "cifar"
    folder.mkdir()
    cifar10_binary(folder)
    archive = packed(folder)
    archive.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(InputError, match="damaged or truncated"):
        open_source(f"{archive}/train", format="cifar")
    os.truncate(folder / "data_batch_2.bin", 3074)
    with pytest.raises(InputError, match=r"data_batch_2.bin has 3074 bytes"):
        open_source(f"{folder}/train")
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(InputError, match=r"holds no data_batch_2.bin"):
        open_source(f"{folder}/train")
    with pytest.raises(InputError, match="name a split"):
        open_source(str(folder))


# Token files.


def test_token_windows_are_disjoint_and_labels_are_the_next_tokens(tmp_path):
    np.arange(23, dtype="<u2").tofile(tmp_path / "t.bin")
    source = open_source(f"{tmp_path}/t.bin", sequence_length=4, vocabulary_size=50)
    rows = every(source)
    assert len(source) == 4  # 20 of 23 tokens; 3 are left over
    assert rows["features"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13], [15, 16, 17, 18]]
    np.testing.assert_array_equal(rows["label"], rows["features"] + 1)
    assert rows["features"].dtype == rows["label"].dtype == np.int32
    metadata = source.metadata
    assert (metadata.label_kind, metadata.num_classes, metadata.vocabulary_size) == ("tokens", 50, 50)


def test_a_changed_token_changes_one_example(tmp_path):
    tokens = RNG.integers(0, 50, 60).astype("<u4")
    options = {"sequence_length": 4, "vocabulary_size": 50, "token_dtype": "uint32"}
    tokens.tofile(tmp_path / "a.bin")
    for place in range(60):
        changed = tokens.copy()
        changed[place] = (changed[place] + 1) % 50
        changed.tofile(tmp_path / "b.bin")
        a, b = (every(open_source(f"{tmp_path}/{name}.bin", **options)) for name in "ab")
        differ = (a["features"] != b["features"]).any(1) | (a["label"] != b["label"]).any(1)
        assert differ.sum() == 1


def test_tokens_outside_of_the_vocabulary_and_odd_files_are_refused(tmp_path):
    path = tmp_path / "t.bin"
    np.arange(20, dtype="<u2").tofile(path)
    with pytest.raises(InputError, match=r"example 2 holds token 13, but data.vocabulary_size=13"):
        every(open_source(str(path), sequence_length=4, vocabulary_size=13))
    with pytest.raises(InputError, match=r"set data.sequence_length"):
        open_source(str(path), vocabulary_size=13)
    with pytest.raises(InputError, match=r"set data.vocabulary_size"):
        open_source(str(path), sequence_length=4)
    with pytest.raises(InputError, match="fewer than one example"):
        open_source(str(path), sequence_length=20, vocabulary_size=20)
    os.truncate(path, 39)
    with pytest.raises(InputError, match="39 bytes, which is no whole number of uint16"):
        open_source(str(path), sequence_length=4, vocabulary_size=20)


# Text: TSV, tokenizers.

SENTENCES = ["a fine film", "dull .", "", "größer", "x" * 100]


def tsv(tmp_path, lines=None, name="train.tsv"):
    lines = lines or ["sentence\tlabel", *(f"{text}\t{k % 2}" for k, text in enumerate(SENTENCES))]
    (tmp_path / name).write_bytes("\n".join(lines).encode() + b"\n")
    return str(tmp_path / name)


def as_text(row):
    return bytes((row[row > 2] - 3).astype(np.uint8)).decode(errors="replace")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_tsv_gives_its_sentences_as_bytes_and_its_labels(tmp_path, ending):
    path = tsv(tmp_path)
    with open(path, "rb+") as file:
        text = file.read().replace(b"\n", ending.encode())
        file.seek(0)
        file.write(text.rstrip(ending.encode()))  # the last line needs no end
        file.truncate()
    source = open_source(path, sequence_length=40, num_classes=2)
    rows = source.rows(np.array([4, 3, 2, 1, 0]))
    assert [as_text(row) for row in rows["features"]] == ["x" * 38, "größer", "", "dull .", "a fine film"]
    assert rows["label"].tolist() == [0, 1, 0, 1, 0]
    assert rows["features"][4].tolist()[:4] == [1, ord("a") + 3, ord(" ") + 3, ord("f") + 3]
    assert rows["features"][4].tolist()[11:15] == [ord("m") + 3, 2, 0, 0]
    assert (source.metadata.vocabulary_size, source.metadata.padding_token) == (259, 0)


def test_columns_are_found_by_name(tmp_path):
    path = tsv(tmp_path, ["id\tscore\tbody", "1\t0.5\tyes", "2\t-1e3\tno"])
    source = open_source(path, sequence_length=9, features_key="body", labels_key="score")
    assert [as_text(row) for row in every(source)["features"]] == ["yes", "no"]
    assert every(source)["label"].tolist() == [0.5, -1000.0]
    assert source.metadata.label_kind == "value"
    with pytest.raises(
        InputError, match=r"no column 'features'; its columns are id, score, body: set data.features_key"
    ):
        open_source(path, sequence_length=9)


@pytest.mark.parametrize(
    ("lines", "pattern"),
    [
        (["text\tlabel", "a\t1", "b"], "line 3 has 1 columns, but the header has 2"),
        (["text\tlabel", "a\t1", "", "b\t0"], "line 3 has 1 columns"),
        (["text\tlabel", "a\tb\t1"], "line 2 has 3 columns"),
        (["text\tlabel", "a\t1", "b\tgood"], "line 3 has the label 'good'"),
        (["text\tlabel", "a\t1", "b\t"], "line 3 has a label of 0 characters"),
        (["text\tlabel", "a\t1", "b\t2"], "row 1 has label 2, but labels must lie in 0 to 1"),
        (["text\tlabel"], "no line below"),
    ],
)
def test_lines_that_do_not_fit_are_refused_by_number(tmp_path, lines, pattern):
    with pytest.raises(InputError, match=pattern):
        open_source(tsv(tmp_path, lines), sequence_length=9, num_classes=2)


def test_text_that_is_no_utf8_is_an_error_or_replaced(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"text\tlabel\nfine\t1\n\xff\xfe\t1\n")
    with pytest.raises(InputError, match=r"example 1 .*line 3 is not UTF-8"):
        every(open_source(f"{tmp_path}/t.tsv", sequence_length=9))
    rows = every(open_source(f"{tmp_path}/t.tsv", sequence_length=9, on_corrupt="replace"))
    assert rows["valid"].tolist() == [True, False]
    assert not rows["features"][1].any()
    assert rows["label"].tolist() == [1, 0]


def vocabulary(tmp_path, words=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fine", "film", "dull", "."), name="v.json"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "[CLS]" in words:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(tmp_path / name))
    return str(tmp_path / name)


def test_a_tokenizer_file_gives_its_ids_cut_and_filled_up(tmp_path):
    path, tokenizer = tsv(tmp_path), vocabulary(tmp_path)
    source = open_source(path, sequence_length=4, tokenizer=tokenizer, vocabulary_size=9)
    assert every(source)["features"].tolist() == [[2, 4, 5, 3], [2, 7, 8, 3], [2, 3, 0, 0], [2, 1, 3, 0], [2, 1, 3, 0]]
    assert (source.metadata.vocabulary_size, source.metadata.padding_token) == (9, 0)


def test_another_vocabulary_is_refused_and_changes_the_fingerprint(tmp_path):
    path, one = tsv(tmp_path), vocabulary(tmp_path)
    other = vocabulary(tmp_path, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fine", "film", ".", "dull"), "w.json")
    with pytest.raises(InputError, match=r"has 9 tokens, but data.vocabulary_size=30522"):
        open_source(path, sequence_length=4, tokenizer=one, vocabulary_size=30522)
    with pytest.raises(InputError, match="no padding token"):
        open_source(path, sequence_length=4, tokenizer=vocabulary(tmp_path, ("[UNK]", "a"), "x.json"))
    with pytest.raises(InputError, match=r"byte-level tokenizer has 259 tokens"):
        open_source(path, sequence_length=4, vocabulary_size=30522)
    a, b = (open_source(path, sequence_length=4, tokenizer=name).fingerprint_parts() for name in (one, other))
    assert a != b
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match=r"bad.json cannot be read"):
        open_source(path, sequence_length=4, tokenizer=f"{tmp_path}/bad.json")
    with pytest.raises(InputError, match=r"vocabulary size 259.* have 9"):
        check_alike(open_source(path, sequence_length=4, tokenizer=one), open_source(path, sequence_length=4))


# Parquet and Arrow.


def huggingface_table():
    """As `datasets` writes it: images as {bytes, path}, a ClassLabel whose names are in the schema's metadata."""
    pixels = [solid(10 * k) for k in range(7)]
    images = [{"bytes": encoded(x), "path": f"{k}.png"} for k, x in enumerate(pixels)]
    features = {"image": {"_type": "Image"}, "label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pa.table({"image": images, "label": [k % 2 for k in range(7)]}, schema=schema)


def write_arrow(table, path, kind=pa.ipc.new_stream):
    with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def tables_on_disk(tmp_path):
    table = huggingface_table()
    pq.write_table(table, tmp_path / "train-0.parquet", row_group_size=3)
    write_arrow(table, tmp_path / "stream.arrow")
    write_arrow(table, tmp_path / "file.arrow", pa.ipc.new_file)
    (tmp_path / "split").mkdir()
    pq.write_table(table.slice(0, 4), tmp_path / "split" / "train-00000-of-00002.parquet")
    pq.write_table(table.slice(4), tmp_path / "split" / "train-00001-of-00002.parquet")
    return ["train-0.parquet", "stream.arrow", "file.arrow", "split", "split/train-*.parquet"]


@pytest.mark.parametrize("in_memory_bytes", [2**31, 0])
def test_parquet_and_arrow_give_the_same_images_labels_and_class_names(tmp_path, monkeypatch, in_memory_bytes):
    monkeypatch.setattr("dpscale.data.parquet.IN_MEMORY_BYTES", in_memory_bytes)
    fingerprints = set()
    for name in tables_on_disk(tmp_path):
        source = open_source(f"{tmp_path}/{name}", image_size=8)
        assert (len(source), source.metadata.class_names, source.metadata.num_classes) == (7, ("ant", "bee"), 2)
        wanted = np.array([6, 0, 3, 3, 1])
        rows = source.rows(wanted)
        np.testing.assert_array_equal(rows["features"][:, 0, 0, 0], 10 * wanted)
        np.testing.assert_array_equal(rows["label"], wanted % 2)
        fingerprints.add(source.fingerprint_parts())
    assert len(fingerprints) == 1


def parquet(tmp_path, **columns):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    return str(tmp_path / "t.parquet")


def test_parquet_holds_text_tokens_and_vectors_too(tmp_path):
    path = parquet(tmp_path, text=["yes", "no"], label=[1, 0])
    source = open_source(path, sequence_length=6)
    assert [as_text(row) for row in every(source)["features"]] == ["yes", "no"]
    path = parquet(tmp_path, input_ids=[[5, 6, 7, 8, 9], [4]], label=[0.5, 1.5])
    source = open_source(path, sequence_length=3, vocabulary_size=10)
    assert every(source)["features"].tolist() == [[5, 6, 7], [4, 0, 0]]
    assert (source.metadata.label_kind, source.metadata.vocabulary_size) == ("value", 10)
    with pytest.raises(InputError, match="holds token 9, but ids must lie in 0 to 8"):
        every(open_source(path, sequence_length=3, vocabulary_size=9))
    vectors = pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64(), 2))
    source = open_source(parquet(tmp_path, features=vectors, labels=[1, 0]))
    assert every(source)["features"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert source.metadata.feature_dtype == np.float32


def test_token_lists_without_labels_are_documents_of_one_example_each(tmp_path):
    path = parquet(tmp_path, input_ids=[[5, 6, 7, 8, 9], [4, 3], [2], [], None, [1, None]], id=list("abcdef"))
    source = open_source(path, sequence_length=3, vocabulary_size=10, on_corrupt="replace")
    rows = every(source)
    assert rows["features"].tolist() == [[5, 6, 7], [4, 3, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert rows["label"].tolist() == [[6, 7, 8], [3, -1, -1], [-1] * 3, [-1] * 3, [0] * 3, [0] * 3]
    assert rows["valid"].tolist() == [True] * 4 + [False] * 2
    metadata = source.metadata
    assert (metadata.label_kind, metadata.num_classes, metadata.label_shape) == ("tokens", 10, (3,))
    assert source.fingerprint_parts() == open_source(path, sequence_length=3, vocabulary_size=10).fingerprint_parts()
    with pytest.raises(InputError, match=r"each row is a document .* set data.vocabulary_size"):
        open_source(path, sequence_length=3)
    with pytest.raises(InputError, match=r"no column 'topic'"):
        open_source(path, sequence_length=3, vocabulary_size=10, labels_key="topic")


def test_corrupt_and_missing_values_are_errors_or_replaced(tmp_path):
    whole = encoded(solid(9))
    path = parquet(tmp_path, image=[whole, whole[:40], None], label=[0, 1, 1])
    source = open_source(path, image_size=8)
    for index, pattern in ((1, "example 1 .*no whole image"), (2, "example 2 .*is null")):
        with pytest.raises(InputError, match=pattern):
            source.rows(np.array([index]))
    rows = every(open_source(path, image_size=8, on_corrupt="replace"))
    assert rows["valid"].tolist() == [True, False, False]
    path = parquet(tmp_path, text=["a", None], label=[0, 1])
    assert every(open_source(path, sequence_length=4, on_corrupt="replace"))["valid"].tolist() == [True, False]
    with pytest.raises(InputError, match="row 1 has no label"):
        open_source(parquet(tmp_path, text=["a", "b"], label=[0, None]), sequence_length=4)
    with pytest.raises(InputError, match="path without bytes"):
        every(open_source(parquet(tmp_path, image=[{"bytes": None, "path": "x.png"}], label=[0]), image_size=8))


@pytest.mark.parametrize(
    ("columns", "options", "pattern"),
    [
        ({"text": ["a"], "label": ["good"]}, {"sequence_length": 4}, "column label is of type string"),
        ({"text": ["a"], "label": [0]}, {}, "set data.sequence_length"),
        ({"image": [b"a"], "label": [0]}, {}, "set data.image_size"),
        ({"body": ["a"], "label": [0]}, {"sequence_length": 4}, "its columns are body, label"),
        ({"text": ["a"], "label": [3]}, {"sequence_length": 4, "num_classes": 3}, "row 0 has label 3"),
        ({"text": [1.5], "label": [0]}, {}, "column text is of type double"),
    ],
)
def test_columns_of_another_type_are_refused_with_the_remedy(tmp_path, columns, options, pattern):
    with pytest.raises(InputError, match=pattern):
        open_source(parquet(tmp_path, **columns), **options)


def test_files_that_are_not_one_data_set_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "test-0.parquet")
    with pytest.raises(InputError, match=r"several names \(test, train\).*with a pattern"):
        open_source(str(tmp_path), sequence_length=4)
    pq.write_table(pa.table({"text": ["a"], "label": [0.5]}), tmp_path / "train-1.parquet")
    with pytest.raises(InputError, match=r"train-1.parquet has the columns text string, label double"):
        open_source(f"{tmp_path}/train-*.parquet", sequence_length=4)
    os.truncate(tmp_path / "test-0.parquet", 200)
    with pytest.raises(InputError, match=r"test-0.parquet cannot be read .*truncated"):
        open_source(f"{tmp_path}/test-0.parquet", sequence_length=4)
    with pytest.raises(InputError, match="no file matches"):
        open_source(f"{tmp_path}/none-*.parquet", sequence_length=4)


# Which format it is.


def test_what_a_path_is_can_be_said_and_is_otherwise_seen(tmp_path, images):
    np.arange(20, dtype="<u2").tofile(tmp_path / "odd.name")
    options = {"sequence_length": 4, "vocabulary_size": 30}
    with pytest.raises(InputError, match=r"or say what it is with data.format"):
        open_source(f"{tmp_path}/odd.name", **options)
    assert len(open_source(f"{tmp_path}/odd.name", format="tokens", **options)) == 4
    with pytest.raises(InputError, match=r"does not exist: data.format=tsv"):
        open_source(f"{tmp_path}/none.tsv", format="tsv")
    (images / "ant.png").write_bytes(encoded(solid(1)))
    with pytest.raises(InputError, match=r"ant.png outside of any class"):
        open_source(str(images), image_size=8)
    (images / "ant.png").rename(images / "ant" / "notes.txt")
    with pytest.raises(InputError, match=r"holds notes.txt, which is no image"):
        open_source(str(images), image_size=8)


def test_a_missing_package_is_named_with_its_extra(images, monkeypatch):
    import importlib

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'dpscale\[images\]'"):
        open_source(str(images), image_size=8)


# Size: 10^6 to 10^7 examples, and no Python object for each.


def peak_bytes(action):
    tracemalloc.start()
    try:
        return action(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_ten_million_token_windows_open_and_read_in_a_few_megabytes(tmp_path):
    with (tmp_path / "t.bin").open("wb") as file:
        file.truncate(10**7 * 2 * 65)  # sparse
        file.seek(2 * 65 * 9_999_999)
        file.write(np.arange(65, dtype="<u2").tobytes())

    def use():
        source = open_source(f"{tmp_path}/t.bin", sequence_length=64, vocabulary_size=100)
        return len(source), source.rows(np.array([9_999_999]))["label"][0, -1]

    seen, peak = peak_bytes(use)
    assert seen == (10**7, 64)
    assert peak < 2**20


def test_many_lines_of_text_take_an_index_of_16_bytes_each(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"text\tlabel\n" + b"".join(b"word %d\t%d\n" % (k, k % 2) for k in range(200_000)))
    source, peak = peak_bytes(lambda: open_source(str(path), sequence_length=16, num_classes=2))
    held = source._bounds.nbytes + source._labels.nbytes
    assert held == 24 * 200_000  # with 8 for the label
    assert peak < 12 * held  # positions and masks on the way; as Python text it were over 60 bytes a line more
    rows = source.rows(np.array([199_999]))
    assert (as_text(rows["features"][0]), rows["label"][0]) == ("word 199999", 1)


def test_a_million_names_take_their_bytes_and_8_more():
    from dpscale.data.packed_names import PackedNames

    groups = [[b"%06d.jpg" % k for k in range(start, start + 1000)] for start in range(0, 10**6, 1000)]
    names = PackedNames(iter(groups))
    assert len(names) == 10**6
    assert names[654_321] == b"654321.jpg"
    assert len(names.blob) + names.offsets.nbytes == 10**7 + 8 * (10**6 + 1)
