"""One training of benchmarks/utility.py by Opacus' PrivacyEngine; that file starts it, once for each seed.

    .venv-peers/bin/python benchmarks/peers/utility_opacus.py recipe.npz '{"seed": 0, ..}'

Runs in an environment of its own (torch, opacus; neither jax nor dpscale). The archive holds the data and the initial
weights of the flax network by their names. The last line that it prints is JSON: accuracy, epsilon by the PRV
accountant, versions.
"""

# pyright: reportMissingImports=false
import json
import sys
import warnings

import numpy as np
import opacus
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class TanhCNN(nn.Module):
    """dpscale's `cnn`: the same paddings, and the dense layer reads height, width, channel in flax's order."""

    def __init__(self, weights: dict[str, np.ndarray]):
        super().__init__()
        self.conv0 = nn.Conv2d(1, 16, 8, stride=2, padding=3)
        self.conv1 = nn.Conv2d(16, 32, 4, stride=2)
        self.dense0, self.dense1 = nn.Linear(512, 32), nn.Linear(32, 10)
        names = {"Conv_0": self.conv0, "Conv_1": self.conv1, "Dense_0": self.dense0, "Dense_1": self.dense1}
        with torch.no_grad():
            for name, layer in names.items():
                kernel = torch.from_numpy(weights[f"{name}.kernel"])
                layer.weight.copy_(kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T)
                layer.bias.copy_(torch.from_numpy(weights[f"{name}.bias"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(torch.tanh(self.conv0(x)), 2, 1)
        x = F.max_pool2d(torch.tanh(self.conv1(x)), 2, 1)
        x = torch.tanh(self.dense0(x.permute(0, 2, 3, 1).flatten(1)))
        return self.dense1(x)


def tensors(arrays: dict[str, np.ndarray], split: str) -> TensorDataset:
    features = torch.from_numpy(arrays[f"{split}.features"]).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(features, torch.from_numpy(arrays[f"{split}.labels"]).long())


def train(arrays: dict[str, np.ndarray], settings: dict[str, float]) -> dict[str, float]:
    torch.manual_seed(int(settings["seed"]))
    model = TanhCNN(arrays)
    optimizer = torch.optim.SGD(model.parameters(), settings["learning_rate"], settings["momentum"])
    engine = opacus.PrivacyEngine(accountant="prv")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(tensors(arrays, "train"), batch_size=int(settings["batch_size"])),
        noise_multiplier=settings["noise_multiplier"],
        max_grad_norm=settings["clip_norm"],
    )
    done = 0
    while done < settings["steps"]:
        for features, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(features), labels).backward()
            optimizer.step()
            done += 1
            if done == settings["steps"]:
                break
    features, labels = tensors(arrays, "held_out").tensors
    with torch.no_grad():
        accuracy = float((model(features).argmax(1) == labels).double().mean())
    return {"accuracy": accuracy, "epsilon": float(engine.get_epsilon(settings["delta"]))}


def main() -> None:
    warnings.filterwarnings("ignore")  # of hooks and of the missing secure generator
    with np.load(sys.argv[1]) as archive:
        result = train(dict(archive), json.loads(sys.argv[2]))
    print(json.dumps(result | {"opacus": opacus.__version__, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
