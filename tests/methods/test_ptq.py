from __future__ import annotations

from qatbench.bench.testing import MethodContract


class TestPTQ(MethodContract):
    method = "ptq"
