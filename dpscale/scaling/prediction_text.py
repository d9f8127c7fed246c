"""A prediction as lines of text, with where it comes from and what checks it."""

from __future__ import annotations

from dpscale.scaling.predict import LABELS, PUBLISHED_TEXT, Fit, Prediction


def prediction_lines(found: Prediction) -> list[str]:
    """The prediction as lines of text, its sources and its check against measured points."""
    lines = [f"network {found.network}", *(f"from {source}" for source in found.sources)]
    if not found.measured:
        lines.append("NOT measured: a prediction from assumptions")
    head = f"{'mode':<7}{'':<43}{'devices':>7}{'batch':>10}{'phys.':>6}{'step ms':>9}{'reduce ms':>10}"
    lines.append(head + f"{'padding':>9}{'examples/s':>12}{'of ideal':>9}{'limit':>8}")
    for p in found.points:
        reduce_ms = 1e3 * (p.latency_s + p.wire_s)
        line = f"{p.mode:<7}{LABELS[p.scheme]:<43}{p.devices:>7}{p.batch:>10g}{p.physical_batch_size:>6}"
        line += f"{1e3 * p.step_s:>9.1f}{reduce_ms:>10.2f}{p.padding_s / p.step_s:>9.1%}"
        lines.append(line + f"{p.examples_per_s:>12,.0f}{p.efficiency:>9.1%}{p.limit:>8.1%}")
    if found.fit is None:
        lines.append("check     no measured point beyond the smallest count: the network model is not fitted")
    else:
        lines += fit_lines(found.fit)
    lines += [f"would help  {text}" for text in found.help]
    return [*lines, PUBLISHED_TEXT]


def fit_lines(fit: Fit) -> list[str]:
    """The fitted factors and what they leave unexplained."""
    lines = [
        f"check     fitted to {len(fit.residuals)} measured points: latency x {fit.latency:.3g}, wire x {fit.wire:.3g};"
        f" relative residual {fit.rms_after:.1%} (before the fit {fit.rms_before:.1%})"
    ]
    return lines + [
        f"          {devices} devices, {mode}, {variant}: measured {left:+.1%} of predicted"
        for devices, mode, variant, left in fit.residuals
    ]
