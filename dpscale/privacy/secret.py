"""The run's 256-bit root secret: its file, and one derived key for every purpose, attempt and step.

Whoever holds the secret and the released weights can subtract the noise, so it lives in one file of mode 0600
and appears in nothing that can be printed, logged or pickled.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from pathlib import Path
from typing import Literal, NoReturn, get_args

from dpscale.durable import sync_directory
from dpscale.errors import InputError, RunDirectoryError

SECRET_BYTES = 32
Purpose = Literal["sampling", "truncation", "noise", "augmentation", "dropout", "ledger", "fingerprint", "audit"]
PURPOSES: frozenset[str] = frozenset(get_args(Purpose))

_FILE_TEXT = re.compile(rb"[0-9a-f]{64}\n")
_UINT64 = 2**64


class RootSecret:
    """The 256-bit key from which every random stream of a run is derived.

    Guarantees: `repr`, `str` and `format` show no key material; it cannot be pickled or copied; comparison
    takes the same time whatever the bytes; `derive` and `mac` are pure functions of their arguments, never of
    the host, the process or what was derived before.

    Edge cases: `insecure` is True when the secret came from a seed (tests and benchmarks); such a run
    promises nothing, since anyone can make the same noise.
    """

    __slots__ = ("_key", "insecure")

    def __init__(self, key: bytes, *, insecure: bool = False) -> None:
        if not isinstance(key, bytes) or len(key) != SECRET_BYTES:
            raise ValueError(f"a root secret is {SECRET_BYTES} bytes")
        self._key = key
        self.insecure = insecure

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> RootSecret:
        """Draw a new secret from the operating system and write it to `path`, durably, with mode 0600.

        Guarantees: the file is never readable by others, not even for a moment, and an existing file is never
        replaced. When this returns, file and directory entry are on disk.

        Raises: RunDirectoryError when the file exists or cannot be written.
        """
        path = Path(path)
        secret = cls(os.urandom(SECRET_BYTES))
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise RunDirectoryError(
                f"{path} exists already: a run has one secret for its whole life. "
                "Resume that run, or choose another run directory."
            ) from None
        except OSError as error:
            raise _cannot("write", path, error) from error
        try:
            # A umask can only take bits away; 0600 must be exact, or the owner could not read it back.
            os.fchmod(descriptor, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secret._key.hex().encode("ascii") + b"\n")
                file.flush()
                os.fsync(file.fileno())
            sync_directory(path.parent)
        except OSError as error:
            path.unlink(missing_ok=True)  # a torn secret must not be mistaken for one
            raise _cannot("write", path, error) from error
        return secret

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RootSecret:
        """Read a secret that `create` wrote.

        Raises: RunDirectoryError when the file is missing, is not 64 lower-case hexadecimal digits and a
        newline, is not a regular file, or can be read or written by anyone but its owner. No message quotes
        its content.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                text = file.read(2 * SECRET_BYTES + 2)
        except OSError as error:
            raise _cannot("read", path, error) from error
        if not stat.S_ISREG(status.st_mode):
            raise RunDirectoryError(f"{path} is not a regular file: a secret is kept in one. Remove it.")
        if status.st_mode & 0o077:
            raise RunDirectoryError(
                f"{path} has mode {stat.S_IMODE(status.st_mode):04o}: others can read or change the secret, "
                f"and with it undo the noise. If nobody did, run: chmod 600 {path}"
            )
        if not _FILE_TEXT.fullmatch(text):
            raise RunDirectoryError(
                f"{path} holds {status.st_size} bytes that are not 64 hexadecimal digits and a newline. "
                "If the run never made a step, remove the file; otherwise restore it: no other will do."
            )
        return cls(bytes.fromhex(text.decode("ascii")))

    @classmethod
    def from_insecure_seed(cls, seed: int) -> RootSecret:
        """Make the secret of a reproducible, NOT private run from a non-negative integer of any size."""
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"privacy.insecure_seed={seed!r}: it must be a non-negative integer; give one such as 0")
        data = seed.to_bytes(max(1, (seed.bit_length() + 7) // 8), "little")
        digest = hashlib.blake2b(data, digest_size=SECRET_BYTES, person=b"dpscale/insecure")
        return cls(digest.digest(), insecure=True)

    def for_other_processes(self) -> str:
        """The secret as 64 hexadecimal digits, for the run's own processes over their own network only."""
        return self._key.hex()

    @classmethod
    def from_process_zero(cls, text: str, *, insecure: bool) -> RootSecret:
        """What `for_other_processes` gave on process 0."""
        return cls(bytes.fromhex(text), insecure=insecure)

    def derive(self, purpose: Purpose, attempt: int = 0, step: int = 0, size: int = 32) -> bytes:
        """Derive `size` bytes (1 to 64) for one purpose, attempt and step (each 0 to 2**64 - 1).

        Keyed BLAKE2b (RFC 7693) over: length of the purpose (1 byte), the purpose, attempt and step as
        little-endian 64-bit words. The encoding is injective and BLAKE2b's own parameters hold the size and a
        personal string that sets `derive` apart from `mac`, so different arguments give independent bytes.
        """
        if not 1 <= size <= 64:
            raise ValueError(f"size={size}: BLAKE2b gives 1 to 64 bytes")
        if not (0 <= attempt < _UINT64 and 0 <= step < _UINT64):
            raise ValueError(f"attempt={attempt}, step={step}: both are 64-bit unsigned integers")
        data = _prefixed(purpose) + attempt.to_bytes(8, "little") + step.to_bytes(8, "little")
        return hashlib.blake2b(data, digest_size=size, key=self._key, person=b"dpscale/derive").digest()

    def mac(self, purpose: Purpose, data: bytes) -> str:
        """Keyed digest of `data`, 64 hexadecimal digits; without the secret it tests no guess."""
        data = _prefixed(purpose) + data
        return hashlib.blake2b(data, digest_size=32, key=self._key, person=b"dpscale/mac").hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RootSecret):
            return NotImplemented
        return hmac.compare_digest(self._key, other._key)

    __hash__ = None  # type: ignore[assignment]  # a hash of the key would be a fact about the key

    def __repr__(self) -> str:
        return "RootSecret(hidden, insecure)" if self.insecure else "RootSecret(hidden)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a RootSecret cannot be pickled or copied: pass its file's path instead")


def destroy(path: str | os.PathLike[str]) -> None:
    """Overwrite the secret's file with random bytes, on disk, and remove it.

    Edge cases: does nothing where the file is gone. Copies (backups, snapshots of the file system) and blocks that a
    flash disk or a copy-on-write file system kept are out of reach.

    Raises: RunDirectoryError when it cannot be written or removed.
    """
    path = Path(path)
    try:
        with path.open("r+b", buffering=0) as file:
            file.write(os.urandom(max(os.fstat(file.fileno()).st_size, 2 * SECRET_BYTES + 1)))
            os.fsync(file.fileno())
        path.unlink()
        sync_directory(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _cannot("destroy", path, error) from error


def _cannot(verb: str, path: Path, error: OSError) -> RunDirectoryError:
    return RunDirectoryError(
        f"cannot {verb} the secret {path} ({error.strerror}): the run keeps it there. "
        "Check that the run directory exists, is yours, and is writable."
    )


def _prefixed(purpose: str) -> bytes:
    if purpose not in PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r}: choose one of {sorted(PURPOSES)}")
    name = purpose.encode("ascii")
    return bytes([len(name)]) + name
