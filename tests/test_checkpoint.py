"""Laws of checkpoints: whole or not used, and the one before stays good whatever happens to the next."""

import gc
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpscale import checkpoint as checkpoint_module
from dpscale import manifest as manifest_module
from dpscale.checkpoint import Checkpoints
from dpscale.errors import InputError, RunDirectoryError
from dpscale.manifest import MANIFEST
from dpscale.state import TrainState

# Orbax leaves the coroutines of a read that failed to the garbage collector, which complains that their loop is gone.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OPTIMIZER = optax.sgd(0.1, momentum=0.9)
FACTS = {"attempt": 0, "ledger_head": "abc"}


@pytest.fixture
def _collect_what_orbax_left():
    yield
    gc.collect()


def everywhere(devices: int) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec())


def state(step: int, devices: int = 8) -> TrainState:
    params = {"w": jnp.arange(64.0).reshape(8, 8) + step, "b": jnp.full(3, step / 3)}
    made = TrainState.create(params, OPTIMIZER)
    return jax.device_put(TrainState(jnp.int32(step), made.params, made.opt_state), everywhere(devices))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of steps 3, 6 and 9."""
    directory = tmp_path_factory.mktemp("saved") / "ckpt"
    directory.mkdir()
    checkpoints = Checkpoints(directory, keep=3)
    for step in (3, 6, 9):
        checkpoints.save(step, state(step), FACTS)
        assert checkpoints.wait() == step
    checkpoints.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "ckpt")
    return tmp_path / "ckpt"


def newest(directory: Path, committed: int = 9) -> tuple[int | None, list[str]]:
    said: list[str] = []
    checkpoints = Checkpoints(directory, keep=3)
    try:
        found = checkpoints.newest_good(said.append, committed=committed)
    finally:
        checkpoints.close()
    return found and found.step, said


def largest_file(path: Path) -> Path:
    return max((f for f in path.rglob("*") if f.is_file() and f.name != MANIFEST), key=lambda f: f.stat().st_size)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_what_is_restored_is_what_was_saved_on_any_number_of_devices(directory, devices):
    checkpoints = Checkpoints(directory, keep=3)
    wanted = state(9, devices)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere(devices)), wanted)
    restored = checkpoints.restore(9, abstract)
    checkpoints.close()
    for mine, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.sharding == theirs.sharding


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def truncate(path: Path) -> None:
    file = largest_file(path)
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = largest_file(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def unlist_and_flip(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["files"][str(largest_file(path).relative_to(path))]
    (path / MANIFEST).write_text(json.dumps(manifest))
    flip(path)


DAMAGES = {
    "an empty directory": empty,
    "a truncated file": truncate,
    "a changed bit": flip,
    "a missing file": lambda path: largest_file(path).unlink(),
    "half deleted": lambda path: shutil.rmtree(path / "d"),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "a torn manifest": lambda path: (path / MANIFEST).write_text('{"schema": 1'),
    "a manifest that lists less": unlist_and_flip,
    "a copy of another step": lambda path: (empty(path), shutil.copytree(path.parent / "6", path, dirs_exist_ok=True)),
}


@pytest.mark.usefixtures("_collect_what_orbax_left")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_is_set_aside_with_a_word_and_the_one_before_is_used(directory, damage):
    DAMAGES[damage](directory / "9")
    step, said = newest(directory)
    assert step == 6
    assert len(said) == 1
    assert "step 9 is not usable" in said[0]
    assert not (directory / "9").exists()
    assert (directory / "bad" / "9-0").exists()
    assert newest(directory) == (6, [])


def test_several_bad_ones_are_walked_over(directory):
    truncate(directory / "9")
    flip(directory / "6")
    assert newest(directory)[0] == 3


def test_no_fresh_start_when_none_is_whole(directory):
    for step in (3, 6, 9):
        empty(directory / str(step))
    with pytest.raises(RunDirectoryError, match="none of the 3 checkpoints"):
        newest(directory)


def test_killed_between_orbax_and_the_manifest_it_is_read_and_adopted(directory):
    (directory / "9" / MANIFEST).unlink()
    checkpoints = Checkpoints(directory, keep=3)
    found = checkpoints.newest_good(pytest.fail, committed=6)
    assert found is not None
    assert (found.step, found.facts, found.attempt) == (9, {}, None)
    checkpoints.adopt(found, FACTS)
    again = checkpoints.newest_good(pytest.fail, committed=9)
    checkpoints.close()
    assert again is not None
    assert (again.step, again.facts) == (9, FACTS)
    truncate(directory / "9")
    assert newest(directory)[0] == 6


@pytest.mark.usefixtures("_collect_what_orbax_left")
@pytest.mark.parametrize("damage", ["an empty directory", "a truncated file", "a changed bit", "half deleted"])
def test_without_a_manifest_a_damaged_checkpoint_is_not_adopted(directory, damage):
    (directory / "9" / MANIFEST).unlink()
    DAMAGES[damage](directory / "9")
    assert newest(directory, committed=6)[0] == 6


def test_only_the_newest_may_lack_a_manifest(directory):
    (directory / "6" / MANIFEST).unlink()
    truncate(directory / "9")
    assert newest(directory, committed=3)[0] == 3


def test_what_interrupted_saves_and_removals_leave_is_deleted(directory):
    leftovers = [
        directory / "12.orbax-checkpoint-tmp",
        directory / "12.orbax-checkpoint-tmp-17",
        directory / ".removed-0",
    ]
    for path in leftovers:
        path.mkdir()
        (path / "part").touch()
    assert newest(directory) == (9, [])
    assert not any(path.exists() for path in leftovers)


def test_the_newest_are_kept_and_the_oldest_go_only_after_a_newer_one_is_durable(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    alive = []
    real = checkpoint_module.write_manifest

    def watched(path, step, facts):
        alive.append(checkpoints.steps())
        real(path, step, facts)

    monkeypatch.setattr(checkpoint_module, "write_manifest", watched)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, state(step), FACTS)
    assert checkpoints.wait() == 4
    assert checkpoints.wait() is None  # told once
    checkpoints.close()
    assert alive == [[1], [1, 2], [1, 2, 3], [2, 3, 4]]
    assert checkpoints.steps() == [3, 4]


def test_killed_while_an_old_one_is_removed_its_rest_never_looks_whole(directory, monkeypatch):
    """Removal takes many calls, in no certain order: the manifest may go first."""
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (Path(path) / MANIFEST).unlink(missing_ok=True))
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints._drop_old(9)
    monkeypatch.undo()
    assert checkpoints.steps() == [9]
    assert any(path.name.startswith(".removed-") for path in directory.iterdir())
    assert newest(directory) == (9, [])
    assert sorted(os.listdir(directory)) == ["9"]
    checkpoints.close()


def test_all_of_a_checkpoint_is_on_disk_before_its_manifest(directory, monkeypatch):
    (directory / "9" / MANIFEST).unlink()
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    checkpoint_module.write_manifest(directory / "9", 9, FACTS)
    manifest = next(i for i, name in enumerate(synced) if MANIFEST in name)
    files = {str(f) for f in (directory / "9").rglob("*") if f.is_file() and f.name != MANIFEST}
    assert files <= set(synced[:manifest])
    assert str(directory) in synced[manifest:]


def save_and_wait(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, state(step), FACTS)
    checkpoints.wait()


@pytest.mark.parametrize("where", ["Orbax", "the manifest"])
def test_a_full_disk_leaves_the_earlier_checkpoint_good_and_says_so(directory, monkeypatch, where):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(directory, keep=3)
    if where == "Orbax":
        monkeypatch.setattr(checkpoints._checkpointer, "wait_until_finished", full)
    else:
        monkeypatch.setattr(manifest_module, "write_atomically", full)
    with pytest.raises(InputError, match=r"checkpoint of step 12 could not be written .*step 9 is whole"):
        save_and_wait(checkpoints, 12)
    monkeypatch.undo()
    checkpoints.close()
    shutil.rmtree(directory / "12", ignore_errors=True)
    assert newest(directory) == (9, [])


@pytest.mark.usefixtures("_collect_what_orbax_left")
def test_another_models_checkpoint_is_refused(directory):
    checkpoints = Checkpoints(directory, keep=3)
    other = TrainState.create({"w": jnp.zeros((8, 9)), "b": jnp.zeros(3)}, OPTIMIZER)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere(8)), other)
    with pytest.raises(RunDirectoryError, match="does not hold this model"):
        checkpoints.restore(9, abstract)
    checkpoints.close()


def test_a_newer_manifest_is_not_taken_for_damage(directory):
    manifest = directory / "9" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(RunDirectoryError, match="schema 2"):
        newest(directory)
    assert manifest.exists()
