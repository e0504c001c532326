"""One setting of the codebook for all three rows of Table 10, without knowing the tasks.

    OMP_NUM_THREADS=1 python studies/grouping_thresholds.py          about 3 minutes on one core

Prints the tables of results/grouping.md and draws results/grouping_thresholds.png. It reads the instructions
of the paper (Table 9) and three text streams from ../shared, or from the folder in LCIA_SHARED; the encoder
needs the extra `sentence`.

Expected: only the sentence encoder, and the removal of words that most groups share, give all three rows at
one threshold; only the encoder also does so when the tasks come in other orders.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from lcia.grouping import SIMILARITIES, Codebook, Router, group_tasks, threshold_ranges
from lcia.grouping.similarity import CodebookTfidf, PairTfidf, words_of

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("LCIA_SHARED", ROOT / ".." / "shared"))
PAPER = json.loads((SHARED / "paper" / "instructions.json").read_text())
PAPER_THRESHOLDS = {"original": 0.9, "diverse": 0.3, "10type": 0.3}
ROWS = tuple(PAPER_THRESHOLDS)
RECOMMENDED = ("sentence", "max")
RECOMMENDED_THRESHOLD = 0.7
ORDERS = 100  # random orders of the eight tasks

Tasks = Mapping[str, Sequence[str]]
Groups = dict[str, list[str]]
Sets = set[frozenset[str]]
Block = NDArray[np.float64]  # (n, m) similarities of a task's instructions to a group's
PairBlock = Callable[[Sequence[str], Sequence[str]], Block]
Blocks = Callable[[Sequence[str], Groups], dict[str, Block]]
Score = Callable[[Sequence[str], Groups], dict[str, float]]


def paper_tasks(row: str, order: Iterable[str] = tuple(PAPER["orders"]["origin"])) -> Tasks:
    return {task: PAPER["instructions"][task][row] for task in order}


def folder_tasks(folder: str, order: Sequence[str]) -> Tasks:
    """{task: its distinct instructions} of one of the text streams."""
    tasks = {}
    for path in (SHARED / "data" / folder).glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        tasks[path.stem.replace("task0", "task")] = list(dict.fromkeys(row["instruction"] for row in rows))
    return {task: tasks[task] for task in order}


def text_streams() -> dict[str, Tasks]:
    data = SHARED / "data"
    assistant = json.loads((data / "assistant_stream" / "tasks.json").read_text())
    return {
        "assistant_stream": folder_tasks("assistant_stream", [task["task"] for task in assistant]),
        **{
            name: folder_tasks(name, json.loads((data / name / "orders.json").read_text())["order1"])
            for name in ("instrdialog", "olora_cl")
        },
    }


def sets(groups: Mapping[str, str]) -> Sets:
    members = defaultdict(set)
    for task, group in groups.items():
        members[group].add(task)
    return {frozenset(tasks) for tasks in members.values()}


def is_table_10(row: str) -> Callable[[Sets], bool]:
    expected = {frozenset(tasks) for tasks in PAPER["groups_in_table_10"][row]}
    return lambda formed: formed == expected


def is_sensible_assistant(formed: Sets) -> bool:
    """The three intent tasks together, the choice of a letter alone; playlist and artist may be either."""
    intents = frozenset({"travel_intent", "banking_intent", "kitchen_intent"})
    return {intents, frozenset({"domain_choice"})} <= formed


# ---------------------------------------------------------------- what is tried: similarities

OF_TWO_TEXTS = {
    **{name: make for name, make in SIMILARITIES.items() if name != "tfidf_codebook"},
    "tfidf_pair, stop words kept": lambda: PairTfidf(words_of(stop_words=None)),
}


def pair_block(name: str) -> PairBlock:
    """The block of a similarity that depends on the two texts alone, each pair compared once."""

    @cache
    def similarity(a: str, b: str) -> float:
        index = OF_TWO_TEXTS[name]()
        index.add([b])
        return float(next(iter(index.rows([a])))[0])

    return lambda new, old: np.array([[similarity(a, b) for b in old] for a in new])


def blocks_of_pairs(block: PairBlock) -> Blocks:
    return lambda new, groups: {group: block(new, texts) for group, texts in groups.items()}


def blocks_of_codebook(new: Sequence[str], groups: Groups) -> dict[str, Block]:
    index = CodebookTfidf(words_of())
    index.add([text for texts in groups.values() for text in texts])
    rows = np.stack(list(index.rows(new)))
    ends = np.cumsum([len(texts) for texts in groups.values()])
    return dict(zip(groups, np.split(rows, ends[:-1], axis=1), strict=True))


@cache
def word_set(text: str) -> frozenset[str]:
    return frozenset(words_of()(text))


def blocks_without_scaffold(new: Sequence[str], groups: Groups) -> dict[str, Block]:
    """Cosine of word sets without the words that 2/3 of the groups have, the new task counted as one."""
    held = Counter[str]()
    for texts in (*groups.values(), new):
        held.update(frozenset().union(*map(word_set, texts)))
    scaffold = {word for word, count in held.items() if 3 * count >= 2 * (len(groups) + 1)}

    def similarity(a: str, b: str) -> float:
        kept_a, kept_b = word_set(a) - scaffold, word_set(b) - scaffold
        if not kept_a or not kept_b:
            return float(word_set(a) == word_set(b))
        return len(kept_a & kept_b) / math.sqrt(len(kept_a) * len(kept_b))

    return {g: np.array([[similarity(a, b) for b in texts] for a in new]) for g, texts in groups.items()}


# ---------------------------------------------------------------- what is tried: from a block to a score

SET_SCORES: dict[str, Callable[[Block], float]] = {
    "mean": lambda block: block.mean(),
    "max": lambda block: block.max(),
    "median": lambda block: float(np.median(block)),
    "min (complete linkage)": lambda block: block.min(),
    "best match of each new": lambda block: block.max(axis=1).mean(),
    "best match of each saved": lambda block: block.max(axis=0).mean(),
    "Chamfer": lambda block: (block.max(axis=1).mean() + block.max(axis=0).mean()) / 2,
    "Hausdorff": lambda block: min(block.max(axis=1).min(), block.max(axis=0).min()),
}
# These also need the similarities inside each set, which only a similarity of two texts alone has.
NORMALISED: dict[str, Callable[[Block, Block, Block], float]] = {
    "mean / √(inside · inside)": lambda block, new, old: block.mean() / math.sqrt(new.mean() * old.mean()),
    "1 − energy distance / 2": lambda block, new, old: 1 - (new.mean() + old.mean() - 2 * block.mean()) / 2,
}


def scored(blocks: Blocks, reduce: str) -> Score:
    def score(new: Sequence[str], groups: Groups) -> dict[str, float]:
        return {group: float(SET_SCORES[reduce](block)) for group, block in blocks(new, groups).items()}

    return score


def normalised(block: PairBlock, reduce: str) -> Score:
    def score(new: Sequence[str], groups: Groups) -> dict[str, float]:
        function, inside = NORMALISED[reduce], block(new, new)
        return {g: float(function(block(new, old), inside, block(old, old))) for g, old in groups.items()}

    return score


def settings() -> dict[tuple[str, str], Score]:
    """Every (similarity, score of two sets) as a function of a task's instructions and the groups so far."""
    tried: dict[tuple[str, str], Score] = {}
    for name in OF_TWO_TEXTS:
        block = pair_block(name)
        tried |= {(name, reduce): scored(blocks_of_pairs(block), reduce) for reduce in SET_SCORES}
        tried |= {(name, reduce): normalised(block, reduce) for reduce in NORMALISED}
    for reduce in SET_SCORES:
        tried["tfidf_codebook", reduce] = scored(blocks_of_codebook, reduce)
        tried["scaffold words dropped", reduce] = scored(blocks_without_scaffold, reduce)
    return tried


