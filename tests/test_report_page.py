"""The page: complete, escaped, self-contained, readable in light and dark; and the figures' labels apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lcia.errors import UserError
from lcia.report import Run, compare_runs, figures, load_run, write_report
from lcia.report.compare import Arena, arrange
from lcia.report.figures.layout import spread
from lcia.report.figures.theme import COLOURS, HEAT_ALPHA, drawable, fitted, style
from lcia.report.heat import confusion_heat
from lcia.report.tables import p_text
from report_runs import ASSISTANT, make_answered_run, make_run

EVIL = '<script>alert("1")</script>'
LONG = tuple(
    f"coin_{name}_reverse_10type_with_a_long_name" if i % 3 == 0 else name
    for i, name in enumerate(
        (*"ABCDEFG", "OCR-VQA", "VizWiz", *"abcdefg", "$x$_y", "summarisation_of_long_documents", "z")
    )
)
TWELVE = (
    "zero_shot", "lora", "ewc", "lwf", "agem", "replay", "pgp", "moelora", "model_tailor_with_a_long_label", "llaca",
    "lcia", "multi_task",
)  # fmt: skip
VOID = {"meta", "wbr", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would find: elements in balance, the cells of each table, text, attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # element, name, value
        self.tables: list[list[list[str]]] = []
        self.cells: list[dict[str, str]] = []  # attributes of every td
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "td":
            self.cells.append({name: value or "" for name, value in attrs})

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text.append(data)
            if {"td", "th"} & set(self.open):
                self.tables[-1][-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def table(self, *head: str) -> list[list[str]]:
        """The rows, below its head, of the one table whose head begins so."""
        (found,) = (rows for rows in self.tables if tuple(rows[0][: len(head)]) == head)
        return found[1:]


def page_of(folder: Path, *runs: Path) -> tuple[Page, str]:
    out = write_report([load_run(run) for run in runs], folder / "report.html")
    text = out.read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page, str]:
    """lora and lcia on six tasks."""
    folder = tmp_path_factory.mktemp("assistant")
    page, text = page_of(folder, *(make_run(folder / method, method) for method in ("lora", "lcia")))
    return folder, page, text


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, which takes most of a page's time."""
    monkeypatch.setattr("lcia.report.gallery.save_png", lambda figure, path: None)
    monkeypatch.setattr("lcia.report.gallery.svg", lambda figure, name: "<svg ></svg>")


# -- the numbers


def test_metrics_table_equals_the_json(assistant: tuple[Path, Page, str]) -> None:
    folder, page, _ = assistant
    rows = page.table("Method", "Seeds", "Avg.ACC", "Forgetting", "New.ACC", "BWT", "FWT")
    for row, method in zip(rows, ("lora", "lcia"), strict=True):
        metrics = json.loads((folder / method / "results.json").read_text())["metrics"]
        assert row == [
            method,
            "0",
            *(f"{metrics[key]:.2f}" for key in ("avg_acc", "forgetting", "new_acc", "bwt", "fwt")),
        ]


def test_final_scores_and_cost_equal_the_json(assistant: tuple[Path, Page, str]) -> None:
    folder, page, _ = assistant
    results = [json.loads((folder / method / "results.json").read_text()) for method in ("lora", "lcia")]
    for i, row in enumerate(page.table("Task", "lora", "lcia")):
        assert row == [f"{i + 1} {ASSISTANT[i]}", *(f"{found['matrix'][-1][i]:.1f}" for found in results)]
    rows = page.table("Method", "Training", "Evaluation")
    assert rows[1] == ["lcia", "2 min 03 s", "6 min 06 s", "240", "12", "2310 MiB", "4.88 M", "14.7 M"]


