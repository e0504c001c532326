"""Rows as they lie in files: reading JSONL, JSON and parquet, and recognising the format of each row.

| format | what tells it |
|---|---|
| chat | `messages`: [{role, content}, ...] |
| ShareGPT, LLaVA | `conversations`: [{from, value}, ...] |
| CoIN test row | `text` and `answer` |
| Super-NI task file | one object with `Definition` and `Instances` |
| own, Alpaca | `input`, `output`, and `instruction` where there is one |

A reader turns a record into a `Draft`; what a row leaves open (split, instruction) is settled with its task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcia.errors import UserError, did_you_mean

SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_NAMES = {
    "train": "train",
    "dev": "dev",
    "validation": "dev",
    "valid": "dev",
    "val": "dev",
    "test": "test",
}
IMAGE_MARKER = "<image>"
_EXAMPLES = "Positive Examples"  # Super-NI's key
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

Turn = tuple[str, str]  # role, text


@dataclass(frozen=True)
class Draft:
    """One example as its file states it.

    `turns` are those before the answer. `complete`: the instruction already stands in the last of them (chat,
    LLaVA, CoIN), so the text is used as it is; otherwise the last turn is the bare input.
    """

    source: str  # "file:line" and what else tells where, for messages
    turns: tuple[Turn, ...]
    outputs: tuple[str, ...]
    complete: bool
    number: int = 0  # line, element or row in its file, from 1
    id: str | None = None
    instruction: str | None = None
    images: tuple[str, ...] = ()  # as written
    split: str | None = None  # train, dev or test
    shared_id: bool = False  # LLaVA's ids name the image: several rows may have one
    positive_examples: Any = None  # of a Super-NI task, as written
    demonstrations: tuple[str, ...] = ()  # of the last turn, once the task has settled it

    @property
    def system(self) -> str | None:
        """The system message, or None where there is none or it says nothing."""
        role, text = self.turns[0]
        return text if role == "system" and text.strip() else None


class Faults:
    """Rows that cannot be used: the first one stops the load, unless they are skipped and listed."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.found: list[str] = []

    def add(self, fault: UserError) -> None:
        if not self.skip:
            raise fault
        self.found.append(str(fault))


def read_file(path: Path, faults: Faults) -> list[Draft]:
    """The rows of one file.

    Raises:
        UserError: the file cannot be read or holds nothing, or (through `faults`) a row cannot be used.
    """
    reader = _read_parquet if path.suffix == ".parquet" else _read_json
    return read_records(reader(path, faults), faults)


Place = tuple[str, int, Any]  # source, number, record


def read_records(records: Iterator[Place], faults: Faults) -> list[Draft]:
    """The records as drafts."""
    drafts: list[Draft] = []
    for source, number, record in records:
        try:
            drafts.append(replace(parse_row(record, source), number=number))
        except UserError as fault:
            faults.add(fault)
    return drafts


# --- files -----------------------------------------------------------------------------------------------


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
_BLANK = re.compile(r"[ \t\r\n]*")


def _decode(text: str, start: int, path: Path, line: int) -> tuple[Any, int]:
    """The JSON value at `start`, and where it ends; `line` is the line of `start`."""
    try:
        return DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line += text.count("\n", start, error.pos)
        raise UserError(
            f"{path}:{line}: broken JSON: {error.msg} (column {error.colno}). "
            "A .jsonl file holds one JSON object a line, a .json file a list of objects."
        ) from error
    except RecursionError as error:
        raise UserError(f"{path}:{line}: JSON is nested too deeply for a row") from error
    except ValueError as error:
        raise UserError(f"{path}:{line}: not valid JSON: {error}") from error


def parse_json(text: str, path: Path) -> Any:
    """One JSON document, such as tasks.json."""
    start = _skip_blank(text, 0)
    value, end = _decode(text, start, path, 1 + text.count("\n", 0, start))
    rest = _skip_blank(text, end)
    if rest < len(text):
        raise UserError(f"{path}:{1 + text.count(chr(10), 0, rest)}: text after the end of the JSON value")
    return value


