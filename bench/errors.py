"""What can go wrong, as one clear line."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(Exception):
    """The request was wrong. The message is one line that says what is wrong and how to mend it; exit status 2."""


class RunFailed(Exception):
    """A run cannot go on. It is recorded as ``failed`` with this message as its reason, and the sweep continues."""


class Diverged(RunFailed):
    """Training has made a number that is not finite, or a step of 0. Who catches it knows which learning rate was too large."""


_MACHINE = {
    getattr(errno, name)
    for name in (
        "ENOSPC", "EDQUOT", "EFBIG", "EIO", "EREMOTEIO", "EROFS", "ESTALE", "ENODEV", "ENXIO", "ENOMEM", "EMFILE", "ENFILE",
        "ENOLCK", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENOTCONN", "ESHUTDOWN", "ENOMEDIUM",
    )
    if hasattr(errno, name)
}  # fmt: skip
_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}


def trouble(error: BaseException | None) -> str | None:
    """What the machine did, in words, if that is why an error was raised: a full disk, a file server that is gone.

    Neither the request nor the method is to blame then: what was begun is left, and goes on when it is asked for again.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # a plugin may raise an error from itself
        seen.append(error)
        if isinstance(error, OSError) and error.errno is not None and error.errno in _MACHINE:
            where = f": {error.filename}" if isinstance(error.filename, str) else ""
            return "no space left on the disk" if error.errno in _FULL else f"{os.strerror(error.errno)}{where}"
        if isinstance(error, RuntimeError) and os.strerror(errno.ENOSPC) in str(error):  # torch, of shared memory
            return "no space left on the disk"
        error = error.__cause__
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest known name, or all of them if none is near.

    >>> nearest("lqs", ["lsq", "pact"])
    "; did you mean 'lsq'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"
