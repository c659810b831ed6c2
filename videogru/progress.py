"""Progress of long jobs on the terminal."""

from collections.abc import Callable

Say = Callable[[str], None]


class Progress:
    """A bar on the terminal for long jobs."""

    def __init__(self, total: int, *, shown: bool) -> None:
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            *progress.Progress.get_default_columns()[:2],
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not shown or total < 2,
        )
        self._task = self._bar.add_task("infer", total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        return lambda done: self._bar.update(self._task, advance=done)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
