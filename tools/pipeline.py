"""Latency table → search → classifier → detectors → measurement → pictures, as one job with one report.

    python tools/pipeline.py CONFIG [--work-dir D] [--target-ms T] [--seed N] [--rerun STAGE ...]
                             [--cfg-options KEY=VALUE ...]

CONFIG names the stages' configs (configs/pipeline/). D ends with report.html and report.json. The same command goes on
where the job was stopped, and skips each stage whose result stands; where a config, weights or an option have changed,
the stages that depend on them run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from prunet_zoo.mm.cli import ConfigOptions, load_config, run_tool
from prunet_zoo.mm.pipeline import Pipeline
from prunet_zoo.mm.pipeline_config import PipelineConfig
from prunet_zoo.mm.pipeline_report import show, write_report

ROOT = Path(__file__).resolve().parent.parent


def make_parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", metavar="CONFIG", help="config file (configs/pipeline/...)")
    parser.add_argument("--work-dir", type=Path, metavar="D", help="default work_dirs/<config name>")
    budget = "latency budget; default: the config's, else a third of the way from the fastest to the slowest network"
    parser.add_argument("--target-ms", type=float, metavar="T", help=budget)
    parser.add_argument("--seed", type=int, metavar="N", help="of every stage; default: the config's, else 0")
    rerun = "run these stages, and all that depend on them, anew; an earlier such call that was stopped goes on"
    parser.add_argument("--rerun", nargs="+", default=[], metavar="STAGE", help=rerun)
    options = "change values of the pipeline's config: search.cfg_options.train_cfg.max_epochs=4"
    parser.add_argument("--cfg-options", nargs="+", action=ConfigOptions, metavar="KEY=VALUE", help=options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are to be run, write and print the report."""
    args = make_parser().parse_args(argv)
    work_dir = args.work_dir or Path("work_dirs") / Path(args.config).stem
    cfg = load_config(args.config, args.cfg_options)
    pipeline = Pipeline(PipelineConfig(cfg, work_dir.resolve(), ROOT, Path.cwd(), args.target_ms, args.seed))
    pipeline.forget(args.rerun)
    pipeline.run()
    show(write_report(pipeline), pipeline.dir, pipeline.console)
    return 0


if __name__ == "__main__":
    run_tool(main)