def test_matrices_show_each_measured_cell_and_mark_the_others(assistant: tuple[Path, Page, str]) -> None:
    folder, page, _ = assistant
    columns = [f"{i} {task}" for i, task in enumerate(ASSISTANT, start=1)]
    found = [rows for rows in page.tables if rows[0][1:] == columns]
    empty = 0
    for rows, method in zip(found, ("lora", "lcia"), strict=True):
        matrix = json.loads((folder / method / "results.json").read_text())["matrix"]
        assert [row[1:] for row in rows[1:]] == [["" if v is None else f"{v:.1f}" for v in row] for row in matrix]
        empty += sum(value is None for row in matrix for value in row)
    marked = [cell for cell in page.cells if cell.get("title") == "not measured"]
    assert len(marked) == empty
    assert all("absent" in cell["class"] for cell in marked)


@pytest.mark.usefixtures("no_drawing")
def test_seeds_are_a_mean_with_its_interval(tmp_path: Path) -> None:
    values = (60.0, 62.0, 64.0)
    runs = [make_run(tmp_path / f"{i}", "lora", ("a",), i, metrics={"avg_acc": v}) for i, v in enumerate(values)]
    page, _ = page_of(tmp_path, *runs)
    assert page.table("Method", "Seeds")[0][:3] == ["lora", "0, 1, 2", "62.00 ± 4.97"]
    assert "95 % t-interval over seeds" in page.words


def test_groups_show_similarity_threshold_and_choice(assistant: tuple[Path, Page, str]) -> None:
    _, page, _ = assistant
    rows = {row[0]: row[1:] for row in page.table("", "intent", "name", "domain_choice")}
    assert rows["1 travel_intent"] == ["new", "", ""]
    assert rows["3 banking_intent"] == ["1.00 ✓", "0.31", ""]
    assert rows["4 domain_choice"] == ["0.31", "0.10", "new"]
    assert "from a similarity of 0.9" in page.words


def test_averaging_is_shown_or_its_absence_explained(assistant: tuple[Path, Page, str]) -> None:
    _, page, _ = assistant
    assert "lcia, seed 0: loss; β (line: median over tensors" in page.words
    assert "No weights are averaged, so there is no β and no fallback to show: lora." in page.words
    rows = dict(page.table("", "lcia"))
    assert rows["fallback fraction, all tasks"] == "0.125"
    assert rows["retained mass, banking_intent"] == "0.320"


