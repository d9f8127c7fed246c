"""The errors that dpscale raises on purpose. Each message says what was seen, the rule, and the remedy."""

import difflib
from collections.abc import Sequence


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """'did you mean .. or ..? ' with up to three of `known` that are close to `word`, for a message; '' if none is."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}? " if close else ""


class DpscaleError(Exception):
    """Base of every error that dpscale raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class InputError(DpscaleError, ValueError):
    """What the user gave (config, data, arguments) cannot be used as it is. Exit code 2."""

    exit_code = 2


class RunDirectoryError(InputError):
    """The run directory belongs to another run, cannot be written, or holds no usable state."""


class PrivacyError(DpscaleError):
    """Going on would make the privacy statement untrue, so the run stops."""


class DivergedError(PrivacyError):
    """Processes that must agree bit for bit (draws, keys, parameters) do not."""


class VerificationError(PrivacyError):
    """A law of the step does not hold on these processes and devices; no step was charged."""
