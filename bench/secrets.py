"""What must not be kept or shown: keys, tokens and passwords are taken out of a text before it is logged, recorded or printed.

Known secrets go whatever they look like: the values of variables whose names have KEY, TOKEN, SECRET or PASSWORD in them, the
passwords of netrc and Hugging Face's token file. Unknown ones go by their form. Run ids and digests stay.
"""

from __future__ import annotations

import functools
import json
import logging
import netrc
import os
import re
from pathlib import Path
from urllib.parse import quote

from .disk import replace_file

HIDDEN = "***"

_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 6  # characters of a value that is taken for a secret
_WORD = re.compile(r"[A-Za-z]{1,7}|\d{1,7}|[\d.+-]+")  # false, default, 4096: settings, and no secrets
_LOOKS = re.compile(
    r"""
    wandb_v\d+_[\w-]+                                           # Weights & Biases
    | \blocal-[0-9a-f]{40}(?![0-9a-f])
    | \b(?:hf_|api_org_)[A-Za-z0-9]{16,}                        # Hugging Face
    | \b(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b                   # Amazon
    | \bAIza[\w-]{30,} | \bya29\.[\w-]+ | \bGOCSPX-[\w-]+       # Google
    | \bgh[pousr]_[A-Za-z0-9]{16,} | \bgithub_pat_\w{16,}       # GitHub
    | \bgl[a-z]{2,5}-[\w-]{16,}                                 # GitLab
    | \bxox[a-z]-[\w-]{8,} | \bxapp-[\w-]{8,}                   # Slack
    | \bsk-[\w-]{16,} | \b[rs]k_(?:live|test)_\w{8,}            # OpenAI, Anthropic, Stripe
    | \bpypi-[\w-]{16,} | \bnpm_[A-Za-z0-9]{16,} | \bdo[opr]_v1_[0-9a-f]{16,} | \bdapi[0-9a-f]{32}
    | \beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*                         # a JSON web token
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|$)
    """,
    re.VERBOSE | re.DOTALL,
)
_ASSIGNED = re.compile(
    r"""((?:(?:api[_-]?key|access[_-]?key|private[_-]?key|secret|token|passw(?:or)?d)[\w.-]*["']?\s*[=:]\s*["']?)
    |(?:\b(?:Bearer|Basic)\s+)|(?:://[^\s/:@]*:(?=[^\s/@]+@)))
    (?![\d.+-]{1,10}(?:[\s"',;&]|$))(?=[^\s"',;&]{16}|[^\s"',;&]*\d|[^\s/@]+@)[^\s"',;&@]{6,}""",
    re.VERBOSE | re.IGNORECASE,
)
_HEX = re.compile(r"(?<![0-9A-Za-z])[0-9a-fA-F]{40}(?![0-9A-Za-z])")
_ABOUT_KEYS = re.compile(
    r"(?<![a-z])(?:api)?[_ -]?(?:keys?|tokens?|secrets?|passw(?:or)?ds?|wandb|w&b|login|credentials?|auth\w*)(?![a-z])",
    re.IGNORECASE,
)
_NEAR = 300  # characters


def scrub(text: str) -> str:
    """The text with every secret replaced by ``***``.

    >>> scrub("no such token: hf_abcdefghijklmnopqrstuvwxyz")
    'no such token: ***'
    """
    known = _known()
    if known:
        text = re.sub("|".join(map(re.escape, known)), HIDDEN, text)
    text = _LOOKS.sub(HIDDEN, text)
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    return _HEX.sub(_unless_digest, text)


class Scrubbed(logging.Formatter):
    """Formats a line of a log without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, its traceback too."""
        return scrub(super().format(record))


def scrub_file(path: Path) -> None:
    """Take the secrets out of a file of text, if it has any; what others print goes there unseen, e.g. a C library."""
    try:
        before = path.read_bytes().decode("utf-8", "surrogateescape")
        after = scrub(before)
        if after != before:
            replace_file(path, after.encode("utf-8", "surrogateescape"))
    except OSError:  # gone, or a full disk
        return


def _unless_digest(match: re.Match[str]) -> str:
    """A W&B key of the first form looks like the id of a commit; it is a key where the line speaks of keys."""
    text = match.string
    before = text[max(0, match.start() - _NEAR) : match.start()].rpartition("\n")[2]
    after = text[match.end() : match.end() + _NEAR].partition("\n")[0]
    return HIDDEN if _ABOUT_KEYS.search(before) or _ABOUT_KEYS.search(after) else match[0]


def _known() -> list[str]:
    """The secrets of this process's user, in each way in which a message may write them; the longest first."""
    found = {value for name, value in os.environ.items() if _NAME.search(name) and _is_secret(value)}
    home = Path(os.path.expanduser("~"))
    hugging_face = Path(os.environ.get("HF_HOME") or home / ".cache" / "huggingface")
    found |= _of_netrc(*_state(Path(os.environ.get("NETRC") or home / ".netrc")))
    found |= _of_file(*_state(Path(os.environ.get("HF_TOKEN_PATH") or hugging_face / "token")))
    written = {
        w for v in found for w in (v, " ".join(v.split()), repr(v)[1:-1], json.dumps(v)[1:-1], quote(v, safe=""))
    }
    return sorted(written, key=len, reverse=True)


def _is_secret(value: str) -> bool:
    if len(value) < _SHORTEST or _WORD.fullmatch(value):
        return False
    return not (os.path.isabs(value) and os.path.exists(value))  # SSH_KEY=/home/me/.ssh/id: where it lies is no secret


def _state(path: Path) -> tuple[str, int, int]:
    """The file, and what changes when it is written; a size of -1 if it is not there."""
    try:
        state = path.stat()
    except OSError:
        return str(path), 0, -1
    return str(path), state.st_mtime_ns, state.st_size


_LARGEST = 2**20  # bytes of a file of passwords


@functools.lru_cache(maxsize=8)
def _of_netrc(path: str, _written: int, size: int) -> frozenset[str]:
    if not 0 < size <= _LARGEST:
        return frozenset()
    try:
        hosts = netrc.netrc(path).hosts.values()
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return frozenset()
    return frozenset(password for _, _, password in hosts if password and _is_secret(password))


@functools.lru_cache(maxsize=8)
def _of_file(path: str, _written: int, size: int) -> frozenset[str]:
    if not 0 < size <= _LARGEST:
        return frozenset()
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return frozenset()
    return frozenset([token] if _is_secret(token) else [])
