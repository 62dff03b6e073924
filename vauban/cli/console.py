"""Lines, tables and progress, for a terminal, a log or a JSON reader.

A terminal gets colour and moving bars; anything else gets plain lines without control
characters. With --json everything meant for people goes to stderr.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from vauban.report import aligned, json_safe, seconds


class Console:
    """The output of a verb: stdout, or stderr beside the document of --json."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.stream: TextIO = sys.stderr if as_json else sys.stdout
        self.rich: Any = None
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console as RichConsole

            self.rich = RichConsole(file=self.stream, highlight=False)

    @property
    def width(self) -> int:
        """Characters in a line of text: the terminal's width, at most 120; 100 elsewhere."""
        return min(self.rich.width, 120) if self.rich else 100

    def line(self, text: str = "", style: str | None = None) -> None:
        """One line, in a style where there is a terminal."""
        if self.rich:
            self.rich.print(text, style=style, markup=False)
        else:
            print(text, file=self.stream, flush=True)

    def command(self, text: str) -> None:
        """A command to copy, never broken into several lines."""
        if self.rich:
            self.rich.print(f"  {text}", style="bold", markup=False, soft_wrap=True)
        else:
            self.line(f"  {text}")

    def warning(self, text: str) -> None:
        self.line(f"warning: {text}", "yellow")

    def pairs(self, title: str | None, rows: Sequence[tuple[str, str]]) -> None:
        """A list of name and text: a panel if it has a title, or plain aligned lines."""
        width = max(len(name) for name, _ in rows)
        if not self.rich:
            if title:
                self.line(title)
            for name, text in rows:
                self.line(f"{'  ' if title else ''}{name:<{width}}  {text}")
            return
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in rows:
            grid.add_row(name, Text(text))
        panel = Panel(
            grid,
            title=Text(title or "", "bold not dim"),
            title_align="left",
            border_style="dim",
            expand=False,
        )
        self.rich.print(panel if title else grid)

    def grid(self, headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> None:
        """A table whose first `texts` columns are text and whose others are figures."""
        if not self.rich:
            for line in aligned(headings, rows, texts):
                self.line(line)
            return
        from rich import box
        from rich.table import Table

        # A terminal of 80 columns has room for the before/after table, but not for its margins.
        table = Table(
            box=box.SIMPLE_HEAD,
            header_style="bold",
            padding=(0, 1) if self.has_room(headings, rows, margin=3) else 0,
            show_edge=False,
        )
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="left" if i < texts else "right")
        for row in rows:
            table.add_row(*row)
        self.rich.print(table)

    def has_room(
        self, headings: Sequence[str], rows: Sequence[Sequence[str]], margin: int = 1
    ) -> bool:
        """Whether a terminal is wide enough for a table; always where there is no terminal."""
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        return not self.rich or sum(widths) + margin * len(widths) <= self.rich.width

    def document(self, value: Any) -> None:
        """The one JSON document of --json, on stdout."""
        if self.as_json:
            print(json.dumps(json_safe(value), indent=2, ensure_ascii=False, allow_nan=False))

    @contextmanager
    def progress(self) -> Iterator["Stages"]:
        """A callable for the library's `progress`; warnings raised meanwhile become lines."""
        stages: _PlainStages | _BarStages
        stages = _BarStages(self.rich) if self.rich else _PlainStages(self)
        with _warnings_as_lines(self), stages:
            yield stages


class Stages(Protocol):
    """What shows the library's stages, and a table that changes while one of them runs."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table below the bars; without a terminal at most every half minute."""


# Without a terminal a stage says at least this often, in seconds, how far it is.
HEARTBEAT = 30.0


class _PlainStages:
    """One line for each stage when it is over, and one every half minute while it runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: str | None = None
        self._began = self._spoke = 0.0
        self._tabled = time.monotonic()
        self._total = 0

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._finish()
            self._stage, self._began = stage, time.monotonic()
            self._spoke = self._began
        self._total = total
        now = time.monotonic()
        if now - self._spoke >= HEARTBEAT:
            self._spoke = now
            span = now - self._began
            rest = f", about {seconds(span * (total - done) / done)} left" if done else ""
            amount = f"{_amount(done)}/{_amount(total)}"
            self._console.line(f"{stage:<20}  {amount:>8}  {seconds(span):>10}{rest}")
        # A single step ends at once: what is printed next belongs below its line.
        if done >= total <= 1:
            self._finish()

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if time.monotonic() - self._tabled >= HEARTBEAT:
            self._tabled = time.monotonic()
            self._console.grid(headings, rows)

    def _finish(self) -> None:
        if self._stage is None:
            return
        span = seconds(time.monotonic() - self._began)
        amount = _amount(self._total) if self._total > 1 else ""
        self._console.line(f"{self._stage:<20}  {amount:>8}  {span:>10}")
        self._stage = None


class _BarStages:
    """A bar for each stage: the remaining time while it runs, the time it took afterwards."""

    def __init__(self, console: Any) -> None:
        self._bars = _bars(console)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> None:
        self._bars.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close()
        self._bars.below = None
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._close()
            self._bars.below = None
            self._tasks[stage] = self._bars.add_task(stage, total=total, over=total <= 1)
        # A stage of many steps works on after its last one (scores, likelihoods) until the next.
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table

        table = Table(*headings, box=box.SIMPLE_HEAD, header_style="bold", show_edge=False)
        for row in rows:
            table.add_row(*row)
        self._bars.below = table
        self._bars.refresh()

    def _close(self) -> None:
        """Stop the clock of the stage before: it is over once the next one begins."""
        for task in self._bars.tasks:
            if not task.fields["over"]:
                self._bars.update(task.id, completed=task.total, over=True, span=task.elapsed)
                self._bars.stop_task(task.id)


def _bars(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Any) -> Text:
            if task.total is None or task.total <= 1:
                return Text("")
            return Text(f"{_amount(int(task.completed))}/{_amount(int(task.total))}", "dim")

    class Clock(ProgressColumn):
        def render(self, task: Any) -> Text:
            elapsed = task.elapsed or 0.0
            if task.fields["over"] and task.finished:
                return Text(seconds(task.fields.get("span") or task.finished_time or 0.0), "green")
            if task.finished or task.time_remaining is None:
                return Text(seconds(elapsed), "dim")
            return Text(f"{seconds(task.time_remaining)} left", "cyan")

    class Bars(Progress):
        below: Any = None
        """What is drawn under the bars."""

        def get_renderables(self) -> Iterator[Any]:
            yield from super().get_renderables()
            if self.below is not None:
                yield self.below

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28, complete_style="cyan", finished_style="green"),
        Amount(),
        Clock(),
        console=console,
    )


def _amount(count: int) -> str:
    """A count; bytes and other large numbers are shortened."""
    for limit, unit in ((10**9, "G"), (10**6, "M")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}"
    return str(count)


@contextmanager
def _warnings_as_lines(console: Console) -> Iterator[None]:
    """Python's warnings as one line each, without file name and source line."""
    before = warnings.showwarning

    def show(message: Any, category: Any, *_: Any, **__: Any) -> None:
        from vauban.errors import VaubanWarning

        # Deprecations of other libraries are for developers, not for this terminal.
        if issubclass(category, VaubanWarning):
            console.warning(str(message))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before
