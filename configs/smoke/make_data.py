"""Writes tiny made-up data sets in the recipes' true formats, for smoke tests: `python configs/smoke/make_data.py`.

Their content is random: nothing can be learnt from it. Under DIRECTORY (default smoke-data, where the override files of
this folder look): both CIFAR archives, an image folder laid out as ImageNet, SST-2's two files with a tokenizer.json,
token files, and arrays of features. About 1 MB.
"""

import io
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "fine", "dull", "film", "and", "not", ",", ".")
TOKENS = 60  # vocabulary of the token files
RNG = np.random.default_rng(0)


def write_all(root: Path) -> None:
    """Write every data set below `root`, over what is there."""
    root.mkdir(parents=True, exist_ok=True)
    write_cifar10(root / "cifar-10-python.tar.gz")
    write_cifar100(root / "cifar-100-python.tar.gz")
    for split, count in (("train", 15), ("val", 3)):
        write_image_folder(root / "imagenet" / split, classes=4, images_each=count)
    write_tokenizer(root / "tokenizer.json")
    for split, count in (("train", 60), ("dev", 12)):
        write_sst2(root / "SST-2" / f"{split}.tsv", count)
    for split, windows in (("train", 60), ("val", 12)):
        write_tokens(root / "tokens" / f"{split}.bin", 17 * windows)
    for split, count in (("train", 60), ("validation", 12)):
        write_features(root / "features" / f"{split}.npz", count)


def write_cifar10(path: Path) -> None:
    """60 training and 12 test images, as cifar-10-python.tar.gz holds them: pickles of planes in six batches."""
    with tarfile.open(path, "w:gz") as archive:
        for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
            content = {b"data": _planes(12), b"labels": RNG.integers(0, 10, 12).tolist()}
            _add(archive, f"cifar-10-batches-py/{name}", pickle.dumps(content, 2))


def write_cifar100(path: Path) -> None:
    """60 training and 12 test images, as cifar-100-python.tar.gz holds them."""
    with tarfile.open(path, "w:gz") as archive:
        for name, count in (("train", 60), ("test", 12)):
            fine = RNG.integers(0, 100, count)
            content = {b"data": _planes(count), b"fine_labels": fine.tolist(), b"coarse_labels": (fine // 5).tolist()}
            _add(archive, f"cifar-100-python/{name}", pickle.dumps(content, 2))


def write_image_folder(folder: Path, *, classes: int, images_each: int) -> None:
    """CLASS/CLASS_IMAGE.JPEG, JPEGs of several sizes, as ImageNet comes."""
    from PIL import Image

    for number in range(classes):
        name = f"n{number + 1440764:08d}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(images_each):
            size = (80 + 8 * (image % 3), 100, 3)
            pixels = RNG.integers(0, 256, size, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}_{image}.JPEG", quality=50)


def write_sst2(path: Path, count: int) -> None:
    """GLUE's SST-2: a header, then sentence<TAB>label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sentences = (" ".join(RNG.choice(WORDS[4:], RNG.integers(1, 20))) for _ in range(count))
    lines = ["sentence\tlabel", *(f"{sentence}\t{RNG.integers(2)}" for sentence in sentences)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tokenizer(path: Path) -> None:
    """A tokenizer.json of 12 words, with BERT's special tokens around each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.BertProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        ("[SEP]", WORDS.index("[SEP]")), ("[CLS]", WORDS.index("[CLS]"))
    )
    tokenizer.save(str(path))


def write_tokens(path: Path, count: int) -> None:
    """Token ids, uint16, little-endian, without a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    RNG.integers(0, TOKENS, count).astype("<u2").tofile(path)


def write_features(path: Path, count: int) -> None:
    """Vectors of the length that configs/scattering_features.py writes, and labels of ten classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = RNG.normal(size=(count, 1953)).astype(np.float32)
    np.savez(path, features=features, labels=RNG.integers(0, 10, count))


def _planes(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "smoke-data")
    write_all(target)
    print(f"wrote {target}")
