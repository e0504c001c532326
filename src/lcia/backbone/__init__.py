"""The frozen model: loading, chat prompt, collation."""

from lcia.backbone.cache import cache_dir
from lcia.backbone.chat import Encoded, collate, encode_row
from lcia.backbone.demonstrations import fit_demonstrations
from lcia.backbone.layout import Layout, layout_of
from lcia.backbone.loading import BUILT_IN, Backbone, find_model, load_backbone, load_layout, load_reader, resolve_paths
from lcia.backbone.loss import answer_logits, answer_loss
from lcia.backbone.reader import Reader
from lcia.backbone.rowwise import RowWise, told

__all__ = [
    "BUILT_IN",
    "Backbone",
    "Encoded",
    "Layout",
    "Reader",
    "RowWise",
    "answer_logits",
    "answer_loss",
    "cache_dir",
    "collate",
    "encode_row",
    "find_model",
    "fit_demonstrations",
    "layout_of",
    "load_backbone",
    "load_layout",
    "load_reader",
    "resolve_paths",
    "told",
]
