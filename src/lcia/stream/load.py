"""`load_stream`: from a name, a folder or a list to tasks whose rows leave nothing open."""

from __future__ import annotations

import os
import random
import stat
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcia.errors import UserError, did_you_mean
from lcia.seeds import stable_seed
from lcia.stream.boxes import parse_box
from lcia.stream.formats import SPLIT_NAMES, Draft, Faults, read_file, read_records
from lcia.stream.hub import load_data_set
from lcia.stream.scorers import SCORERS, answer_words, chosen_letter, chosen_truth, default_scorer
from lcia.stream.sources import find
from lcia.stream.super_ni import positive_examples, super_ni_prompt
from lcia.stream.task_source import TaskSource
from lcia.stream.types import Row, Stream, Task

SPLITS = ("train", "dev", "test")
MANY_INSTRUCTIONS = 100  # above this, a task's place in the codebook is worth a remark


def load_stream(
    source: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    skip_bad_rows: bool = False,
    instruction: str | None = None,
) -> Stream:
    """Read a stream.

    Args:
        source: a built-in name ("assistant"), one with options ({"name": "coin", "order": "reverse", "path": DIR}), a
            folder, one data file, or a list of tasks {name, path, instruction?, scorer?, image_folder?, examples?}.
        tasks: names of the tasks to take, in the order in which they shall arrive; None takes all.
        seed: of the 80/10/10 draw for tasks that state no split.
        skip_bad_rows: leave out rows that cannot be used, and list them in `Stream.notes`.
        instruction: for rows without one, in tasks that name none.

    Returns:
        The stream; its `notes` say what was decided: splits drawn, scorers chosen, rows skipped.

    Raises:
        UserError: naming the file and line, or the key, and what would be right.
    """
    found = find(source)
    chosen = found.tasks if tasks is None else _select((*found.tasks, *found.on_request), tasks)
    notes = list(found.notes)
    loaded = []
    for task in chosen:
        if task.instruction is None:
            task = replace(task, instruction=instruction)
        loaded.append(_load_task(task, seed, skip_bad_rows, notes))
    return Stream(found.name, tuple(loaded), tuple(notes))