@pytest.mark.usefixtures("no_drawing")
def test_examples_put_disagreement_first_and_say_right_or_wrong_in_words(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / method, method, ("a",), n_rows=3) for method in ("lora", "lcia")]
    answers = {"lora": ("right", 1.0), "lcia": ("half", 0.5)}
    for run in runs:
        text, score = answers[run.name]
        lines = [
            {
                "id": i,
                "prompt": f"question {i}",
                "prediction": text,
                "reference": "right",
                "score": score if i == 2 else 0,
            }
            for i in range(3)
        ]
        (run / "predictions/1/a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    page, _ = page_of(tmp_path, *runs)
    first = next(rows for rows in page.tables if rows[0][0] == "reference")
    assert first == [["reference", "right", ""], ["lora", "right", "✓ right"], ["lcia", "half", "~ partly, 0.50"]]
    assert page.words.index("question 2") < page.words.index("question 0") < page.words.index("question 1")
    assert "✗ wrong" in page.words


@pytest.mark.usefixtures("no_drawing")
def test_significance_shows_raw_and_corrected_p_and_the_notes(tmp_path: Path) -> None:
    tasks = ("a", "b", "c")
    runs = [
        make_answered_run(tmp_path / f"{method}{seed}", method, tasks, seed)
        for method in ("lora", "lcia", "llaca")
        for seed in (0, 1)
    ]
    page, _ = page_of(tmp_path, *runs)
    contrasts = compare_runs([load_run(run) for run in runs]).scopes[0].contrasts
    rows = page.table(
        "Method", "Difference in Avg.ACC", "Seeds", "p, seeds", "Holm", "Test rows", "p, test rows", "Holm"
    )
    for row, one in zip(rows, contrasts, strict=True):
        shown = [p_text(p) for p in (one.repeats.p, one.repeats.corrected, one.examples.p, one.examples.corrected)]
        assert [row[0], row[2], row[5]] == [one.label, "2", "60"]
        assert [row[3], row[4], row[6], row[7]] == shown
    assert "2 seeds are few. Even uncorrected, p is below 0.05 only from 12.7 standard errors on" in page.words
    assert "tested over seeds, after correction: " in page.words
    assert "#c1-significance" in [value for _, name, value in page.attributes if name == "href"]


@pytest.mark.usefixtures("no_drawing")
def test_one_method_has_no_section_on_significance(tmp_path: Path) -> None:
    page, _ = page_of(tmp_path, make_run(tmp_path / "run", "lora", ("a",)))
    assert "Significance" not in page.words


@pytest.mark.usefixtures("no_drawing")
def test_orders_stand_before_the_chapters(tmp_path: Path) -> None:
    runs = [
        make_answered_run(tmp_path / f"{method}{i}", method, order)
        for method in ("lora", "lcia")
        for i, order in enumerate((("a", "b"), ("b", "a")))
    ]
    page, _ = page_of(tmp_path, *runs)
    rows = page.table("Method", "Avg.ACC, order 1", "Avg.ACC, order 2", "Avg.ACC, all orders")
    for row, method in zip(rows, ("lora", "lcia"), strict=True):
        scores = [load_run(tmp_path / f"{method}{i}").metrics["avg_acc"] or 0.0 for i in (0, 1)]
        mean, half = np.mean(scores), 12.7062 * abs(scores[0] - scores[1]) / 2
        assert row[1].startswith(f"{scores[0]:.2f} [")
        assert row[3] == f"{mean:.2f} ± {half:.2f}"
    body = page.words.split("2 comparisons", 1)[1]
    assert body.index("over 2 orders") < body.index("order 1 on smollm2-135m")
    assert "bootstrap interval over test rows" in page.words


@pytest.mark.usefixtures("no_drawing")
def test_confusion_adds_up_the_seeds_and_marks_the_own_group(tmp_path: Path) -> None:
    groups = {"a": "one", "b": "two"}
    confusion = {"a": {"one": 7, "": 3}, "b": {"one": 4, "two": 6}}
    routing = {"accuracy": 65.0, "oracle_avg_acc": 50.0, "base_model_answers": 3, "confusion": confusion}
    runs = [
        make_run(tmp_path / f"lcia{seed}", "lcia", ("a", "b"), seed, routing=routing, groups=groups, group_scores={})
        for seed in (0, 1)
    ]
    shared = {"accuracy": 100.0, "confusion": {"a": {"shared": 10}, "b": {"shared": 10}}}
    runs.append(make_run(tmp_path / "lora", "lora", ("a", "b"), routing=shared))
    page, _ = page_of(tmp_path, *runs)
    assert page.table("", "one", "two", "base model") == [["1 a", "14", "0", "6"], ["2 b", "8", "12", "0"]]
    assert "lcia : test inputs of each task, by the group they were sent to, 2 seeds together" in page.words
    marked = [
        cell["title"] for cell in page.cells if "joined" in cell.get("class", "") and " of " in cell.get("title", "")
    ]
    assert marked == ["14 of 20", "12 of 20"]
    rows = page.table("Method", "Routed to the task's own group, %", "Avg.ACC", "Avg.ACC with perfect routing")
    assert (rows[0][1], rows[0][3], rows[0][4]) == ("65.00 ± 0.00", "50.00 ± 0.00", "3")
    assert "shared" not in [name for rows in page.tables for name in rows[0]]  # one group: nothing to route


def test_a_stack_of_adapters_answers_for_all_its_tasks(tmp_path: Path) -> None:
    confusion = {"a": {"a+b": 5}, "b": {"a+b": 4, "": 1}}
    run = load_run(make_run(tmp_path / "run", "lora", ("a", "b"), groups={"a": "a", "b": "b"}))
    table = confusion_heat(run, confusion)
    assert table.columns == ("a+b", "base model")
    assert [[cell.mark for cell in cells] for _, cells in table.rows] == [["joined", ""], ["joined", ""]]


@pytest.mark.usefixtures("no_drawing")
def test_cost_names_the_methods_that_are_not_dominated(tmp_path: Path) -> None:
    matrix = [[0.0], [50.0]]
    runs = [
        make_run(tmp_path / method, method, ("a",), matrix=matrix, metrics={"avg_acc": score}, cost=cost)
        for method, score, cost in (
            ("lora", 40.0, {"train_s": 5.0}),
            ("lcia", 50.0, {"train_s": 9.0}),
            ("replay", 45.0, {"train_s": 9.5, "examples_stored": 30}),
        )
    ]
    page, _ = page_of(tmp_path, *runs)
    assert "not dominated, Training: lora, lcia" in page.words
    assert "not dominated, Examples stored: lcia" in page.words
    rows = page.table("Method", "Training")
    assert [row[-1] for row in rows] == ["–", "–", "30"]


# -- what is missing


@pytest.mark.usefixtures("no_drawing")
def test_missing_optional_parts_are_not_recorded(tmp_path: Path) -> None:
    results = {"method": "lora", "model": "m", "seed": 0, "tasks": ["a", "b", "c"], "metrics": {"avg_acc": 5.0}}
    (tmp_path / "results.json").write_text(json.dumps(results | {"matrix": [[5.0] * 3] * 4}))
    page, _ = page_of(tmp_path, tmp_path)
    assert "stream not recorded" in page.words
    assert page.table("Method", "Training")[0] == ["lora", *["not recorded"] * 7]
    for sentence in (
        "Routing: not recorded",
        "Predictions: not recorded",
        "Versions: not recorded",
        "no groups recorded",
    ):
        assert sentence in page.words


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    matrix = [[None] * 3] * 4
    run = make_run(tmp_path / "run", tasks=("a", "b", "c"), matrix=matrix, metrics={"avg_acc": None})
    page, _ = page_of(tmp_path, run)
    assert "No run here has been measured on all its tasks yet." in page.words
    assert page.table("Method", "Seeds")[0] == ["lcia", "0", "–", "–", "–", "–", "–"]
    assert "No radar" in page.words


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(("tasks", "radars"), [(("a",), 0), (("a", "b"), 0), (("a", "b", "c"), 1)])
def test_radar_needs_three_tasks(tmp_path: Path, tasks: tuple[str, ...], radars: int) -> None:
    runs = [make_run(tmp_path / method, method, tasks, n_steps=5) for method in ("lora", "lcia")]
    page, _ = page_of(tmp_path, *runs)
    assert ("No radar: it needs at least 3 tasks" in page.words) == (not radars)
    assert page.words.count("Final scores, one axis a task") == radars


@pytest.mark.usefixtures("no_drawing")
def test_rows_that_did_not_fit_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "lora", ("a",), left_out={"a": 3}, too_long={"a": 2})
    page, _ = page_of(tmp_path, run)
    assert "lora, seed 0: 3 training rows of a were too long and left out." in page.words
    assert "lora, seed 0: 2 test rows of a were too long and count as wrong." in page.words


