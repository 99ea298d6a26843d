"""The super-network of a search space: Prunodes, stochastic layers, and what derives a network from them."""

from prunet_zoo.supernet.prunode import PrunodeBlock
from prunet_zoo.supernet.recalibrate import recalibrate_batchnorm
from prunet_zoo.supernet.stochastic import StochasticLayer, drop_parameters
from prunet_zoo.supernet.supernet import SuperNet
from prunet_zoo.supernet.window import WidthWindow

__all__ = ["PrunodeBlock", "StochasticLayer", "SuperNet", "WidthWindow", "drop_parameters", "recalibrate_batchnorm"]
