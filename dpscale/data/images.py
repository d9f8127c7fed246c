"""Compressed images to uint8 pixels of one constant size."""

import io

import numpy as np

from dpscale.data.corrupt import CorruptExample
from dpscale.data.extras import needs
from dpscale.data.options import SourceOptions
from dpscale.errors import InputError

# Modes with more than 8 bits a channel: turning them into 8 bits would need a scale, which the data must not give.
_WIDE_MODES = ("I", "F")


class ImageDecoder:
    """`decoder(data) -> uint8[size, size, 3]`: RGB, shorter side `image_resize`, centre crop to `image_size`.

    Depends on the bytes and on constants alone. Pillow decodes outside of Python's lock, so threads help. Orientation
    tags are left alone. Large JPEGs are decoded at a fraction of their size, never below twice the target.

    Raises: InputError without data.image_size or without Pillow; when called, CorruptExample for bytes that are no
    whole image, or one of more than 8 bits a channel.
    """

    def __init__(self, options: SourceOptions, what: str):
        if options.image_size is None:
            raise InputError(
                f"{what} holds compressed images, and every example must have one constant size: set data.image_size, "
                "for example to 224"
            )
        self._image = needs("PIL.Image", "images", what)
        self._size = options.image_size
        self._resize = options.image_resize or options.image_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of every decoded image."""
        return (self._size, self._size, 3)

    def __call__(self, data: bytes) -> np.ndarray:
        """One image."""
        try:
            with self._image.open(io.BytesIO(data)) as image:
                if image.mode.partition(";")[0] in _WIDE_MODES:
                    raise CorruptExample(
                        f"an image of mode {image.mode}, more than 8 bits a channel: store 8-bit images"
                    )
                image.draft("RGB", (2 * self._resize, 2 * self._resize))
                whole = image.convert("RGB")
        except CorruptExample:
            raise
        except self._image.UnidentifiedImageError as error:  # its text is the address of a buffer
            raise CorruptExample("no whole image: of no format that Pillow reads") from error
        # Pillow's decoders raise nearly anything on bad bytes: OSError, SyntaxError, ValueError, struct.error, ..
        except Exception as error:
            raise CorruptExample(f"no whole image: {error or type(error).__name__}") from error
        width, height = whole.size
        side = min(width, height) * self._size / self._resize
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        square = whole.resize((self._size, self._size), self._image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        return np.asarray(square, np.uint8)
