"""The texts of an export: model cards, the script that starts vLLM, and the guide beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from lcia.export.source import Source
from lcia.results import method_line
from lcia.stream.super_ni import super_ni_prompt

# vLLM reserves memory for every adapter that one batch may hold.
_MAX_ADAPTERS_IN_A_BATCH = 8
_PLAIN = (
    "A prompt is the base model's chat template over {turns}, the input and on a new line the instruction "
    "(without a template: plain lines, `INPUT\\nINSTRUCTION\\n`)."
)
_SUPER_NI = (
    "A prompt is the base model's chat template over {turns}, Super-NI's prompt (without a template: plain lines, and "
    "that prompt as it is):\n\n```\n{text}\n```\n\nIt ends in a space. A part that ends in punctuation gets no further "
    "full stop. Of the task's examples those that do not fit are left out, from the last one on."
)
_PADDING = """

Before the processor sees it, an image is padded to a square of the processor's mean colour:

```python
from PIL import Image

side = max(image.size)
square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in processor.image_processor.image_mean))
square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
```"""


def adapter_card(source: Source, group: str, base: str) -> str:
    """README.md of one adapter; `base` is what its settings name."""
    auto = source.auto_class
    use = (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f"base = {auto}.from_pretrained({base!r}, dtype={source.dtype!r})\n"
        'model = PeftModel.from_pretrained(base, "this folder")'
    )
    note = ""
    if source.is_initialised:
        note = (
            f"The base model is {source.config.model} after the run's Init stage. It lies in the run, and the code "
            "names its folder: take it along, or let `lcia export RUN OUT --as merged` make a model that needs no base."
            "\n\n"
        )
    elif source.base_is_local:
        note = (
            "The base model has no id on the hub: the code names the folder it was loaded from. Elsewhere "
            f"`lcia.backbone.find_model({Path(source.config.model).name!r})` gives the folder of a built-in name or a "
            "GGUF file, and `lcia export RUN OUT --as merged` makes a model that needs no base.\n\n"
        )
    what = "LoRA adapter of one instruction group, trained with lcia."
    return _card(source, group, "peft", what, use, note)


def merged_card(source: Source, group: str, dtype: str, rounding: float) -> str:
    """README.md of a merged model."""
    auto, reader = source.auto_class, source.reader_class
    use = (
        f"from transformers import {auto}, {reader}\n\n"
        f'model = {auto}.from_pretrained("this folder", dtype={dtype!r})\n'
        f'{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained("this folder")'
    )
    what = (
        "The base model with the LoRA adapter of one instruction group merged into its weights, trained with lcia. "
        f"W + s·B·A was computed in float32 and is stored in {dtype}: rounding errors have {rounding:.1%} of "
        "the norm of s·B·A."
    )
    return _card(source, group, "transformers", what, use)


def _prompt(source: Source, tasks: Iterable[str]) -> str:
    """How the run asks in these tasks."""
    system = source.config.system
    turns = "one user turn" if system is None else f"the system message {json.dumps(system)} and one user turn"
    asked: dict[int | None, list[str]] = {}  # examples → tasks
    for task in tasks:
        asked.setdefault(source.examples[task], []).append(task)
    forms = [
        (f"**{', '.join(names)}**: " if len(asked) > 1 else "")
        + (_PLAIN if examples is None else _SUPER_NI).format(turns=turns, text=_last_turn(examples))
        for examples, names in asked.items()
    ]
    padding = _PADDING if source.config.image_padding and source.layout.sees else ""
    return "\n\n".join(forms) + " Answers were measured with greedy decoding." + padding


def _last_turn(examples: int | None) -> str:
    """What a user's turn says, with words in capitals for what changes."""
    if examples is None:
        return "INPUT\nINSTRUCTION"
    shown = [(f"EXAMPLE {number}", f"ANSWER {number}") for number in range(1, examples + 1)]
    return super_ni_prompt("INSTRUCTION", shown, "INPUT")[0]


def _card(source: Source, group: str, library: str, what: str, use: str, note: str = "") -> str:
    base = "" if source.base_is_local else f"base_model: {source.base}\n"
    return (
        f"---\n{base}library_name: {library}\ntags: [lora, continual-learning]\n---\n\n# {group}\n\n{what}\n\n"
        f"- tasks learned, in order: {', '.join(source.groups[group])}\n{_facts(source)}\n"
        f"{_scores(source, group)}## Use\n\n```python\n{use}\n```\n\n{note}{_prompt(source, source.groups[group])}\n"
    )


