"""What arrives: tasks of instruction data, how answers are scored, and a stream in numbers."""

from lcia.stream.load import load_stream
from lcia.stream.scorers import SCORERS
from lcia.stream.sources import BUILT_IN, find
from lcia.stream.types import Row, Stream, Task
from lcia.stream.validate import StreamSummary, describe

__all__ = ["BUILT_IN", "SCORERS", "Row", "Stream", "StreamSummary", "Task", "describe", "find", "load_stream"]
