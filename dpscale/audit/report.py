"""An audit as lines of text, with what it can see and what it cannot."""

from __future__ import annotations

from dpscale.audit.run import AuditResult
from dpscale.privacy.shown import shown_epsilon

SEES = {
    "total": "too little noise, a missing clip, canaries sampled too often",
    "spread": "one draw of noise used in all steps",
    "repeats": "draws of noise that come back",
}
BLIND = (
    "cannot see: noise a third too small, noise missing on other parameters, a clip that fails on real gradients, or a "
    "wrong sampling rate by less than several times. Those are for `dpscale verify` and the tests of the sampler"
)


def result_lines(result: AuditResult) -> list[str]:
    """What `dpscale audit` prints."""
    lines = [
        f"canaries       {result.canaries} of {result.examples} examples, {result.included} included by their coins",
        f"steps          {result.steps}",
        f"claimed        epsilon {shown_epsilon(result.claimed)} at delta {result.delta:g}",
        f"lower bound    epsilon {result.lower_bound:.3f} with {100 * result.confidence:g} % confidence",
    ]
    for name, found in result.evidence.items():
        right = f"{found.correct} of {found.guesses} guesses right"
        lines.append(f"  {name:<12} {found.epsilon:6.3f}   {right} (sees {SEES[name]})")
    lines.append(f"reach          {result.reach:.3f}, were every guess right")
    if result.lost_rows:
        lines.append(
            f"warning        {result.lost_rows} rows were not finite and contributed nothing; where canaries are among "
            "them the audit is blind. Lower the learning rate, or mend the data"
        )
    if result.violation:
        lines.append("verdict        VIOLATION: epsilon is larger than claimed. Do not publish; run `dpscale verify`")
    elif result.reach <= result.claimed:
        lines.append(
            f"verdict        none: so few canaries cannot contradict epsilon {shown_epsilon(result.claimed)}. Take "
            "more, or fewer steps"
        )
    else:
        lines.append("verdict        consistent with the claim")
    return [*lines, BLIND, f"details        {result.run_dir}"]
