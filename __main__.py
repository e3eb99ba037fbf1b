"""``python -m qatbench`` and the ``qatbench`` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; a wrong request is one line on stderr and exit status 2, Ctrl-C is 130."""
    from .bench.alone import leave_cluster
    from .bench.errors import UserError
    from .cli import Interrupted, app, usage_line

    leave_cluster()
    try:
        status = app(prog_name="qatbench", standalone_mode=False)
        sys.stdout.flush()  # else a reader that has gone is noticed only when Python ends
    except UserError as error:
        status = _say(str(error), 2)
    except (KeyboardInterrupt, Interrupted) as stop:
        status = _say(str(stop) or "interrupted", 130)
    except (BrokenPipeError, SystemExit) as end:  # `qatbench list ... | head`; typer turns that into SystemExit
        if type(end).__name__ == "SIGTERMException":  # Lightning's, which would end as if all was done
            sys.exit(_say("terminated; the same command goes on from the last finished epoch", 143))
        if not isinstance(end, BrokenPipeError) and not isinstance(end.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python flushes when it ends
        status = 0
    except Exception as error:
        line = usage_line(error)
        status = _say_all(error) if line is None else _say(line, 2)
    sys.exit(status or 0)


def _say(line: str, status: int) -> int:
    from .bench.secrets import scrub

    print(f"qatbench: {scrub(line)}", file=sys.stderr)
    return status


def _say_all(error: Exception) -> int:
    """The traceback of what nobody has foreseen."""
    import traceback

    from .bench.secrets import scrub

    print(scrub("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
