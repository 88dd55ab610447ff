"""Accuracy of an exported checkpoint on the tasks of lm-evaluation-harness, which is an optional extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.upcycle.source import read_config


def evaluate(
    folder: Path,
    tasks: list[str],
    limit: int | None = None,
    few_shot: int | None = None,
    batch: int = 1,
    device: str = "cpu",
    include: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Return {task: {metric: value}} as lm-evaluation-harness reports them.

    Args:
        tasks: its names for tasks or groups, such as mmlu.
        limit: at most so many examples per task; None for all.
        few_shot: examples in the prompt; None for each task's own number.
        include: a folder with task files of one's own.
    Raises:
        UserError: the harness is not installed, no such checkpoint, or tasks that it does not know.
    """
    read_config(folder)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("evaluation needs lm-evaluation-harness: uv pip install 'fivefold[evaluate]'") from error
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"lm-evaluation-harness does not know {', '.join(unknown)}; `lm_eval ls tasks` lists what it knows"
        )
    done = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": False},
        tasks=tasks,
        num_fewshot=few_shot,
        limit=limit,
        batch_size=batch,
        device=device,
        task_manager=manager,
        bootstrap_iters=1000,
    )
    return dict(done["results"]) if done else {}
