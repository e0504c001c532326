"""What a step of the dynamic EMA costs, and what it could cost.

    python bench/ema.py                       # LoRA r=16 and r=128 on a model of SmolLM2-135M's shape
    python bench/ema.py --device cuda --rounds 200
    python bench/ema.py --no-model            # without the training step: seconds instead of minutes

All contenders take turns, and the best of their rounds counts: other programs on the machine make things slower, never
faster. Columns of the first table:

    bytes        that a step must move per trained parameter, everything read once and written once
    bound        the time for that at the bandwidth of a large copy, measured in the same rounds
    bound (2)    the same, when weights (and averages, where β needs them) are read twice: whether all weights are
                 finite, and what β is, is known only after the last of them has been seen, and until then no average
                 may change
    plain        the same rule, tensor by tensor, as one would write it first
    AdamW        one fused AdamW step on the same parameters

`step` of fisher includes observe(). `fisher of AdamW` reads F_new in the optimizer (fisher_source="adamw").

Figures of one machine are in docs/concepts/dynamic-ema.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lcia.ema import DynamicEMA

HIDDEN, KEYS, INNER, LAYERS, VOCABULARY = 576, 192, 1536, 30, 49152  # SmolLM2-135M
LINEAR = {  # name: (out, in)
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KEYS, HIDDEN),
    "v_proj": (KEYS, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
# Floats read and written: θ_t and θ*_{t−1} are read and θ*_t is written by all; once more for the second reading.
FLOATS = {
    "fixed": (3, 1),
    "eq45": (6, 2),  # and g_t, g_{t−1} read, g_t written
    "released": (6, 2),
    "fisher": (7, 1),  # and g_t, F_old, F_new read, F_new written
    "fisher of AdamW": (5, 1),  # and F_old read, and the optimizer's second moment
}
COPY_ELEMENTS = 50_000_000


def lora_parameters(rank: int, device: torch.device) -> dict[str, nn.Parameter]:
    """The tensors of LoRA on all linear layers: 420 of them, 10-25 thousand elements each at rank 16."""
    named = {}
    for layer in range(LAYERS):
        for name, (out, inner) in LINEAR.items():
            named[f"{layer}.{name}.lora_A"] = nn.Parameter(torch.randn(rank, inner, device=device) / 30)
            named[f"{layer}.{name}.lora_B"] = nn.Parameter(torch.randn(out, rank, device=device) / 30)
    for parameter in named.values():
        parameter.grad = torch.randn_like(parameter) / 1000
    return named


class Plain:
    """Tensor by tensor, with a copy of the last weights and gradients, as the equation is read."""

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        rule: str,
        importance: dict[str, Tensor],
        steps: int,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.named = named
        self.move = getattr(self, rule.replace(" ", "_").lower())
        self.optimizer = optimizer
        self.average = {name: p.detach().clone() for name, p in named.items()}
        self.weights = {name: p.detach().clone() for name, p in named.items()}
        self.gradients = {name: torch.randn_like(p) for name, p in named.items()}
        self.importance = importance
        self.squares = {name: torch.zeros_like(p) for name, p in named.items()}
        self.total_steps = steps
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for name, parameter in self.named.items():
            beta = self.move(name, parameter)
            if not isinstance(beta, Tensor) and not 0 < beta < 1:
                beta = 0.99
            self.average[name].mul_(beta).add_((1 - beta) * parameter)

    def fixed(self, name: str, weights: Tensor) -> float:
        return 0.99

    def remember(self, name: str, weights: Tensor) -> None:
        self.weights[name] = weights.clone()
        self.gradients[name] = weights.grad.clone()

    def eq45(self, name: str, weights: Tensor) -> float:
        gradient, average = weights.grad, self.average[name]
        lag = torch.norm(self.weights[name] - average, p=1)
        change = torch.norm(gradient - self.gradients[name], p=1)
        beta = 1 - lag * torch.norm(gradient + 1, p=1) / (torch.norm(weights - average, p=1) * change)
        self.remember(name, weights)
        return beta.item()

    def released(self, name: str, weights: Tensor) -> float:
        gradient, average = weights.grad, self.average[name]
        change = torch.norm(gradient - self.gradients[name], p=1)
        beta = 1 - 2 * (1 + torch.norm(gradient, p=1)) / (torch.norm(weights - average, p=1) * change)
        self.remember(name, weights)
        return beta.item()

    def fisher(self, name: str, weights: Tensor) -> Tensor:
        self.squares[name].mul_(0.999).add_(0.001 * weights.grad**2)
        return self.share(name, self.squares[name] / (1 - 0.999**self.steps))

    def fisher_of_adamw(self, name: str, weights: Tensor) -> Tensor:
        state = self.optimizer.state[weights]
        return self.share(name, state["exp_avg_sq"] / (1 - 0.999 ** state["step"]))

    def share(self, name: str, new: Tensor) -> Tensor:
        share = self.importance[name] / (self.importance[name] + new)
        return share ** (1 / self.total_steps)


def best_of(contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """The best time in seconds of each, taking turns."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - begun)
    return best


