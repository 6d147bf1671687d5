"""What is done of tasks that take long: bars on a terminal, elsewhere lines. Knows no task."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn


class TaskProgress(Progress):
    """Tasks have a field `note`. Where there is no terminal, each tells of every tenth that is done, in a line."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console()
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._tenths: Counter[TaskID] = Counter()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See Progress."""
        super().update(task_id, **changes)
        if self.console.is_terminal:
            return
        (task,) = (each for each in self.tasks if each.id == task_id)
        if (tenth := int(task.percentage // 10)) > self._tenths[task_id]:
            self._tenths[task_id] = tenth
            self.console.print(f"{task.description}: {task.percentage:.0f}%  {task.fields['note']}".rstrip(), highlight=False)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See Progress."""
        self.update(task_id, advance=advance)
