"""A small model of linears and convolutions that needs torch alone, for engines that adapt any module."""

import torch
from torch import nn


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 16, 3, padding=1)
        self.conv_down = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.mix = nn.Linear(24, 40)
        self.out = nn.Linear(40, 8, bias=False)

    def forward(self, x):
        x = torch.tanh(self.conv_down(torch.tanh(self.conv_in(x))))
        return self.out(torch.tanh(self.mix(x.flatten(2).mT)))


def made():
    """(model, input)."""
    torch.manual_seed(0)
    return Toy().eval(), torch.randn(2, 3, 8, 8)
