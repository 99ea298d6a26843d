"""What is searched in (the super-network of a space, or a network with masks on its channels), what derives from it."""

from prunet_zoo.supernet.masked import ChannelMask, Group, MaskedNet
from prunet_zoo.supernet.masked_spec import SpecNet
from prunet_zoo.supernet.prunode import PrunodeBlock
from prunet_zoo.supernet.recalibrate import recalibrate_batchnorm
from prunet_zoo.supernet.stochastic import StochasticLayer, drop_parameters
from prunet_zoo.supernet.supernet import SuperNet
from prunet_zoo.supernet.window import WidthWindow

__all__ = [
    "ChannelMask",
    "Group",
    "MaskedNet",
    "PrunodeBlock",
    "SpecNet",
    "StochasticLayer",
    "SuperNet",
    "WidthWindow",
    "drop_parameters",
    "recalibrate_batchnorm",
]
