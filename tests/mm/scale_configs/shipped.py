"""The shipped detector of digit scenes, whose weights come along, on the scenes of these tests."""

_base_ = ["../../../configs/detection/retinanet_prunet-cpu-small_fpn_digit-scenes.py"]
data_root = "{{$SCENES:data/digit_scenes}}/"
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(batch_size=2, dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + "annotations/instances_val.json")
test_evaluator = val_evaluator
