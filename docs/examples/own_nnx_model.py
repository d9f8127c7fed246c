"""The same with a flax nnx module: give the module itself, or a function that makes it from random keys."""

from flax import nnx
from sklearn.datasets import load_digits

import dpscale

CONFIG = {
    "data": {"num_classes": 10, "validation_is": "public"},
    "optimizer": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9},
    "training": {"steps": 40},
    "privacy": {"noise_multiplier": 2.0, "delta": 1e-4, "clip_norm": 1.0, "expected_batch_size": 256},
}


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.tanh(self.norm(self.hidden(x))))


def main(run_dir="runs/own-nnx-model"):
    features, labels = load_digits(return_X_y=True)
    features = (features / 16).astype("float32")
    result = dpscale.train(
        dpscale.RunConfig.model_validate(CONFIG),
        run_dir=run_dir,
        model=Classifier,
        train_data=(features[:1500], labels[:1500]),
        validation_data=(features[1500:], labels[1500:]),
    )
    print(f"accuracy {result.validation['accuracy']:.3f} at epsilon {result.epsilon:.2f}")
    return result


if __name__ == "__main__":
    main()