def _skip_blank(text: str, start: int) -> int:
    match = _BLANK.match(text, start)
    return match.end() if match else start


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def decode_utf8(data: bytes, path: Path, line: int = 1) -> str:
    """Text of `data`, which starts on `line` of the file; a byte order mark is dropped."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error


def _read_json(path: Path, faults: Faults) -> Iterator[Place]:
    data = read_bytes(path)
    content = data.removeprefix(b"\xef\xbb\xbf").strip()
    if not content:
        raise UserError(f"{path}: the file is empty; it must hold at least one row")
    if content.startswith(b"["):
        yield from _array(decode_utf8(data, path), path, faults)
    elif path.suffix == ".json" and not _is_json_lines(content):
        record = parse_json(decode_utf8(data, path), path)
        is_task_file = isinstance(record, dict) and "Instances" in record
        yield from _super_ni(record, path) if is_task_file else [(f"{path}:1", 1, record)]
    else:
        # bytes are split, not text: a bad byte spoils one line only, and U+2028 inside a string ends none
        for number, line in enumerate(data.split(b"\n"), start=1):
            if not line.strip() or (number == 1 and line.strip() == b"\xef\xbb\xbf"):
                continue
            try:
                record = parse_json_line(decode_utf8(line, path, number), path, number)
            except UserError as fault:
                faults.add(fault)
            else:
                yield f"{path}:{number}", number, record


def parse_json_line(text: str, path: Path, number: int) -> Any:
    value, end = _decode(text, _skip_blank(text, 0), path, number)
    if _skip_blank(text, end) < len(text):
        raise UserError(f"{path}:{number}: broken JSON: text after the end of the object (column {end + 1})")
    return value


def _is_json_lines(content: bytes) -> bool:
    """Whether a .json file is JSONL by another name: its first line is an object and more follow."""
    first, _, rest = content.partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _array(text: str, path: Path, faults: Faults) -> Iterator[Place]:
    """The elements of a JSON list, each with its line."""
    position = line_start = _skip_blank(text, 0)
    line = 1 + text.count("\n", 0, position)
    number = 0
    closing = False
    while not closing:
        position = _skip_blank(text, position + 1)  # past "[" or ","
        line += text.count("\n", line_start, position)
        line_start = position
        if number == 0 and text.startswith("]", position):
            raise UserError(f"{path}: the list is empty; it must hold at least one row")
        record, end = _decode(text, position, path, line)
        number += 1
        yield f"{path}:{line} (element {number})", number, record
        position = _skip_blank(text, end)
        closing = text.startswith("]", position)
        if not closing and not text.startswith(",", position):
            line += text.count("\n", line_start, position)
            raise UserError(f"{path}:{line}: broken JSON: expected ',' or ']' after an element of the list")
    rest = _skip_blank(text, position + 1)
    if rest < len(text):
        raise UserError(f"{path}:{1 + text.count(chr(10), 0, rest)}: text after the end of the list")


def _super_ni(record: Mapping[str, Any], path: Path) -> Iterator[Place]:
    """The instances of a Super-NaturalInstructions task file, as rows whose instruction is the definition."""
    definition = record.get("Definition")
    if isinstance(definition, list) and all(isinstance(part, str) for part in definition):
        definition = "\n".join(definition)
    if not isinstance(definition, str) or not definition.strip():
        raise UserError(f"{path}: a Super-NI task file needs a 'Definition', a text or a list of texts")
    instances = record["Instances"]
    if not isinstance(instances, list) or not instances:
        raise UserError(f"{path}: 'Instances' of a Super-NI task file must be a list of at least one object")
    for number, instance in enumerate(instances, start=1):
        if isinstance(instance, dict):
            instance = {**instance, "instruction": definition, _EXAMPLES: record.get(_EXAMPLES)}
        yield f"{path}:instance {number}", number, instance


def _read_parquet(path: Path, faults: Faults) -> Iterator[Place]:
    # pyarrow is needed for parquet only, and takes a while to load
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; it must hold at least one row")
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from error
    if not rows:
        raise UserError(f"{path}: holds no rows")
    for number, record in enumerate(rows, start=1):
        yield f"{path}:row {number}", number, record


# --- rows ------------------------------------------------------------------------------------------------


def parse_row(record: Any, source: str) -> Draft:
    """Recognise the format of one record and read it.

    Raises:
        UserError: starting with `source`, saying what is wrong and what would be right.
    """
    if not isinstance(record, dict):
        raise UserError(f"{source}: a row must be a JSON object, not {_kind(record)}")
    reader: Callable[[dict[str, Any], str], Draft]
    if record.get("messages") is not None:
        reader = _chat("messages")
    elif record.get("conversations") is not None:
        reader = _chat("conversations")
    elif "question_id" in record or ("text" in record and "answer" in record):
        reader = _coin
    elif record.keys() & {"input", "output", "instruction"}:
        reader = _plain
    else:
        keys = ", ".join(repr(str(key)[:40]) for key in list(record)[:12]) or "none"
        raise UserError(
            f"{source}: row in no known format (its keys: {keys}). Understood: "
            "input + output (+ instruction), messages, conversations, text + answer (CoIN), "
            "Super-NI task files."
        )
    return reader(record, source)


def _plain(record: dict[str, Any], source: str) -> Draft:
    """The project's own rows and Alpaca's, with LLaMA-Factory's `system` and `history`."""
    if "input" not in record:
        raise UserError(f'{source}: row without "input" (write "input": "" if the instruction is all there is)')
    images = _images(record, source)
    question = _text(record, "input", source) or ""
    turns = [*_system(record, source), *_history(record, source), ("user", question)]
    if images:
        turns = _without_markers(turns, images, source)
    return Draft(
        source=source,
        turns=tuple(turns),
        outputs=_outputs(record, "output", source),
        complete=False,
        images=images,
        positive_examples=record.get(_EXAMPLES),
        **_common(record, source),
    )