# ---------------------------------------------------------------- what is asked of each


@dataclass(frozen=True)
class Formed:
    groups: dict[str, str]  # task -> group
    lowest: float  # the lowest score at which a task joined
    lead: float  # the smallest distance of the group that was joined to the second best


def form(tasks: Tasks, score: Score, above: float) -> Formed:
    """The groups when every task with a score > `above` joins its best group."""
    saved: Groups = {}
    groups, lowest, lead = {}, math.inf, math.inf
    for task, instructions in tasks.items():
        new = list(dict.fromkeys(instructions))
        scores = {g: round(value, 12) for g, value in score(new, saved).items()} if saved else {}
        best, *others = sorted(scores.values(), reverse=True) or [-math.inf]
        groups[task] = task
        if best > above:
            groups[task] = max(scores, key=scores.__getitem__)
            lowest, lead = min(lowest, best), min([lead, *(best - second for second in others[:1])])
        saved[groups[task]] = list(dict.fromkeys([*saved.get(groups[task], []), *new]))
    return Formed(groups, lowest, lead)


def form_at(tasks: Tasks, score: Score, threshold: float) -> Formed:
    """With ≥, as the codebook compares."""
    return form(tasks, score, float(np.nextafter(threshold, -1)))


def ranges(tasks: Tasks, score: Score) -> list[tuple[float, float, Sets]]:
    """[(above, up to, the groups)], as lcia.grouping.threshold_ranges does it, for any score."""
    pieces, above = [], -math.inf
    while above < math.inf:
        formed = form(tasks, score, above)
        pieces.append((above, formed.lowest, sets(formed.groups)))
        above = formed.lowest
    return pieces


