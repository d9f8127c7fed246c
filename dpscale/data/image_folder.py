"""Images in one folder a class, as ImageNet comes: ROOT/CLASS/IMAGE.jpg."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dpscale.data.corrupt import CorruptExample, read_each
from dpscale.data.images import ImageDecoder
from dpscale.data.options import SourceOptions
from dpscale.data.packed_names import PackedNames
from dpscale.data.source import SAMPLED_ROWS, Batch, SourceMetadata
from dpscale.errors import InputError

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".bmp", b".webp", b".ppm", b".pgm", b".tif", b".tiff", b".gif")
_SCAN_THREADS = 8


class ImageFolderSource:
    """ROOT/CLASS/IMAGE, classes numbered in the order of their folders' names; decoded by the thread that asks.

    The order of the examples is that of (class, file name) as bytes, the same on every machine. The index takes the
    names' bytes and 8 more for each image, and no Python object. Files whose name starts with a dot are no examples.

    Raises: InputError for a root without class folders, other files or folders inside a class, classes that differ
    from `num_classes`, or a missing `image_size`.
    """

    def __init__(self, root: Path, options: SourceOptions):
        name = str(root)
        decoder = ImageDecoder(options, name)
        classes = _class_folders(root)
        if options.num_classes not in (None, len(classes)):
            raise InputError(
                f"{name} has {len(classes)} class folders, but data.num_classes={options.num_classes}: labels are "
                "numbers in the order of the names, so each class needs one, an empty one where it has no images; or "
                "correct the number, or name the folder that holds the classes"
            )
        self._root, self._options, self._decode = root, options, decoder
        starts = [0]

        def groups() -> Iterator[list[bytes]]:
            with ThreadPoolExecutor(_SCAN_THREADS) as pool:
                for images in pool.map(lambda folder: _images(root / folder), classes):
                    starts.append(starts[-1] + len(images))
                    yield images

        self._names = PackedNames(groups())
        if not len(self._names):
            raise InputError(f"{name} has class folders, but no image in them: {', '.join(classes[:5])}, ..")
        self._starts = np.array(starts, np.int64)
        self._metadata = SourceMetadata(
            name=name,
            feature_shape=decoder.shape,
            feature_dtype=np.dtype(np.uint8),
            label_kind="class",
            num_classes=len(classes),
            full_scale=255.0,
            class_names=tuple(classes),
        )

    @property
    def metadata(self) -> SourceMetadata:
        """Shapes, types and constants."""
        return self._metadata

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def rows(self, indices: np.ndarray) -> Batch:
        """The images at `indices`, int64[n], read and decoded one after the other."""
        return read_each(np.asarray(indices), self._read, self._metadata, self._options)

    def fingerprint_parts(self) -> bytes:
        """A digest of all names and of the bytes of 1,024 evenly spaced files (all of them where there are fewer)."""
        digest = hashlib.blake2b(digest_size=32)
        digest.update(repr((self._metadata.feature_shape, self._options.image_resize)).encode())
        digest.update("\0".join(self._metadata.class_names or ()).encode(errors="surrogateescape"))
        for part in (self._names.blob, self._names.offsets.tobytes(), self._starts.tobytes()):
            digest.update(hashlib.blake2b(part).digest())
        for index in np.unique(np.linspace(0, len(self) - 1, SAMPLED_ROWS).astype(np.int64)):
            digest.update(hashlib.blake2b(self._bytes(int(index))[1]).digest())
        return digest.digest()

    def _label(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _bytes(self, index: int) -> tuple[Path, bytes]:
        assert self._metadata.class_names is not None
        path = self._root / self._metadata.class_names[self._label(index)] / os.fsdecode(self._names[index])
        try:
            return path, path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path} cannot be read ({error}): the folder must not change while it is in use, and the disk must be "
                "there"
            ) from error

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        path, data = self._bytes(index)
        try:
            return self._decode(data), self._label(index)
        except CorruptExample as error:
            raise CorruptExample(f"{path}: {error}") from error


def _class_folders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        folders = sorted((entry.name for entry in visible if entry.is_dir()), key=os.fsencode)
        files = sorted(entry.name for entry in visible if not entry.is_dir())
    images = [file for file in files if os.fsencode(file).lower().endswith(EXTENSIONS)]
    if images:
        raise InputError(
            f"{root} holds the image {images[0]} outside of any class: move images into one folder for each class"
        )
    if not folders:
        raise InputError(f"{root} has no class folders: images go into ROOT/CLASS/IMAGE.jpg")
    return folders


def _images(folder: Path) -> list[bytes]:
    """The names of a class's images, sorted; anything else in there is an error, since skipping it is a choice."""
    names = []
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if not entry.name.lower().endswith(EXTENSIONS) or not entry.is_file():
                raise InputError(
                    f"{folder} holds {os.fsdecode(entry.name)}, which is no image file: a class "
                    "folder holds images only. "
                    "Move it elsewhere"
                )
            names.append(entry.name)
    return sorted(names)
