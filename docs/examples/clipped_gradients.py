"""The clipped sum alone: exact per-example clipping of any JAX loss, to build your own training step on."""

import jax
import jax.numpy as jnp

import dpscale


def loss(params, example):
    features, label = example
    return jnp.square(jnp.tanh(features @ params["w"]) @ params["v"] - label)


def main():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], (8, 16)), "v": jax.random.normal(keys[1], (16,))}
    batch = (jax.random.normal(keys[2], (32, 8)), jax.random.normal(keys[3], (32,)))
    mask = jnp.arange(32) < 30  # the last two rows are padding: they contribute exactly zero

    clipped = jax.jit(dpscale.clipped_grad(loss, clip_norm=1.0))
    out = clipped(params, batch, mask)
    print({name: leaf.shape for name, leaf in out.grad_sum.items()})
    print(f"{int((out.norms > 1).sum())} of {int(mask.sum())} examples were clipped (a sensitive number)")
    return out


if __name__ == "__main__":
    main()
