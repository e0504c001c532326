"""The parts of memory that a plan tells apart."""

from __future__ import annotations

BASE = "base weights"
ADAPTERS = "adapters"  # of all groups
GRADIENTS = "gradients"
OPTIMIZER = "optimizer states"
METHOD = "method's states"  # averages and what their rule needs, anchors, importance, memories
ACTIVATIONS = "activations"
LOGITS = "logits and loss"  # whatever has the vocabulary as one of its sizes
CACHE = "keys and values"
OTHER = "batch and the rest"
BUCKETS = "DDP's gradient buckets"
GATHERED = "gathered from all"  # two layers, and what is in none

PARTS = (BASE, ADAPTERS, GRADIENTS, OPTIMIZER, METHOD, ACTIVATIONS, LOGITS, CACHE, OTHER, BUCKETS, GATHERED)
SHARDED = (BASE, ADAPTERS, GRADIENTS, OPTIMIZER, METHOD)  # by FSDP2
