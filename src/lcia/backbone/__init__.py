"""The frozen model: loading, chat prompt, collation."""

from lcia.backbone.cache import cache_dir
from lcia.backbone.chat import Encoded, collate, encode_row
from lcia.backbone.loading import BUILT_IN, Backbone, find_model, load_backbone, resolve_paths

__all__ = [
    "BUILT_IN",
    "Backbone",
    "Encoded",
    "cache_dir",
    "collate",
    "encode_row",
    "find_model",
    "load_backbone",
    "resolve_paths",
]
