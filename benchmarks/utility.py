"""Held-out accuracy of one recipe in dpscale, JAX Privacy and Opacus: `make bench-peers`, ten minutes on two cores.

    python benchmarks/utility.py [--seeds 5] [--opacus-python .venv-peers/bin/python]

The recipe is configs/quickstart.toml with a batch of 500 expected of the 4,500 digits, so that Opacus' sampling rate,
one over a whole number, is the same: same tanh CNN, same initial weights for each seed, Poisson sampling, clip norm,
SGD with momentum, steps. All three take the noise multiplier that dpscale calibrates to epsilon 3 at delta 1e-5, and
each says what epsilon its own accountant gives it. Each draws its own batches and noise.

Writes benchmarks/results/utility.json: every accuracy, means, standard deviations over the seeds, and each difference
from dpscale with its standard error. Two libraries agree where it is within run-to-run noise: the 95 % interval of the
difference (Welch, 1947) holds zero.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_privacy import accounting, batch_selection, clipping, noise_addition
from machine import machine
from scipy import stats

import dpscale
from dpscale.config import RunConfig, load_config
from dpscale.data.open import open_source
from dpscale.models import as_functional, build_model
from dpscale.models.leaves import named
from dpscale.privacy.plan import PrivacyPlan

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "utility.json"
OVERRIDES = (
    "privacy.expected_batch_size=500",
    "privacy.verify=false",
    "training.steps=80",
    "training.evaluate_every_steps=0",
    "performance.physical_batch_size=250",
)
PHYSICAL_BATCH = 250  # of JAX Privacy's sums too
CONFIDENCE = 0.95


class Recipe:
    """What all libraries share: data in [0, 1], model, plan, and the initial weights of a seed."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.train, self.held_out = (_arrays(f"mnist5k/{split}") for split in ("train", "validation"))
        self.plan = PrivacyPlan.from_config(config, num_examples=len(self.train[1]))
        self.model = build_model(config.model.name, 10)

    def initial(self, seed: int) -> Any:
        """The parameters that dpscale starts from with run.seed = seed."""
        return as_functional(self.model, jax.ShapeDtypeStruct((28, 28, 1), jnp.float32), seed=seed).params

    def loss(self, params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Cross entropy of one example."""
        features, label = example
        logits = self.model.apply({"params": params}, features)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)  # pyright: ignore[reportArgumentType]

    def accuracy(self, params: Any) -> float:
        """On the 500 held-out digits."""
        features, labels = self.held_out
        logits: Any = jax.vmap(lambda x: self.model.apply({"params": params}, x))(features)
        return float(np.mean(np.argmax(logits, -1) == labels))


def _arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(float32[N, 28, 28, 1] in [0, 1], int32[N])."""
    source = open_source(name, num_classes=10)
    rows = source.rows(np.arange(len(source)))
    return rows["features"].astype(np.float32) / 255.0, rows["label"].astype(np.int32)


def train_dpscale(recipe: Recipe, seed: int) -> float:
    config = recipe.config.model_copy(update={"run": recipe.config.run.model_copy(update={"seed": seed})})
    with tempfile.TemporaryDirectory() as folder:
        result = dpscale.train(config, run_dir=Path(folder) / "run", report=lambda line: None, progress=False)
    return result.validation["accuracy"]


def train_jax_privacy(recipe: Recipe, seed: int) -> float:
    plan, optimizer = recipe.plan, recipe.config.optimizer
    assert plan.clip_norm is not None
    features, labels = map(jnp.asarray, recipe.train)
    clipped = clipping.clipped_grad(
        recipe.loss,
        l2_clip_norm=plan.clip_norm,
        normalize_by=plan.expected_batch_size,
        keep_batch_dim=False,
    )
    noise = noise_addition.gaussian_privatizer(
        stddev=clipped.sensitivity() * plan.noise_multiplier,  # of the mean: normalize_by is in it
        prng_key=jax.random.key(seed),
    )
    rule = optax.chain(noise, optax.sgd(optimizer.learning_rate, momentum=optimizer.momentum))

    @jax.jit
    def accumulate(params: Any, total: Any, rows: jax.Array) -> Any:
        batch = (features[rows], labels[rows])
        return jax.tree.map(jnp.add, total, clipped(params, batch, is_padding_example=rows < 0))

    @jax.jit
    def update(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = rule.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    sampling = batch_selection.CyclicPoissonSampling(sampling_prob=plan.sampling_rate, iterations=plan.steps)
    params = recipe.initial(seed)
    state, zeros = rule.init(params), jax.tree.map(jnp.zeros_like, params)
    for indices in sampling.batch_iterator(plan.num_examples, rng=seed):
        total = zeros
        for rows in batch_selection.split_and_pad_global_batch(indices, PHYSICAL_BATCH):
            total = accumulate(params, total, rows)
        params, state = update(params, state, total)
    return recipe.accuracy(params)


def train_opacus(recipe: Recipe, seed: int, *, python: Path, said: dict[str, Any]) -> float:
    """In a process of Opacus' own environment; `said` keeps what it tells of itself."""
    plan, optimizer = recipe.plan, recipe.config.optimizer
    settings = {
        "seed": seed,
        "steps": plan.steps,
        "batch_size": round(plan.expected_batch_size),
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": plan.clip_norm,
        "delta": plan.delta,
        "learning_rate": optimizer.learning_rate,
        "momentum": optimizer.momentum,
    }
    arrays = {name.replace("/", "."): np.asarray(leaf) for name, leaf in named(recipe.initial(seed)).items()}
    for split, (features, labels) in (("train", recipe.train), ("held_out", recipe.held_out)):
        arrays |= {f"{split}.features": features, f"{split}.labels": labels}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "recipe.npz", **arrays)  # pyright: ignore[reportArgumentType]
        script = ROOT / "benchmarks" / "peers" / "utility_opacus.py"
        command = [str(python), str(script), str(Path(folder) / "recipe.npz"), json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    said |= {key: answer[key] for key in ("opacus", "torch", "epsilon")}
    return answer["accuracy"]


def jax_privacy_epsilon(plan: PrivacyPlan) -> float:
    accountant = accounting.DpsgdTrainingAccountant(accounting.PldAccountantConfig())
    assert plan.delta is not None
    parameters = accounting.DpParams(
        noise_multipliers=plan.noise_multiplier,
        num_samples=plan.num_examples,
        delta=plan.delta,
        batch_size=round(plan.expected_batch_size),
    )
    return float(accountant.compute_epsilon(plan.steps, parameters))


def against(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How far two lists of accuracies are apart, and whether that is within run-to-run noise."""
    interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(CONFIDENCE)
    return {
        "difference": statistics.mean(ours) - statistics.mean(theirs),
        "interval_95": [float(interval.low), float(interval.high)],
        "within_run_to_run_noise": bool(interval.low <= 0 <= interval.high),
    }


def measure(trainers: dict[str, Callable[[Recipe, int], float]], recipe: Recipe, seeds: int) -> dict[str, list[float]]:
    """Each trainer's held-out accuracy for each seed; they take turns."""
    seen: dict[str, list[float]] = {name: [] for name in trainers}
    for seed in range(seeds):
        for name, trainer in trainers.items():
            begin = time.perf_counter()
            seen[name].append(trainer(recipe, seed))
            took = time.perf_counter() - begin
            print(f"seed {seed}  {name:<12} {100 * seen[name][-1]:.1f} %  {took:.0f} s", flush=True)
    return seen


def summary(seen: dict[str, list[float]], epsilons: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Mean, spread and epsilon of each library, and what it differs from dpscale; printed too."""
    libraries: dict[str, dict[str, Any]] = {}
    for name, accuracies in seen.items():
        mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
        libraries[name] = {"mean": mean, "standard_deviation": spread, "accuracies": accuracies}
        libraries[name]["epsilon_by_its_own_accountant"] = epsilons[name]
        line = f"{name:<12} {100 * mean:.2f} % +- {100 * spread:.2f}  epsilon {epsilons[name]:.3f}"
        if name != "dpscale":
            libraries[name]["dpscale_against_it"] = apart = against(seen["dpscale"], accuracies)
            low, high = (100 * bound for bound in apart["interval_95"])
            line += f"  dpscale is {low:+.2f} to {high:+.2f} points from it"
        print(line, flush=True)
    return libraries


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    plan = recipe.plan
    return {
        "examples": plan.num_examples,
        "held_out": len(recipe.held_out[1]),
        "expected_batch_size": plan.expected_batch_size,
        "sampling_rate": plan.sampling_rate,
        "steps": plan.steps,
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": plan.clip_norm,
        "delta": plan.delta,
        "optimizer": recipe.config.optimizer.model_dump(exclude_none=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--opacus-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: a spread needs at least 2")
    if not arguments.opacus_python.exists():
        parser.error(f"{arguments.opacus_python} does not exist: `make bench-peers` makes it, or give --opacus-python")
    recipe, said = Recipe(load_config(ROOT / "configs" / "quickstart.toml", OVERRIDES)), {}
    train_by_opacus = partial(train_opacus, python=arguments.opacus_python, said=said)
    trainers = {"dpscale": train_dpscale, "jax_privacy": train_jax_privacy, "opacus": train_by_opacus}
    seen = measure(trainers, recipe, arguments.seeds)
    plan = recipe.plan
    ours, theirs = plan.epsilon_after(plan.steps), jax_privacy_epsilon(plan)
    assert ours is not None
    libraries = summary(seen, {"dpscale": ours, "jax_privacy": theirs, "opacus": said["epsilon"]})
    versions = {"jax_privacy": version("jax_privacy"), "opacus": said["opacus"], "torch": said["torch"]}
    record = {"machine": machine(), "versions": versions, "recipe": recipe_facts(recipe), "libraries": libraries}
    if not arguments.no_write:
        RESULT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
