"""What a run will need, without running it."""

from lcia.planning.plan import Plan, plan_run

__all__ = ["Plan", "plan_run"]
