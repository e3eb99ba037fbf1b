from __future__ import annotations

from qatbench.bench.testing import MethodContract


class TestLSQ(MethodContract):
    method = "lsq"
