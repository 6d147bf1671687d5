"""How long tasks of the command line tell where they are."""

from __future__ import annotations

import io

from rich.console import Console

from services.cli.progress import TaskProgress


def told(*, is_terminal: bool) -> str:
    """What is written while one task goes from 0 to 30 in steps of 1, and another one ends at once."""
    out = io.StringIO()
    with TaskProgress(Console(file=out, force_terminal=is_terminal, width=100)) as progress:
        slow = progress.add_task("reading", total=30, note="")
        quick = progress.add_task("training", total=1.0, note="")
        for _ in range(15):
            progress.advance(slow)
        progress.update(quick, completed=1.0, note="loss 1.5")
        for _ in range(15):
            progress.advance(slow)
    return out.getvalue()


def test_without_a_terminal_every_tenth_has_a_line() -> None:
    lines = told(is_terminal=False).splitlines()
    tenths = [f"reading: {10 * tenth}%" for tenth in range(1, 11)]
    assert lines == [*tenths[:5], "training: 100%  loss 1.5", *tenths[5:]]


def test_a_terminal_has_bars() -> None:
    shown = told(is_terminal=True)
    assert "reading: " not in shown
    assert "loss 1.5" in shown
