import copy
import hashlib
import itertools
import os
import pickle

import pytest

from dpscale.errors import InputError, RunDirectoryError
from dpscale.privacy.secret import PURPOSES, RootSecret

KNOWN = bytes(range(32))


def test_the_file_is_64_hex_digits_and_a_newline_of_mode_0600_whatever_the_umask(tmp_path):
    for umask in (0o000, 0o022, 0o777):
        path = tmp_path / f"secret-{umask:o}.key"
        old = os.umask(umask)
        try:
            secret = RootSecret.create(path)
        finally:
            os.umask(old)
        text = path.read_bytes()
        assert len(text) == 65
        assert bytes.fromhex(text[:64].decode()) == secret._key
        assert text[:64].islower() or text[:64].isdigit()
        assert text[64:] == b"\n"
        assert path.stat().st_mode & 0o777 == 0o600


def test_the_file_is_never_readable_by_others_not_even_while_it_is_made(tmp_path, monkeypatch):
    seen = []
    real_open = os.open

    def watching_open(path, flags, mode=0o777, **kwargs):
        descriptor = real_open(path, flags, mode, **kwargs)
        if flags & os.O_CREAT:
            seen.append((bool(flags & os.O_EXCL), os.fstat(descriptor).st_mode & 0o077))
        return descriptor

    monkeypatch.setattr(os, "open", watching_open)
    old = os.umask(0)
    try:
        RootSecret.create(tmp_path / "secret.key")
    finally:
        os.umask(old)
    assert seen == [(True, 0)]


def test_file_and_directory_are_synced_before_create_returns(tmp_path, monkeypatch):
    synced = []
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    RootSecret.create(tmp_path / "secret.key")
    assert synced == [str(tmp_path / "secret.key"), str(tmp_path)]


def test_two_runs_have_different_secrets_and_loading_gives_back_the_same(tmp_path):
    one, two = RootSecret.create(tmp_path / "1"), RootSecret.create(tmp_path / "2")
    assert one != two
    assert RootSecret.load(tmp_path / "1") == one
    assert not one.insecure


def test_an_existing_secret_is_never_replaced(tmp_path):
    first = RootSecret.create(tmp_path / "secret.key")
    with pytest.raises(RunDirectoryError, match="exists already"):
        RootSecret.create(tmp_path / "secret.key")
    assert RootSecret.load(tmp_path / "secret.key") == first


def test_a_full_disk_leaves_no_torn_secret(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunDirectoryError, match="No space left"):
        RootSecret.create(tmp_path / "secret.key")
    assert not (tmp_path / "secret.key").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o602])
def test_a_secret_that_others_can_touch_is_refused_with_the_remedy(tmp_path, mode):
    path = tmp_path / "secret.key"
    RootSecret.create(path)
    path.chmod(mode)
    with pytest.raises(RunDirectoryError, match=f"mode {mode:04o}.*chmod 600"):
        RootSecret.load(path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\n",
        b"a" * 63 + b"\n",
        b"a" * 64,
        b"a" * 65 + b"\n",
        b"a" * 64 + b"\n\n",
        b"A" * 64 + b"\n",
        b"g" * 64 + b"\n",
        b"a" * 64 + b" ",
        b" " + b"a" * 63 + b"\n",
        b"\xff" * 65,
    ],
)
def test_anything_but_64_hex_digits_and_a_newline_is_refused_and_not_quoted(tmp_path, text):
    path = tmp_path / "secret.key"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(RunDirectoryError, match="64 hexadecimal digits") as error:
        RootSecret.load(path)
    assert "aaaa" not in str(error.value)


def test_a_missing_file_and_a_directory_are_errors_of_the_user(tmp_path):
    with pytest.raises(RunDirectoryError, match="cannot read"):
        RootSecret.load(tmp_path / "absent")
    with pytest.raises(RunDirectoryError, match="cannot read"):
        RootSecret.load(tmp_path)
    with pytest.raises(RunDirectoryError, match="cannot write"):
        RootSecret.create(tmp_path / "absent" / "secret.key")


