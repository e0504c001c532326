"""`python dies_in_training.py ARGUMENTS`: `lcia ARGUMENTS`, dead by SIGKILL as its DIES_AT-th training step begins.

A moment that the clock chooses is another one on a busy machine; this one is the same in every process of a run.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from transformers import Trainer

from lcia.cli import main

_training_step = Trainer.training_step
_begun = 0


def _dying(*arguments: Any, **options: Any) -> Any:
    global _begun
    _begun += 1
    if _begun == int(os.environ["DIES_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    return _training_step(*arguments, **options)


if __name__ == "__main__":
    Trainer.training_step = _dying  # type: ignore[method-assign]
    main()
