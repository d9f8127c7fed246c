"""Laws that held or did not, on every process, and how they become one verdict."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from dpscale.distributed import gathered
from dpscale.errors import VerificationError

SHOWN_FAILURES = 4
REMEDY = (
    "The run has not been charged for any step. Look for what differs from a released dpscale (an edit, a driver, a "
    "device: run `dpscale doctor`, then `dpscale verify CONFIG`). privacy.verify=false runs without this check, and "
    "without knowing that epsilon is true"
)


@dataclass
class Laws:
    """What this process has checked so far.

    `failures`: "law: seen .., expected .."; `equal`: digests of what must be the same on every process.
    """

    names: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    equal: dict[str, str] = field(default_factory=dict)

    def check(self, law: str, holds: bool, seen: str, expected: str) -> None:
        """Note that `law` was checked, and where it does not hold what was seen."""
        if law not in self.names:
            self.names.append(law)
        if not holds:
            self.failures.append(f"{law}: seen {seen}, expected {expected}")

    def same_everywhere(self, law: str, value: bytes) -> None:
        """Note a value whose digest all processes will compare at the end."""
        self.names.append(law)
        self.equal[law] = hashlib.sha256(value).hexdigest()

    def settle(self) -> list[str]:
        """Compare with the other processes, all of which must call this; the names of the laws, where all hold.

        Raises: VerificationError, on every process alike, naming each law that does not hold, where, what was seen
            and what was expected.
        """
        everyone = gathered({"failures": self.failures, "equal": self.equal})
        found = [
            (f"process {rank}: " if len(everyone) > 1 else "", text)
            for rank, x in enumerate(everyone)
            for text in x["failures"]
        ]
        for law in self.equal:
            different = [
                rank for rank, x in enumerate(everyone) if x["equal"].get(law) != everyone[0]["equal"].get(law)
            ]
            if different:
                found.append(
                    ("", f"{law}: seen another value on process(es) {different} than on process 0, expected one")
                )
        if found:
            lines = [f"  {where}{text}" for where, text in found[:SHOWN_FAILURES]]
            lines += [f"  and {len(found) - SHOWN_FAILURES} more"] if len(found) > SHOWN_FAILURES else []
            raise VerificationError("verification failed:\n" + "\n".join(lines) + f"\n{REMEDY}")
        return self.names
