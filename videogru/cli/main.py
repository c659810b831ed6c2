"""The command line: short, frozen flags; the only place that prints errors and exits.

Exit codes: 0 ok, 1 internal error, 2 usage, settings or data, 3 some inputs failed, 4 refused, 130 interrupted.
Heavy modules are imported inside the commands, so that `videogru --help` answers at once.
"""

import errno
import io
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from videogru import __version__
from videogru.cli import data, evaluate, export, features, model, predict, stream, train
from videogru.cli.terminal import say
from videogru.errors import VideogruError

app = typer.Typer(
    name="videogru",
    help="Classify videos, scans and images as sequences: a 2-D CNN reads each frame, a bidirectional GRU the order.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (train, evaluate, predict, stream, export, features):
    app.add_typer(commands.app)
app.add_typer(data.app, name="data")
app.add_typer(model.app, name="model")


# A full disk, missing rights, a name too long: nothing that a traceback would explain.
_OF_THE_SYSTEM = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}


def _version(asked: bool | None) -> None:
    if asked:
        print(f"videogru {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    pass


def main() -> None:
    """Run a command; turn what went wrong into one message and an exit code."""
    # SIGTERM ends every command as Ctrl-C does: cleanly, with 130.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if "VIDEOGRU_LAUNCHED_BY" in os.environ:
        from videogru.training.launch import end_with_launcher

        end_with_launcher()
    sys.exit(_run())


def _run() -> int:
    # nibabel writes what it dislikes in a header to stderr; what matters of it comes back as an error.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started this, as `>&-` does
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for output in (sys.stdout, sys.stderr):
        # File names need not be valid text; one of them must not end the work.
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")
    try:
        code = int(app(standalone_mode=False, prog_name="videogru") or 0)
        if code == 130:
            say("interrupted")
        return code
    except VideogruError as error:
        if not (error.is_echo or _is_beside_another()):
            say(str(error) if error.exit_code == 130 else f"error: {error}")
        return error.exit_code
    except MemoryError as error:
        say(f"error: not enough memory ({error}); make data.num_frames, data.frame_size or train.batch_size smaller")
        return 2
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            return _click_exit(error)
        say(f"error: {error.filename or 'writing'}: {error.strerror}")
        return 2
    except Exception as error:  # noqa: BLE001
        return _click_exit(error)


def _is_beside_another() -> bool:
    """Whether torchrun started this process beside another here, which meets the same errors and tells them."""
    variables = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return None not in variables and variables[-1] != "0"


def _click_exit(error: Exception) -> int:
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):
        show()
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        say("interrupted")
        return 130
    traceback.print_exception(error)
    say("error: this is a mistake in videogru, not yours; please report it with the lines above")
    return 1
