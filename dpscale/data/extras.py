"""Packages that only some formats need."""

import importlib
from types import ModuleType

from dpscale.errors import InputError


def needs(module: str, extra: str, what: str) -> ModuleType:
    """Import `module`, which the extra `extra` of dpscale installs and `what` needs.

    Raises: InputError with the pip line where it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"{what} needs the package {package}, which is not installed: pip install 'dpscale[{extra}]'"
        ) from error
