"""AdapterCL (Madotto et al., arXiv 2012.15504): one bottleneck adapter per task; the least perplexed one answers.

    adapter   h + U ReLU(D LayerNorm(h) + b) + c      behind every sub-layer: attention, MLP
    choice    argmin_t PPL_t(x),  log PPL_t(x) = −1/(n−1) Σ_i log p_t(x_i | x_1 … x_{i−1})      x: the request, n tokens
    training  L_answer + w · mean over rows of log PPL_t(x)

An adapter never trained on requests has no reason to find its own task's requests likely: the paper's loss covers
request and answer alike, and so does this one, for w > 0.

The paper's model is decoder-only. In an encoder-decoder p_t(x_i | x_1 … x_{i−1}) is what the decoder predicts while the
encoder reads an empty text, its end token alone: then nothing but x_1 … x_{i−1} is known of the request. The decoder's
start token stands before x_1, so all n tokens count.

Shapes: B rows, L tokens, V vocabulary, N tokens that are predicted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn.functional import cross_entropy

from lcia.adapters import ModulePool, Pool
from lcia.adapters.bottleneck import Bottleneck
from lcia.adapters.targets import sublayers
from lcia.backbone import Backbone
from lcia.backbone.chat import IGNORED, pad_left
from lcia.backbone.layout import flush_left
from lcia.files import write_json
from lcia.grouping import Match
from lcia.methods.base import Method, Placement, Training
from lcia.methods.options import number
from lcia.methods.passes import evaluating
from lcia.processes import count
from lcia.stream import Row, Task

_FILE = "adapter_cl.json"  # in a checkpoint inside a task: the passes counted so far
_TOKENS = 1024  # of one batch of requests: its logits are (tokens, V), which is what takes memory


def log_perplexity(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, counted: torch.Tensor, end_id: int
) -> torch.Tensor:
    """(B,) fp32: −1/n Σ_i log p(x_i | what stands before it) over the n `counted` tokens of each row.

    In a decoder-only model a row's first token has nothing before it and does not count. A row of which nothing counts
    gets 0.

    Args:
        input_ids, attention_mask: (B, L), padded on the left.
        counted: (B, L), True where a token's probability counts.
        end_id: the token that ends a text; all that an encoder reads.
    """
    inner = extract_model_from_parallel(model)
    if inner.config.is_encoder_decoder:
        targets = flush_left(input_ids, counted, IGNORED)  # (B, W)
        logits = model(
            input_ids=input_ids.new_full((len(input_ids), 1), end_id),
            decoder_input_ids=inner.prepare_decoder_input_ids_from_labels(targets),
            use_cache=False,
        ).logits  # (B, W, V)
    else:
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).logits[:, :-1]  # (B, L − 1, V)
        has_before = attention_mask[:, :-1].bool()
        targets = input_ids[:, 1:].masked_fill(~(counted[:, 1:] & has_before), IGNORED)  # (B, L − 1)
    predicted = targets != IGNORED
    surprise = cross_entropy(logits[predicted].float(), targets[predicted], reduction="none")  # (N,)
    rows = torch.zeros(predicted.shape, device=surprise.device).masked_scatter(predicted, surprise)
    return rows.sum(1) / predicted.sum(1).clamp(min=1)


class AdapterCL(Method):
    """A new adapter for each task, none of them ever trained again; a request is tried with each.

    Args:
        bottleneck: m, the adapters' inner width (100 in the released code and in CITB's).
        request_weight: w of the requests' log perplexity in the loss; 0 trains on answers alone, and saves a second
            pass through the model.
    """

    name = "adapter_cl"
    published_learning_rate = 1e-3
    one_task_per_adapter = True

    def __init__(self, *, bottleneck: int = 100, request_weight: float = 1.0) -> None:
        if isinstance(bottleneck, bool) or not isinstance(bottleneck, int) or bottleneck < 1:
            raise ValueError(f"bottleneck must be a whole number from 1, got {bottleneck!r}")
        self._bottleneck = bottleneck
        self._request_weight = number("request_weight", request_weight)
        self._learned: list[str] = []  # adapters, in the order in which they were learned
        self._rows_routed = 0  # times the adapters that each was tried with
        self._cost: dict[str, float] = {}

    def make_pool(self, backbone: Backbone, lora: dict[str, Any], seed: int) -> Pool:
        model, width, bottleneck = backbone.model, backbone.model.config.get_text_config().hidden_size, self._bottleneck
        return ModulePool(
            model,
            sublayers(model, backbone.name),
            lambda sublayer: Bottleneck(width, bottleneck),
            kind="Bottleneck adapter",
            settings={"name": self.name, "bottleneck": bottleneck},
            base_name=backbone.name,
            seed=seed,
            projector=backbone.projector,
        )

    def open_task(self, task: Task) -> Placement:
        return Placement(task.name, is_new=True)

    def begin(self, training: Training) -> None:
        self._model = training.model
        self._cost = {"extra_forward_rows": 0, "extra_backward_rows": 0}

    def penalty(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if not self._request_weight:
            return None
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]  # (B, L)
        labels = batch["labels"]  # (B, A), the right edge; its first learned token ends the request
        answers = labels.shape[1] - (labels != IGNORED).int().argmax(1, keepdim=True)  # (B, 1)
        position = torch.arange(input_ids.shape[1], device=input_ids.device)  # (L,)
        is_request = attention_mask.bool() & (position < len(position) - answers)
        for name in self._cost:
            self._cost[name] += len(input_ids) * count()
        end_id = self.backbone.tokenizer.eos_token_id
        values = log_perplexity(self._model, input_ids, attention_mask, is_request, end_id)  # (B,)
        # a micro-batch has more rows, or fewer, than the others of its step: the mean is over all of them
        return self._request_weight * values.sum() / batch["rows"]

    def close_task(self, task: Task) -> None:
        self._learned.append(task.name)

    @torch.no_grad()
    def route(self, requests: Sequence[Row]) -> list[Match] | None:
        """The adapter with the lowest perplexity, the earliest among equals.

        A match's scores are 1 / PPL, the geometric mean of the probabilities of the request's tokens.
        """
        if not self._learned:
            return None
        # The reference answer is none of the request. One that is longer than the model can read is told by its end.
        longest = self.backbone.reader.positions or 0
        prompts = [self.backbone.reader.encode_prompt(row).prompt[-longest:] for row in requests]
        by_adapter: dict[str, list[float]] = {}  # adapter → log PPL of each request
        for adapter in self._learned:
            with self.pool.active(adapter) as model, evaluating(model):
                by_adapter[adapter] = self._log_perplexities(model, prompts)
        self._rows_routed += len(prompts) * len(self._learned)
        matches = []
        for i in range(len(prompts)):
            perplexity = {adapter: values[i] for adapter, values in by_adapter.items()}
            best = min(perplexity, key=perplexity.__getitem__)  # min keeps the first of equals
            scores = {adapter: math.exp(-value) for adapter, value in perplexity.items()}
            matches.append(Match(best, scores[best], scores))
        return matches

    def _log_perplexities(self, model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> list[float]:
        """Of each prompt, in order."""
        device = next(model.parameters()).device
        found = [0.0] * len(prompts)
        for chosen in _batches(prompts):
            asked = [prompts[i] for i in chosen]
            input_ids = pad_left(asked, self.backbone.reader.pad_id).to(device)  # (B, L)
            attention_mask = pad_left([[1] * len(prompt) for prompt in asked], 0).to(device)
            end_id = self.backbone.tokenizer.eos_token_id
            values = log_perplexity(model, input_ids, attention_mask, attention_mask.bool(), end_id)
            for i, value in zip(chosen, values.tolist(), strict=True):
                found[i] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"learned": list(self._learned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._learned = list(state["learned"])

    def adapters_changed(self, origin: Mapping[str, str]) -> None:
        self._learned = [name for name, source in origin.items() if source in self._learned]

    def save_progress(self, folder: Path) -> None:
        write_json(folder / _FILE, self._cost)

    def load_progress(self, folder: Path) -> None:
        saved = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        self._cost = {key: max(value, saved[key]) for key, value in self._cost.items()}  # no pass is taken back

    def cost(self) -> dict[str, float]:
        """Rows are those of the loss on requests; routing's are in `routing_cost`."""
        return dict(self._cost)

    def routing_cost(self) -> dict[str, float]:
        return {"extra_forward_rows": self._rows_routed}


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of prompts of like length, in batches of at most `_TOKENS` padded tokens (or a single prompt)."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if batch and (len(batch) + 1) * len(prompts[i]) > _TOKENS:  # the newest is the longest
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
