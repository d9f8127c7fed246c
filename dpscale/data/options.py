"""SourceOptions: how a data set is to be read; constants that the user knows, never taken from the data."""

from dataclasses import dataclass, fields
from typing import Any, Literal

Format = Literal["auto", "arrays", "array_record", "image_folder", "parquet", "cifar", "tokens", "tsv"]


@dataclass(frozen=True)
class SourceOptions:
    """The keys of `[data]` that say how `data.train` and `data.validation` are read; see `DataSection`."""

    format: Format = "auto"
    features_key: str = "features"
    labels_key: str = "labels"
    num_classes: int | None = None
    image_size: int | None = None
    image_resize: int | None = None
    sequence_length: int | None = None
    vocabulary_size: int | None = None
    token_dtype: Literal["uint16", "uint32"] = "uint16"
    tokenizer: str = "bytes"
    on_corrupt: Literal["error", "replace"] = "error"

    @classmethod
    def from_config(cls, section: Any) -> "SourceOptions":
        """From a `[data]` section (`dpscale.sections.DataSection`)."""
        return cls(**{field.name: getattr(section, field.name) for field in fields(cls)})