def state_bytes(ema: DynamicEMA) -> float:
    """Bytes of state per trained parameter."""
    tensors = [value for key, value in ema.state_dict().items() if "/" in key]
    trained = sum(average.numel() for average in ema.averages.values())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / trained


def measure_steps(rank: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Prints the first table for one rank; returns the seconds of each rule's step."""
    named = lora_parameters(rank, device)
    trained = sum(parameter.numel() for parameter in named.values())
    importance = {name: torch.rand_like(parameter) for name, parameter in named.items()}
    source, target = torch.randn(2, COPY_ELEMENTS, device=device)
    optimizer = torch.optim.AdamW(named.values(), lr=0.0, fused=True)
    of_fisher = {"importance": importance, "optimizer": optimizer}
    averages = {rule: DynamicEMA(named, rule, total_steps=100) for rule in ("fixed", "eq45", "released")}
    averages["fisher"] = DynamicEMA(named, "fisher", total_steps=100, **of_fisher)
    averages["fisher of AdamW"] = DynamicEMA(named, "fisher", total_steps=100, fisher_source="adamw", **of_fisher)
    half = DynamicEMA(named, "eq45", grad_dtype=torch.bfloat16)
    contenders: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "adamw": optimizer.step,
        "eq45, bf16 gradients": half.step,
    }
    contenders |= {rule: ema.step for rule, ema in averages.items()}
    contenders |= {f"plain {rule}": Plain(named, rule, importance, 100, optimizer).step for rule in FLOATS}
    best = best_of(contenders, rounds, device)

    bandwidth = 8 * COPY_ELEMENTS / best["copy"]
    print(f"\n## LoRA r={rank}: {len(named)} tensors, {trained:,} parameters")
    print(f"\ncopy {bandwidth / 1e9:.1f} GB/s; fused AdamW step {1e3 * best['adamw']:.2f} ms\n")
    print("| rule | step ms | bytes | of bound | of bound (2) | AdamW steps | plain ms | faster than plain | state B |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rule, (floats, again) in FLOATS.items():
        seconds, plain = best[rule], best[f"plain {rule}"]
        bound, bound_2 = (4 * count * trained / bandwidth for count in (floats, floats + again))
        print(
            f"| {rule} | {1e3 * seconds:.2f} | {4 * floats} | {bound / seconds:.0%} | {bound_2 / seconds:.0%} "
            f"| {seconds / best['adamw']:.2f} | {1e3 * plain:.2f} | {plain / seconds:.1f}x "
            f"| {state_bytes(averages[rule]):.2f} |"
        )
    name = "eq45, bf16 gradients"
    print(f"| {name} | {1e3 * best[name]:.2f} | | | | | | | {state_bytes(half):.2f} |")
    return {rule: best[rule] for rule in FLOATS}


def training_step_s(rank: int, device: torch.device, batch: int, tokens: int, rounds: int) -> float:
    """Forward, backward and AdamW of PEFT's LoRA on a random model of SmolLM2-135M's shape, in the dtype and with the
    attention of `lcia`.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lcia.backbone import resolve_paths

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEAR))
    paths = resolve_paths("auto", "auto", device)
    base = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, paths["dtype"]), attn_implementation=paths["attn_implementation"]
    )
    model = get_peft_model(base, lora).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(VOCABULARY, (batch, tokens), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return best_of({"train": step}, rounds, device)["train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--no-model", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {device}")
    steps = {rank: measure_steps(rank, arguments.rounds, device) for rank in arguments.ranks}
    if arguments.no_model:
        return
    rows = f"{arguments.batch} rows of {arguments.tokens} tokens"
    print(f"\n## Share of a training step of PEFT's model, {rows}, a loss on every token\n")
    print("| LoRA | training step ms | " + " | ".join(FLOATS) + " |")
    print("|---|---|" + "---|" * len(FLOATS))
    for rank, seconds in steps.items():
        whole = training_step_s(rank, device, arguments.batch, arguments.tokens, rounds=4)
        shares = " | ".join(f"{seconds[rule] / whole:.2%}" for rule in FLOATS)
        print(f"| r={rank} | {1e3 * whole:.0f} | {shares} |")


if __name__ == "__main__":
    main()
