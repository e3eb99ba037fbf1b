from __future__ import annotations

from qatbench.bench.testing import MethodContract


class TestFP32(MethodContract):
    method = "fp32"
