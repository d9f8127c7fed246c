"""A scaling sweep on a real SLURM, from submit to the page: 1 and 2 processes, pinned to a core each."""

from __future__ import annotations

import json

from dpscale.scaling.sweep import collect

CONFIG = """
[run]
name = "sweep"
[data]
train = "made_up:vectors:2000:16:4"
[model]
name = "mlp"
[training]
steps = 4
[privacy]
epsilon = 3
delta = 1e-4
expected_batch_size = 64
[performance]
physical_batch_size = 32
"""


def test_a_sweep_of_one_and_two_processes_goes_from_submit_to_the_page(cluster, tmp_path):
    config, sweep = tmp_path / "sweep.toml", tmp_path / "sweep"
    config.write_text(CONFIG)
    points = "--gpus 1,2 --per-node 2 --repeats 1 --windows 2 --steps 2 --cores-per-process 1 --one-at-a-time"
    words = ["scaling", "submit", str(config), "--out", str(sweep), *points.split()]
    printed = cluster.dpscale(*words, "--via", "sbatch")
    jobs = [line.split()[-1] for line in printed.splitlines() if " job " in line]
    assert len(jobs) == 3  # one process; two strong; two weak
    assert "dpscale scaling curves" in printed
    for job in jobs:
        cluster.wait_for_end(job, sweep / "jobs")

    found = collect(sweep)
    everything = "\n".join(cluster.everything(path) for path in (sweep / "jobs").iterdir())
    assert found.missing == (), everything
    assert {(r.devices, r.batch, r.variant) for r in found.records} == {
        (devices, batch, variant)
        for devices, batch in ((1, 64.0), (2, 64.0), (2, 128.0))
        for variant in ("private", "nonprivate")
    }
    for record in found.records:
        assert record.processes == record.devices
        assert record.environment["cores_usable"] == 1
        assert set(record.nodes) <= {"t1", "t2", "t3"}

    (sweep / "records" / "n2-b128-r1-private.json").unlink()
    table = cluster.dpscale("scaling", "curves", str(sweep))
    assert "Amdahl, strong private" in table
    assert "missing   n2-b128-r1-private: its job ended with exit code 0" in table
    page = (sweep / "curves" / "index.html").read_text()
    assert "n2-b128-r1-private" in page
    assert page.count("<svg ") == 6
    rows = json.loads((sweep / "curves" / "curves.json").read_text())["rows"]
    assert len(rows) == 7

    (job,) = [line.split()[-1] for line in cluster.dpscale(*words).splitlines() if " job " in line]  # by submitit
    cluster.wait_for_end(job, sweep / "jobs")
    assert collect(sweep).missing == (), cluster.everything(sweep / "jobs" / "n2-b128-r1")
