"""Errors a user can cause, each with the exit code the command line ends with.

A message says what was wrong (with the value), where, and what to do next. Only `cli/main.py` prints and exits.
"""


class VideogruError(Exception):
    """Something a user can mend; `where` is a file, row or key, `hint` the next thing to do."""

    exit_code = 2
    is_echo = False  # raised in another process as well, which tells it: see training/processes.py

    def __init__(self, what: str, *, where: object = None, hint: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.hint = hint
        super().__init__(what, self.where, hint)

    def __str__(self) -> str:
        message = self.what if self.where is None else f"{self.where}: {self.what}"
        return message if self.hint is None else f"{message}\n  {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send errors pickled; keyword-only arguments need help.
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(kind: type[VideogruError], what: str, where: str | None, hint: str | None) -> VideogruError:
    return kind(what, where=where, hint=hint)


class ConfigError(VideogruError):
    """An unknown key, a value out of range, options that do not go together."""


class DataError(VideogruError):
    """A data set, card or manifest that cannot be used as it is."""


class ModelFileError(VideogruError):
    """A model file that is missing, foreign, damaged or of another kind than its input."""


class GateRefused(VideogruError):
    """Something that was made and measured, and is not good enough to be kept."""

    exit_code = 4


class SourceError(VideogruError):
    """One source (video, volume, image) that cannot be read; the others go on."""

    exit_code = 3


class Interrupted(VideogruError):
    """Ctrl-C or SIGTERM, after the state was saved."""

    exit_code = 130
