"""``python -m qatbench`` and the ``qatbench`` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; a wrong request is one line on stderr and exit status 2, Ctrl-C is 130."""
    from .bench.errors import UserError
    from .cli import app

    try:
        app()
    except UserError as error:
        print(f"qatbench: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("qatbench: interrupted; the same command goes on from the last finished epoch", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `qatbench list ... | head`
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
