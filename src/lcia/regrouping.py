"""Change the groups of a run by hand: rename, merge, split. Weights are moved, never trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcia.backbone import load_backbone
from lcia.errors import UserError, did_you_mean
from lcia.learning import model_card
from lcia.methods import Placement
from lcia.progress import Reporter
from lcia.results import method_name
from lcia.run import finish, is_finished
from lcia.run_folder import RunFolder
from lcia.session import base_model, current_stream, frozen_config, open_session
from lcia.stream.sources import TASK_NAME

ACTIONS = ("rename", "merge", "split")


def regroup(
    path: Path,
    action: str,
    group: str,
    other: str,
    reason: str,
    reporter: Reporter,
    tasks: Sequence[str] = (),
) -> dict[str, Any]:
    """Change groups by hand; the reason goes into the ledger, and the last row is measured again.

    rename: `group` is called `other`. merge: the requests of `group` go to the weights of `other`, its own are
    dropped. split: `tasks` leave `group` for a new group `other`, which starts as a copy of its weights.

    Raises:
        UserError: the run is not finished, its method has no groups, or the names do not fit.
    """
    folder = RunFolder(path).require_run()
    if action not in ACTIONS:
        raise UserError(f"unknown action {action!r}. {did_you_mean(action, ACTIONS)}")
    if tasks and action != "split":
        raise UserError(f"tasks: {action} takes the whole group; only split takes some tasks of it")
    if not reason.strip():
        raise UserError("a reason is needed: it goes into the ledger, for whoever reads it in a year")
    with folder.lock():
        config = frozen_config(folder)
        stream = current_stream(folder, config, reporter)
        if not is_finished(folder, stream):
            raise UserError(f"{path}: the run is not finished; first `lcia resume {path}`")
        backbone = load_backbone(base_model(folder, config), config.dtype, config.attn_implementation)
        session = open_session(folder, config, stream, backbone)
        codebook, pool = session.method.codebook, session.pool
        if codebook is None:
            raise UserError(f"{path}: method {method_name(config)} has no groups")
        if group not in codebook.groups:
            raise UserError(f"{path}: no group {group!r}; groups: {', '.join(codebook.groups)}")
        if (other in codebook.groups) != (action == "merge"):
            problem = f"no group {other!r} to merge into" if action == "merge" else f"a group {other!r} exists already"
            raise UserError(f"{path}: {problem}; groups: {', '.join(codebook.groups)}")
        if action != "merge" and not TASK_NAME.fullmatch(other):
            raise UserError(f"group {other!r}: a name of folders and adapters has only A-Z a-z 0-9 _ - (at most 100)")
        moved = [name for name, placement in session.placements.items() if placement.adapter == group]
        origin = {name: name for name in pool.names}  # adapter → whose weights and state it has
        if action == "rename":
            codebook.rename(group, other)
            origin[other] = origin.pop(group)
        elif action == "merge":
            codebook.merge(group, other)
            del origin[group]
        else:
            wrong = [name for name in tasks if name not in moved]
            if wrong or not tasks or len(tasks) == len(moved):
                raise UserError(f"{path}: split needs some, not all, of the tasks of {group!r}: {', '.join(moved)}")
            members, moved = moved, list(tasks)
            texts = {task.name: set(task.instructions) for task in stream}
            leaving = set().union(*(texts[name] for name in moved))
            staying = set().union(*(texts[name] for name in members if name not in moved))
            if leaving & staying:
                raise UserError(
                    f"{path}: the instruction {min(leaving & staying)!r} belongs to tasks on both sides; requests with "
                    "it could not be told apart"
                )
            codebook.split(group, other, [text for text in codebook.groups[group] if text in leaving])
            origin[other] = group
        for name, source in origin.items():
            if name not in pool.names:
                pool.add(name, start=source)
        for name in [name for name in pool.names if name not in origin]:
            pool.remove(name)
        session.method.adapters_changed(origin)
        for name in moved:
            session.placements[name] = Placement(other, is_new=False)
        count = len(folder.records("groups_changed")) + 1
        stage = f"{stream[len(stream) - 1].name}.groups-{count}"
        files = folder.save_snapshot(stage, pool, session.method, lambda name: model_card(session, name))
        folder.confirm(
            "groups_changed",
            stage=stage,
            action=action,
            group=group,
            other=other,
            tasks=moved,
            reason=reason,
            placements={name: vars(session.placements[name]) for name in moved},
            sha256={name: pool.sha256(name) for name in pool.names},
            files=files,
        )
        return finish(session, reporter)
