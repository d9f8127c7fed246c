"""Users instead of records: one row holds a bounded set of one user's records, so that the user is what is sampled,
clipped once, and protected (`privacy.unit = "user"`)."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpscale.config import RunConfig
from dpscale.data.columns import Tables
from dpscale.data.parquet import table_files
from dpscale.data.source import FEATURES, LABEL, PRESENT, VALID, Batch, ExampleSource, SourceMetadata, content_digest
from dpscale.errors import InputError
from dpscale.sampling import KeyedStream, uniform_subset

USER = "user"
TABLES = (".parquet", ".arrow")
_TAG = b"dpscale/records-of-a-user/1/"


class UserSource:
    """An ExampleSource whose examples are the users of another one, in the order of their sorted ids.

    records: the source of single records. users: integers or text, one id for each record. max_records: K, the most
    records of one user that are ever used.

    A row is {"features": [n, K, ...], "label": [n, K, ...], "present": bool[n, K]}: the user's records in the order in
    which the data set holds them, False and a copy of the first one where there are fewer than K.

    Guarantees: of a user with more than K records a uniform subset is taken, the same in every step and every run. It
    is a function of the user's id and number of records alone (SHAKE-256, no secret), never of other users' data.

    Raises: InputError where ids and records do not fit.
    """

    def __init__(self, records: ExampleSource, users: np.ndarray, max_records: int) -> None:
        name = records.metadata.name
        users = np.asarray(users)
        if users.shape != (len(records),) or users.dtype.kind not in "iuSU":
            raise InputError(
                f"the user ids of {name} are {users.dtype}{list(users.shape)}: give integers or text, one for each of "
                f"its {len(records)} records"
            )
        if max_records < 1:
            raise InputError(f"max_records={max_records}: give the most records of one user, at least 1")
        self._records, self._users, self._max = records, users, max_records
        self._ids, owners, counts = np.unique(users, return_inverse=True, return_counts=True)
        self._by_user = np.argsort(owners.reshape(-1), kind="stable")
        self._starts = np.r_[0, np.cumsum(counts)]

    @property
    def records(self) -> ExampleSource:
        """The source of single records."""
        return self._records

    @property
    def metadata(self) -> SourceMetadata:
        """The records' own, with `records` set: a row has one more axis."""
        return replace(self._records.metadata, records=self._max)

    def __len__(self) -> int:
        """Number of users."""
        return len(self._ids)

    def rows(self, indices: np.ndarray) -> Batch:
        """The users at `indices`, int64[n]."""
        chosen = [self.records_of(int(user)) for user in indices]
        present = np.arange(self._max) < np.array([len(mine) for mine in chosen], np.int64).reshape(-1, 1)
        place = np.zeros(present.shape, np.int64)
        place[present] = np.arange(int(present.sum()))
        place = np.where(present, place, place[:, :1])
        read = self._records.rows(np.concatenate([*chosen, np.empty(0, np.int64)]))
        if VALID in read:  # False for records that could not be read
            present &= read[VALID][place]
        return {FEATURES: read[FEATURES][place], LABEL: read[LABEL][place], PRESENT: present}

    def records_of(self, user: int) -> np.ndarray:
        """The records that stand for user number `user`: int64[1 .. K], ascending."""
        mine = self._by_user[self._starts[user] : self._starts[user + 1]]
        if len(mine) <= self._max:
            return mine
        key = hashlib.blake2b(_TAG + _id_bytes(self._ids[user]), digest_size=32).digest()
        return mine[uniform_subset(KeyedStream(key, attempt=0, step=len(mine)), len(mine), self._max)]

    def fingerprint_parts(self) -> bytes:
        """A digest of the records and of whose they are."""
        parts = self._records.fingerprint_parts() + content_digest({USER: self._users})
        return hashlib.blake2b(parts, digest_size=32).digest()


def by_user(config: RunConfig, source: ExampleSource, users: np.ndarray | None = None) -> ExampleSource:
    """The training data as the run draws from them: `source`, or its users where `privacy.unit` is "user".

    users: the ids that were given with the data; None: what data.user_key names.

    Raises: InputError where there are users and nothing to tell them by, or the other way round.
    """
    data, bound = config.data, config.privacy.max_examples_per_user
    if users is None and data.user_key is not None:
        users = read_user_ids(data.train, data.user_key)
    if (config.privacy.unit == USER) != (users is not None or source.metadata.records is not None):
        raise InputError(
            'privacy.unit = "user" and ids that tell users apart belong together, and one is missing: set '
            "data.user_key (an array of the .npz file or folder, a column of Parquet), or give "
            'train_data=(features, labels, users); and privacy.unit = "user"'
        )
    if users is not None:
        assert bound is not None, "RunConfig asks for it"
        return UserSource(source, users, bound)
    if source.metadata.records != bound:
        raise InputError(
            f"train_data holds up to {source.metadata.records} records of a user and privacy.max_examples_per_user is "
            f"{bound}: make them equal"
        )
    return source


def read_user_ids(spec: str, key: str) -> np.ndarray:
    """One id for each record: the array `key` of an .npz file, KEY.npy of a folder, or a column of Parquet or Arrow.

    A folder that `dpscale data convert` wrote holds KEY.npy where it was given --user-key.

    Raises: InputError when there is none.
    """
    path = Path(spec).expanduser()
    beside = path.is_dir() and (path / f"{key}.npy").exists()
    if not beside and (path.suffix in TABLES or any(path.glob("*.parquet")) or any(path.glob("*.arrow"))):
        return Tables(table_files(path), spec).ids(key)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return archive[key]
        if path.is_dir():
            return np.load(path / f"{key}.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"data.user_key={key!r}: {path} has no such array that can be read ({error})") from error
    raise InputError(
        f"data.user_key={key!r}: user ids are read from an .npz file, a folder with {key}.npy, or a column of Parquet "
        f"or Arrow, and data.train is {spec!r}; from Python give train_data=(features, labels, users)"
    )


def split_users(given: Any) -> tuple[Any, np.ndarray | None]:
    """(what `as_source` takes, ids or None) of (features, labels, users), a dict with the key "user", or other data."""
    if isinstance(given, dict) and USER in given:
        return {name: value for name, value in given.items() if name != USER}, np.asarray(given[USER])
    if isinstance(given, tuple | list) and len(given) == 3:
        return tuple(given[:2]), np.asarray(given[2])
    return given, None


def _id_bytes(user: Any) -> bytes:
    if isinstance(user, bytes):
        return b"bytes:" + user
    return b"text:" + user.encode() if isinstance(user, str) else b"number:" + str(int(user)).encode()