def _coin(record: dict[str, Any], source: str) -> Draft:
    """CoIN's test rows: the instruction is the last line of `text`."""
    question = _text(record, "text", source)
    if question is None:
        raise UserError(f'{source}: row with a question_id but without "text"')
    images = _images(record, source)
    _check_question(question, images, source)
    common = _common(record, source)
    common["id"] = common["id"] or _id(record, "question_id", source)
    return Draft(
        source=source,
        turns=tuple(_without_markers([("user", question)], images, source)),
        outputs=_outputs(record, "answer", source),
        complete=True,
        images=images,
        **common,
    )


def _chat(key: str) -> Callable[[dict[str, Any], str], Draft]:
    """Reader of a list of turns: OpenAI's role and content, or ShareGPT's from and value."""

    def read(record: dict[str, Any], source: str) -> Draft:
        value = record[key]
        if not isinstance(value, list) or not value:
            raise UserError(f"{source}: {key!r} must be a list of at least two turns")
        parts = [_turn(turn, f"{source}: {key}[{number}]") for number, turn in enumerate(value)]
        turns = [*_system(record, source), *((role, text) for role, text, _ in parts)]
        images = _images(record, source) + tuple(image for *_, inner in parts for image in inner)
        turns = _without_markers(turns, images, source)
        _check_order(turns, key, source)
        _check_question(turns[-2][1], images, source)
        return Draft(
            source=source,
            turns=tuple(turns[:-1]),
            outputs=_not_blank([turns[-1][1]], key, source),
            complete=True,
            images=images,
            shared_id=key == "conversations",
            **_common(record, source),
        )

    return read


def _check_question(text: str, images: tuple[str, ...], source: str) -> None:
    if not text.strip() and not images:
        raise UserError(f"{source}: the question is empty: missing input")


def _check_order(turns: list[Turn], key: str, source: str) -> None:
    roles = [role for role, _ in turns]
    if "system" in roles[1:]:
        raise UserError(f"{source}: {key!r} may have one system turn, and only as the first")
    if roles[-1] != "assistant":
        raise UserError(f"{source}: {key!r} ends with a {roles[-1]} turn: no output (the last turn is the answer)")
    if len(roles) < 2 or roles[-2] != "user":
        raise UserError(f"{source}: {key!r} needs a user turn before the answer: missing input")


def _turn(turn: Any, where: str) -> tuple[str, str, tuple[str, ...]]:
    """Role, text and images of one turn."""
    if not isinstance(turn, dict):
        raise UserError(f"{where} must be an object with role and content, not {_kind(turn)}")
    name, content = ("from", "value") if turn.get("from") is not None else ("role", "content")
    said = turn.get(name)
    if not isinstance(said, str) or said not in _ROLES:
        valid = did_you_mean(str(said)[:40], _ROLES)
        raise UserError(f"{where}: unknown role {str(said)[:40]!r} under {name!r}. {valid}")
    if isinstance(turn.get(content), list):
        texts, images = _parts(turn[content], f"{where}.{content}")
        return _ROLES[said], texts, images
    return _ROLES[said], _text(turn, content, where) or "", ()


def _parts(parts: list[Any], where: str) -> tuple[str, tuple[str, ...]]:
    """Text and images of a content list: {type: text, text} and {type: image, image or path}."""
    texts: list[str] = []
    images: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(_text(part, "text", where) or "")
        elif kind == "image":
            key = "path" if part.get("path") is not None else "image"
            # without a path the part is a place holder for the row's own `image` or `images`
            images += [name] if (name := _text(part, key, where)) else []
        else:
            raise UserError(f"{where}: each part must have the type text or image, not {str(kind)[:40]!r}")
    return "\n".join(texts), tuple(images)


