from __future__ import annotations

from qatbench.bench.testing import MethodContract


class TestDOREFA(MethodContract):
    method = "dorefa"
