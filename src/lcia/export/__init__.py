"""What a run learned, for other programs: PEFT folders, one merged model, or a folder that vLLM serves."""

from lcia.adapters.merging import merge_active
from lcia.export.layouts import LAYOUTS, Exported, export_run

__all__ = ["LAYOUTS", "Exported", "export_run", "merge_active"]
