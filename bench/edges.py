"""The bits of the first and the last layer: the one home of the words ``8bit``, ``fp``, ``same`` and ``native``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from .errors import nearest
from .spec import FLOAT_BITS, Bits, Budget, FirstLast

if TYPE_CHECKING:
    from .site import Site

Edge = Literal["8bit", "fp", "same"]
Edges = tuple[Edge, Edge]
WORDS: tuple[str, ...] = get_args(Edge)


def pair(policy: Any) -> Edges:
    """A policy for the first and for the last layer, from one word for both or from two.

    >>> pair("fp"), pair(("same", "fp"))
    (('fp', 'fp'), ('same', 'fp'))

    Raises:
        ValueError: A word is unknown; the nearest known one is named.
    """
    words = (policy, policy) if isinstance(policy, str) else policy
    if not isinstance(words, list | tuple) or len(words) != 2:
        raise ValueError(f"first_last={policy!r} is neither a word nor two; known: {', '.join(WORDS)}")
    for word in words:
        if word not in WORDS:
            raise ValueError(f"first_last={word!r} is unknown{nearest(str(word), WORDS)}")
    first, last = words
    return cast(Edge, first), cast(Edge, last)


def edges_of_run(asked: FirstLast, own: Edge | Edges) -> Edges:
    """The policy of a run: what it asks for, or the method's own where it asks for ``native``.

    Args:
        asked: The run's ``first_last``.
        own: `Method.first_last` of the outermost method.

    Raises:
        ValueError: A word is unknown; the nearest known one is named.
    """
    return pair(own if asked == "native" else asked)


def edge_words(sites: Sequence[Site], edges: Edges) -> dict[str, Edge]:
    """First and last layer -> policy; a layer that is both has that of the last.

    Args:
        sites: The network's sites, in order of execution.
        edges: For the first and for the last layer.
    """
    names = [site.name for site in sites if site.kind == "layer" and site.edge]
    return dict(zip((names[0], names[-1]), edges, strict=True)) if names else {}


def edge_bits(policy: str, bits: Bits | Budget) -> Bits:
    """Bits of a first or a last layer under a policy (``8bit``, ``fp``, ``same``).

    What is float in the other layers is float there, too: w2a32 leaves every input in float.

    Raises:
        ValueError: The word is unknown, or it is ``same`` under a budget, where the layer has no bits of its own.
    """
    word = pair(policy)[0]
    if word != "same":
        width = 8 if word == "8bit" else FLOAT_BITS
        return Bits(*(width if b < FLOAT_BITS else FLOAT_BITS for b in bits))
    if isinstance(bits, Budget):
        raise ValueError(
            "under first_last=same the first and the last layer share the budget; they have no bits of their own"
        )
    return bits
