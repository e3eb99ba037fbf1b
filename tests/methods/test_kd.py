from __future__ import annotations

from qatbench.bench.testing import MethodContract


class TestKD(MethodContract):
    method = "kd+lsq"
