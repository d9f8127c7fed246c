"""Each law of privacy has its tests: every test that the table names exists, and pytest runs it."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest
from breaks import BREAKS, Break, planted
from law_table import TABLE, Law

TESTS = Path(__file__).resolve().parent.parent


@functools.cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / f"{file}.py").read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_the_table_has_all_laws_in_order():
    assert [law.row for law in TABLE] == list(range(1, 52))
    assert {law.severity for law in TABLE} == {"C", "T", "U"}
    assert len({law.law for law in TABLE}) == len(TABLE)


@pytest.mark.parametrize("law", TABLE, ids=lambda law: f"{law.row:02}")
def test_every_law_has_tests_that_exist(law: Law):
    assert law.tests
    for test in law.tests:
        file, name = test.split("::")
        assert name in functions(file), f"law {law.row} ({law.law}) names {test}, which is not there"


def test_every_law_has_its_break():
    rows = [plan.row for plan in BREAKS]
    assert rows == sorted(rows)
    assert sorted(set(rows)) == [law.row for law in TABLE]


@pytest.mark.parametrize("plan", BREAKS, ids=lambda plan: f"{plan.row:02}")
def test_every_break_still_fits_the_code_and_names_a_test_of_its_law(plan: Break):
    text = (TESTS.parent / "dpscale" / plan.file).read_text()
    assert planted(text, plan) != text
    assert plan.test.split("[")[0] in TABLE[plan.row - 1].tests


@pytest.mark.slow
def test_pytest_collects_every_test_of_the_table():
    named = sorted(
        {f"tests/{file}.py::{name}" for law in TABLE for file, name in [test.split("::") for test in law.tests]}
    )
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *named]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    collected = {line.split("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == set(named)
