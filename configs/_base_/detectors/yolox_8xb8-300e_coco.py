"""YOLOX, size s, on COCO, 300 epochs on 8 GPUs × 8 images, mixed precision; a config on top names the backbone.

It differs from mmdet's yolox_s by mixed precision, backbone, preprocessing (mmdet's: none) and neck.
"""

_base_ = "mmdet::yolox/yolox_s_8xb8-300e_coco.py"
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)

model = dict(
    # mmdet's own leaves images at 0…255 in BGR, for CSPDarknet, which starts from random weights
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        out_indices=(2, 3, 4),  # strides 8, 16, 32; neck.in_channels follows
        frozen_stages=-1,
        norm_cfg=dict(type="BN", momentum=0.03),
        norm_eval=False,
    ),
    # The PAFPN's inner widths are its in_channels: behind ResNet-50 it would take 44 GMACs at 640 px, behind
    # EfficientNet-B0 0.6. From 192 channels it takes 3.2, as in size s (2.9), behind every backbone.
    neck=[
        dict(
            type="ChannelMapper",
            in_channels=[512, 1024, 2048],
            out_channels=192,
            kernel_size=1,
            norm_cfg=dict(type="BN", momentum=0.03, eps=0.001),
            act_cfg=dict(type="Swish"),
        ),
        dict(
            type="YOLOXPAFPN",
            in_channels=[192, 192, 192],
            out_channels=128,
            num_csp_blocks=1,
            use_depthwise=False,
            upsample_cfg=dict(scale_factor=2, mode="nearest"),
            norm_cfg=dict(type="BN", momentum=0.03, eps=0.001),
            act_cfg=dict(type="Swish"),
        ),
    ],
)
optim_wrapper = dict(type="AmpOptimWrapper")
auto_scale_lr = dict(enable=False, base_batch_size=64)
