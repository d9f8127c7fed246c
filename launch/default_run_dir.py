"""`python -m launch.default_run_dir -- CONFIG [section.key=value ...]`: where a run lives; slurm/train.sbatch asks."""

from __future__ import annotations

import sys
from pathlib import Path

from dpscale.config import load_config
from dpscale.errors import DpscaleError


def main() -> None:
    """Print the absolute path; exit code 2 and a message when the config is wrong."""
    config, *overrides = [word for word in sys.argv[1:] if word != "--"]
    try:
        print(Path("runs").absolute() / load_config(config, overrides).run.name)
    except DpscaleError as error:
        print(f"dpscale: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
