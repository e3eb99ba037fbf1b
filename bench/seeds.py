"""Seeds come from an algebra, not from arithmetic: a draw depends on what it names and on nothing else.

The draw of a data split names (data, seed); initial weights name (network, data, protocol, seed); neither names the method,
so methods are paired by seed and can be compared pairwise.
"""

from __future__ import annotations

import hashlib
import json


def seed_for(purpose: str, *parts: str | int) -> int:
    """A 63-bit seed for one purpose, the same on every machine and Python version.

    >>> seed_for("split", "optdigits", 0) == seed_for("split", "optdigits", 0) != seed_for("split", "optdigits", 1)
    True
    """
    text = json.dumps([purpose, *parts])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
