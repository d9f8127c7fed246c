"""Scattering features, which nothing learns, and a linear classifier on them."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpscale.errors import InputError
from dpscale.models.registry import register, require_image

VARIANCE_FLOOR = 1e-6


@register("scattering")
class ScatteringLinear(nn.Module):
    """`scattering_features`, then one dense layer, which alone is trained: [.., H, W, C] -> float32[.., num_classes].

    Source: Tramer and Boneh, "Differentially Private Learning Needs Better Features (or Much More Data)" (ICLR 2021,
    arXiv 2011.11660). Here the layer starts at zero.
    """

    num_classes: int
    scales: int = 2
    angles: int = 8
    groups: int = 27
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        require_image(features, "scattering")
        x = scattering_features(features, self.scales, self.angles, self.groups).astype(self.dtype)
        zeros = nn.initializers.zeros_init()
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=zeros, name="head")(x).astype(jnp.float32)


def scattering_features(images: jax.Array, scales: int, angles: int, groups: int) -> jax.Array:
    """Scattering coefficients as one vector an image, each group of channels with mean 0 and variance 1.

    [.., H, W, C] -> float32[.., D], of length about sqrt(D): as long for a faint image as for a bright one, so that one
    clip norm suits all. An image's statistics are its own; no statistic of the data set enters.
    """
    x = scattering(jnp.moveaxis(images, -1, -3).astype(jnp.float32), scales, angles)
    x = jnp.moveaxis(x, -4, -2)  # [.., h, w, C, K]
    x = x.reshape(*x.shape[:-2], -1)
    if x.shape[-1] % groups:
        raise InputError(
            f"model.groups={groups} must divide the {x.shape[-1]} scattering channels of an example of shape "
            f"{images.shape[-3:]} with model.scales={scales} and model.angles={angles}"
        )
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    axes = (-4, -3, -1)
    x = (grouped - grouped.mean(axes, keepdims=True)) * jax.lax.rsqrt(grouped.var(axes, keepdims=True) + VARIANCE_FLOOR)
    return x.reshape(*x.shape[:-4], -1)


def scattering(images: jax.Array, scales: int, angles: int) -> jax.Array:
    """Scattering coefficients of orders 0, 1 and 2: float32[.., side, side] -> float32[.., h, w, K].

    h = w = side / 2**scales, rounded down; K = 1 + J L + J (J - 1) / 2 L**2 for J scales and L angles.
    Source: Bruna and Mallat 2013 (arXiv 1203.1513); wavelets, padding and order of the channels as in Kymatio
    (Andreux et al. 2020, arXiv 1812.11214).
    """
    side = images.shape[-1]
    if images.shape[-2] != side or side < 2 ** (scales + 1):
        raise InputError(
            f"model.name='scattering' with model.scales={scales} takes square images of at least {2 ** (scales + 1)} "
            f"pixels, but an example has {images.shape[-2]} x {side}"
        )
    padded = (side // 2**scales + 2) * 2**scales
    before = (padded - side) // 2
    margin = (before, padded - side - before)
    pixels = jnp.pad(images, [(0, 0)] * (images.ndim - 2) + [margin, margin], mode="reflect")
    low, wavelets = _filters(padded, scales, angles)

    def smooth(spectra: jax.Array, scale: int) -> jax.Array:
        """[.., m, m] -> [.., h, w], the angles' axes flattened."""
        small = _subsampled(spectra * _cropped(low, 2**scale), 2 ** (scales - scale))
        smoothed = jnp.fft.ifft2(small).real[..., 1:-1, 1:-1]
        return smoothed.reshape(*images.shape[:-2], -1, *smoothed.shape[-2:])

    def modulus(spectra: jax.Array, scale: int, by: int) -> jax.Array:
        """[.., m, m] -> [.., angles, n, n], n = m / 2**(by - scale): of |signal * wavelet| at scale `by`."""
        spectra = spectra[..., None, :, :] * _cropped(wavelets[by], 2**scale)
        return jnp.fft.fft2(jnp.abs(jnp.fft.ifft2(_subsampled(spectra, 2 ** (by - scale)))))

    spectrum = jnp.fft.fft2(pixels)
    first, second = [smooth(spectrum, 0)], []
    for scale in range(scales):
        inner = modulus(spectrum, 0, scale)
        first.append(smooth(inner, scale))
        coarser = range(scale + 1, scales)
        pairs = [smooth(modulus(inner, scale, other), other) for other in coarser]
        # The channels of one angle lie together, whatever scale follows it.
        split = [pair.reshape(*pair.shape[:-3], angles, -1, *pair.shape[-2:]) for pair in pairs]
        if split:
            both = jnp.concatenate(split, axis=-3)
            second.append(both.reshape(*both.shape[:-4], -1, *both.shape[-2:]))
    return jnp.moveaxis(jnp.concatenate(first + second, axis=-3), -3, -1)


def _subsampled(spectrum: jax.Array, factor: int) -> jax.Array:
    """The spectrum of every `factor`-th sample: the mean over what is aliased."""
    *batch, rows, columns = spectrum.shape
    folded = spectrum.reshape(*batch, factor, rows // factor, factor, columns // factor)
    return folded.mean(axis=(-4, -2))


def _cropped(spectrum: np.ndarray, factor: int) -> np.ndarray:
    """The lowest 1 / factor of the frequencies on the last two axes."""
    whole = spectrum.shape[-1]
    size = whole // factor
    kept = np.r_[: size // 2, whole - size + size // 2 : whole]
    return spectrum[..., kept[:, None], kept]


@lru_cache(maxsize=8)
def _filters(size: int, scales: int, angles: int) -> tuple[np.ndarray, np.ndarray]:
    """Spectra of the low pass, float32[size, size], and of the wavelets, float32[scales, angles, size, size]."""
    low = np.fft.fft2(_gabor(size, 0.8 * 2 ** (scales - 1), 0.0, 0.0, 1.0)).real
    wavelets = np.empty((scales, angles, size, size), np.float32)
    for scale in range(scales):
        for k in range(angles):
            turn = (angles // 2 - 1 - k) * np.pi / angles
            shape = (size, 0.8 * 2**scale, turn)
            wave, bump = (_gabor(*shape, frequency, 4 / angles) for frequency in (0.75 * np.pi / 2**scale, 0.0))
            wavelets[scale, k] = np.fft.fft2(wave - wave.sum() / bump.sum() * bump).real  # Morlet: its mean is zero
    return low.astype(np.float32), wavelets


def _gabor(size: int, sigma: float, turn: float, frequency: float, slant: float) -> np.ndarray:
    """A Gaussian, `slant` times as wide along its wave as across, times a plane wave: periodic complex[size, size]."""
    reach = np.arange(-2 * size, 3 * size)
    rows, columns = np.meshgrid(reach, reach, indexing="ij")
    along, across = rows * np.cos(turn) + columns * np.sin(turn), columns * np.cos(turn) - rows * np.sin(turn)
    envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    wave = envelope * np.exp(1j * frequency * along) * slant / (2 * np.pi * sigma**2)
    return wave.reshape(5, size, 5, size).sum(axis=(0, 2))