@dataclass(frozen=True)
class Span:
    """Thresholds in above < threshold ≤ up_to; false when there are none."""

    above: float
    up_to: float

    def __and__(self, other: Span) -> Span:
        return Span(max(self.above, other.above), min(self.up_to, other.up_to))

    def __bool__(self) -> bool:
        return self.above < self.up_to

    def __contains__(self, threshold: float) -> bool:
        return self.above < threshold <= self.up_to

    @property
    def width(self) -> float:
        return max(0.0, self.up_to - self.above)

    @property
    def middle(self) -> float:
        return (self.above + self.up_to) / 2

    def __str__(self) -> str:
        return f"{self.above:.3f}–{self.up_to:.3f}" if self else "–"


NEVER = Span(1.0, -1.0)


def span(tasks: Tasks, score: Score, right: Callable[[Sets], bool]) -> Span:
    """The widest run of thresholds that gives the right groups."""
    runs = [NEVER]
    for above, up_to, formed in ranges(tasks, score):
        if right(formed) and runs[-1].up_to == above:
            runs[-1] = Span(runs[-1].above, up_to)
        elif right(formed):
            runs.append(Span(above, up_to))
    return max(runs, key=lambda run: run.width)


def paper_spans(
    score: Score, order: Sequence[str] = PAPER["orders"]["origin"], change: Callable[[str], str] = str
) -> dict[str, Span]:
    spans = {}
    for row in ROWS:
        tasks = {task: [change(text) for text in texts] for task, texts in paper_tasks(row, order).items()}
        spans[row] = span(tasks, score, is_table_10(row))
    return spans


def joint(spans: Mapping[str, Span]) -> Span:
    return spans["original"] & spans["diverse"] & spans["10type"]


def right_in_random_orders(score: Score, thresholds: Mapping[str, float]) -> str:
    """In how many of ORDERS random orders of the tasks each row forms the groups of Table 10."""
    generator = np.random.default_rng(0)
    orders = [generator.permutation(PAPER["orders"]["origin"]).tolist() for _ in range(ORDERS)]
    right = []
    for row, threshold in thresholds.items():
        formed = (sets(form_at(paper_tasks(row, order), score, threshold).groups) for order in orders)
        right.append(sum(map(is_table_10(row), formed)))
    return " / ".join(map(str, right))


def right_when_left_out(spans: Mapping[str, Span]) -> int:
    """For how many rows the middle of what suits the two other rows suits it too."""
    right = 0
    for row in ROWS:
        first, second = (spans[other] for other in ROWS if other != row)
        both = first & second
        right += bool(both) and both.middle in spans[row]
    return right


