"""Where converted models are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$LCIA_CACHE`, else `~/.cache/lcia`."""
    return Path(os.environ.get("LCIA_CACHE") or Path.home() / ".cache" / "lcia")
