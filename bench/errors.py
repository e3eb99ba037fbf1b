"""What can go wrong, as one clear line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The request was wrong. The message is one line that says what is wrong and how to mend it; exit status 2."""


class RunFailed(Exception):
    """A run cannot go on. It is recorded as ``failed`` with this message as its reason, and the sweep continues."""


class Diverged(RunFailed):
    """Training has made a number that is not finite, or a step of 0. Who catches it knows which learning rate was too large."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest known name, or all of them if none is near.

    >>> nearest("lqs", ["lsq", "pact"])
    "; did you mean 'lsq'?"
    """
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"
