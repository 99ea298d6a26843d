"""mmcv's compiled operators on torchvision and torch, with mmcv's signatures, for CPUs and GPUs.

One file an idea. Outputs are tensors that the caller made and that are overwritten, as in ``mmcv._ext``. Half precision
is computed in float32 and rounded once (`precision`).
"""

from prunet_zoo.mm.ops.attention import ms_deform_attn_backward, ms_deform_attn_forward
from prunet_zoo.mm.ops.deform_conv import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from prunet_zoo.mm.ops.focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from prunet_zoo.mm.ops.info import get_compiler_version, get_compiling_cuda_version
from prunet_zoo.mm.ops.masked_conv import masked_col2im_forward, masked_im2col_forward
from prunet_zoo.mm.ops.roi_align import roi_align_backward, roi_align_forward
from prunet_zoo.mm.ops.roi_pool import roi_pool_backward, roi_pool_forward
from prunet_zoo.mm.ops.suppression import nms, nms_match, softnms

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "get_compiler_version",
    "get_compiling_cuda_version",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "nms",
    "nms_match",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
    "softnms",
]
