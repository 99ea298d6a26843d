"""The only place (with registry.py) that knows MMEngine, mmcv and mmdet. Importing it registers everything.

Neither mmcv nor mmdet is imported here, so it costs little and works without them.
"""
