"""Examples/s of each data source, and what a GPU takes: `python benchmarks/loading.py`, three minutes on two cores.

Files are made up, in a temporary folder, and read from the page cache: the figures are those of decoding and of
Python, not of a disk. Each thread asks for blocks of 32 random rows, as a Poisson draw does.
"""

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from PIL import Image

from dpscale.data.convert import convert
from dpscale.data.inspection import read_rate
from dpscale.data.open import open_source
from dpscale.data.source import ExampleSource

SIDE, IMAGES, CLASSES = 224, 512, 8
STORED = (500, 375)  # about the mean size of ImageNet's training images
# One forward and backward pass of ViT-B/16 at 224 x 224: 3 passes x 2 operations x 17.6e9 multiply-adds.
VIT_B16_FLOP = 3 * 2 * 17.6e9
ASSUMED_SHARE_OF_PEAK = 0.4
NEEDS = [
    # what, examples/s, where from
    (
        "RTX 3090, mixed precision",
        393,
        "timm, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv, vit_base_patch16_224",
    ),
    ("A100, bf16", round(312e12 * ASSUMED_SHARE_OF_PEAK / VIT_B16_FLOP), "assumed: 40 % of 312 TFLOP/s"),
    ("H100, bf16", round(989e12 * ASSUMED_SHARE_OF_PEAK / VIT_B16_FLOP), "assumed: 40 % of 989 TFLOP/s"),
]


def photograph(generator: np.random.Generator) -> bytes:
    """A JPEG of quality 90 with detail at several scales, about as many bytes as a photograph of its size."""
    width, height = STORED
    pixels = np.zeros((height, width, 3))
    for cells, strength in ((4, 60), (16, 40), (64, 25), (250, 18)):
        coarse = generator.normal(0, strength, (cells, cells, 3)).clip(-128, 127) + 128
        layer = Image.fromarray(coarse.astype(np.uint8)).resize(STORED, Image.Resampling.BILINEAR)
        pixels += np.asarray(layer, float) - 128
    buffer = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def sources(root: Path) -> dict[str, Callable[[], ExampleSource]]:
    """Every source over files made in `root`; they are opened one at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    images = [photograph(generator) for _ in range(IMAGES)]
    for k, data in enumerate(images):
        (root / "folder" / f"class{k % CLASSES}").mkdir(parents=True, exist_ok=True)
        (root / "folder" / f"class{k % CLASSES}" / f"{k:05d}.jpg").write_bytes(data)
    labels = [k % CLASSES for k in range(IMAGES)]
    table = pa.table({"image": [{"bytes": data, "path": None} for data in images], "label": labels})
    pq.write_table(table, root / "images.parquet", row_group_size=100)
    with pa.OSFile(str(root / "images.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    folder = open_source(f"{root}/folder", image_size=SIDE)
    convert(folder, root / "converted", num_threads=2)
    rows = folder.rows(np.arange(IMAGES))
    (root / "arrays").mkdir()
    np.save(root / "arrays" / "features.npy", rows["features"])
    np.save(root / "arrays" / "labels.npy", rows["label"])
    cifar = generator.integers(0, 10, (10_000, 3073), dtype=np.uint8)
    for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
        (root / name).write_bytes(cifar.tobytes())
    generator.integers(0, 50_257, 2 * 10**7).astype("<u2").tofile(root / "tokens.bin")
    words = [f"w{k}" for k in range(5000)]
    with (root / "text.tsv").open("w") as file:
        file.write("sentence\tlabel\n")
        for k in range(50_000):
            file.write(" ".join(words[i] for i in generator.integers(0, 5000, 20)) + f"\t{k % 2}\n")
    text: dict[str, Any] = {"sequence_length": 128, "num_classes": 2}
    return {
        f"image folder, JPEG {STORED[0]} x {STORED[1]} -> {SIDE}": lambda: folder,
        f"Parquet in memory, the same JPEGs -> {SIDE}": lambda: open_source(f"{root}/images.parquet", image_size=SIDE),
        f"Arrow, the same JPEGs -> {SIDE}": lambda: open_source(f"{root}/images.arrow", image_size=SIDE),
        f"ArrayRecord, converted, {SIDE} x {SIDE} x 3": lambda: open_source(f"{root}/converted"),
        f".npy, memory-mapped, {SIDE} x {SIDE} x 3": lambda: open_source(f"{root}/arrays", num_classes=CLASSES),
        "CIFAR-10, 32 x 32 x 3": lambda: open_source(f"{root}/train", format="cifar"),
        "token file, 1,024 tokens": lambda: open_source(
            f"{root}/tokens.bin", sequence_length=1024, vocabulary_size=50_257
        ),
        "TSV, 20 words as 128 bytes": lambda: open_source(f"{root}/text.tsv", **text),
        "TSV, 20 words, tokenizer.json": lambda: open_source(
            f"{root}/text.tsv", tokenizer=vocabulary(root, words), **text
        ),
    }


def vocabulary(root: Path, words: list[str]) -> str:
    """A WordPiece tokenizer.json that knows the words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    known = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(root / "tokenizer.json"))
    return str(root / "tokenizer.json")


def measure(open_it: Callable[[], ExampleSource], threads: list[int], seconds: float) -> dict[str, Any]:
    """Rates by number of threads, after a warm-up; `threads` are measured in turn, twice, and the better one counts."""
    source = open_it()
    read_rate(source, 1, seconds / 4)
    rates = {count: max(read_rate(source, count, seconds) for _ in range(2)) for count in threads}
    m = source.metadata
    row_bytes = m.feature_dtype.itemsize * int(np.prod(m.feature_shape))
    return {"feature_bytes": row_bytes, "examples_per_s": {str(count): round(rate, 1) for count, rate in rates.items()}}


def main() -> None:
    """Measure every source, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default 1 2)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default 3)")
    default = Path(__file__).parent / "results" / "loading.json"
    parser.add_argument("--out", type=Path, default=default, help="result file (default %(default)s)")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as root:
        made = sources(Path(root))
        jpeg_bytes = sum(path.stat().st_size for path in Path(root).glob("folder/*/*")) / IMAGES
        print(f"{'examples/s with threads':<48}" + "".join(f"{count:>12}" for count in arguments.threads))
        for name, open_it in made.items():
            row = {"source": name, **measure(open_it, arguments.threads, arguments.seconds)}
            results.append(row)
            print(f"{name:<48}" + "".join(f"{rate:>12,.0f}" for rate in row["examples_per_s"].values()))
    print("\nexamples/s that ViT-B/16 takes at 224 x 224")
    for what, rate, where in NEEDS:
        print(f"{what:<36}{rate:>8,}   {where}")
    found = machine()
    found["packages"] |= {name: version_of(name) for name in ("pillow", "pyarrow", "tokenizers", "array_record")}
    needs = [{"what": what, "examples_per_s": rate, "source": where} for what, rate, where in NEEDS]
    content = {"machine": found, "jpeg_bytes_mean": round(jpeg_bytes), "results": results, "vit_b16_224_takes": needs}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {arguments.out}")


def version_of(package: str) -> str:
    """Installed version of a package."""
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
