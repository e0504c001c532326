"""The benchmark CoIN (arXiv 2403.08350): eight image tasks in its published layout, as LCIA reads them.

    DIR/cl_dataset/{COCO2014, GQA, ImageNet_withlabel, OCR-VQA, ScienceQA, TextVQA, VizWiz}/...
    DIR/Instructions{, _Diverse, _10Type}/TASK/{train, test, val}.json

Training rows are LLaVA's `conversations`, questions are `{question_id, image?, text, answer}`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from lcia.errors import UserError
from lcia.stream.formats import Draft, Faults, decode_utf8, parse_json, read_bytes, read_records
from lcia.stream.json_list import json_elements
from lcia.stream.scorers import SCORERS
from lcia.stream.task_source import DATA, Found, TaskSource, chosen, data_folder, share
from lcia.stream.vqa import ANNOTATORS, evalai_normalise

STRICT, RELEASED = "strict", "released"
# Kind of instructions → the folders that may hold it: LCIA's name, then those of CoIN's own downloads.
KINDS = {
    "origin": ("Instructions", "Instructions_Original", "Instructions_Type1"),
    "diverse": ("Instructions_Diverse",),
    "10type": ("Instructions_10Type", "Instruction_10Type"),
}
IMAGE_FOLDERS = ("COCO2014", "GQA", "ImageNet_withlabel", "OCR-VQA", "ScienceQA", "TextVQA", "VizWiz")  # in cl_dataset
_HOMES = ("", "playground")  # where, below DIR, those folders may lie
Answers = Iterator[tuple[Any, list[str]]]  # question id, its answers


def _textvqa_answers(content: Any) -> Answers:
    for entry in content["data"]:
        yield entry["question_id"], list(entry["answers"])


def _gqa_answers(content: Any) -> Answers:
    for question, entry in content.items():
        yield question, [entry["answer"]]


def _scienceqa_answers(content: Any) -> Answers:
    for question, entry in content.items():
        yield question, ["ABCDEFGH"[entry["answer"]]]


@dataclass(frozen=True)
class CoinTask:
    """One of the eight."""

    name: str
    measured_on: str  # the file of questions that are scored
    strict: str  # scorers
    released: str
    folders: tuple[str, ...] = ()  # other names of its folder
    annotations: str = ""  # a file below cl_dataset that has the answers
    parse_annotations: Callable[[Any], Answers] | None = None


TASKS = {
    task.name: task
    for task in (
        CoinTask(
            "ScienceQA",
            "test.json",
            "option_letter",
            "coin_scienceqa_released",
            annotations="ScienceQA/problems.json",
            parse_annotations=_scienceqa_answers,
        ),
        CoinTask(
            "TextVQA",
            "val.json",
            "vqa_short",
            "coin_textvqa_released",
            annotations="TextVQA/TextVQA_0.5.1_val.json",
            parse_annotations=_textvqa_answers,
        ),
        CoinTask("ImageNet", "test.json", "exact", "coin_imagenet_released"),
        CoinTask(
            "GQA",
            "test.json",
            "exact",
            "coin_gqa_released",
            annotations="GQA/testdev_balanced_questions.json",
            parse_annotations=_gqa_answers,
        ),
        CoinTask("VizWiz", "val.json", "vqa_short", "coin_vqa_released"),
        CoinTask("Grounding", "test.json", "box_iou", "coin_grounding_released"),
        CoinTask("VQAv2", "val.json", "vqa_short", "coin_vqa_released"),
        CoinTask("OCR-VQA", "test.json", "exact", "coin_ocrvqa_released", folders=("OCRVQA",)),
    )
}


def coin(
    *,
    path: str | None = None,
    order: str = "origin",
    instructions: str = "origin",
    scoring: str = STRICT,
    dev_share: float = 0.0,
) -> Found:
    """CoIN's eight tasks in one of three orders, with one of three kinds of instructions.

    What is missing of a download is noticed when a task is read: the other tasks can be learned without it.

    Args:
        path: the folder with `cl_dataset` and `Instructions...`; `$LCIA_DATA/coin` if not given.
        order: origin | reverse | alphabet.
        instructions: origin | diverse | 10type.
        scoring: strict, or released: as CoIN's code scores, mistakes included.
        dev_share: of the training rows that become dev rows, whole images at a time; CoIN trains on all of them.
    """
    orders: dict[str, list[str]] = _json(DATA / "coin" / "orders.json")
    order = chosen("coin", "order", order, tuple(orders))
    kind = chosen("coin", "instructions", "origin" if str(instructions) == "original" else instructions, tuple(KINDS))
    scoring = chosen("coin", "scoring", scoring, (STRICT, RELEASED))
    folder = CoinFolder(data_folder("coin", path), kind, scoring)
    tasks = (replace(folder.task(TASKS[name]), dev_share=share("coin", dev_share)) for name in orders[order])
    return Found("coin", tuple(tasks), (f"coin: order {order}, instructions {kind}, scoring {scoring}",))


class CoinFolder:
    """A download of CoIN, whole or not."""

    def __init__(self, root: Path, kind: str, scoring: str) -> None:
        places = [root / home / name for home in _HOMES for name in KINDS[kind]]
        self.root, self.kind, self.scoring = root, kind, scoring
        self.rows = next((place for place in places if place.is_dir()), places[0])
        self.images = root / "cl_dataset" if (root / "cl_dataset").is_dir() else root
        self._links = tuple(_linked(self.images))
        self._known: dict[str, dict[str, list[str]]] = _json(DATA / "coin" / "instructions.json")

    def task(self, task: CoinTask) -> TaskSource:
        names = (task.name, *task.folders)
        folder = self.rows / next((name for name in names if (self.rows / name).is_dir()), task.name)
        files = ((folder / "train.json", "train"), (folder / task.measured_on, "test"))
        scorer = task.released if self.scoring == RELEASED else task.strict
        answers = cache(partial(_published_answers, task, self.images))
        reader = partial(self._read, task, answers)
        return TaskSource(
            task.name,
            files,
            scorer=scorer,
            image_folders=(self.images,),
            links=self._links,
            every_answer=True,
            reader=reader,
        )

    def _read(
        self,
        task: CoinTask,
        answers: Callable[[], Mapping[str, list[str]]],
        path: Path,
        split: str | None,
        faults: Faults,
        notes: list[str],
    ) -> list[Draft]:
        """The rows of one file, each with its instruction, an id of its own, and the answers it is scored with."""
        if not path.is_file():
            raise UserError(
                f"task {task.name!r}: {path} does not exist; `lcia bench prepare coin --data {self.root}` lists what "
                "is there, and 'tasks' in the configuration takes only some tasks"
            )
        counts: Counter[str] = Counter()
        records = (
            (f"{path}: element {number}", number, self._completed(record, task, split, answers, counts))
            for number, record in json_elements(path)
        )
        drafts = read_records(records, faults)
        if not drafts and not faults.found:
            raise UserError(f"{path}: holds no rows")
        drafts = self._with_instructions(drafts, task, notes)
        if split == "test":
            drafts = _with_own_ids(drafts, path, notes)
        if counts["number"]:
            notes.append(f"{task.name}: {counts['number']} answers in {path.name} are numbers, read as text")
        return drafts

    def _completed(
        self,
        record: Any,
        task: CoinTask,
        split: str | None,
        answers: Callable[[], Mapping[str, list[str]]],
        counts: Counter[str],
    ) -> Any:
        """The record with its answer under `answer`, as text."""
        if not isinstance(record, dict):
            return record
        record = dict(record)
        if record.get("answer_bbox") is not None:
            record["answer"] = record["answer_bbox"]
            if isinstance(record["answer"], list):  # the one answer that may be written as a list of numbers
                record["answer"] = str(record["answer"])
        if split == "test":
            record["answer"] = self._answer(record, task, answers)
        if isinstance(record.get("answer"), list):
            record["answer"] = [_as_text(one, counts) for one in record["answer"]]
        elif "answer" in record:
            record["answer"] = _as_text(record["answer"], counts)
        if isinstance(record.get("conversations"), list):
            record["conversations"] = [
                {**turn, "value": _as_text(turn.get("value"), counts)} if isinstance(turn, dict) else turn
                for turn in record["conversations"]
            ]
        return record

    def _answer(self, record: dict[str, Any], task: CoinTask, answers: Callable[[], Mapping[str, list[str]]]) -> Any:
        """What a question is scored with: the row's answer, or the annotators' where the row has none or too few."""
        own = record.get("answer")
        soft = task.name == "TextVQA" and self.scoring == RELEASED
        complete = isinstance(own, list) and len(own) == ANNOTATORS if soft else own is not None
        if not complete and task.parse_annotations is not None:
            own = answers().get(str(record.get("question_id")))
        if task.name == "TextVQA" and isinstance(own, list) and not soft:
            own = most_common(list(map(str, own)))
        return own

    def _with_instructions(self, drafts: list[Draft], task: CoinTask, notes: list[str]) -> list[Draft]:
        known = self._known[task.name][self.kind]
        own: list[str] = []
        completed = []
        for draft in drafts:
            asked = "\n".join(text for role, text in draft.turns if role == "user")
            instruction = instruction_in(asked, known)
            if instruction is None:
                instruction = _own_instruction(draft)
                own.append(instruction)
            # LLaVA's ids name the image: several rows may have one
            completed.append(replace(draft, instruction=draft.instruction or instruction, shared_id=True))
        if own:
            notes.append(
                f"{task.name}: {len(own)} of {len(drafts)} rows hold no instruction that is listed for {self.kind}; "
                f"their own line is taken, such as {own[0][:120]!r}"
            )
        return completed


def _linked(images: Path) -> Iterator[Path]:
    """What a user has elsewhere and linked in: a data set (COCO2014), or a part of one (COCO2014/train2014)."""
    for folder in (images / name for name in IMAGE_FOLDERS):
        if folder.is_dir():
            yield from (place.resolve() for place in (folder, *folder.iterdir()) if place.is_symlink())


def instruction_in(text: str, known: Iterable[str]) -> str | None:
    """The one of the known instructions that a text holds: the last, and of nested ones the longest."""
    folded = text.replace("’", "'").casefold()
    ends = {one: folded.rfind(one.casefold()) + len(one) for one in known if one.casefold() in folded}
    return max(ends, key=lambda one: (ends[one], len(one)), default=None)


def _own_instruction(draft: Draft) -> str:
    """The last line of the first question, up to a colon, where LLaVA writes the instruction."""
    question = next(text for role, text in draft.turns if role == "user")
    line = question.strip().rpartition("\n")[2]
    return line.partition(":")[0].strip().rstrip(".") or line


def most_common(answers: Sequence[str]) -> str:
    """The answer that most annotators gave, as the first of them wrote it."""
    counts = Counter(map(evalai_normalise, answers))
    return max(answers, key=lambda answer: counts[evalai_normalise(answer)])


def _with_own_ids(drafts: list[Draft], path: Path, notes: list[str]) -> list[Draft]:
    """A question id that comes again gets its place appended: every question is scored."""
    seen: set[str | None] = set()
    found = []
    for draft in drafts:
        again = draft.id is not None and draft.id in seen
        seen.add(draft.id)
        found.append(replace(draft, id=f"{draft.id}@{path.stem}:{draft.number}") if again else draft)
    repeated = sum(new is not old for new, old in zip(found, drafts, strict=True))
    if repeated:
        notes.append(f"{path.parent.name}: {repeated} question ids in {path.name} come again; their place is appended")
    return found


def _as_text(value: Any, counts: Counter[str]) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        counts["number"] += 1
        return str(value)
    return value


def _published_answers(task: CoinTask, images: Path) -> Mapping[str, list[str]]:
    """Question id → answers, from the annotation file of the data set a task was made of."""
    file = images / task.annotations
    if not file.is_file():
        raise UserError(
            f"task {task.name!r}: {file} does not exist: its answers are needed (CoIN's rows do not have them all)"
        )
    content = _json(file)
    assert task.parse_annotations is not None
    try:
        return {str(question): answers for question, answers in task.parse_annotations(content)}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{file}: not the annotation file of {task.name}: {type(error).__name__} {error}") from None


def _json(file: Path) -> Any:
    return parse_json(decode_utf8(read_bytes(file), file), file)


def coin_accuracy(
    task: str, predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], scoring: str = STRICT
) -> float:
    """Percent right of predictions that come from elsewhere, such as a `merge.jsonl` of CoIN's scripts.

    A question without prediction is wrong. As released, that holds for ScienceQA only: the other scripts average over
    the predictions they are given. Which prediction belongs to which question is told by the id, here always; the
    released script of ImageNet pairs the n-th prediction with the n-th question, so that one missing line shifts all
    behind it: that is not repeated.

    Args:
        predictions: question id → answer.
        references: question id → right answers.
        scoring: strict | released.

    Raises:
        UserError: an unknown task or scoring, a prediction without reference, or nothing to average.
    """
    facts = TASKS[chosen("coin", "task", task, tuple(TASKS))]
    scoring = chosen("coin", "scoring", scoring, (STRICT, RELEASED))
    unknown = next((question for question in predictions if question not in references), None)
    if unknown is not None:
        raise UserError(f"coin: no reference for the prediction of question {unknown!r}")
    scorer = SCORERS[facts.released if scoring == RELEASED else facts.strict]
    over = predictions if scoring == RELEASED and facts.name != "ScienceQA" else references
    if not over:
        raise UserError(f"coin: {facts.name}: nothing to score")
    right = sum(scorer(answer, references[question]) for question, answer in predictions.items())
    return 100.0 * right / len(over)
