"""torchvision's ResNet-18 with its joints made visible: how a foreign network becomes one that names its sites."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from ..site import Joint


class JointBlock(BasicBlock):
    """torchvision's block, adding through a `Joint`, which a method can find, in place of a bare ``+=``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.joint = Joint("add")

    def forward(self, x: Tensor) -> Tensor:
        """``[B, I, H, W]`` to ``[B, O, H / stride, W / stride]``; residual branch first, shortcut second."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(self.joint(out, x if self.downsample is None else self.downsample(x)))


class ResNet18(ResNet):
    """ResNet-18 with the ImageNet stem (7x7 convolution, pooling: 1/32 of the size at the end).

    Images ``[B, channels, H, W]`` to logits ``[B, classes]``. State dict and outputs are those of
    ``torchvision.models.resnet18``, so its pretrained weights load; the head is called ``fc`` there.

    Args:
        channels: of the input images; where they are not 3, the first convolution is made anew.
        classes: number of logits.
    """

    name = "resnet18"

    def __init__(self, channels: int, classes: int):
        super().__init__(JointBlock, [2, 2, 2, 2], num_classes=classes)
        if channels != 3:
            self.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # see `BasicBlock` in resnet.py
