"""RTMDet, size s, on COCO, 300 epochs on 8 GPUs × 32 images, mixed precision; a config on top names the backbone.

It differs from mmdet's rtmdet_s by mixed precision, backbone, preprocessing, neck and the batch size of auto_scale_lr
(256, as trained; mmdet's says 16).
"""

_base_ = "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py"
custom_imports = dict(imports=["prunet_zoo"], allow_failed_imports=False)
checkpoint = None  # mmdet's name for CSPNeXt's weights

model = dict(
    # mmdet's own is for CSPNeXt, trained on BGR
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        out_indices=(2, 3, 4),  # strides 8, 16, 32; neck.in_channels follows
        frozen_stages=-1,
        norm_cfg=dict(type="SyncBN"),
        norm_eval=False,
    ),
    # The PAFPN's inner widths are its in_channels: behind ResNet-50 it would take 49 GMACs at 640 px, behind
    # EfficientNet-B0 1.2. From 192 channels it takes 4.9, as in size s (4.3), behind every backbone.
    neck=[
        dict(
            type="ChannelMapper",
            in_channels=[512, 1024, 2048],
            out_channels=192,
            kernel_size=1,
            norm_cfg=dict(type="SyncBN"),
            act_cfg=dict(type="SiLU", inplace=True),
        ),
        dict(
            type="CSPNeXtPAFPN",
            in_channels=[192, 192, 192],
            out_channels=128,
            num_csp_blocks=1,
            expand_ratio=0.5,
            norm_cfg=dict(type="SyncBN"),
            act_cfg=dict(type="SiLU", inplace=True),
        ),
    ],
)
optim_wrapper = dict(type="AmpOptimWrapper")
auto_scale_lr = dict(enable=False, base_batch_size=256)
