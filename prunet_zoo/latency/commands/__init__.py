"""The commands of tools/latency.py, a file each: ``add(commands)`` makes the parser,
``run(args)`` returns what to print.

Their modules import torch and the backends late, so that ``--help`` is quick.
"""
