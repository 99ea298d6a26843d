"""The published recipe of GPUNet-P0 and P1 (train_params in NVIDIA's GPUNet release), for 8 GPUs.

Taken as it is: RMSpropTF, eps 1e-3, weight decay 1e-5, learning rate 0.08 for 8 × 256 images, decay by 0.97 every 2.4
epochs, warm-up from 1e-6, 450 epochs, averaged weights with decay 0.9999, dropout 0.3, stochastic depth 0.2, mixed
precision (give ``--amp``).

That release does not fix the rest, which is ours: momentum 0.9 and alpha 0.9, 3 epochs of warm-up and label smoothing
0.1 (timm's defaults of the time), no weight decay on norms and biases. Its distillation from tf_efficientnet_b2 at 260
px is left out, so expect less than the published 80.3 and 81.1% top-1.
"""

max_epochs = 450
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=1)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="RMSpropTF", lr=0.08, alpha=0.9, momentum=0.9, eps=1e-3, weight_decay=1e-5),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1.25e-5, by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    # every 2.4 epochs, at the first whole epoch, as timm's scheduler does: after epochs 3, 5, 8, 10, 12, ...
    dict(type="MultiStepLR", gamma=0.97, by_epoch=True, milestones=[-(-24 * k // 10) for k in range(1, 188)]),
]
custom_hooks = [dict(type="EMAHook", ema_type="ExponentialMovingAverage", momentum=1e-4, update_buffers=True)]
auto_scale_lr = dict(enable=False, base_batch_size=2048)