def _select(found: Sequence[TaskSource], names: Sequence[str]) -> tuple[TaskSource, ...]:
    by_name = {task.name: task for task in found}
    for name in names:
        if name not in by_name:
            raise UserError(f"tasks: the stream has no task {name!r}. {did_you_mean(str(name), by_name)}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise UserError(f"tasks: {twice!r} is listed twice")
    if not names:
        raise UserError("tasks: the list is empty; name at least one task, or leave the key out for all")
    return tuple(by_name[name] for name in names)


def _load_task(source: TaskSource, seed: int, skip_bad_rows: bool, notes: list[str]) -> Task:
    if source.scorer is not None and source.scorer not in SCORERS:
        hint = did_you_mean(source.scorer, SCORERS)
        raise UserError(f"task {source.name!r}: unknown scorer {source.scorer!r}. {hint}")
    notes += source.notes
    faults = Faults(skip_bad_rows)
    images = ImageFinder(source)
    drafts = _some(_usable(_read(source, faults, notes), images, faults), source.name, faults)
    prompts = _with_instructions if source.examples is None else _super_ni_prompts
    drafts = prompts(drafts, source, notes)
    scorer = source.scorer
    if scorer is None:
        # a split for this alone: the one that counts is made of what the scorer can read
        splits = _split(drafts, source, images.written, seed, faults, [])
        scorer = _choose_scorer(source.name, splits["train"], notes)
    drafts = _some(scorable(drafts, source.name, scorer, faults), source.name, faults)
    if faults.found:
        notes.append(f"{source.name}: {len(faults.found)} rows skipped")
        notes += faults.found
    splits = _split(drafts, source, images.written, seed, faults, notes)
    instructions = tuple(dict.fromkeys(draft.instruction or "" for draft in splits["train"]))
    if len(instructions) > MANY_INSTRUCTIONS:
        notes.append(
            f"{source.name}: {len(instructions)} distinct instructions in {len(splits['train'])} training "
            "rows; grouping compares all of them"
        )
    train, dev, test = (tuple(map(_row, splits[split])) for split in SPLITS)
    if source.every_answer:
        train = _learned_whole(train, source.name, notes)
        _note_context((*dev, *test), source.name, notes)
    return Task(source.name, instructions, train, dev, test, scorer)


def _some(drafts: Iterator[Draft], task: str, faults: Faults) -> list[Draft]:
    found = list(drafts)
    if not found:
        raise UserError(f"task {task!r}: no row can be used{_skipped(faults)}")
    return found


def _skipped(faults: Faults) -> str:
    return f"; {len(faults.found)} rows skipped, the first: {faults.found[0]}" if faults.found else ""


# --- reading ---------------------------------------------------------------------------------------------


def _read(source: TaskSource, faults: Faults, notes: list[str]) -> Iterator[Draft]:
    """All rows of a task, each with its id, and with the split that its file stands for."""
    if source.dataset is not None:
        parts = _read_dataset(source.dataset, faults)
    else:
        parts = ((path.stem, split, read_task_file(source, path, split, faults, notes)) for path, split in source.files)
    seen: dict[tuple[str, str], str] = {}  # (scope, id): source
    for part, split, drafts in parts:
        for draft in drafts:
            if split is not None and draft.split not in (None, split):
                faults.add(UserError(f"{draft.source}: split {draft.split!r} in a file for {split!r}"))
                continue
            draft = replace(draft, split=split or draft.split)
            try:
                yield _with_id(draft, part, seen)
            except UserError as fault:
                faults.add(fault)


def read_task_file(source: TaskSource, path: Path, split: str | None, faults: Faults, notes: list[str]) -> list[Draft]:
    """The rows of one of a task's files.

    Raises:
        UserError: as `formats.read_file`.
    """
    return read_file(path, faults) if source.reader is None else source.reader(path, split, faults, notes)


def _with_id(draft: Draft, part: str, seen: dict[tuple[str, str], str]) -> Draft:
    """Ids are unique in a file and in a split: files for different splits often count from 0 each."""
    place = f"{part}:{draft.number}"
    if draft.id is None:
        draft = replace(draft, id=place)
    elif draft.shared_id and (f"split {draft.split}", draft.id) in seen:
        draft = replace(draft, id=f"{draft.id}@{place}")
    scopes = [(f"file {part}", draft.id or ""), (f"split {draft.split}", draft.id or "")]
    for scope in scopes:
        if scope in seen and not draft.shared_id:
            raise UserError(f"{draft.source}: the id {draft.id!r} was used before, at {seen[scope]}")
    seen.update(dict.fromkeys(scopes, draft.source))
    return draft


def _read_dataset(name: str, faults: Faults) -> Iterator[tuple[str, str | None, list[Draft]]]:
    """The splits of a hub data set, or of a folder written by `save_to_disk`."""
    for part, rows in load_data_set(name).items():
        if part is not None and part not in SPLIT_NAMES:
            raise UserError(f"data set {name!r}: unknown split {part!r}. {did_you_mean(str(part), SPLIT_NAMES)}")
        label = str(part or "data")
        records = ((f"{name}/{label}:row {n}", n, record) for n, record in enumerate(rows, start=1))
        yield label, None if part is None else SPLIT_NAMES[part], read_records(records, faults)


def _usable(drafts: Iterator[Draft], images: ImageFinder, faults: Faults) -> Iterator[Draft]:
    """The drafts with their images found."""
    for draft in drafts:
        try:
            found = tuple(images.find(name, draft.source) for name in draft.images)
        except UserError as fault:
            faults.add(fault)
        else:
            yield replace(draft, images=found) if found else draft


class ImageFinder:
    """The images of a task: in its folders, and, links followed, nowhere else but where the source says."""

    def __init__(self, source: TaskSource) -> None:
        self.written: dict[str, str] = {}  # image found → as rows name it
        self._folders = source.image_folders
        self._inside = [[os.path.join(os.path.realpath(folder), "")] for folder in source.image_folders]
        for allowed in self._inside:
            allowed += [os.path.join(os.path.realpath(link), "") for link in source.links]
        self._real: dict[str, str] = {}  # folder as written → without links: asked once, not for each image

    def find(self, name: str, source: str) -> str:
        """The absolute path of an image."""
        if "://" in name[:10] or name.startswith("data:"):
            raise UserError(f"{source}: image {name[:60]!r}: only files can be read; download it first")
        outside = False
        for folder, allowed in zip(self._folders, self._inside, strict=True):
            try:
                path = self._path(folder, name)
                exists = stat.S_ISREG(os.stat(path).st_mode)
            except (FileNotFoundError, NotADirectoryError):
                exists = False
            except (OSError, ValueError) as error:
                raise UserError(f"{source}: image {name[:60]!r} is not a usable path: {str(error)[:80]}") from error
            inside = os.path.join(path, "").startswith(tuple(allowed))
            if exists and inside:
                self.written.setdefault(path, os.path.normpath(name))
                return path
            outside = outside or not inside
        places = " or ".join(map(str, self._folders))
        if outside:
            raise UserError(
                f"{source}: image {name[:200]!r} leaves its folder {places}; set image_folder to where images lie"
            )
        raise UserError(f"{source}: image {name[:200]!r} does not exist in {places}")

    def _path(self, folder: Path, name: str) -> str:
        """Where an image would lie, links followed."""
        parent, base = os.path.split(os.path.join(folder, name))
        if parent not in self._real:
            self._real[parent] = os.path.realpath(parent)
        path = os.path.join(self._real[parent], base)
        return os.path.realpath(path) if base in ("", ".", "..") or os.path.islink(path) else path


# --- what the task settles -------------------------------------------------------------------------------


def _with_instructions(drafts: list[Draft], source: TaskSource, notes: list[str]) -> list[Draft]:
    """Give every row its instruction: its own, the task's, its system message, or the shared last line.

    A plain row's text gets the instruction appended where it is the row's own or the task's; elsewhere the
    instruction is already in what the model reads.
    """
    open_rows = [draft for draft in drafts if draft.instruction is None]
    if source.instruction is not None:
        if not open_rows and source.instruction not in {draft.instruction for draft in drafts}:
            notes.append(f"{source.name}: the task's instruction is not used: every row has its own")
        return [_complete(draft, draft.instruction or source.instruction) for draft in drafts]
    unnamed = [draft for draft in open_rows if draft.system is None]
    line = _shared_last_line(unnamed, source.name)
    if unnamed:
        notes.append(f"{source.name}: instruction taken from the rows' last line: {line!r}")
    if len(unnamed) < len(open_rows):
        from_system = len(open_rows) - len(unnamed)
        notes.append(f"{source.name}: instruction taken from the system message in {from_system} rows")
    return [
        _complete(draft, draft.instruction)
        if draft.instruction is not None
        else replace(draft, instruction=draft.system or line)
        for draft in drafts
    ]


def _complete(draft: Draft, instruction: str) -> Draft:
    """The row with its instruction, and for a plain row with the user text `{input}\\n{instruction}`."""
    if draft.complete:
        return replace(draft, instruction=instruction)
    question = draft.turns[-1][1]
    text = f"{question}\n{instruction}" if question.strip() else instruction
    return replace(draft, instruction=instruction, turns=(*draft.turns[:-1], ("user", text)))


def _super_ni_prompts(drafts: list[Draft], source: TaskSource, notes: list[str]) -> list[Draft]:
    """Definition, positive examples and input of each row as Super-NI's prompt; the definition is the instruction."""
    assert source.examples is not None
    prompted, fewest = [], source.examples
    for draft in drafts:
        definition = draft.instruction or source.instruction
        if draft.complete or definition is None:
            raise UserError(
                f"{draft.source}: 'examples' of task {source.name!r} builds prompts of definition, examples and input: "
                "it needs plain rows, with an 'instruction' of their own or the task's"
            )
        stated = draft.positive_examples if source.positive_examples is None else source.positive_examples
        examples = positive_examples(stated, draft.source)[: source.examples]
        text, demonstrations = super_ni_prompt(definition, examples, draft.turns[-1][1])
        turns = (*draft.turns[:-1], ("user", text))
        prompted.append(replace(draft, instruction=definition, turns=turns, demonstrations=demonstrations))
        fewest = min(fewest, len(examples))
    if fewest < source.examples:
        notes.append(f"{source.name}: {fewest} positive examples stated, {source.examples} wanted")
    return prompted


def _shared_last_line(drafts: list[Draft], task: str) -> str:
    """The last line of the question, where all rows that need one have the same."""
    lines = {draft.turns[-1][1].strip().rpartition("\n")[2].strip(): draft.source for draft in drafts}
    if not lines:
        return ""
    if len(lines) > 1 or "" in lines:
        first, *others = lines.values()
        raise UserError(
            f"{first}: row without instruction: it has none of its own, task {task!r} names none, there is "
            "no system message, and the rows do not end with one shared line (compare "
            f"{others[0] if others else first}). Add 'instruction' to the rows, or to the task in tasks.json "
            "or the configuration."
        )
    return next(iter(lines))


def _split(
    drafts: list[Draft],
    source: TaskSource,
    written: Mapping[str, str],
    seed: int,
    faults: Faults,
    notes: list[str],
) -> dict[str, list[Draft]]:
    task, total = source.name, len(drafts)
    stated = [draft for draft in drafts if draft.split is not None]
    if stated and len(stated) < len(drafts):
        missing = next(draft for draft in drafts if draft.split is None)
        raise UserError(f"{missing.source}: row without split, while {stated[0].source} has one: state all or none")
    if not stated:
        drafts = _draw_splits(drafts, task, seed) if source.split is None else _by_position(drafts, source, seed)
    elif source.dev_share and not any(draft.split == "dev" for draft in drafts):
        drafts = _with_dev_rows(drafts, source, written, seed, notes)
    splits = {split: [draft for draft in drafts if draft.split == split] for split in SPLITS}
    for split, limit in source.at_most.items():
        draw = random.Random(stable_seed(seed, task, split, "at most"))
        splits[split] = _at_most(splits[split], limit, draw, f"{task}: {split}", notes)
    for split in ("train", "test"):
        if not splits[split]:
            raise UserError(
                f"task {task!r}: the {split} split is empty ({drafts[0].source.rsplit(':', 1)[0]}): "
                f'mark rows with "split": "{split}", or state no split at all to have one drawn{_skipped(faults)}'
            )
    sizes = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    if not stated and source.split is None:
        notes.append(f"{task}: no split stated, so 80/10/10 drawn with seed {seed}: {sizes}")
    elif not stated:
        notes.append(f"{task}: split by position, of {total} rows: {sizes} (training rows drawn with seed {seed})")
    if not splits["dev"]:
        notes.append(f"{task}: no dev rows")
    return splits


def _draw_splits(drafts: list[Draft], task: str, seed: int) -> list[Draft]:
    if len(drafts) < 2:
        raise UserError(f"{drafts[0].source}: task {task!r} has one row; a split needs at least two")
    held_out = round(len(drafts) / 10)
    names = ["test"] * max(1, held_out) + ["dev"] * held_out
    names += ["train"] * (len(drafts) - len(names))
    # the task's name is part of the seed: adding a task must not change the others' splits
    random.Random(f"{seed}/{task}").shuffle(names)
    return [replace(draft, split=name) for draft, name in zip(drafts, names, strict=True)]


def _with_dev_rows(
    drafts: list[Draft], source: TaskSource, written: Mapping[str, str], seed: int, notes: list[str]
) -> list[Draft]:
    """A share of the training rows as dev rows: all rows of an image, or of a question without one, go together."""

    def shown(draft: Draft) -> str:
        """What a row is about, equal on every machine: its images as rows name them, else its question."""
        return repr([written[image] for image in draft.images] or draft.turns)

    train = [draft for draft in drafts if draft.split == "train"]
    sizes = Counter(map(shown, train))
    # by content and not by task: two tasks on the same images take much the same ones
    pieces = sorted(sizes, key=lambda piece: (stable_seed(seed, "dev", piece), piece))
    wanted, taken, dev = max(1, round(source.dev_share * len(train))), 0, set()
    for piece in pieces[:-1]:  # one is left to train on
        if taken >= wanted:
            break
        dev.add(piece)
        taken += sizes[piece]
    notes.append(
        f"{source.name}: no dev rows stated, so {taken} of {len(train)} training rows drawn with seed {seed}, whole "
        "images at a time; none from test"
    )
    return [
        replace(draft, split="dev") if draft.split == "train" and shown(draft) in dev else draft for draft in drafts
    ]


def _at_most(drafts: list[Draft], limit: int, draw: random.Random, what: str, notes: list[str]) -> list[Draft]:
    if len(drafts) <= limit:
        return drafts
    notes.append(f"{what}: {limit} of {len(drafts)} rows drawn")
    return [drafts[i] for i in sorted(draw.sample(range(len(drafts)), limit))]


def _by_position(drafts: list[Draft], source: TaskSource, seed: int) -> list[Draft]:
    assert source.split is not None
    test, dev = source.split.test, source.split.test + source.split.dev
    rest = drafts[dev:]
    drawn = random.Random(f"{seed}/{source.name}").sample(range(len(rest)), min(source.split.train, len(rest)))
    parts = {"test": drafts[:test], "dev": drafts[test:dev], "train": [rest[i] for i in sorted(drawn)]}
    return [replace(draft, split=name) for name, part in parts.items() for draft in part]


def _choose_scorer(task: str, train: list[Draft], notes: list[str]) -> str:
    answers = [draft.outputs[0] for draft in train]
    scorer = default_scorer(answers)
    words = statistics.median(answer_words(answer) for answer in answers)
    why = (
        "all training answers are one letter"
        if scorer == "option_letter"
        else f"median answer length in words: {words:g}"
    )
    notes.append(f"{task}: scorer {scorer} ({why})")
    return scorer


# Scorer → how it reads a reference (None: not at all), and what a reference must name.
_READS: dict[str, tuple[Callable[[str], object], str]] = {
    "option_letter": (chosen_letter, "no option A-Z"),
    "true_false": (chosen_truth, "neither true nor false"),
    "box_iou": (parse_box, "no box [x1, y1, x2, y2]"),
}


def scorable(drafts: Iterable[Draft], task: str, scorer: str, faults: Faults) -> Iterator[Draft]:
    """The drafts whose answers the scorer can read."""
    if scorer not in _READS:
        yield from drafts
        return
    read, missing = _READS[scorer]
    for draft in drafts:
        unread = next((output for output in draft.outputs if read(output) is None), None)
        if unread is None:
            yield draft
            continue
        faults.add(
            UserError(
                f"{draft.source}: task {task!r} is scored by {scorer}, but the answer {unread[:40]!r} names "
                f"{missing}; correct it, or set another scorer"
            )
        )


def _learned_whole(rows: tuple[Row, ...], task: str, notes: list[str]) -> tuple[Row, ...]:
    """The rows, all answers of a conversation to be learned."""
    marked = tuple(replace(row, every_answer=True) if _asks_several(row) else row for row in rows)
    several = [row for row in marked if row.every_answer]
    if several:
        answers = sum(1 + sum(role == "assistant" for role, _ in row.messages) for row in several)
        notes.append(
            f"{task}: {len(several)} of {len(rows)} training rows ask several questions: all {answers} answers in them "
            "are learned"
        )
    return marked


def _note_context(rows: tuple[Row, ...], task: str, notes: list[str]) -> None:
    several = sum(map(_asks_several, rows))
    if several:
        notes.append(
            f"{task}: {several} of {len(rows)} evaluation rows ask several questions: the last answer is measured, the "
            "others are context"
        )


def _asks_several(row: Row) -> bool:
    """Whether an answer stands behind a question, before the last answer."""
    roles = [role for role, _ in row.messages]
    return "assistant" in roles[roles.index("user") :]


def _row(draft: Draft) -> Row:
    return Row(
        draft.id or "",
        draft.instruction or "",
        draft.turns,
        draft.outputs,
        draft.images,
        draft.source,
        draft.demonstrations,
    )
