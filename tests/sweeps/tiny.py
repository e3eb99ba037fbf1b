"""A plugin for the tests of the launcher: a data set that trains in a moment, and methods that misbehave."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time

import torch
from qatbench.bench.data import DataSet, Domain
from qatbench.bench.method import Method


class Tiny(DataSet):
    """Dark squares and bright ones."""

    name = "tiny"
    domains = ("squares",)
    classes = ("dark", "bright")
    image = (1, 8, 8)

    def fingerprint(self):
        return "1"

    def load(self):
        noise = torch.randint(0, 100, (120, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        labels = torch.arange(120) % 2
        return [Domain("squares", (noise + 120 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)]


class _Float(Method):
    changes_net = False
    bits = (32,)


class Boom(_Float):
    """Raises."""

    name = "boom"

    def start(self, run, stage):
        raise ValueError("boom [1]")


class Killed(_Float):
    """Dies as the kernel kills a process that takes too much memory."""

    name = "killed"

    def start(self, run, stage):
        os.kill(os.getpid(), signal.SIGKILL)


class Crashes(_Float):
    """Dies as a process whose C code writes where it must not."""

    name = "crashes"

    def start(self, run, stage):
        os.kill(os.getpid(), signal.SIGSEGV)


class Full(_Float):
    """Meets a full disk."""

    name = "full"

    def start(self, run, stage):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "/somewhere/file")


class Noisy(_Float):
    """Prints, from Python and from a program that it starts."""

    name = "noisy"

    def start(self, run, stage):
        print("said in Python")
        print("said on stderr", file=sys.stderr)
        os.system("echo said by a program")


class Slow(_Float):
    """Takes a second an epoch at least."""

    name = "slow"

    def epoch_start(self, run):
        print("an epoch begins", flush=True)
        time.sleep(1)


class Slower(Slow):
    """Another one."""

    name = "slower"
