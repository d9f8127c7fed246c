"""Law 2: jax.random.key(int) keeps 32 bits of its seed, so nothing in dpscale makes a key from an integer."""

from __future__ import annotations

import ast
from pathlib import Path

import jax

import dpscale

FROM_INTEGERS = {"key", "PRNGKey"}


def keys_from_integers(text: str) -> list[int]:
    """Lines that call jax.random.key or PRNGKey, under whatever name jax.random goes."""
    tree = ast.parse(text)
    bare = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jax.random"
        for alias in node.names
        if alias.name in FROM_INTEGERS
    }
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jax"
        for alias in node.names
        if alias.name == "random"
    } | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "jax.random" and alias.asname
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        owner, _, last = name.rpartition(".")
        if name in bare or (last in FROM_INTEGERS and owner in modules | {"jax.random"}):
            found.append(node.lineno)
    return found


def test_no_key_is_made_from_an_integer_of_32_bits():
    assert (jax.random.key_data(jax.random.key(5)) == jax.random.key_data(jax.random.key(5 + 2**32))).all()
    for planted in (
        "import jax\njax.random.key(0)",
        "import jax\njax.random.PRNGKey(s)",
        "from jax import random\nrandom.key(0)",
        "from jax.random import key as make\nmake(0)",
        "import jax.random as jr\njr.key(1)",
    ):
        assert keys_from_integers(planted) == [2], planted
    package = Path(dpscale.__file__).parent
    found = {file.name: keys_from_integers(file.read_text()) for file in package.rglob("*.py")}
    assert len(found) > 50
    assert not {name: lines for name, lines in found.items() if lines}
