"""``python -m qatbench`` and the ``qatbench`` command."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback

_LONGEST = 2_000  # characters of a line about what is wrong


def main() -> None:
    """Run the command line; a wrong request is one line on stderr and exit status 2, Ctrl-C is 130."""
    from .bench.alone import leave_cluster
    from .bench.errors import RunFailed, UserError
    from .cli import Interrupted, app, usage_line

    leave_cluster()
    _mend_streams()
    try:
        if not _has_folder():
            raise UserError("the folder in which you are is gone; change to another one")
        status = app(prog_name="qatbench", standalone_mode=False)
        sys.stdout.flush()  # else a reader that has gone is noticed only when Python ends
    except UserError as error:
        status = _say(str(error), 2)
    except RunFailed as error:  # before or after a run: there is no record to put it into
        status = _say(f"{error}{_place(error)}", 2)
    except (KeyboardInterrupt, Interrupted) as stop:
        status = _say(str(stop) or "interrupted", 130)
    except (BrokenPipeError, SystemExit) as end:  # `qatbench list ... | head`; typer turns that into SystemExit
        if type(end).__name__ == "SIGTERMException":  # Lightning's, which would end as if all was done
            sys.exit(_say("terminated; the same command goes on from the last finished epoch", 143))
        if not isinstance(end, BrokenPipeError) and not isinstance(end.__context__, BrokenPipeError):
            raise
        _drop_output()
        status = 0
    except OSError as error:  # a disk or a right that is missing where nobody has foreseen it
        where = f"{error.filename}: " if error.filename else ""
        status = _say(f"{where}{error.strerror or error}", 2)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
    except Exception as error:
        line = usage_line(error)
        status = _say_all(error) if line is None else _say(line, 2)
    sys.exit(status or 0)


def _place(error: Exception) -> str:
    """The file and line in which something was raised that a failure stands for."""
    frames = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _mend_streams() -> None:
    """Let output go wherever stdout leads: what its encoding lacks is a question mark, and a closed one takes all."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # it is closed already
            sys.stdout.reconfigure(errors="replace")


def _has_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _drop_output() -> None:
    """Send to nowhere what Python flushes when it ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _say(line: str, status: int) -> int:
    """One line on stderr, whatever is in it: a name may have line breaks, or a megabyte."""
    from .bench.secrets import scrub

    text = "".join(c if c.isprintable() else " " if c in "\n\r\t" else ascii(c)[1:-1] for c in scrub(line))
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    print(f"qatbench: {text}", file=sys.stderr)
    return status


def _say_all(error: Exception) -> int:
    """The traceback of what nobody has foreseen."""
    from .bench.secrets import scrub

    print(scrub("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
