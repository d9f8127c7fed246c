"""Logits of Objax's ResNet v2 with GroupNorm, for weights that a formula gives, in dp-imagenet's own file format.

    .venv-objax/bin/python benchmarks/peers/models_objax.py [--out tests/golden/models.json]

Runs in an environment of its own: jax 0.4.13 and jaxlib 0.4.13 (Objax needs that old ones), objax 1.7.0, six, NumPy
1.25. Adds to the file that benchmarks/peers/models_reference.py writes; the formula is the same.
"""

# pyright: reportMissingImports=false
import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jn
import numpy as np
import objax
from objax.zoo.resnet_v2 import ResNetV2

CLASSES, SIDE = 5, 64


def weight(leaf: int, shape: tuple[int, ...]) -> np.ndarray:
    """As in models_reference.py."""
    index = np.arange(math.prod(shape), dtype=np.int64)
    values = ((index * 7919 + leaf * 104_729 + index // 13) % 1009 - 504) / 1680.0
    return values.reshape(shape).astype(np.float32)


def golden(bottleneck: bool) -> dict[str, Any]:
    # As ResNet18 and ResNet50 set them, with fewer blocks.
    options: dict[str, Any] = (
        {"blocks_per_group": (1, 1, 1, 1), "group_strides": (2, 2, 2, 1)}
        if bottleneck
        else {
            "blocks_per_group": (1, 2, 1, 1),
            "channels_per_group": (64, 128, 256, 512),
            "group_use_projection": (False, True, True, True),
        }
    )
    model = ResNetV2(3, CLASSES, bottleneck=bottleneck, normalization_fn=objax.nn.GroupNorm2D, **options)
    leaves = model.vars()
    shapes = {name: tuple(leaves[name].value.shape) for name in sorted(leaves.keys())}
    for number, name in enumerate(shapes):
        leaves[name].assign(jn.array(weight(number, shapes[name])))
    image = 3 * weight(1000, (SIDE, SIDE, 3))
    logits = np.asarray(model(image.transpose(2, 0, 1)[None], training=False))[0]
    return {
        "shapes": {name: list(s) for name, s in shapes.items()},
        "logits": np.round(logits.astype(float), 6).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/golden/models.json"))
    out = parser.parse_args().out
    whole = json.loads(out.read_text()) if out.exists() else {}
    for name, bottleneck in (("objax_basic", False), ("objax_bottleneck", True)):
        whole[name] = golden(bottleneck)
        print(name, whole[name]["logits"])
    lines = [f"{json.dumps(name)}: {json.dumps(whole[name])}" for name in sorted(whole)]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
