"""Long tails: how many images of each class are kept, and which classes are seen often, less often and seldom."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import UserError, nearest

RULES = ("ldam", "climbq")
_MANY, _FEW = 100, 20


def tail_counts(available: Sequence[int], imbalance: float, rule: str) -> list[int]:
    """How many images of each class are kept, so that the classes become exponentially rarer.

    Classes are ranked by what is available, largest first, equals in class order. With ``n`` images in the largest of ``C``
    classes and an imbalance ``g``, the class of rank ``i`` keeps, if it has as many,

    - ``ldam``: ``floor(n * g ** (-i / (C - 1)))`` (Cao et al. 2019, arXiv 1906.07413). Every class is kept.
    - ``climbq``: ``floor(k * g ** (-1 / (C - 1)))`` of the ``k`` that the class before it keeps, as the public script of ClimbQ
      (Chen et al., NeurIPS 2022) does. Rounding down again and again makes the tail thinner than ``g`` says, and with many
      classes empties it: a count of 0 is a class that is dropped. ``ldam`` keeps it.

    >>> tail_counts([1000] * 5, 50, "ldam")
    [1000, 376, 141, 53, 20]
    >>> tail_counts([1000] * 5, 50, "climbq")
    [1000, 376, 141, 53, 19]

    Args:
        available: Training images of each class.
        imbalance: The largest class over the smallest, at least 1.
        rule: One of `RULES`.

    Returns:
        Images to keep of each class, in the order of ``available``; never more than there are.

    Raises:
        UserError: The imbalance is below 1, or so large that ``ldam`` would empty a class; or there is no such rule.
    """
    if rule not in RULES:
        raise UserError(f"no list rule {rule!r}{nearest(rule, RULES)}")
    if not imbalance >= 1:  # so written, this refuses NaN, too
        raise UserError(f"imbalance={imbalance:g} is below 1; it is the largest class over the smallest: 1 is balanced")
    ranked = sorted(range(len(available)), key=lambda c: -available[c])
    steps, most = max(len(available) - 1, 1), max(available, default=0)
    kept, last = [0] * len(available), most
    for rank, c in enumerate(ranked):
        if rule == "ldam":
            wanted = _floor(most * imbalance ** (-rank / steps))
        else:
            wanted = _floor(last * imbalance ** (-1 / steps)) if rank else most
        kept[c] = last = min(wanted, available[c])
    emptied = [c for c in ranked if available[c] and not kept[c]]
    if emptied and rule == "ldam":
        raise UserError(
            f"imbalance={imbalance:g} leaves {len(emptied)} of {len(available)} classes without a training image; "
            f"the largest class has {most}, so take imbalance={most} or less to keep all"
        )
    return kept


def shots(class_counts: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The classes with many (more than 100), medium (20 to 100) and few (fewer than 20) training images, by number.

    A class without a training image is one of the few.

    >>> shots([500, 100, 20, 19, 0])
    {'many': (0,), 'medium': (1, 2), 'few': (3, 4)}
    """
    groups: dict[str, tuple[int, ...]] = {"many": (), "medium": (), "few": ()}
    for c, n in enumerate(class_counts):
        groups["many" if n > _MANY else "few" if n < _FEW else "medium"] += (c,)
    return groups


def _floor(value: float) -> int:
    """The value rounded down. A whole number that came out a few bits too small is whole: 49 * 49**-1 is 1, not 0.

    So the counts do not depend on the last bit of the platform's power function either.
    """
    return int(value * (1 + 1e-12))
