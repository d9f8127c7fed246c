"""Opacus' clipping on the architectures of benchmarks/clipping_models.py, in PyTorch, next to its own plain SGD.

    PYTHONPATH=. .venv-peers/bin/python benchmarks/peers/clipping_opacus.py [MODEL ...] [--repeats 5]

Runs in an environment of its own (torch, opacus; no jax, and of dpscale only what times turns and describes the
machine). "hooks" is GradSampleModule with per-sample gradients that are then clipped and summed; "ghost" is
GradSampleModuleFastGradientClipping with its two backward passes. Times are medians of steps taken in turn, without the
optimizer. Writes benchmarks/results/clipping-opacus-MODEL.json. A model that Opacus refuses is recorded with its
message.
"""

# pyright: reportMissingImports=false
import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import opacus
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from machine import machine

from dpscale.turns import in_turn

RESULTS = Path(__file__).parent.parent / "results"


def conv(width_in: int, width: int, kernel: int = 3, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, kernel, stride, kernel // 2, bias=bias)


class CNN(nn.Sequential):
    def __init__(self):
        layers: list[nn.Module] = []
        for a, b in ((3, 32), (32, 64), (64, 128)):
            layers += [conv(a, b), nn.GroupNorm(8, b), nn.ReLU(), nn.AvgPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))


class MLP(nn.Sequential):
    def __init__(self):
        widths = [3072, 1024, 1024, 1024, 1024]
        layers = [x for a, b in itertools.pairwise(widths) for x in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(nn.Flatten(), *layers, nn.Linear(1024, 10))


class ResidualBlock(nn.Module):
    def __init__(self, a: int, b: int, stride: int, first: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(16, a), nn.GroupNorm(16, b)
        self.conv1, self.conv2 = conv(a, b, 3, stride, False), conv(b, b, 3, 1, False)
        self.skip = conv(a, b, 1, stride, False) if first else None

    def forward(self, x):
        h = F.relu(self.norm1(x))
        x = x if self.skip is None else self.skip(h)
        return x + self.conv2(F.relu(self.norm2(self.conv1(h))))


class WideResNet(nn.Module):
    def __init__(self):
        super().__init__()
        widths, layers = [16, 64, 128, 256], [conv(3, 16, bias=False)]
        for stage, (a, b) in enumerate(itertools.pairwise(widths)):
            layers.append(ResidualBlock(a, b, 2 if stage else 1, True))
            layers.append(ResidualBlock(b, b, 1, False))
        self.body, self.norm, self.head = nn.Sequential(*layers), nn.GroupNorm(16, 256), nn.Linear(256, 10)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.body(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ViT(nn.Module):
    """Without the position embedding, a bare parameter, for which Opacus has no rule."""

    def __init__(self, patch: int = 4):
        super().__init__()
        self.patch = nn.Conv2d(3, 192, patch, patch)
        self.blocks = nn.Sequential(*(Block(192, 3) for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(192), nn.Linear(192, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class LanguageModel(nn.Module):
    """Its output layer is not tied to the embedding (Opacus has no tied weights) and it has no position embedding."""

    def __init__(self, depth: int = 4):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 256), nn.Linear(256, 256, bias=False)
        self.blocks, self.norm = nn.Sequential(*(Block(256, 4, True) for _ in range(depth))), nn.LayerNorm(256)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids))))


IMAGES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "mlp": (MLP, 64, 32),
    "cnn": (CNN, 64, 32),
    "wrn-16-4": (WideResNet, 16, 32),
    "vit-tiny-4": (ViT, 16, 32),
    "vit-tiny-16": (lambda: ViT(patch=16), 6, 224),
}
TEXTS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "lm-128": (LanguageModel, 16, 128),
    "lm-1024": (LanguageModel, 2, 1024),
    "scan-lm": (lambda: LanguageModel(depth=6), 16, 128),  # PyTorch has no loop over layers: a stack
}
NAMES = [*IMAGES, *TEXTS]


def workload(name: str) -> tuple[Callable[[], nn.Module], torch.Tensor, torch.Tensor]:
    """How the named model is made, and random inputs and targets."""
    if name in IMAGES:
        make, batch, side = IMAGES[name]
        return make, torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))
    make, batch, length = TEXTS[name]
    text = torch.randint(0, 256, (batch, length + 1))
    return make, text[:, :-1].contiguous(), text[:, 1:].contiguous()  # Opacus takes views of them


def example_losses(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
    return losses.view(y.shape[0], -1).mean(1)


def sgd_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    def step():
        model.zero_grad(set_to_none=True)
        example_losses(model(x), y).sum().backward()

    return step


def hooks_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    wrapped = GradSampleModule(model, loss_reduction="sum")

    def step():
        wrapped.zero_grad(set_to_none=True)
        example_losses(wrapped(x), y).sum().backward()
        samples = [p.grad_sample for p in wrapped.parameters()]
        norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples]).norm(dim=0)
        factor = (1 / norms.clamp(min=1e-6)).clamp(max=1)
        for p, sample in zip(wrapped.parameters(), samples, strict=True):
            p.grad, p.grad_sample = torch.einsum("b,b...->...", factor, sample), None

    return step


class _Clipped:
    """What DPLossFastGradientClipping wants of an optimizer."""

    expected_batch_size = 1
    loss_reduction = "sum"

    def __init__(self, module: nn.Module):
        self.module = module

    def zero_grad(self):
        self.module.zero_grad(set_to_none=True)


def ghost_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=1.0, use_ghost_clipping=True, loss_reduction="sum"
    )
    positions = y.numel() // y.shape[0]
    criterion = nn.CrossEntropyLoss(reduction="sum")
    loss = DPLossFastGradientClipping(wrapped, _Clipped(wrapped), criterion, loss_reduction="sum")

    def step():
        wrapped.zero_grad(set_to_none=True)
        logits = wrapped(x)
        if positions == 1:
            loss(logits, y).backward()
        else:
            loss(logits.flatten(0, 1), y.flatten(), shape=y.shape).backward()

    return step


def measure(name: str, repeats: int) -> dict[str, Any]:
    make, x, y = workload(name)
    steps, report = {}, {}
    for method, build in {"sgd": sgd_step, "hooks": hooks_step, "ghost": ghost_step}.items():
        torch.manual_seed(0)
        try:
            step = build(make(), x, y)
            step()
        except Exception as error:  # a refusal is a result
            report[method] = {"refused": f"{type(error).__name__}: {error}"[:300]}
            continue
        steps[method] = step
    times = in_turn(steps, repeats)
    base = statistics.median(times["sgd"])
    for method, seen in times.items():
        median = statistics.median(seen)
        report[method] = {"time_s": median, "fastest_s": min(seen), "slowest_s": max(seen), "times_sgd": median / base}
    return {"model": name, "batch": x.shape[0], "methods": report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=NAMES, metavar="MODEL", help=", ".join(NAMES))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    about = {"machine": machine(), "torch": torch.__version__, "opacus": opacus.__version__}
    for name in arguments.models:
        result = measure(name, arguments.repeats)
        for method, x in result["methods"].items():
            print(name, method, x.get("refused") or f"{x['time_s'] * 1e3:.1f} ms  x{x['times_sgd']:.2f}", flush=True)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"clipping-opacus-{name}.json").write_text(json.dumps(about | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
