"""Small residual networks for small images, in the CIFAR style of He et al. (2016)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..site import Joint


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ``[B, I, H, W]`` to ``[B, O, H / stride, W / stride]``, rounded up.

    Where the shape changes, the shortcut is a 1x1 convolution with a norm (option B of the paper's sec. 3.3). On CIFAR
    the authors pad with zeros instead (option A); here both branches of every joint then hold a signal, come out of a
    layer and a norm, and so can be quantized, balanced and normalised per domain like any other. It costs 2,752
    parameters at width 16.

    ReLUs are not in place: methods look at what norms and joints return, and may put modules there whose backward
    pass needs their output.
    """

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.joint = Joint("add")
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The residual branch is the joint's first, the shortcut its second."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(self.joint(out, self.downsample(x)))


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers in three stages of n blocks; He et al., "Deep Residual Learning", CVPR 2016, sec. 4.2.

    Images ``[B, channels, H, W]`` to logits ``[B, classes]``; the stages work at H, H / 2 and H / 4, so any size from
    4x4 up will do. Convolutions start from He's normal initialisation (fan out), the head from PyTorch's default.

    Args:
        channels: of the input images.
        classes: number of logits.
    """

    name: ClassVar[str]
    blocks: ClassVar[int]  # n: blocks in each stage
    width: ClassVar[int] = 16  # channels of the first stage; doubled in each further one

    def __init__(self, channels: int, classes: int):
        super().__init__()
        width = self.width
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(width, width, stride=1)
        self.layer2 = self._stage(width, 2 * width, stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, channels: int, out: int, stride: int) -> nn.Sequential:
        rest = [BasicBlock(out, out) for _ in range(self.blocks - 1)]
        return nn.Sequential(BasicBlock(channels, out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, channels, H, W]`` to logits ``[B, classes]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.head(torch.flatten(self.avgpool(x), 1))


class ResNet8(CifarResNet):
    """One block a stage, 78,042 parameters (3 channels, 10 classes): the network of the quickstart."""

    name = "resnet8"
    blocks = 1


class ResNet20(CifarResNet):
    """Three blocks a stage, 272,474 parameters (3 channels, 10 classes); the paper says 0.27M."""

    name = "resnet20"
    blocks = 3


class ResNet56(CifarResNet):
    """Nine blocks a stage, 855,770 parameters (3 channels, 10 classes); the paper says 0.85M."""

    name = "resnet56"
    blocks = 9
