"""Requests to a finished run: which group, and what does it answer?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from lcia.backbone.images import open_image
from lcia.config import RunConfig, load_config
from lcia.errors import UserError
from lcia.evaluation import Decoding, generate_answers
from lcia.grouping import Codebook, Explanation, Router, explain
from lcia.methods import build_method
from lcia.run_folder import RunFolder
from lcia.session import load_run_stream, open_run, with_system
from lcia.stream import Row, load_stream
from lcia.validate import planned_groups


@dataclass(frozen=True)
class Answer:
    """One request answered."""

    request: str
    instruction: str
    group: str | None  # None: the base model answered
    similarity: float | None  # to the group; None where the method does not choose by one
    answer: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Text:
        near = "" if self.similarity is None else f", similarity {self.similarity:.3f}"
        who = f"group {self.group}{near}" if self.group else "base model, no group"
        return Text.assemble((self.answer, "bold"), (f"   [{who}]", "dim"))


def user_text(request: str, instruction: str | None, system: str | None = None) -> tuple[str, str]:
    """(what the model reads, what is routed by): `{input}\\n{instruction}`, as in training on plain rows; of chat rows
    the system message is the instruction.

    It is not the prompt of a task with `examples`.
    """
    if instruction is None and system is not None:
        if not request.strip():
            raise UserError("generate: the request is empty")
        return request, system
    if instruction is None:
        lines = [line for line in request.splitlines() if line.strip()]
        if not lines:
            raise UserError("generate: the request is empty")
        return request, lines[-1].strip()
    return f"{request}\n{instruction}" if request else instruction, instruction


def answer_requests(
    folder: Path,
    requests: Sequence[tuple[str, str | None]],
    max_new_tokens: int | None = None,
    images: Sequence[Path] = (),
    system: str | None = None,
) -> list[Answer]:
    """Route each (request, instruction) by its instruction and answer it greedily.

    Args:
        images: shown before the text of every request.
        system: the system message of every request, which is routed by where it has no instruction; None: the
            configuration's.

    Raises:
        UserError: a request is empty or too long, an image cannot be used, or the run's model reads text only.
    """
    texts = [user_text(request, instruction, system) for request, instruction in requests]
    for path in images:
        open_image(path)  # a wrong name must not wait for the model
    session = open_run(folder, all_adapters=False)
    reader = session.backbone.reader
    if images and not reader.sees:
        raise UserError(f"--image: model {session.config.model!r} of {folder} reads text only")
    shown = tuple(str(path.absolute()) for path in images)
    rows = [
        with_system(Row("", instruction, (("user", text),), (), shown, "the request"), system or session.config.system)
        for text, instruction in texts
    ]
    limit = session.config.max_new_tokens if max_new_tokens is None else max_new_tokens
    decoding = Decoding(limit, session.config.per_device_eval_batch_size, session.config.max_length)
    prompts = [reader.encode_prompt(row) for row in rows]
    for prompt in prompts:
        if not session.backbone.layout.fits(len(prompt), limit, decoding):
            raise UserError(
                f"the request has {len(prompt)} tokens, which with {limit} new ones does not fit max_length "
                f"{session.config.max_length}"
            )
    matches = session.route(rows)
    groups = [match.group for match in matches]
    answers = generate_answers(session.pool, reader, groups, prompts, decoding)
    return [
        Answer(text, instruction, match.group, match.score if match.scores else None, answer)
        for (text, instruction), match, answer in zip(texts, matches, answers, strict=True)
    ]


def explain_task(source: Path, data: Path) -> Explanation:
    """Which group of a run (or of a configuration's stream, once learned) would learn the rows of `data`.

    They are read as `extend` would read them.
    """
    stream = load_stream(str(data), skip_bad_rows=_config(source).skip_bad_rows)
    if len(stream) > 1:
        raise UserError(
            f"{data}: {len(stream)} tasks ({', '.join(task.name for task in stream)}); give the file of one"
        )
    return explain(_codebook(source), stream[0].instructions)


@dataclass(frozen=True)
class RequestRoute:
    """Where one request goes."""

    instruction: str
    group: str | None  # None: the base model answers
    score: float
    route_threshold: float
    scores: dict[str, float]
    words: dict[str, float]  # term → what it adds to the score of the nearest group

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Text:
        who = f"group {self.group} answers" if self.group else "the base model answers"
        words = ", ".join(f"{word} {value:+.3f}" for word, value in self.words.items())
        lines = [f"{who}: nearest similarity {self.score:.3f}, route_threshold {self.route_threshold:g}"]
        lines += [f"  {score:.3f}  {group}" for group, score in sorted(self.scores.items(), key=lambda item: -item[1])]
        return Text("\n".join([*lines, f"words behind it: {words or 'none'}"]))


def explain_request(source: Path, request: str) -> RequestRoute:
    """Which group would answer one request; its last line is the instruction."""
    codebook, route_threshold = _codebook(source), _route_threshold(source)
    instruction = user_text(request, None)[1]
    match = Router(codebook, route_threshold).route(instruction)
    words = explain(codebook, [instruction]).words
    return RequestRoute(instruction, match.group, match.score, route_threshold, match.scores, words)


def _config(source: Path) -> RunConfig:
    """Of a run folder, or a configuration file."""
    return load_config(RunFolder(source).require_run().config if source.is_dir() else source)


def _route_threshold(source: Path) -> float:
    parts = _config(source).method_parts()
    return next((float(o["route_threshold"]) for _, o in parts if "route_threshold" in o), 0.0)


def _codebook(source: Path) -> Codebook:
    """A run's codebook, or the one that a configuration's stream would fill."""
    if source.is_dir():
        path = RunFolder(source).require_run().path / "codebook.json"
        if not path.is_file():
            raise UserError(f"{source}: no codebook.json in it; give a run folder of a method with groups")
        return Codebook.load(path)
    config = load_config(source)
    codebook = build_method(config.method_parts()).codebook
    if codebook is None:
        raise UserError(f"{source}: key 'method': this method has no groups; use lcia")
    planned_groups(load_run_stream(config), codebook)
    return codebook
