"""Where examples come from: sources of rows, the loader that brings them to the step, device-side
transforms."""

from dpscale.data.open import as_source as as_source
from dpscale.data.open import open_source as open_source
from dpscale.data.source import ExampleSource as ExampleSource
from dpscale.data.source import SourceMetadata as SourceMetadata
