"""Laws of the report: one file, nothing fetched, nothing private, everything escaped, readable where it is read."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scaling_records import planted

from dpscale.config import config_from_dict, to_toml
from dpscale.errors import InputError
from dpscale.metrics.plot import plot_run
from dpscale.metrics.status import write_status
from dpscale.metrics.streams import PublicStream, SensitiveStream
from dpscale.page import Page
from dpscale.privacy.card import RECORD_RELATIONS, USER_RELATIONS
from dpscale.report import write_report
from dpscale.scaling.curves import curves
from dpscale.scaling.output import write_curves
from dpscale.scaling.sweep import collect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE, DESKTOP = 390, 1280
PAPER = 688  # A4 less the margins of page.py, 182 mm at 96 dots an inch
HOSTILE = '<script>alert(1)</script><img src="https://example.org/x.png" onerror=alert(1)>&"'
PLAN = {
    "num_examples": 4500,
    "sampling_rate": 0.2276,
    "steps": 150,
    "expected_batch_size": 1024.0,
    "noise_multiplier": 4.1234,
    "clip_norm": 0.5,
    "delta": 1e-5,
    "epsilon_target": 3.0,
    "bound": "flat",
    "unit": "image",
    "neighboring_relation": "zero_out",
    "accountant": "pld",
    "enabled": True,
}


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def make_run(directory: Path, *, unit: str = "image", enabled: bool = True, **privacy) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    private = {"epsilon": 3.0, "delta": 1e-5, "expected_batch_size": 1024, "enabled": enabled, "unit": unit} | privacy
    config = config_from_dict(
        {
            "run": {"name": "a run <b>of mine"},
            "data": {"train": "mnist5k/train", "validation": "mnist5k/validation", "validation_is": "public"},
            "training": {"steps": 150},
            "privacy": private,
        }
    )
    (directory / "config.toml").write_text(to_toml(config))
    (directory / "plan.json").write_text(json.dumps(PLAN | {"unit": unit, "enabled": enabled}))
    public = PublicStream(directory, validation_is="public")
    for step in range(10, 151, 10):
        public.write(step, epsilon=step / 50, delta=1e-5, validation_accuracy=1 - 9 / (step + 9), learning_rate=0.5)
    public.commit(150)
    public.write(160, epsilon=9.876)  # waits for a checkpoint
    sensitive = SensitiveStream(directory)
    sensitive.write(10, train_loss=7.654321, batch_size=987654)
    sensitive.close()
    write_status(
        directory, state="finished", step=150, steps=150, epsilon=2.998, delta=1e-5, attempt=0, checkpoint_step=150
    )
    return directory


def by_amdahl(setting, variant):
    serial = 0.02 if variant == "private" else 0.06
    return (1.2 if variant == "private" else 1.0) * (serial + (1 - serial) * setting.batch / 1000 / setting.devices)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    tmp_path = tmp_path_factory.mktemp("pages")
    planted(tmp_path / "sweep", [1, 2, 4, 8, 16], by_amdahl, jitter=0.05)
    return {
        "run": write_report(make_run(tmp_path / "run")),
        "sweep": write_report(tmp_path / "sweep"),
    }


def test_a_page_loads_nothing_and_runs_nothing(pages):
    for path in pages.values():
        elements = Elements(path.read_text()).found
        assert {"svg", "style", "table"} <= {tag for tag, _ in elements}
        assert not {"script", "link", "iframe", "object", "embed", "base"} & {tag for tag, _ in elements}
        for tag, attributes in elements:
            for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                value = attributes.get(name)
                assert value is None or value.startswith("#"), (tag, name, value)
            assert not any(name.startswith("on") for name in attributes)
        assert not re.search(r"url\((?!['\"]?#)", path.read_text())
        assert "default-src &#x27;none&#x27;" in path.read_text()


def test_ids_of_the_drawings_of_a_page_do_not_clash_but_for_letters(pages):
    found = [a["id"] for _, a in Elements(pages["sweep"].read_text()).found if a.get("id")]
    clips = [name for name in found if re.fullmatch(r"p[0-9a-f]{10}", name or "")]
    assert len(clips) >= 5
    assert len(set(clips)) == len(clips)


def test_every_text_is_escaped(tmp_path):
    page = Page(HOSTILE, HOSTILE)
    page.section(HOSTILE)
    page.text(HOSTILE)
    page.note(HOSTILE)
    page.facts({HOSTILE: HOSTILE})
    page.figures({HOSTILE: "<svg ></svg>"})
    page.table([HOSTILE], [[HOSTILE]])
    page.pairs({HOSTILE: HOSTILE})
    page.items([HOSTILE])
    page.preformatted(HOSTILE)
    elements = Elements(page.html()).found
    assert not {"script", "img"} & {tag for tag, _ in elements}
    assert page.html().count("&lt;script&gt;") == 15
    unit = write_report(make_run(tmp_path / "run", unit=HOSTILE)).read_text()
    assert not {"script", "img"} & {tag for tag, _ in Elements(unit).found}
    assert "&lt;script&gt;alert(1)" in unit


def test_a_run_shows_its_figures_and_its_privacy_statement(pages):
    text = pages["run"].read_text()
    assert re.findall(r"<tr><td>(\d+)</td>", text) == ["10", "30", "50", "70", "90", "110", "130", "150"]
    for shown in (
        "94.3 %",
        "2.998",
        "1e-05",
        "150 of 150",
        "4.1234",
        "record (called",
        "contributes nothing",
        "a run &lt;b&gt;",
    ):
        assert shown in text, shown


def test_a_run_shows_nothing_that_is_sensitive_or_not_durable_yet(pages):
    text = pages["run"].read_text()
    for hidden in ("7.654", "987654", "9.876", "train loss", "batch_size"):
        assert hidden not in text, hidden
    assert "Not shown: the time of a step follows" in text


def test_where_records_may_be_added_or_removed_their_number_is_not_shown(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "plan.json").write_text(json.dumps(PLAN | {"neighboring_relation": "add_or_remove", "num_examples": 4567}))
    text = write_report(run).read_text()
    assert "one record added or removed" in text
    assert "4567" not in text
    assert "1024" not in text
    (run / "plan.json").write_text(json.dumps(PLAN | {"num_examples": 4567}))
    assert "4567" in write_report(run).read_text()


@pytest.mark.parametrize("relation", ["zero_out", "add_or_remove", "replace_one"])
def test_a_page_of_a_run_that_protects_users_speaks_of_users_as_the_card_does(tmp_path, relation):
    run = make_run(tmp_path / "run")
    users = {"unit": "user", "max_examples_per_user": 7, "neighboring_relation": relation, "num_examples": 4567}
    (run / "plan.json").write_text(json.dumps(PLAN | users))
    text = html.unescape(write_report(run).read_text())
    assert USER_RELATIONS[relation] in text
    assert "one user with all its records, of which at most 7 are used" in text
    assert "private for one user" in text
    assert not any(words in text for words in RECORD_RELATIONS.values())
    assert (">users<" in text) == (relation != "add_or_remove")
    assert ">records<" not in text


def test_epsilon_is_never_shown_below_its_value_and_an_unfinished_run_says_what_counts(tmp_path):
    run = make_run(tmp_path / "run")
    write_status(run, state="stopped", step=70, steps=150, epsilon=2.0001, delta=1e-5, attempt=0, checkpoint_step=70)
    text = write_report(run).read_text()
    assert "2.001" in text
    assert "2.000<" not in text
    assert "the epsilon of its planned end counts" in text


def test_a_run_without_privacy_or_with_a_fixed_seed_says_so_first(tmp_path):
    plain = write_report(make_run(tmp_path / "plain", enabled=False)).read_text()
    assert "had no privacy" in plain
    seeded = write_report(make_run(tmp_path / "seeded", insecure_seed=1)).read_text()
    assert "NO privacy guarantee" in seeded


def test_a_fixed_seed_is_never_called_differentially_private(tmp_path):
    text = write_report(make_run(tmp_path / "run", insecure_seed=1)).read_text()
    assert "NONE (fixed seed)" in text
    assert "differentially private for" not in text
    assert "epsilon spent" not in text
    assert "differentially private for" in write_report(make_run(tmp_path / "true")).read_text()


def test_where_private_files_lie_is_not_on_the_page():
    from dpscale.run_page import _named

    assert _named("/home/somebody/ward/patients.npz") == "patients.npz"
    assert _named("ward/patients.npz") == "patients.npz"
    assert _named("mnist5k/train") == "mnist5k/train"


def test_a_plot_that_is_newer_than_the_records_is_used_again(tmp_path):
    run = make_run(tmp_path / "run")
    drawn = plot_run(run, epsilon_allowed=3.0, path=run / "plot.svg")
    drawn.write_text(drawn.read_text().replace("</svg>", '<g id="marked"/></svg>'))
    assert 'id="marked"' in write_report(run).read_text()


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "plan.json").write_text(json.dumps(PLAN))
    text = write_report(run, tmp_path / "elsewhere" / "page.html").read_text()
    assert "Nothing is public yet" in text


def test_a_sweep_shows_its_curves_its_laws_and_what_they_cannot_show(pages):
    text = pages["sweep"].read_text()
    for shown in (
        "serial part 2.00%",
        "a processor, 2 cores",
        "shared 2 cores, which shows overhead only",
        "nonprivate",
    ):
        assert shown in text, shown
    assert text.count("<svg ") == 6
    assert "(input wait)" in text


def test_without_matplotlib_the_page_has_the_tables_and_says_what_is_missing(tmp_path, monkeypatch):
    planted(tmp_path / "sweep", [1, 2], by_amdahl)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for directory in (tmp_path / "sweep", make_run(tmp_path / "run")):
        text = write_report(directory).read_text()
        assert "dpscale[plots]" in text
        assert "<table>" in text


def test_only_a_missing_matplotlib_is_passed_over(tmp_path, monkeypatch):
    planted(tmp_path / "sweep", [1, 2], by_amdahl)
    collected = collect(tmp_path / "sweep")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert write_curves(collected, curves(collected), [], tmp_path / "without", png=True).exists()
        assert not list((tmp_path / "without").glob("*.svg"))

    def broken(*_):
        raise InputError("another reason")

    monkeypatch.setattr("dpscale.scaling.output.to_svg", broken)
    with pytest.raises(InputError, match="another reason"):
        write_curves(collected, curves(collected), [], tmp_path / "with", png=True)


def test_an_epsilon_of_the_table_and_of_the_plot_is_never_below_its_value(tmp_path):
    run = make_run(tmp_path / "run")
    public = PublicStream(run, validation_is="public")
    public.recover(150)
    public.write(151, epsilon=3.00001, delta=1e-5)
    public.commit(151)
    text = write_report(run).read_text()
    assert "<td>3.001</td>" in text
    assert "epsilon 3.01" in text


def test_another_directory_is_refused_with_what_to_give(tmp_path):
    with pytest.raises(InputError, match="no run's directory and no sweep's"):
        write_report(tmp_path)


def test_the_verb_writes_the_page_without_jax(tmp_path):
    run = make_run(tmp_path / "run")
    code = "import sys; from dpscale.__main__ import main; sys.argv = ['dpscale', 'report', sys.argv[1]]\n"
    code += "try: main()\nfinally: assert 'jax' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "report.html")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_in_a_browser_the_page_fits_a_phone_a_desktop_and_paper_and_loads_nothing(pages, tmp_path, kind):
    """Opened in frames of these widths by a page of ours that measures them: nothing sticks out, every drawing shows.

    The frame for paper has the print style by other means: a frame cannot be printed.
    """
    widths = (PHONE, DESKTOP, PAPER)
    frames = "".join(f'<iframe style="width:{width}px;height:900px;border:0"></iframe>' for width in widths)
    script = """
    const page = PAGE, frames = [...document.querySelectorAll('iframe')];
    const paper = page.replace('@media print', '@media all');
    Promise.all(frames.map((f, at) => new Promise(
        done => { f.onload = done; f.srcdoc = at == 2 ? paper : page; }))).then(() => {
      document.title = JSON.stringify(frames.map(f => {
        const d = f.contentDocument, w = f.contentWindow;
        return {inner: w.innerWidth, scroll: d.documentElement.scrollWidth,
                tables: [...d.querySelectorAll('.scroll')].map(s => s.scrollWidth - s.clientWidth),
                lines: [...d.querySelectorAll('.scroll td')].map(c => c.getClientRects().length && c.clientHeight),
                drawings: [...d.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width),
                font: parseFloat(w.getComputedStyle(d.querySelector('p')).fontSize),
                fetched: w.performance.getEntriesByType('resource').length}; })); });
    """
    quoted = json.dumps(pages[kind].read_text()).replace("</", "<\\/")
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><body>{frames}<script>{script.replace('PAGE', quoted)}</script></body>")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    assert CHROMIUM is not None
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path}/profile", f"file://{wrapper}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    phone, desktop, paper = seen = json.loads(title[1])
    for width, frame in zip(widths, seen, strict=True):
        assert frame["inner"] == width
        assert frame["scroll"] <= width, f"the page is wider than a screen of {width}"
        assert frame["fetched"] == 0
        assert len(frame["drawings"]) == (1 if kind == "run" else 6)
        assert all(250 < drawing <= width for drawing in frame["drawings"])
    assert min(phone["font"], desktop["font"]) >= 15
    assert max(desktop["tables"]) <= 0, "a table does not fit a desktop"
    assert paper["lines"], "there are tables"
    assert max(paper["lines"]) < 1.5 * min(paper["lines"]), "a cell of a table is broken on paper"
    if kind == "sweep":
        assert max(paper["drawings"]) < PAPER / 2, "drawings stand side by side on paper"
