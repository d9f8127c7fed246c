"""`dpscale data inspect` and `convert`: what they print, and their exit codes."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dpscale.cli import app
from dpscale.data import open_source

RUNNER = CliRunner()


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["ant", "bee"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(3):
            buffer = io.BytesIO()
            Image.fromarray(np.full((20, 20, 3), 90 * number + k, np.uint8)).save(buffer, "PNG")
            (tmp_path / "images" / name / f"{k}.png").write_bytes(buffer.getvalue())
    return tmp_path / "images"


def inspect(*arguments):
    result = RUNNER.invoke(app, ["data", "inspect", *map(str, arguments), "--seconds", "0"], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.return_value, result.stdout, result.stderr


def test_inspect_says_what_is_there_and_warns_that_it_is_derived_from_the_data(folder):
    code, out, err = inspect(folder, "data.image_size=16", "--threads", "3")
    assert code == 0
    assert "for the owner's terminal" in err
    for line in (
        "examples          6",
        "features          uint8[16, 16, 3]",
        "label             int32[], a class",
        "classes           2: ant, bee",
        "bytes             772 for each example",
        "problems          none in all",
    ):
        assert line in out
    assert [line.split(", ")[-1] for line in out.splitlines() if "read rate" in line] == [
        "1 thread",
        "2 threads",
        "3 threads",
    ]


@pytest.mark.parametrize("on_corrupt", ["error", "replace"])
def test_inspect_counts_what_cannot_be_read_and_ends_with_2(folder, on_corrupt):
    for name in ("ant/1.png", "bee/0.png"):
        (folder / name).write_bytes(b"no image")
    code, out, _ = inspect(folder, "data.image_size=16", f"data.on_corrupt={on_corrupt}")
    assert code == 2
    assert "problems          2 of 6 examples" in out
    assert "example 1 " in out
    assert "example 3 " in out


def test_inspect_finds_numbers_that_are_not_finite(tmp_path):
    features = np.ones((50, 3), np.float32)
    features[33, 1] = np.nan
    np.savez(tmp_path / "set.npz", features=features, labels=np.zeros(50, int))
    code, out, _ = inspect(tmp_path / "set.npz")
    assert code == 2
    assert "example 33 holds a NaN or an infinity in its features" in out
    assert "classes           not known: set data.num_classes" in out


def test_convert_and_train_on_it_from_the_command_line(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dpscale", "data", "convert", str(folder), str(tmp_path / "c"), "data.image_size=16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "6 examples in" in done.stdout
    source = open_source(str(tmp_path / "c"))
    assert source.metadata.class_names == ("ant", "bee")
    again = subprocess.run(
        [sys.executable, "-m", "dpscale", "data", "convert", str(folder), str(tmp_path / "c"), "data.image_size=16"],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2
    assert "finished data set already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["training.steps=3"], "training is of no use here"),
        (["data.image_sise=3"], "did you mean image_size"),
        (["data.image_size=16", "data.image_resize=8"], "the crop would not fit"),
    ],
)
def test_overrides_are_those_of_the_data_section(folder, arguments, pattern):
    with pytest.raises(ValueError, match=pattern):
        inspect(folder, *arguments)