def test_nothing_to_report_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs"):
        write_report([], tmp_path / "report.html")


# -- safety and self-containment


def test_every_name_and_answer_is_escaped(tmp_path: Path) -> None:
    task = "a<script>b"
    run = make_run(
        tmp_path / "run", "lcia", (task, "c", "d"), stream=EVIL, model=EVIL, versions={EVIL: EVIL}, date=EVIL,
        config={"note": EVIL},
    )  # fmt: skip
    line = {"id": EVIL, "prompt": EVIL, "prediction": EVIL, "reference": [EVIL], "score": 0.0, "group": EVIL}
    (run / f"predictions/3/{task}.jsonl").write_text(json.dumps(line))
    results = json.loads((run / "results.json").read_text())
    results |= {"method": EVIL, "groups": dict.fromkeys(results["tasks"], EVIL), "group_scores": {"c": {EVIL: 1.0}}}
    (run / "results.json").write_text(json.dumps(results))
    page, text = page_of(tmp_path, run)
    assert page.tags.count("script") == 1  # the page's own
    assert "alert" not in text[text.rindex("<script>") :]
    assert page.words.count(EVIL) >= 8
    assert "a<script>b" in page.words


def test_the_page_needs_no_network(assistant: tuple[Path, Page, str]) -> None:
    _, page, text = assistant
    links = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href", "data", "action")]
    assert links
    assert all(value.startswith("#") for value in links)
    assert "://" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))


