"""What privacy costs, before anything runs."""

import dpscale

SETTING = {"sampling_rate": 1024 / 4500, "steps": 150, "delta": 1e-5}


def main():
    noise = dpscale.noise_multiplier(epsilon=3.0, **SETTING)
    print(f"epsilon 3 needs a noise multiplier of {noise:.3f}")
    for accountant in ("pld", "rdp"):
        epsilon = dpscale.epsilon(noise_multiplier=noise, accountant=accountant, **SETTING)
        print(f"which is epsilon {epsilon:.3f} by {accountant}")
    return noise


if __name__ == "__main__":
    main()
