"""Poisson sampling as a pure function of key and step: the same on every machine, in O(expected batch)."""

import dpscale


def main():
    key = bytes(range(32))  # in a run: derived from the secret; here a constant, so that you see the same draw
    sampler = dpscale.PoissonSampler(num_examples=1_000_000_000, sampling_rate=2.5e-8, key=key)
    for step in range(3):
        draw = sampler.indices(step)
        print(f"step {step}: {len(draw)} examples {draw[:3]} ..")
    return sampler.indices(0)


if __name__ == "__main__":
    main()
