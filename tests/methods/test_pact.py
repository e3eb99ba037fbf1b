from __future__ import annotations

from qatbench.bench.testing import MethodContract


class TestPACT(MethodContract):
    method = "pact"