def test_derived_keys_never_change_between_versions():
    secret = RootSecret(KNOWN)
    assert secret.derive("noise", 0, 0).hex() == "1730dea35389eb77633dce66b81f5f4c9142f716cd3697dec3c40a690444d0d7"
    # By hand from the docstring, so that another implementation can be checked against it.
    message = b"\x05noise" + (4).to_bytes(8, "little") + (9).to_bytes(8, "little")
    by_hand = hashlib.blake2b(message, digest_size=32, key=KNOWN, person=b"dpscale/derive").digest()
    assert secret.derive("noise", 4, 9) == by_hand
    assert secret.derive("sampling", 3, 2**40 + 7, 16).hex() == "5c81603432f5d1e4f364faf5e4e924e3"
    assert secret.mac("fingerprint", b"data") == "4d7a3a191a53b266e741e9abf6f37ec2c875e8f8f380010e535833dd420e0349"
    assert (
        RootSecret.from_insecure_seed(0).derive("noise").hex()
        == "5541f1f83b4ad7023f2f84315e8fb56a70f6608d3959ec23afb7dd8fb3338fe0"
    )


def test_all_keys_over_steps_attempts_and_purposes_are_distinct():
    secret = RootSecret(KNOWN)
    steps = [*range(50), 255, 256, 2**16, 2**32, 2**32 + 1, 2**64 - 1]
    places = list(itertools.product(sorted(PURPOSES), steps[:8] + steps[50:], steps))
    keys = {secret.derive(*place)[:8] for place in places}  # 64 bits suffice: a chance collision has odds 1e-12
    assert len(keys) == len(places)
    assert secret.derive("noise", 1, 2) != secret.derive("noise", 2, 1)
    assert secret.derive("noise", 0, 0, 32) != secret.derive("noise", 0, 0, 64)[:32]


def test_another_secret_gives_other_keys_and_every_bit_of_it_matters():
    key = RootSecret(KNOWN).derive("noise")
    for bit in range(256):
        flipped = (int.from_bytes(KNOWN, "little") ^ (1 << bit)).to_bytes(32, "little")
        assert RootSecret(flipped).derive("noise") != key


def test_a_mac_depends_on_purpose_data_and_secret_and_is_not_a_derived_key():
    secret = RootSecret(KNOWN)
    words = b"\0" * 16
    assert secret.mac("ledger", b"x") != secret.mac("fingerprint", b"x")
    assert secret.mac("ledger", b"x") != secret.mac("ledger", b"y")
    assert secret.mac("ledger", b"x") != RootSecret(KNOWN[::-1]).mac("ledger", b"x")
    assert secret.mac("ledger", words) != secret.derive("ledger", 0, 0).hex()


def test_insecure_seeds_keep_all_their_bits_and_are_marked():
    seeds = [0, 1, 255, 256, 2**32, 2**32 + 1, 5, 5 + 2**32, 5 + 2**64, 2**300]
    secrets = [RootSecret.from_insecure_seed(seed) for seed in seeds]
    assert len({secret.derive("noise") for secret in secrets}) == len(seeds)
    assert all(secret.insecure for secret in secrets)
    assert RootSecret.from_insecure_seed(7) == RootSecret.from_insecure_seed(7)
    with pytest.raises(InputError, match="non-negative"):
        RootSecret.from_insecure_seed(-1)


def test_other_processes_get_the_same_secret_and_the_same_mark():
    for secret in (RootSecret(KNOWN), RootSecret.from_insecure_seed(3)):
        copied = RootSecret.from_process_zero(secret.for_other_processes(), insecure=secret.insecure)
        assert copied == secret
        assert copied.insecure == secret.insecure
        assert copied.derive("noise", 1, 2) == secret.derive("noise", 1, 2)


def test_nothing_printable_or_pickled_shows_the_secret():
    secret = RootSecret(KNOWN)
    key_as_number = str(int.from_bytes(KNOWN, "big"))
    for text in (
        repr(secret),
        str(secret),
        f"{secret}",
        repr([secret]),
        repr(RootSecret.from_insecure_seed(3)),
    ):
        assert KNOWN.hex()[:8] not in text
        assert repr(KNOWN)[2:10] not in text
        assert key_as_number[:8] not in text
    for take in (pickle.dumps, copy.copy, copy.deepcopy, vars, hash):
        with pytest.raises(TypeError):
            take(secret)


def test_wrong_arguments_are_refused():
    secret = RootSecret(KNOWN)
    with pytest.raises(ValueError, match="unknown purpose"):
        secret.derive("everything")
    for bad in ((-1, 0), (0, -1), (2**64, 0), (0, 2**64)):
        with pytest.raises(ValueError, match="64-bit"):
            secret.derive("noise", *bad)
    for size in (0, 65):
        with pytest.raises(ValueError, match="1 to 64"):
            secret.derive("noise", size=size)
    with pytest.raises(ValueError, match="32 bytes"):
        RootSecret(b"short")
