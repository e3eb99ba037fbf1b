"""Paths as a user gives them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import UserError

_LONGEST = 255  # bytes of one name, on every file system of Linux and macOS
_IMPOSSIBLE = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


def usable(path: Path | str, what: str) -> Path:
    """The path, with ``~`` replaced. It need not be there.

    Args:
        path: As it was given.
        what: What it is for, e.g. ``store``.

    Raises:
        UserError: No file can have this name: it is too long, leads in a circle, or is of a user who is not known here.
    """
    shown = str(path) if len(str(path)) <= 100 else f"{str(path)[:60]}…{str(path)[-20:]}"
    try:
        found = Path(path).expanduser()
        if any(len(os.fsencode(part)) > _LONGEST for part in found.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))  # stat says so of what is there alone
        os.stat(found)
    except (RuntimeError, ValueError) as error:  # ~nobody; a zero byte
        reason = "there is no such user" if isinstance(error, RuntimeError) else "a name has no zero bytes"
        raise UserError(f"{what} {shown!r}: {reason}; give another path") from None
    except OSError as error:
        if error.errno in _IMPOSSIBLE:
            raise UserError(f"{what} {shown!r}: {error.strerror}; give another path") from None
    return found
