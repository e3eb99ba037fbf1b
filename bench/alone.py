"""One process trains alone, whatever the variables of a cluster say of others.

Lightning and torchmetrics look for SLURM, LSF, torchrun, kubeflow and MPI, and then wait for processes that nobody started, or
refuse to train. Lightning also takes settings of its trainer from variables ``PL_TRAINER_...``, which would move a number unseen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_READ = re.compile(
    r"RANK|LOCAL_RANK|NODE_RANK|GROUP_RANK|ROLE_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|SLURM_PROCID|JSM_NAMESPACE_RANK|"
    r"STANDALONE_PORT|PL_.+"
)


def environment() -> dict[str, str]:
    """The variables of this process without those that speak of other processes, or set Lightning up."""
    return {name: value for name, value in os.environ.items() if not _READ.fullmatch(name)}


def leave_cluster() -> None:
    """Take these variables from this process. To be called before Lightning is imported: it reads ranks then."""
    for name in os.environ.keys() - environment().keys():
        del os.environ[name]


@contextmanager
def unseen() -> Iterator[None]:
    """Hide these variables meanwhile: for a process that is not ours alone."""
    before = dict(os.environ)
    leave_cluster()
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if name not in os.environ})