def test_ids_are_unique_and_links_lead_somewhere(assistant: tuple[Path, Page, str]) -> None:
    _, page, text = assistant
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for _, name, value in page.attributes if name == "href"]
    targets += re.findall(r"url\(#([^)]*)\)", text)
    assert set(targets) <= set(ids)


def test_figures_are_png_files_beside_the_page(assistant: tuple[Path, Page, str]) -> None:
    folder, _, _ = assistant
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {
        "cost.png", "final-scores.png", "groups-lcia.png", "matrices.png", "metrics.png", "pareto.png", "radar.png",
        "scores-over-time.png", "training-lcia.png", "training-lora.png",
    }  # fmt: skip
    assert all((folder / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "lcia", ("a", "b"), n_steps=4)
    assert page_of(tmp_path, run)[1] == page_of(tmp_path, run)[1]


@pytest.mark.usefixtures("no_drawing")
def test_comparisons_that_are_not_comparable_get_chapters(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(i), "lora", ("a",), stream=f"stream{i}", n_steps=4) for i in range(2)]
    page, _ = page_of(tmp_path, *runs)
    assert page.tags.count("h1") == 3
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


@pytest.mark.usefixtures("no_drawing")
def test_nineteen_tasks_and_twelve_methods(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / method, method, LONG, n_rows=1) for method in TWELVE]
    for run in runs:
        (run / "training_log.jsonl").unlink()
    page, _ = page_of(tmp_path, *runs)
    assert len(page.table("Task", *TWELVE)) == 19
    assert [row[0] for row in page.table("Method", "Seeds")] == list(TWELVE)


def test_importing_the_report_is_light_and_leaves_matplotlib_alone() -> None:
    code = "import sys, lcia.report; print({'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    before = dict(matplotlib.rcParams)
    with style():
        pass
    assert dict(matplotlib.rcParams) == before


# -- colours