def _system(record: dict[str, Any], source: str) -> list[Turn]:
    text = _text(record, "system", source)
    return [("system", text)] if text and text.strip() else []


def _history(record: dict[str, Any], source: str) -> list[Turn]:
    turns: list[Turn] = []
    history = record.get("history")
    if not isinstance(history, list | None):
        raise UserError(f"{source}: 'history' must be a list of [question, answer] pairs, not {_kind(history)}")
    for pair in history or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UserError(f"{source}: 'history' must be a list of [question, answer] pairs of texts")
        turns += [("user", _encodable(pair[0], "history", source))]
        turns += [("assistant", _encodable(pair[1], "history", source))]
    return turns


def _without_markers(turns: list[Turn], images: tuple[str, ...], source: str) -> list[Turn]:
    """The turns without `<image>`: the images of a row stand before its text."""
    markers = sum(text.count(IMAGE_MARKER) for _, text in turns)
    if markers not in (0, len(images)):
        raise UserError(f"{source}: {markers} {IMAGE_MARKER} markers in the text, but {len(images)} images in the row")
    return [(role, _strip_markers(text) if IMAGE_MARKER in text else text) for role, text in turns]


def _strip_markers(text: str) -> str:
    return re.sub(rf"{IMAGE_MARKER}[ \t]*\n?", "", text).strip()


def _common(record: dict[str, Any], source: str) -> dict[str, Any]:
    instruction = _text(record, "instruction", source)
    return {
        "id": _id(record, "id", source),
        "instruction": instruction if instruction and instruction.strip() else None,
        "split": _split(record, source),
    }


def _split(record: dict[str, Any], source: str) -> str | None:
    name = _text(record, "split", source)
    if name is None:
        return None
    if name not in SPLIT_NAMES:
        raise UserError(f"{source}: unknown split {name[:40]!r}. {did_you_mean(name[:40], SPLIT_NAMES)}")
    return SPLIT_NAMES[name]


def _id(record: dict[str, Any], key: str, source: str) -> str | None:
    value = record.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(record, key, source) or None


def _images(record: dict[str, Any], source: str) -> tuple[str, ...]:
    if record.get("image") is not None and record.get("images") is not None:
        raise UserError(f"{source}: 'image' and 'images' in one row; keep one of them")
    key = "image" if record.get("image") is not None else "images"
    value = record.get(key)
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        names = [_encodable(name, key, source) for name in value]
    elif isinstance(value, str):
        names = [_encodable(value, key, source)]
    else:
        raise UserError(f"{source}: {key!r} must be the path of an image file or a list of paths, not {_kind(value)}")
    if not all(name.strip() for name in names):
        raise UserError(f"{source}: {key!r} is an empty path; leave the key out if the row has no image")
    return tuple(names)


def _outputs(record: dict[str, Any], key: str, source: str) -> tuple[str, ...]:
    value = record.get(key)
    if value is None:
        raise UserError(f"{source}: row without {key!r}: give the answer as a text, or a list of texts")
    if isinstance(value, list):
        if not value:
            raise UserError(f"{source}: {key!r} is an empty list; it needs at least one answer")
        return _not_blank(value, key, source)
    return _not_blank([value], key, source)


def _not_blank(values: list[Any], key: str, source: str) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str):
            raise UserError(f"{source}: {key!r} must be a text or a list of texts, not {_kind(value)}")
        if not value.strip():
            raise UserError(f"{source}: empty answer in {key!r}: there is nothing to learn from it")
    return tuple(_encodable(value, key, source) for value in values)


def _text(record: Mapping[str, Any], key: str, source: str) -> str | None:
    """The text under a key; None where the key is missing or null."""
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{source}: {key!r} must be a text, not {_kind(value)}")
    return _encodable(value, key, source)


def _encodable(text: str, key: str, source: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no file and no tokenizer can hold
        raise UserError(f"{source}: {key!r} holds a lone surrogate ({text[error.start]!r})") from error
    return text


def _kind(value: Any) -> str:
    names = {
        "dict": "an object",
        "list": "a list",
        "bool": "true or false",
        "str": "a text",
        "NoneType": "null",
    }
    names |= {"int": "a number (quote it)", "float": "a number (quote it)"}
    return names.get(type(value).__name__, type(value).__name__)
