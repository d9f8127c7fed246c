"""Your own parameters and loss, written as plain JAX functions: private linear regression."""

import jax.numpy as jnp
import numpy as np

import dpscale

CONFIG = {
    "optimizer": {"name": "sgd", "learning_rate": 0.2},
    "training": {"steps": 60},
    "privacy": {"epsilon": 2.0, "delta": 1e-5, "clip_norm": 1.0, "expected_batch_size": 500},
}


def loss(params, example):
    """Squared error of one example; add a third argument to get a random key for each example."""
    prediction = params["slope"] @ example["features"] + params["intercept"]
    return jnp.square(prediction - example["label"])


def main(run_dir="runs/own-loss"):
    generator = np.random.default_rng(0)
    features = generator.uniform(-1, 1, (5000, 3)).astype("float32")
    truth = np.array([1.0, -0.5, 0.25], "float32")
    labels = features @ truth + 0.1
    result = dpscale.train(
        dpscale.RunConfig.model_validate(CONFIG),
        run_dir=run_dir,
        model={"slope": jnp.zeros(3), "intercept": jnp.zeros(())},
        loss=loss,
        train_data=(features, labels.astype("float32")),
    )
    print(f"slope {result.params['slope']}, truth {truth}, epsilon {result.epsilon:.2f}")
    return result


if __name__ == "__main__":
    main()