def luminance(colour: str) -> float:
    """WCAG relative luminance."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mixed(one: str, other: str, share: float) -> str:
    pairs = ((int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


@pytest.mark.parametrize("paper", [0, 1], ids=["light", "dark"])
def test_colours_stand_out(paper: int) -> None:
    shown = {name: colours[paper] for name, colours in COLOURS.items()}
    assert contrast(shown["ink"], shown["paper"]) > 7
    assert contrast(shown["faint"], shown["paper"]) > 4.5
    assert contrast(shown["ink"], mixed(shown["heat"], shown["paper"], HEAT_ALPHA)) > 4.5
    for name in (name for name in shown if re.fullmatch(r"c\d", name)):
        assert contrast(shown[name], shown["paper"]) > 3, name


def test_every_colour_of_a_drawing_follows_the_page(assistant: tuple[Path, Page, str]) -> None:
    _, _, text = assistant
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.findall(r"(?:fill|stroke)(?:: |=\")#[0-9a-f]+", drawings)
    assert set(re.findall(r"var\(--(\w+)\)", drawings)) <= set(COLOURS)


# -- labels


class Recorder(RendererAgg):
    """Notes where each level text is drawn: ticks outside an axis exist, but are not."""

    def __init__(self, figure: Figure) -> None:
        super().__init__(*figure.bbox.size, figure.dpi)
        self.found: list[tuple[str, Bbox]] = []

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None) -> None:  # type: ignore[no-untyped-def]
        if not s.strip() or angle % 90:
            return
        if angle:
            self.found.append((s.strip(), mtext.get_window_extent(self)))
            return
        width, height, descent = self.get_text_width_height_descent(s, prop, False)
        self.found.append((s.strip(), Bbox.from_bounds(x, self.height - y - descent, width, height)))


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other, and texts that reach over the figure's edge."""
    with style():
        figure.draw_without_rendering()
        recorder = Recorder(figure)
        figure.draw(recorder)
    found, edge = recorder.found, figure.bbox
    assert found
    pairs = [
        (name, other)
        for (name, one), (other, two) in combinations(found, 2)
        if min(one.x1, two.x1) - max(one.x0, two.x0) > 1 and min(one.y1, two.y1) - max(one.y0, two.y0) > 1
    ]
    outside = [name for name, box in found if box.x0 < -1 or box.x1 > edge.x1 + 1 or box.y1 > edge.y1 + 1]
    return pairs + [(name, "edge") for name in outside]


@pytest.fixture(scope="module", params=["six", "nineteen"])
def arena(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Arena:
    folder = tmp_path_factory.mktemp(request.param)
    tasks, methods = (ASSISTANT, ("lora", "lcia")) if request.param == "six" else (LONG, TWELVE)
    runs = [load_run(make_run(folder / method, method, tasks, n_rows=1)) for method in methods]
    return arrange(runs)[0]


@pytest.mark.parametrize("name", ["scores_over_time", "final_bars", "metric_bars", "cost_bars", "radar", "pareto"])
def test_labels_do_not_overlap(arena: Arena, name: str) -> None:
    assert overlapping(getattr(figures, name)(arena)) == []


@pytest.mark.parametrize("name", ["group_similarities", "training_course"])
def test_labels_of_one_run_do_not_overlap(arena: Arena, name: str) -> None:
    (run,) = (run for run in arena.runs if run.method == "lcia")
    assert overlapping(getattr(figures, name)(run)) == []


def test_labels_of_a_confusion_do_not_overlap(arena: Arena) -> None:
    (run,) = (run for run in arena.runs if run.method == "lcia")
    counts = {task: {str(group): 1234, "": 5} for task, group in run.groups.items()}
    assert overlapping(figures.routing_confusion(run, counts)) == []


def test_labels_of_a_matrix_do_not_overlap(arena: Arena) -> None:
    assert overlapping(figures.matrices(arena.series[:2], 100.0)) == []


@given(st.lists(st.floats(0, 1), max_size=9))
def test_spread_keeps_order_and_distance(values: list[float]) -> None:
    placed = spread(values, gap=0.1)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed)
    ranked = sorted(zip(values, placed, strict=True))
    for (low, first), (high, second) in pairwise(ranked):
        assert low == high or second > first
    gaps = np.diff(sorted(placed))
    assert (gaps > 0.1 - 1e-9).all()


@given(st.text(max_size=60), st.integers(2, 20), st.integers(1, 3))
def test_fitted_keeps_its_promise(text: str, width: int, lines: int) -> None:
    shown = fitted(text, width, lines).split("\n")
    assert len(shown) <= lines
    assert all(len(line) <= width for line in shown)
    if len(drawable(text)) <= width:
        assert shown == [drawable(text)]


def test_names_the_font_cannot_draw_do_not_warn(tmp_path: Path) -> None:
    run: Run = load_run(make_run(tmp_path / "run", "lora", ("旅行", "b\n$x^2$", "_c"), n_steps=2))
    page, _ = Page(write_report([run], tmp_path / "r.html").read_text()), None
    assert "旅行" in page.words
    assert drawable("旅行a") == "□□a"