def _facts(source: Source) -> str:
    learned = sum(len(tasks) for tasks in source.groups.values())
    base = f"{source.config.model}{' after the Init stage' if source.is_initialised else ''}, in {source.dtype}"
    state = f"- **the run is not finished**: {learned} of {len(source.planned)} tasks are learned\n"
    return (
        f"- base model: {base}, sha256 of its weights {source.base_sha256[:16]}…\n"
        f"- method: {method_line(source.config)}, seed {source.config.seed}\n{'' if source.results else state}"
        f"- lcia {version('lcia')}\n- licence: see the base model, and the data it was trained on here\n"
    )


def _scores(source: Source, group: str) -> str:
    """The last row of the matrix, for the tasks of one group."""
    if source.results is None:
        return ""
    last = dict(zip(source.results["tasks"], source.results["matrix"][-1], strict=True))
    scorers = source.results["scorers"]
    rows = "".join(f"| {task} | {last[task]:.1f} | {scorers[task]} |\n" for task in source.groups[group])
    return (
        f"## Scores\n\nAfter the run's last task, on {source.results['eval_split']} rows, requests routed as they come:"
        f"\n\n| task | score | scorer |\n|---|---|---|\n{rows}\n"
    )


def serve_script(source: Source, base: str, served: str, adapters: Mapping[str, str], max_rank: int) -> str:
    """serve.sh: the command that starts vLLM.

    Args:
        base: hub id or folder of the base model.
        served: the model name under which it answers.
        adapters: group → folder.
        max_rank: a value that --max-lora-rank takes.
    """
    # vLLM reads NAME=PATH only without a comma or a second `=` in it; a JSON object always.
    modules = [
        json.dumps({"name": group, "path": path}) if set("=,") & set(group) else f"{group}={path}"
        for group, path in adapters.items()
    ]
    lines = [
        f"exec vllm serve {shlex.quote(base)}",
        f"--served-model-name {shlex.quote(served)}",
        f"--dtype {_serving_dtype(source)}",
        "--generation-config vllm",  # answers were measured without the model's own defaults of sampling
        "--enable-lora",
        f"--max-lora-rank {max_rank}",
        f"--max-loras {min(len(adapters), _MAX_ADAPTERS_IN_A_BATCH)}",
        f"--max-cpu-loras {len(adapters)}",
        '"$@"',
        f"--lora-modules {shlex.join(modules)}",
    ]
    return (
        "#!/bin/sh\n# Paths are relative to this folder. Options given to this script go on to vLLM.\n"
        'cd "$(dirname "$0")" || exit\n' + " \\\n  ".join(lines) + "\n"
    )


def _serving_dtype(source: Source) -> str:
    return source.dtype if source.dtype in ("bfloat16", "float16") else "bfloat16"  # all that vLLM's LoRA kernels take


def serving_guide(source: Source, served: str) -> str:
    """README.md of a serving layout."""
    models = "".join(f"| `{group}` | {', '.join(tasks)} |\n" for group, tasks in source.groups.items())
    if source.router is None:
        route = f"Every request goes to `{next(iter(source.groups))}`: there is nothing to route."
    else:
        route = (
            "`routes.json` says which group answers an instruction:\n\n```python\n"
            "from lcia.grouping import load_routes  # needs no torch\n\n"
            'match = load_routes("routes.json").route("INSTRUCTION")\n'
            f"model = match.group or {served!r}  # no group is near enough: the base model\n```"
        )
    tasks = [task for names in source.groups.values() for task in names]
    turns = [] if source.config.system is None else [{"role": "system", "content": source.config.system}]
    turns.append({"role": "user", "content": _last_turn(source.examples[tasks[0]])})
    # as it stands between the quotes of a shell: a system message may hold an apostrophe
    messages = shlex.quote(json.dumps(turns))[1:-1]
    return (
        "# Groups of one run, served by vLLM\n\n"
        "`./serve.sh` starts a server of the OpenAI API with one model name per group; options of `vllm serve` may "
        "follow. It was written from the documentation of vLLM 0.9 to 0.22 and was not tried.\n\n"
        f"| model | answers |\n|---|---|\n{models}| `{served}` | the base model |\n\n{route}\n\n"
        "```sh\ncurl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "MODEL", "temperature": 0, "messages": {messages}}}\'\n```\n\n'
        f"{_prompt(source, tasks)}\n\nA base model without a template is asked at `/v1/completions`.\n\n"
        f"The server computes in {_serving_dtype(source)} and rounds the adapters, float32 here, to it: last digits, "
        f"and now and then an answer, differ from the run's.\n\n{_facts(source)}"
    )