def check_against_the_package(similarity: str, reduce: str, score: Score) -> None:
    """The loop above and lcia.grouping must agree on every range of the threshold."""
    for row in ROWS:
        mine, package = (
            ranges(paper_tasks(row), score),
            threshold_ranges(paper_tasks(row), reduce, similarity),
        )
        assert [formed for *_, formed in mine] == [sets(piece.groups) for piece in package]
        for (above, up_to, _), piece in zip(mine, package, strict=True):
            assert np.allclose([above, up_to], [piece.above, piece.up_to])


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def describe(formed: Sets) -> str:
    several = sorted(sorted(tasks) for tasks in formed if len(tasks) > 1)
    return "; ".join("{" + ", ".join(tasks) + "}" for tasks in several) or "none"


REWORDINGS: dict[str, Callable[[str], str]] = {
    "as printed": str,
    "a full stop at the end": lambda text: text + ".",
    "`Please` in front": lambda text: text if text.startswith("Please") else f"Please {text[0].lower()}{text[1:]}",
    "in capitals": str.upper,
    "line break and space around": lambda text: f" {text} \n",
}


def study_settings(tried: Mapping[tuple[str, str], Score]) -> dict[tuple[str, str], Span]:
    """The table of settings; returns the range of each that gives all three rows."""
    assistant, lines, found = text_streams()["assistant_stream"], [], {}
    for (similarity, reduce), score in tried.items():
        if similarity in SIMILARITIES and reduce in ("mean", "max"):
            check_against_the_package(similarity, reduce, score)
        spans = paper_spans(score)
        found[similarity, reduce] = all_three = joint(spans)
        orders = right_in_random_orders(score, dict.fromkeys(ROWS, all_three.middle)) if all_three else "–"
        sensible = span(assistant, score, is_sensible_assistant)
        left_out = f"{right_when_left_out(spans)} of 3"
        width = f"{all_three.width:.3f}"
        lines.append([similarity, reduce, *spans.values(), all_three, width, left_out, sensible, orders])
    print("## Thresholds that give Table 10, order `origin`\n")
    head = ["similarity", "score of two sets", *ROWS, "all three", "width", "left-out row right", "assistant"]
    table([*head, f"of {ORDERS} orders"], sorted(lines, key=lambda line: -float(str(line[6]))))
    right = right_in_random_orders(tried["tfidf_pair", "mean"], PAPER_THRESHOLDS)
    print(f"tfidf_pair, mean with the paper's own ε for each row, in the same {ORDERS} orders: {right}.\n")
    return found


def study_streams(tried: Mapping[tuple[str, str], Score], found: Mapping[tuple[str, str], Span]) -> None:
    shown = {
        ("tfidf_pair", "mean"): PAPER_THRESHOLDS["original"],
        RECOMMENDED: RECOMMENDED_THRESHOLD,
        ("sentence", "1 − energy distance / 2"): found["sentence", "1 − energy distance / 2"].middle,
        ("scaffold words dropped", "max"): found["scaffold words dropped", "max"].middle,
    }
    print("## The text streams\n")
    lines = []
    for stream, tasks in text_streams().items():
        for setting, threshold in shown.items():
            formed = sets(form_at(tasks, tried[setting], threshold).groups)
            lines.append([stream, ", ".join(setting), f"{threshold:.3f}", f"{len(formed)} of {len(tasks)}"])
            lines[-1].append(describe(formed))
    table(["stream", "setting", "threshold", "groups of tasks", "groups of several tasks"], lines)


def study_recommendation(score: Score) -> None:
    print(f"## How firm the recommendation is: {', '.join(RECOMMENDED)}\n")
    lines = []
    for name, change in REWORDINGS.items():
        spans = paper_spans(score, change=change)
        lines.append([name, *spans.values(), joint(spans), f"{joint(spans).width:.3f}"])
    table(["instructions", *ROWS, "all three", "width"], lines)
    lines = []
    for name, order in PAPER["orders"].items():
        spans = paper_spans(score, order)
        leads = [form_at(paper_tasks(row, order), score, RECOMMENDED_THRESHOLD).lead for row in ROWS]
        lines.append([name, *spans.values(), joint(spans), f"{min(leads):.3f}"])
    table(["order", *ROWS, "all three", f"smallest lead at {RECOMMENDED_THRESHOLD}"], lines)


