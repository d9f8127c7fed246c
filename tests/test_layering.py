"""Imports point one way, and the parts that a login node runs start without jax."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each layer may import from those before it, and from itself.
LAYERS = [
    ["dpscale.errors", "dpscale.durable", "dpscale.manifest", "dpscale.turns", "dpscale.weights"],
    ["dpscale.sections"],
    ["dpscale.config"],
    ["dpscale.privacy"],
    ["dpscale.sampling"],
    ["dpscale.batching"],
    ["dpscale.data"],
    ["dpscale.models", "dpscale.losses"],
    ["dpscale.clipping", "dpscale.baseline"],
    ["dpscale.chacha"],
    ["dpscale.noise"],
    ["dpscale.mesh", "dpscale.state", "dpscale.optimizer", "dpscale.stopping", "dpscale.watchdog"],
    ["dpscale.rollcall", "dpscale.slurm"],
    ["dpscale.distributed"],
    ["dpscale.placement"],
    ["dpscale.observe"],
    ["dpscale.shard_update"],
    ["dpscale.step", "dpscale.replicas", "dpscale.run_directory", "dpscale.lease", "dpscale.program"],
    ["dpscale.feed", "dpscale.loop", "dpscale.evaluate", "dpscale.checkpoint", "dpscale.task", "dpscale.metrics"],
    ["dpscale.gradients", "dpscale.restore", "dpscale.ranges"],
    ["dpscale.physical_batch"],
    ["dpscale.run_record"],
    ["dpscale.session", "dpscale.spending", "dpscale.search_cost"],
    ["dpscale.release_files"],
    ["dpscale.release"],
    ["dpscale.page"],
    ["dpscale.scaling"],
    ["dpscale.run_page", "dpscale.sweep_page"],
    ["dpscale.report"],
    ["dpscale.scaling.output"],
    ["dpscale.verify"],
    ["dpscale.train"],
    [
        "dpscale.estimate",
        "dpscale.plan_text",
        "dpscale.simulate",
        "dpscale.bench",
        "dpscale.audit",
        "dpscale.verify_config",
    ],
    ["dpscale.scaling.parts", "dpscale.scaling.bench", "dpscale.scaling.measure", "dpscale.scaling.in_task"],
    ["launch"],
    ["dpscale.scaling.job", "dpscale.scaling.by_hand"],
    ["dpscale.cli_cluster", "dpscale.cli_audit", "dpscale.cli_bench", "dpscale.cli_data", "dpscale.cli_privacy"],
    ["dpscale.cli_scaling"],
    ["dpscale.cli"],
    ["dpscale.__main__"],
]
WITHOUT_JAX = [
    "dpscale",
    "dpscale.config",
    "dpscale.sections",
    "dpscale.privacy.plan",
    "dpscale.privacy.secret",
    "dpscale.sampling",
]
WITHOUT_JAX += [
    "dpscale.privacy.accounting",
    "dpscale.privacy.ledger",
    "dpscale.manifest",
    "dpscale.spending",
    "dpscale.release",
    "dpscale.batching",
    "dpscale.cli",
    "dpscale.data.convert",
    "dpscale.data.inspection",
    "dpscale.data.open",
    "dpscale.report",
    "dpscale.scaling.by_hand",
    "dpscale.scaling.forecast",
    "dpscale.scaling.job",
    "dpscale.scaling.output",
    "launch.local",
]


def modules() -> dict[str, Path]:
    found = {}
    for package in ("dpscale", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer_of(module: str) -> int:
    owners = [
        (len(name), level)
        for level, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    assert owners, f"{module} is in no layer: add it to LAYERS in {Path(__file__).name}, where it belongs"
    return max(owners)[1]


def runtime_imports(tree: ast.AST) -> list[str]:
    """Modules that importing the file imports: not those under TYPE_CHECKING, and not those inside functions."""
    names = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module]
        names += runtime_imports(node)
    return names


def arrows_back(sources: dict[str, str]) -> list[str]:
    bad = []
    for module, text in sources.items():
        if module == "dpscale":
            continue  # the package itself imports nothing; it finds public names on first use
        for name in runtime_imports(ast.parse(text)):
            if name.split(".")[0] in ("dpscale", "launch") and layer_of(name) > layer_of(module):
                bad.append(f"{module} imports {name}")
    return bad


def test_no_import_points_back():
    assert arrows_back({module: path.read_text() for module, path in modules().items()}) == []


def test_an_arrow_that_points_back_is_found():
    assert arrows_back({"dpscale.sampling": "from dpscale.step import Rows"}) == [
        "dpscale.sampling imports dpscale.step"
    ]


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_importing_it_starts_no_jax(module):
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('jax', 'dp_accounting')) and 'jax is in')"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_file_imports_jax_internals():
    found = [module for module, path in modules().items() if "jax._src" in path.read_text()]
    assert found == []
