"""What all searches share, whatever the method. A search config gives model, strategy, data, target and epochs."""

_base_ = ["./default_runtime.py"]

runner_type = "SuperNetRunner"
default_hooks = dict(checkpoint=dict(save_best=None, rule=None, max_keep_ckpts=2))
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(type="Visualizer", vis_backends=vis_backends)
log_processor = dict(window_size=20)
val_cfg = None
val_evaluator = None
test_cfg = None
test_evaluator = None