# ---------------------------------------------------------------- the sweep


def held_out(seed: int, count: int = 3) -> tuple[Tasks, list[tuple[str, str]]]:
    """10type with `count` instructions of each task kept for routing: (the rest, [(task, instruction)])."""
    generator = np.random.default_rng(seed)
    kept, asked = {}, []
    for task, instructions in paper_tasks("10type").items():
        chosen = set(generator.choice(len(instructions), count, replace=False).tolist())
        kept[task] = [text for place, text in enumerate(instructions) if place not in chosen]
        asked += [(task, instructions[place]) for place in sorted(chosen)]
    return kept, asked


def routing_accuracy(threshold: float, reduce: str, similarity: str, route_reduce: str) -> float:
    """Percent of held-out instructions routed to the group that their task trains; over five draws."""
    right, total = 0, 0
    for seed in range(5):
        tasks, asked = held_out(seed)
        book = Codebook(threshold, reduce, similarity)
        groups = group_tasks(tasks, book)
        matches = Router(book, reduce=route_reduce).route_many([text for _, text in asked])
        right += sum(match.group == groups[task] for (task, _), match in zip(asked, matches, strict=True))
        total += len(asked)
    return 100 * right / total


def study_sweep() -> None:
    thresholds = np.round(np.linspace(0.0, 1.0, 51), 2).tolist()
    colours = {"original": "#0072b2", "diverse": "#d55e00", "10type": "#009e73"}
    reductions = {("mean", "mean"): "-", ("mean", "max"): "--", ("max", "max"): ":"}  # groups by, routed by
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), sharex=True, sharey="row", layout="constrained")
    lines = []
    for (top, bottom), similarity in zip(axes.T, SIMILARITIES, strict=True):
        for row, (reduce, style) in itertools.product(ROWS, {"mean": "-", "max": ":"}.items()):
            pieces = threshold_ranges(paper_tasks(row), reduce, similarity)
            formed = [next(p for p in pieces if p.above < threshold <= p.up_to) for threshold in thresholds]
            counts = [len(sets(piece.groups)) for piece in formed]
            top.plot(thresholds, counts, style, color=colours[row], label=f"{row}, {reduce}")
        for (reduce, route), style in reductions.items():
            accuracy = [routing_accuracy(threshold, reduce, similarity, route) for threshold in thresholds]
            bottom.plot(thresholds, accuracy, f"k{style}", label=f"groups by {reduce}, routed by {route}")
            at = [f"{accuracy[thresholds.index(threshold)]:.1f}" for threshold in (0.3, 0.5, 0.7, 0.9)]
            lines.append([similarity, reduce, route, *at])
        top.set_title(similarity)
        share = top.secondary_yaxis("right", functions=(lambda groups: 12.5 * groups, lambda share: share / 12.5))
        share.set_yticks([25, 50, 75, 100])
        share.set_ylabel("trained parameters,\n% of one set per task" if similarity == "sentence" else "")
        bottom.set(xlabel="threshold", ylim=(0, 103))
        top.grid(alpha=0.3)
        bottom.grid(alpha=0.3)
    axes[0, 0].set_ylabel("groups formed from 8 tasks")
    axes[1, 0].set_ylabel("held-out instructions of 10type\nrouted to their task's group, %")
    axes[0, 0].legend(fontsize=7, loc="upper left")
    axes[1, 0].legend(fontsize=7, loc="lower left")
    figure.savefig(ROOT / "results" / "grouping_thresholds.png", dpi=110)
    print("## Routing of held-out instructions, % right (10type, 3 of 11 a task, five draws)\n")
    table(["similarity", "groups by", "routed by", *(f"threshold {t}" for t in (0.3, 0.5, 0.7, 0.9))], lines)


def main() -> None:
    tried = settings()
    found = study_settings(tried)
    study_streams(tried, found)
    study_recommendation(tried[RECOMMENDED])
    study_sweep()


if __name__ == "__main__":
    main()
