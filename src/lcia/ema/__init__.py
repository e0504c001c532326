"""Dynamic exponential moving average of the trained weights, weighted by what earlier tasks need."""

from lcia.ema.average import DynamicEMA
from lcia.ema.callback import DynamicEMACallback
from lcia.ema.rules import RULES, Rule

__all__ = ["RULES", "DynamicEMA", "DynamicEMACallback", "Rule"]
