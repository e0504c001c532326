"""T5 (arXiv 1910.10683) with a bottleneck adapter behind every sub-layer, in float64, written from the equations.

    x ← x + adapter(sublayer(x / rms(x) · g)),   adapter(h) = h + U ReLU(D LayerNorm(h) + b) + c
    attention: softmax(q kᵀ + bias of the distance), not scaled;   MLP: Wo ReLU(Wi x)

One row, no padding, no dropout. Shapes: n tokens of a sequence, m of the one it attends to, d width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def t5_logits(
    weights: Mapping[str, Array], adapter: str, heads: int, encoder_ids: Sequence[int], decoder_ids: Sequence[int]
) -> Array:
    """(n, V) of what follows each token of `decoder_ids`.

    Args:
        weights: of the model with its adapters, by full name.
        adapter: what an adapter's weights are called below a sub-layer.
    """
    words = weights["shared.weight"]
    memory = _stack(weights, "encoder", adapter, heads, words[list(encoder_ids)], None)
    hidden = _stack(weights, "decoder", adapter, heads, words[list(decoder_ids)], memory)
    return (hidden * len(words[0]) ** -0.5) @ words.T  # the vocabulary projection is tied to the embedding


def _stack(weights: Mapping[str, Array], stack: str, adapter: str, heads: int, x: Array, memory: Array | None) -> Array:
    distances = weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]  # (buckets, heads)
    is_decoder = memory is not None
    bias = np.zeros((heads, len(x), len(x)))
    for i in range(len(x)):
        for j in range(len(x)):
            bias[:, i, j] = -math.inf if is_decoder and j > i else distances[_bucket(j - i, is_decoder, distances)]
    block = 0
    while f"{stack}.block.{block}.layer.0.layer_norm.weight" in weights:
        place = f"{stack}.block.{block}.layer"
        normed = _rms(x, weights[f"{place}.0.layer_norm.weight"])
        h = _attention(weights, f"{place}.0.SelfAttention", heads, normed, normed, bias)
        x = x + _adapted(weights, f"{place}.0.SelfAttention.{adapter}", h)
        if memory is not None:
            normed = _rms(x, weights[f"{place}.1.layer_norm.weight"])
            h = _attention(weights, f"{place}.1.EncDecAttention", heads, normed, memory, None)
            x = x + _adapted(weights, f"{place}.1.EncDecAttention.{adapter}", h)
        last = 2 if is_decoder else 1
        normed = _rms(x, weights[f"{place}.{last}.layer_norm.weight"])
        mlp = f"{place}.{last}.DenseReluDense"
        h = np.maximum(normed @ weights[f"{mlp}.wi.weight"].T, 0) @ weights[f"{mlp}.wo.weight"].T
        x = x + _adapted(weights, f"{mlp}.{adapter}", h)
        block += 1
    return _rms(x, weights[f"{stack}.final_layer_norm.weight"])


def _rms(x: Array, gain: Array) -> Array:
    return np.array([row / math.sqrt(sum(value * value for value in row) / len(row) + 1e-6) * gain for row in x])


def _attention(
    weights: Mapping[str, Array], place: str, heads: int, x: Array, memory: Array, bias: Array | None
) -> Array:
    query, key, value = (
        source @ weights[f"{place}.{name}.weight"].T for name, source in (("q", x), ("k", memory), ("v", memory))
    )
    size = query.shape[1] // heads
    mixed = np.zeros_like(query)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(x)):
            scores = [
                float(query[i, part] @ key[j, part]) + (0.0 if bias is None else bias[head, i, j])
                for j in range(len(memory))
            ]
            shares = [math.exp(score - max(scores)) for score in scores]
            mixed[i, part] = sum(share * value[j, part] for j, share in enumerate(shares)) / sum(shares)
    return mixed @ weights[f"{place}.o.weight"].T


def _bucket(distance: int, is_decoder: bool, distances: Array) -> int:
    """Half of a side's buckets are one distance each, the others grow as its logarithm up to 128."""
    side = len(distances) if is_decoder else len(distances) // 2
    start = side if not is_decoder and distance > 0 else 0
    far = abs(distance)
    if far < side // 2:
        return start + far
    grown = side // 2 + int(math.log(far / (side // 2)) / math.log(128 / (side // 2)) * (side - side // 2))
    return start + min(grown, side - 1)


def _adapted(weights: Mapping[str, Array], place: str, h: Array) -> Array:
    rows = []
    for row in h:
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in row) / len(row) + 1e-5)
        normed = (row - mean) / deviation * weights[f"{place}.norm.weight"] + weights[f"{place}.norm.bias"]
        inner = np.maximum(weights[f"{place}.down.weight"] @ normed + weights[f"{place}.down.bias"], 0)
        rows.append(row + weights[f"{place}.up.weight"] @ inner + weights[f"{place}.up.bias"])
    return np.array(rows)
