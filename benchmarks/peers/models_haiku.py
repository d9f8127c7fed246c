"""Logits of De et al.'s WideResNet in Haiku, their released code, for weights that a formula gives.

    git clone --branch v1.0.0 https://github.com/google-deepmind/jax_privacy /tmp/jax_privacy
    .venv-haiku/bin/python benchmarks/peers/models_haiku.py /tmp/jax_privacy [--out tests/golden/models.json]

Runs in an environment of its own: dm-haiku 0.0.16, jax 0.6.2, orbax-checkpoint (which that code imports). Adds to the
file that benchmarks/peers/models_reference.py writes; the formula is the same. Weights have dpscale's names, in whose
order the formula fills them; `haiku_name` says where each lies in theirs.
"""

# pyright: reportMissingImports=false
import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import numpy as np

CLASSES, SIDE, DEPTH, WIDTH = 5, 32, 16, 1
BLOCKS = (DEPTH - 4) // 6  # in each of three stages
WHOLE = {"stem": "First_conv", "norm": "Final_norm", "head": "Softmax"}

SKIP, PARTS = {"projection": "_skip_conv", "norm_projection": "_skip_norm"}, {"conv": "Conv", "norm": "_norm"}


def weight(leaf: int, shape: tuple[int, ...]) -> np.ndarray:
    """As in models_reference.py."""
    index = np.arange(math.prod(shape), dtype=np.int64)
    values = ((index * 7919 + leaf * 104_729 + index // 13) % 1009 - 504) / 1680.0
    return values.reshape(shape).astype(np.float32)


def haiku_name(name: str) -> tuple[str, str]:
    """dpscale's "blocks_3/conv_1/kernel" as their module and parameter, ("Block_2Conv_1_1", "w")."""
    *modules, leaf = name.split("/")
    if modules[0] in WHOLE:
        module = WHOLE[modules[0]]
    else:
        stage, place = divmod(int(modules[0].removeprefix("blocks_")), BLOCKS)
        kind, _, number = modules[1].partition("_")
        part = SKIP.get(modules[1]) or f"{PARTS[kind]}_{place}_{number}"
        module = f"Block_{stage + 1}{part}"
    bias = "b" if module == "Softmax" else "offset" if "norm" in module else "bias"
    return module, {"kernel": "w", "bias": bias}.get(leaf, leaf)


def dpscale_names() -> list[str]:
    """The leaves of dpscale's `wrn`, written out, so that this file needs no dpscale."""
    norm, conv = ("scale", "bias"), ("kernel", "bias", "gain")
    modules: dict[str, tuple[str, ...]] = {"stem": conv, "norm": norm, "head": ("kernel", "bias")}
    for block in range(3 * BLOCKS):
        parts = ["0", "1"] if block % BLOCKS else ["0", "1", "projection"]
        for part in parts:
            modules[f"blocks_{block}/{part if part == 'projection' else f'conv_{part}'}"] = conv
            modules[f"blocks_{block}/norm_{part}"] = norm
    return sorted(f"{module}/{leaf}" for module, leaves in modules.items() for leaf in leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the clone of jax_privacy v1.0.0")
    parser.add_argument("--out", type=Path, default=Path("tests/golden/models.json"))
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.source / "experiments"))
    from image_classification.models.cifar import WideResNet

    network = hk.without_apply_rng(
        hk.transform(lambda x: WideResNet(CLASSES, depth=DEPTH, width=WIDTH)(x, is_training=False))
    )
    image = 3 * weight(1000, (SIDE, SIDE, 3))[None]
    theirs = jax.eval_shape(network.init, jax.random.key(0), image)
    full = {re.sub(r".*/", "", module): module for module in theirs}
    filled: dict[str, dict[str, Any]] = {module: {} for module in theirs}
    shapes = {}
    for leaf, name in enumerate(dpscale_names()):
        module, parameter = haiku_name(name)
        shapes[name] = theirs[full[module]][parameter].shape
        filled[full[module]][parameter] = weight(leaf, shapes[name])
    assert {m: set(leaves) for m, leaves in filled.items()} == {m: set(leaves) for m, leaves in theirs.items()}
    logits = np.asarray(network.apply(filled, image))[0]
    whole = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    whole["wrn"] = {
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "logits": np.round(logits.astype(float), 6).tolist(),
    }
    print("wrn", whole["wrn"]["logits"])
    lines = [f"{json.dumps(name)}: {json.dumps(whole[name])}" for name in sorted(whole)]
    arguments.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
