"""TRL's SFTTrainer with LoRA and the callback: trains, checkpoints, resumes."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lcia.ema import DynamicEMACallback

trl = pytest.importorskip("trl")

# TRL 1.16 sets a name of TrainingArguments that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
STEPS = 4


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


def sft(model: Path, folder: Path, *callbacks: TrainerCallback, importance: Any = None) -> Any:
    ema = DynamicEMACallback(rule="fisher", importance=importance, keep_raw=importance is None)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"item {i}"},
                {"role": "assistant", "content": "red" if i % 2 else "blue"},
            ]
        }
        for i in range(16)
    ]
    torch.manual_seed(0)
    return trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(model),
        args=trl.SFTConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            save_steps=1,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[ema, *callbacks],
    )


def callback_of(trainer: Any) -> DynamicEMACallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, DynamicEMACallback))


def trained(trainer: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_sft_with_lora_trains_checkpoints_and_resumes(tiny_model, tmp_path):
    first = sft(tiny_model, tmp_path / "first")
    first.train()
    importance = callback_of(first).ema.importance
    assert set(importance) == set(trained(first))
    assert all("lora_" in name for name in importance)

    through = sft(tiny_model, tmp_path / "through", importance=importance)
    through.train()
    halted = sft(tiny_model, tmp_path / "halted", Stop(), importance=importance)
    halted.train()
    resumed = sft(tiny_model, tmp_path / "halted", importance=importance)
    resumed.train(resume_from_checkpoint=True)

    expected, found = callback_of(through).ema, callback_of(resumed).ema
    assert found.steps == STEPS
    assert found.fallback_fraction == 0
    for name, average in expected.averages.items():
        assert torch.equal(average, found.averages[name]), name
        assert torch.equal(average, trained(resumed)[name]), "the model ends as the average"
    assert 0 < sum(found.retained_mass.values()) / len(found.retained_mass) < 1
    assert "ema_retained_mass" in resumed.state.log_history[-2]

    resumed.save_model(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "adapter")
    weights = dict(plain.named_parameters())
    assert all(torch.equal(weights[name], average) for name, average in found.averages.items())
    raw = load_file(tmp_path / "halted" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert raw.keys() == saved.keys()
    assert any(not torch.equal(raw[key], saved[key]) for key in raw), "the checkpoint holds θ, the end θ*"


def test_the_example_learns_two_data_sets_and_goes_on_where_it_was_interrupted(tiny_model, tmp_path, monkeypatch):
    script = Path(__file__).resolve().parents[1] / "examples" / "trl_sft.py"
    files = []
    for name, answers in (("first", ("red", "blue")), ("second", ("cat", "dog"))):
        files.append(tmp_path / f"{name}.jsonl")
        asked = [{"role": "user", "content": f"{name} item"}]
        rows = [{"messages": [*asked, {"role": "assistant", "content": answers[i % 2]}]} for i in range(16)]
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(folder: Path, *more: str) -> dict[str, dict[str, torch.Tensor]]:
        options = ["--output", folder, "--r", 4, "--max-steps", 4, "--batch", 4, "--save-steps", 2, *more]
        monkeypatch.setattr(sys, "argv", ["trl_sft.py", *map(str, [tiny_model, *files, *options])])
        runpy.run_path(str(script), run_name="__main__")
        names = ("adapter_model.safetensors", "importance.safetensors")
        return {f"{number}/{name}": load_file(folder / number / name) for number in "12" for name in names}

    whole = run(tmp_path / "whole")
    assert not torch.equal(*(next(iter(whole[f"{number}/adapter_model.safetensors"].values())) for number in "12"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for lost in ("importance.safetensors", "adapter_model.safetensors"):
        (tmp_path / "cut" / "2" / lost).unlink()
    shutil.rmtree(tmp_path / "cut" / "2" / "checkpoints" / "checkpoint-4")
    resumed = run(tmp_path / "cut", "--resume")
    for file, tensors in whole.items():
        for name, value in tensors.items():
            assert torch.equal(value, resumed[file][name]), (file, name)
