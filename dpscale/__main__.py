"""`dpscale` and `python -m dpscale`: errors as one message with an exit code; a traceback only with --debug."""

from __future__ import annotations

import os
import sys

from dpscale.errors import DpscaleError


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 75 saved and wants to be started again, else a crash."""
    # pydantic would look for its plugins in the metadata of every installed package, here and in each task.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from dpscale.cli import command_line

    try:
        code = command_line(sys.argv[1:])(standalone_mode=False)
    except DpscaleError as error:
        if "--debug" in sys.argv:
            raise
        print(f"dpscale: {error}", file=sys.stderr)
        code = error.exit_code
    except Exception as error:
        code = _usage_error(error)
    sys.stdout.flush()
    sys.exit(code or 0)


def _usage_error(error: Exception) -> int:
    """Click's own errors (unknown option, missing argument) in our form; anything else is a crash and goes on."""
    show = getattr(error, "format_message", None)
    if show is not None:
        print(f"dpscale: {show()} (see `dpscale --help`)", file=sys.stderr)
        return 2
    if type(error).__name__ == "Abort":
        return 130
    raise error


if __name__ == "__main__":
    main()
