"""Eight virtual CPU devices, fixed before jax starts its backend, so that multi-device laws run everywhere."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Most of the suite's time is compilation. Workers, the processes that tests start, and the next run share what was
# compiled; the key of an entry holds the program, the flags and the versions.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

LEAST_SLURM_TESTS = 10  # where DPSCALE_REQUIRE_SLURM=1 says that they must run


def pytest_sessionfinish(session):
    """What was not tested on SLURM is said at the end, never skipped in silence; where it must be tested, it counts."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return

    def on_slurm(outcome):
        return [report for report in reporter.stats.get(outcome, []) if "tests/slurm/" in report.nodeid]

    passed = [report for report in on_slurm("passed") if report.when == "call"]
    option = session.config.option
    selected = option.markexpr not in ("", "slurm") or option.keyword or session.config.args_source.name == "ARGS"
    required = os.environ.get("DPSCALE_REQUIRE_SLURM") == "1" and not selected
    if required and len(passed) < LEAST_SLURM_TESTS:
        session.exitstatus = 1
        reporter.write_line(f"\n{len(passed)} tests on SLURM passed; {LEAST_SLURM_TESTS} must", red=True, bold=True)
    elif on_slurm("skipped"):
        reporter.write_line("")
        reporter.section("SLURM was NOT tested", sep="!", red=True, bold=True)
        reporter.line(
            f"{len(on_slurm('skipped'))} tests skipped; apt-get install -y slurm-wlm munge, then run them again"
        )
