"""Tiny random models and a tiny stream, made on the spot: tests need no network and no download."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models are slower on several threads; and results name their number, which processes must share."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["compiled", "torch"])
def either_passes(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module that uses it is run with each way in which averages go through the weights."""
    from lcia.ema import compiled

    if request.param == "compiled":
        if compiled.library() is None:
            pytest.skip("lcia was installed without a C compiler")
        yield
    else:
        with patch.object(compiled, "library", lambda: None):
            yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests must not read or fill the user's cache; the converted demo model is the exception that is linked in."""
    cache = tmp_path_factory.mktemp("cache")
    user = Path(os.environ.get("LCIA_CACHE") or Path.home() / ".cache" / "lcia") / "models"
    if user.is_dir():
        (cache / "models").symlink_to(user)
    os.environ["LCIA_CACHE"] = str(cache)


def byte_tokenizer() -> Any:
    """One token a byte, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer T5 and its tokenizer. It drops out in training, as T5 does."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny-t5")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.1,
        initializer_factor=0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks: the first and the last share an instruction, and so a group."""
    folder = tmp_path_factory.mktemp("tiny-stream")
    instructions = {
        "colours": "Name the colour",
        "animals": "Which animal is it",
        "paints": "Name the colour",
    }
    answers = {"colours": ("red", "blue"), "animals": ("cat", "dog"), "paints": ("ochre", "umber")}
    for name, instruction in instructions.items():
        rows = [
            {
                "id": f"{name}-{i}",
                "instruction": instruction,
                "input": f"{name} item {i}",
                "output": answers[name][i % 2],
                "split": ("train", "train", "train", "train", "dev", "test")[i % 6],
            }
            for i in range(24)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.json").write_text(json.dumps(list(instructions)))
    return folder


@pytest.fixture
def tiny_config(tiny_model: Path, tiny_stream: Path, tmp_path: Path) -> Callable[..., Any]:
    """A configuration of a run that takes a second or two; keywords change it."""
    from lcia.config import parse_config

    def make(**changes: Any) -> Any:
        values = {
            "stream": str(tiny_stream),
            "model": str(tiny_model),
            "method": "lcia",
            "output_dir": str(tmp_path / "run"),
            "dtype": "float32",
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lora_r": 4,
            "max_length": 256,
            "max_new_tokens": 4,
            "logging_steps": 1,
        }
        return parse_config({**values, **changes}, where="test")

    return make


@pytest.fixture
def lcia(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Any]]:
    """Run the command in this process: (exit code, stdout, stderr)."""
    import torch

    from lcia import cli

    threads = torch.get_num_threads()

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcia", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    torch.set_num_threads(threads)


@contextlib.contextmanager
def interrupted(step: int) -> Iterator[None]:
    """What is done inside ends as by Ctrl-C, in the loss of its training step `step`, counted from 1."""
    from lcia.training import TaskTrainer

    original, steps = TaskTrainer.compute_loss, 0

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskTrainer, "compute_loss", dying)
        with pytest.raises(KeyboardInterrupt):
            yield
