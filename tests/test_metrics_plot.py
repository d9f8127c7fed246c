"""Laws of the plot and of the TensorBoard files: both are made from committed public records alone."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from dpscale.errors import InputError
from dpscale.metrics.plot import latest, plot_run
from dpscale.metrics.streams import PublicStream
from dpscale.metrics.tensorboard import TensorBoardWriter


def run_with(directory: Path, records: list[dict]) -> Path:
    stream = PublicStream(directory, validation_is="public")
    for record in records:
        stream.write(**record)
    stream.commit(10**6)
    return directory


BOTH = [{"step": s, "epsilon": s / 50, "validation_accuracy": 1 - 9 / (s + 9)} for s in range(10, 151, 10)]
CASES = {
    "both": BOTH,
    "epsilon only": [{"step": s, "epsilon": s / 50} for s in range(100)],
    "accuracy only": [{"step": s, "validation_accuracy": s / 100} for s in range(100)],
    "one point": BOTH[:1],
    "step 0": [{"step": 0, "validation_accuracy": 0.1}],
    "perfect and constant": [{"step": s, "validation_accuracy": 1.0, "epsilon": 0.0} for s in (1, 2)],
    "accuracy null once": [*BOTH, {"step": 160, "validation_accuracy": float("nan"), "epsilon": 3.2}],
}


@pytest.mark.parametrize("records", CASES.values(), ids=CASES.keys())
def test_every_kind_of_run_can_be_drawn(tmp_path, records):
    path = plot_run(run_with(tmp_path, records), epsilon_allowed=3.0)
    assert path == tmp_path / "metrics" / "plot.svg"
    assert ET.parse(path).getroot().tag.endswith("svg")


def test_a_plot_is_a_png_by_its_suffix(tmp_path):
    path = plot_run(run_with(tmp_path, BOTH), path=tmp_path / "run.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_equal_runs_give_equal_files_and_another_run_another(tmp_path):
    drawn = []
    for name, records in (("a", BOTH), ("b", BOTH), ("c", BOTH[:-1])):
        (tmp_path / name).mkdir()
        drawn.append(plot_run(run_with(tmp_path / name, records)).read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_records_that_wait_for_a_checkpoint_are_not_drawn(tmp_path):
    run_with(tmp_path, BOTH[:-1])
    before = plot_run(tmp_path).read_bytes()
    stream = PublicStream(tmp_path, validation_is="public")
    stream.recover(140)
    stream.write(**BOTH[-1])
    assert plot_run(tmp_path).read_bytes() == before


def test_steps_that_a_later_attempt_ran_again_are_drawn_once():
    records = [
        {"step": 1, "attempt": 0, "epsilon": 1.0},
        {"step": 2, "attempt": 0, "epsilon": 2.0},
        {"step": 3, "attempt": 0, "epsilon": 3.0},
        {"step": 2, "attempt": 1, "epsilon": 4.0},
        {"step": 2, "attempt": 1, "validation_accuracy": 0.5},
    ]
    assert latest(records) == [records[0], records[3], records[4]]


def test_nothing_to_draw_and_an_unknown_suffix_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match="first checkpoint"):
        plot_run(tmp_path)
    with pytest.raises(InputError, match=r"\.svg or a \.png"):
        plot_run(run_with(tmp_path, BOTH), path=tmp_path / "plot.pdf")


def test_a_missing_library_is_said_with_its_pip_line(tmp_path, monkeypatch):
    run_with(tmp_path, BOTH)
    for name in ("matplotlib", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'dpscale\[plots\]'"):
        plot_run(tmp_path)
    with pytest.raises(InputError, match=r"pip install 'dpscale\[tensorboard\]'"):
        TensorBoardWriter(tmp_path)


def test_the_modules_import_neither_jax_nor_their_libraries_before_use():
    program = (
        "import sys\n"
        "import dpscale.metrics.plot, dpscale.metrics.progress, dpscale.metrics.streams\n"
        "import dpscale.metrics.tensorboard\n"
        "heavy = {'jax', 'matplotlib', 'tensorboardX', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_tensorboard_holds_the_committed_numbers_and_nothing_else(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    stream = PublicStream(tmp_path, validation_is="public")
    writer = TensorBoardWriter(tmp_path)
    stream.on_commit(writer)
    stream.write(1, epsilon=0.5, validation_loss=float("inf"))
    stream.write(2, epsilon=0.75, validation_accuracy=0.25)
    stream.write(3, epsilon=1.0)
    stream.commit(2)
    writer.close()
    (path,) = (tmp_path / "metrics" / "tensorboard").iterdir()
    data, seen = path.read_bytes(), []
    while data:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        seen += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert sorted(seen) == [(1, "epsilon", 0.5), (2, "epsilon", 0.75), (2, "validation_accuracy", 0.25)]
