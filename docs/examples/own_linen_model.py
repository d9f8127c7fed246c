"""Your own flax linen module and your own arrays, trained with differential privacy."""

import flax.linen as nn
from sklearn.datasets import load_digits

import dpscale

CONFIG = {
    "data": {"num_classes": 10, "validation_is": "public"},
    "optimizer": {"name": "adam", "learning_rate": 0.01},
    "training": {"epochs": 5},
    "privacy": {"epsilon": 8.0, "delta": 1e-4, "clip_norm": 1.0, "expected_batch_size": 128},
}


class Classifier(nn.Module):
    """Sees ONE example, without a batch axis, so nothing can leak from one example to another."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64)(x.reshape(-1)))
        return nn.Dense(10)(x)


def main(run_dir="runs/own-linen-model"):
    features, labels = load_digits(return_X_y=True)
    features = (features / 16).astype("float32")
    result = dpscale.train(
        dpscale.RunConfig.model_validate(CONFIG),
        run_dir=run_dir,
        model=Classifier(),
        train_data=(features[:1500], labels[:1500]),
        validation_data=(features[1500:], labels[1500:]),
    )
    print(f"accuracy {result.validation['accuracy']:.3f} at epsilon {result.epsilon:.2f}")
    return result


if __name__ == "__main__":
    main()
