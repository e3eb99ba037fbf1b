"""The files of a report: whole, the same for the same store, and safe against what users write."""

from __future__ import annotations

import csv
import html.parser
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from qatbench.bench.errors import UserError
from qatbench.reports.figure import _spread, _ticks, _unspread, accuracy_figure
from qatbench.reports.leaderboard import leaderboard
from qatbench.reports.render import _md, _md_code, percent, terminal_table
from qatbench.reports.report import make_report
from rich.console import Console

COMMAND = "qatbench report small --store runs"
EVIL = "<script>alert('x')</script> a | b\n\n# **head** `code` [link](http://x.y) \x1b[31m"


@pytest.fixture
def filled(store, record, write, write_suite):
    """A store with everything in it: three seeds, a chain, a failure, a skip, a missing run and a broken record."""
    runs = []
    for seed, shift in enumerate([-0.004, 0.0, 0.005]):
        for method, bits, level in [
            ("fp32", "w32a32", 0.97),
            ("lsq", "w4a4", 0.96),
            ("kd+lsq", "w4a4", 0.961),
            ("ptq", "w4a4", 0.86),
            ("lsq", "w2a2", 0.91),
            ("ptq", "w2a2", 0.12),
        ]:
            runs.append(record(method, bits, seed, (level + 0.01 + shift, level + shift, level - 0.02 + shift)))
    runs.append(record("pact", "w2a2", 0, None, reason=EVIL))
    runs.append(record("fqat", "w2a2", 0, None, status="skipped", reason="needs three bits"))
    for run in runs:
        write(store, run)
    (write(store, record("dorefa", "w2a2", 0, None)) / "result.json").write_text('{"schema": 99}')
    write_suite(store, "small", runs, [0, 1, 2], absent=("ab12" * 4,))
    return store


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class _Page(html.parser.HTMLParser):
    """Every tag, every attribute that can load something, and the text of the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.text += data


def test_every_file_is_written_and_none_is_half(filled):
    """Fails if a file of the report were missing, empty, or a temporary one left behind."""
    paths = make_report(filled, "small", None, COMMAND)
    names = [
        "accuracy_vs_bits.png",
        "accuracy_vs_bits.svg",
        "index.html",
        "leaderboard.csv",
        "leaderboard.md",
        "runs.csv",
    ]
    assert sorted(p.name for p in paths.folder.iterdir()) == names
    assert paths.folder == filled.root / "report"
    assert all(p.stat().st_size > 500 for p in paths.folder.iterdir())
    assert paths.png.read_bytes().startswith(b"\x89PNG")


def test_the_same_store_gives_the_same_bytes(filled, tmp_path):
    """Fails if a date, a folder or the order of a set crept into the report."""
    one = make_report(filled, "small", tmp_path / "one", COMMAND)
    code = (
        "import sys; from pathlib import Path; from qatbench.bench.store import Store;"
        "from qatbench.reports.report import make_report;"
        "make_report(Store(sys.argv[1]), 'small', Path(sys.argv[2]), sys.argv[3]);"
        "assert 'torch' not in sys.modules, 'the report imported torch'"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    two = tmp_path / "two"
    subprocess.run([sys.executable, "-c", code, str(filled.root), str(two), COMMAND], check=True, env=environment)
    for path in sorted(one.folder.iterdir()):
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_nothing_of_the_reports_imports_torch(filled):
    """Fails if a report needed the seconds, or the installation, that torch takes."""
    code = (
        "import sys; from qatbench.bench.store import Store;"
        "from qatbench.reports import figure, frame, leaderboard, render, report;"
        "heavy = {'torch', 'pandas', 'seaborn', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "store = Store(sys.argv[1]); frame.results(store); boards = leaderboard.leaderboard(store, 'small');"
        "render.terminal_table(boards[0]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(filled.root)], check=True)


def test_markdown_shows_what_matters(filled):
    """Fails if the page lacked a mean, a count of seeds, a reason, a file set aside or the command that made it."""
    text = make_report(filled, "small", None, COMMAND).markdown.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| lsq | w4a4"))
    # 0.95, 0.96, 0.97 less 1/3 point, with shifts -0.4, 0, 0.5: mean 95.7, sd 0.45
    assert row.split(" | ")[2:5] == ["95.7 ± 0.5 =", "−1.0", "3/3"]
    assert "| **kd+lsq** | w4a4 | **95.8 ± 0.5** |" in text
    assert "| blended\\* |" in text
    assert "1 failed" in text
    assert "needs three bits" in text
    assert "of schema 99" in text
    assert f"Made by `{COMMAND}`" in text
    assert "- records: 18 done, 1 failed, 1 skipped, 1 missing" in text
    assert "- newest record: 2026-03-03 10:00 UTC" in text
    assert "- git: 0123456789ab" in text


def test_markdown_tables_keep_their_shape(filled):
    """Fails if a reason with a pipe, a line break or a tag broke the table it stands in, or became markup."""
    lines = make_report(filled, "small", None, COMMAND).markdown.read_text().splitlines()
    tables = "\n".join(lines).split("\n\n")
    for table in (t.splitlines() for t in tables if t.startswith("| ")):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table}
        assert len(widths) == 1, table
    reason = next(line for line in lines if "alert" in line)
    assert "<script>" not in reason
    assert "\\*\\*head\\*\\*" in reason
    assert "\\[link\\]" in reason


def test_html_is_one_safe_page(filled):
    """Fails if the page loaded anything from elsewhere, or ran what a reason says."""
    page = _Page(make_report(filled, "small", None, COMMAND).html.read_text())
    assert "script" not in page.tags
    assert "link" in page.tags  # the empty icon, without which a browser asks a server for one
    assert all(address.startswith("data:") for address in page.loads)
    assert "<script>alert('x')</script> a | b # **head**" in page.text
    assert "95.7 ± 0.5 =" in page.text
    assert COMMAND in page.text
    assert page.tags.count("table") == 4  # accuracy, cost, without a number, set aside


def test_csv_reads_back_equal(filled):
    """Fails if the files for machines rounded a number or lost a cell."""
    paths = make_report(filled, "small", None, COMMAND)
    cells = {(row["label"], row["bits"]): row for row in read_csv(paths.csv)}
    assert len(cells) == len(paths.tables[0].cells) == 8
    for cell in paths.tables[0].cells:
        row = cells[cell.label, cell.bits]
        assert int(row["seeds_done"]) == len(cell.seeds)
        assert int(row["seeds_expected"]) == cell.expected
        if cell.accuracy:
            assert float(row["acc/mean"]) == cell.accuracy.mean
            assert float(row["acc/sd"]) == cell.accuracy.sd
            assert float(row["acc/fonts/mean"]) == cell.domains["fonts"].mean
            assert float(row["size_bytes"]) == cell.cost["size_bytes"]
    runs = {row["run_id"]: row for row in read_csv(paths.runs)}
    assert Counter(row["status"] for row in runs.values()) == {"done": 18, "failed": 1, "skipped": 1, "missing": 1}
    record = filled.records()[0]
    assert float(runs[record["run_id"]]["test/acc"]) == record["metrics"]["test/acc"]
    assert all(row["made_by"].startswith(COMMAND) for row in runs.values())
    assert len(pd.read_csv(paths.runs)) == len(runs)


def test_runs_of_unequal_starts_and_devices_are_told(store, record, write, tmp_path):
    """Fails if a difference between two machines, or between two float networks, passed for one between methods."""
    for method, digest, device in (("lsq", "aa", "cpu"), ("pact", "aa", "cpu"), ("fp32", "bb", "NVIDIA H200")):
        start = {"float": {"id": "f10a7", "sha256": digest}, "device": device}
        write(store, record(method, "w4a4", 0, (0.9, 0.8, 0.7), provenance=start))
        text = make_report(store, None, tmp_path / method, "qatbench report").markdown.read_text()
        assert ("start from unequal weights" in text) == ("float networks f10a7" in text) == (method == "fp32")
        assert ("on different devices" in text) == (method == "fp32")


def test_a_store_of_failures_is_still_a_report(store, record, write):
    """Fails if a sweep in which every run failed gave a traceback instead of the reasons."""
    write(store, record("lsq", "w4a4", 0, None))
    paths = make_report(store, None, None, "qatbench report")
    assert "diverged: step of layer1.conv1" in paths.markdown.read_text()
    assert "diverged: step of layer1.conv1" in paths.html.read_text()


def test_a_folder_that_cannot_be_written_is_one_line(filled, tmp_path):
    """Fails if --out naming a file ended in a traceback."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write the report.*--out") as error:
        make_report(filled, "small", tmp_path / "file", COMMAND)
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_report_is_replaced_whole(filled):
    """Fails if a second report left something of the first behind, or could not be written over it."""
    first = make_report(filled, "small", None, "qatbench report small")
    second = make_report(filled, None, None, "qatbench report")
    assert first.folder == second.folder
    assert second.markdown.read_text().startswith("# Leaderboard\n")


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_terminal_table_fits(filled, width):
    """Fails if the leaderboard wrapped its numbers or ran over the edge of the terminal."""
    console = Console(width=width, record=True, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    for table in leaderboard(filled, "small"):
        console.print(terminal_table(table, width))
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    row = next(line for line in lines if line.strip().startswith("kd+lsq"))
    assert "95.8 ± 0.5" in row
    assert "−0.9" in row


MEASURED = {
    "longtail": {"bacc": 0.61, "acc_many": 0.82, "acc_medium": 0.53, "acc_few": 0.34, "ece": 0.085},
    "lodo:fonts": {"bacc": 0.61, "acc_id": 0.93, "acc_ood": 0.9, "acc_worst": 0.9, "ece": 0.085},
    "mdl": {"bacc": 0.61, "ece": 0.085, "acc_worst": 0.9},
}


@pytest.fixture
def measured(store, record, write):
    """A store with one run under each protocol, with everything that is measured beside the accuracy."""
    for protocol, values in MEASURED.items():
        metrics = {f"test/{name}": value for name, value in values.items()}
        run = record("lsq", "w4a4", 0, (0.95, 0.93, 0.9), spec={"protocol": protocol}, metrics=metrics)
        if protocol == "longtail":
            run["metrics"] = {k: v for k, v in run["metrics"].items() if not k.startswith("test/acc/")}
        run["provenance"] |= {"classes": ["<b>cat", "dog", "owl"], "class_counts": [50, 500, 5]}
        write(store, run | {"per_class": {"fonts": [0.5, 0.75, None], "scanned": [0.5, 0.25, None]}})
    return store


def shown(store, protocol, width):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    (table,) = (t for t in leaderboard(store) if t.protocol == protocol)
    console.print(terminal_table(table, width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    head, row = (
        next(re.split(r"  +", line.strip()) for line in text.splitlines() if name in line) for name in ("bits", "lsq")
    )
    return dict(zip(head, row, strict=True)), text


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_tails_groups_are_in_the_terminal(measured, width):
    """Fails if the numbers that a long tail is about were missing, or under another's head."""
    row, text = shown(measured, "longtail", width)
    assert (row["many"], row["medium"], row["few"]) == ("82.0", "53.0", "34.0")
    assert row["size, kB"] == "40.3"
    assert row.get("balanced") == (
        "61.0" if width == 120 else None
    )  # the first to go: of balanced images it is the accuracy
    assert "many > 100, medium 20–100, few < 20 training images" in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_held_out_domain_says_so_in_the_terminal(measured, width):
    """Fails if accuracy on the unseen domain were taken for that on seen ones, or the other way round."""
    row, text = shown(measured, "lodo:fonts", width)
    assert row["ID accuracy"] == "93.0"
    assert row["OOD accuracy"].startswith("92.7")
    assert not {"accuracy", "balanced", "worst domain"} & set(row)
    assert "size, kB" in row
    assert "OOD: on the domain that training did not see" in " ".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_what_is_measured_everywhere_leaves_the_terminal_as_it_was(store, measured, record, write, tmp_path, width):
    """Fails if metrics that every record has now changed the table of a protocol that is not about them."""
    old = type(store)(tmp_path / "old")
    write(old, record("lsq", "w4a4", 0, (0.95, 0.93, 0.9)))
    assert shown(measured, "mdl", width) == shown(old, "mdl", width)
    assert not set(shown(measured, "mdl", width)[0]) & {"balanced", "ECE"}


def test_every_measure_is_in_the_files(measured):
    """Fails if what the terminal has no room for were lost, or explained nowhere."""
    paths = make_report(measured, None, None, COMMAND)
    rows = {row["protocol"]: row for row in read_csv(paths.csv)}
    for protocol, values in MEASURED.items():
        assert {k: float(rows[protocol][f"{k}/mean"]) for k in values} == values
        assert int(rows[protocol]["ece/n"]) == 1
    assert rows["mdl"]["acc_few/mean"] == ""
    text = paths.markdown.read_text()
    heads = [line for line in text.splitlines() if line.startswith("| method | bits | ") and "fidelity" in line]
    assert [line.endswith("| start | ECE |") for line in heads] == [True, True, True]
    assert sum("| balanced | many | medium | few |" in line for line in heads) == 1
    assert sum("| OOD accuracy |" in line and "| ID accuracy |" in line for line in heads) == 1
    for word in ("OOD accuracy", "ID accuracy", "balanced", "few", "ECE", "accuracy by class"):
        assert text.count(f"- **{word}**") == 1
    assert "classes" not in next(iter(read_csv(paths.runs)))


def test_old_records_are_reported_without_the_new_words(filled):
    """Fails if a store of before these metrics had empty columns, or words that mean nothing in it."""
    paths = make_report(filled, "small", None, COMMAND)
    for text in (paths.markdown.read_text(), paths.html.read_text(), paths.csv.read_text()):
        assert not re.search(r"\bECE\b|\bOOD\b|balanced|\bece\b|[Bb]y class", text)


def test_the_page_shows_each_class(measured):
    """Fails if a class's square held another's number, a long tail were not in its order, or a name became markup."""
    text = make_report(measured, None, None, COMMAND).html.read_text()
    page = _Page(text)
    assert "b" not in page.tags
    tables = re.findall(r'<table class="squares">.*?</table>', text, re.DOTALL)
    assert len(tables) == 3
    tail = next(t for t in tables if t.index("dog") < t.index("cat"))
    squares = re.findall(r'<td class="q" style="--v:([\d.]+)" title="([^"]+)">([^<]+)</td>', tail)
    assert squares == [
        ("0.50", "dog, 500 training images: 50", "50"),
        ("0.50", "&lt;b&gt;cat, 50 training images: 50", "50"),
        ("0.00", "owl, 5 training images: –", "–"),
    ]


@pytest.mark.parametrize(("classes", "squares", "numbers"), [(20, 20, 20), (21, 21, 0), (100, 100, 0), (101, 0, 0)])
def test_many_classes_become_a_strip_and_then_nothing(store, record, write, classes, squares, numbers):
    """Fails if a set of a thousand classes made a page of megabytes, or one of a hundred a table of a hundred numbers."""
    names = {"classes": [f"class {c}" for c in range(classes)]}
    write(store, record("lsq", "w4a4", 0, (0.9,) * 3, provenance=names) | {"per_class": {"fonts": [0.5] * classes}})
    text = make_report(store, None, None, COMMAND).html.read_text()
    assert text.count('<td class="q"') == squares
    assert text.count(">50</td>") == numbers
    assert ("Accuracy by class" in text) == (squares > 0)
    assert (f"{classes} classes; darker is better" in text) == (squares > 0 and not numbers)


def test_terminal_markup_in_a_name_is_text(store, record, write):
    """Fails if a label in brackets were taken for a colour."""
    write(store, record("lsq", "w4a4", 0, (0.9, 0.9, 0.9), spec={"augment": "[red]"}))
    write(store, record("lsq", "w4a4", 0, (0.9, 0.9, 0.9)))
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(terminal_table(leaderboard(store)[0], 120))
    assert "augment=[red]" in console.export_text()


def test_many_domains_give_way_to_the_worst(store, record, write):
    """Fails if a data set of many domains made the terminal's table unreadable."""
    metrics = {f"test/acc/domain_number_{i}": 0.9 - i / 100 for i in range(9)}
    write(store, record("lsq", "w4a4", 0, (0.9, 0.9, 0.9), metrics=metrics))
    (table,) = leaderboard(store)
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(terminal_table(table, 80))
    assert "82.0 domain_number_8" in console.export_text()


def test_numbers_are_written_with_their_spread():
    """Fails if one seed were written as if it had a spread."""
    from qatbench.reports.leaderboard import Mean

    assert percent(Mean(0.97123, 0.0034, 3)) == "97.1 ± 0.3"
    assert percent(Mean(0.97123, None, 1), show_n=True) == "97.1 (n=1)"
    assert percent(None) == "–"


def test_escapes():
    """Fails if text could leave its cell or its code span in Markdown."""
    assert _md("a|b\nc<d>*e*") == "a\\|b c&lt;d&gt;\\*e\\*"
    assert _md_code("a `b` c") == "`` a `b` c ``"


def test_the_axis_of_errors_is_exact_and_its_ticks_apart():
    """Fails if a point were drawn at another accuracy than its own, or labels ran into each other."""
    for percent_ in (0.0, 11.3, 50.0, 97.123, 100.0):
        assert float(_unspread(_spread(percent_))) == pytest.approx(percent_)
    for low, high in [(0, 100), (96.0, 97.0), (10, 12), (85, 99.9)]:
        bottom, top = float(_spread(low)), float(_spread(high))
        ticks = _ticks(bottom, top)
        places = [float(_spread(t)) for t in ticks]
        assert len(ticks) >= 3
        assert min(b - a for a, b in itertools.pairwise(places)) >= 0.07 * (top - bottom)


def test_the_figure_draws_cells_at_their_bits_and_accuracy(filled):
    """Fails if an error bar, a point or the float line were missing from the figure, or its text ran out of it."""
    png, svg = accuracy_figure(leaderboard(filled, "small"), "footer")
    text = svg.decode()
    for name in ("lsq", "kd+lsq", "ptq", "fp32 (float)", "average weight bits", "footer"):
        assert f"<!-- {name}" in text
    assert "<!-- pact" not in text  # no finished run, no point
    assert len(png) > 10_000


def test_a_crowded_figure_draws_the_best_of_each_method(store, record, write):
    """Fails if a search over many settings made the figure unreadable, or hid that only the best are drawn."""
    for step in range(15):
        write(store, record("lsq", "w4a4", 0, (0.9 + step / 1000,) * 3, spec={"batch": 16 + step}))
    write(store, record("pact", "w4a4", 0, (0.8, 0.8, 0.8)))
    text = accuracy_figure(leaderboard(store), "footer")[1].decode()
    assert "<!-- lsq (batch=30)" in text
    assert "<!-- lsq (batch=29)" not in text
    assert "<!-- pact" in text
    assert "of each method the setting with" in text


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine to render the page with")
    return found


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_renders_the_page(filled, browser, tmp_path, width):
    """Fails if the page did not render, broke a rule of the browser, or was wider than the screen."""
    page = make_report(filled, "small", None, COMMAND).html
    # a phone's width comes from a frame: headless Chromium has no window below 500 pixels
    probe = tmp_path / "probe.html"
    probe.write_text(
        f"<iframe id=f style='width:{width}px;height:900px;border:0'></iframe><pre id=o></pre><script>"
        "f.onload = () => { const d = f.contentDocument; const img = d.querySelector('figure img');"
        "o.textContent = `wide ${d.documentElement.scrollWidth} rows ${d.querySelectorAll('tbody tr').length} "
        "figure ${img.naturalWidth > 100} ${d.compatMode}` };"
        f"f.src = '{page.as_uri()}'</script>"
    )
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
    ]
    command += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", "--window-size=1300,1000", "--enable-logging=stderr", "--v=0"]
    command += ["--virtual-time-budget=5000", "--dump-dom", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shown = re.search(r"wide (\d+) rows (\d+) figure (\w+) (\w+)</pre>", done.stdout)
    assert shown, done.stdout[-2000:]
    assert int(shown[1]) <= width
    assert int(shown[2]) == 8 + 8 + len(leaderboard(filled, "small")[0].problems) + 1
    assert shown[3] == "true"
    assert shown[4] == "CSS1Compat"
    assert "CONSOLE" not in done.stderr


def test_the_template_travels_with_the_package():
    """Fails if an installed qatbench had no page to fill."""
    import qatbench.reports as reports

    template = Path(reports.__file__).parent / "templates" / "leaderboard.html.j2"
    assert "{{ page.title }}" in template.read_text()
