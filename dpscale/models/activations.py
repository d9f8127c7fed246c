"""Activation functions by name: what `model.activation` in a config may be."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpscale.errors import InputError

Activation = Callable[[jax.Array], jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
_TEMPERED = re.compile(r"tempered_sigmoid\(([0-9.]+),([0-9.]+),([0-9.]+)\)")


def activation(name: str) -> Activation:
    """The function called `name`: one of ACTIVATIONS, or `tempered_sigmoid(s,T,o)`, which is s * sigmoid(T x) - o.

    Tempered sigmoids are Papernot et al.'s (AAAI 2021, section 3); `tempered_sigmoid(2,2,1)` is tanh.
    Raises: InputError for another name.
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    found = _TEMPERED.fullmatch(name.replace(" ", ""))
    if found is None:
        raise InputError(
            f"model.activation={name!r} is unknown: choose {', '.join(ACTIVATIONS)}, or tempered_sigmoid(s,T,o) with "
            "three numbers"
        )
    scale, temperature, offset = (float(text) for text in found.groups())
    return lambda x: scale * jax.nn.sigmoid(temperature * x) - offset
