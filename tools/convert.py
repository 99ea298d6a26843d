"""Convert a published checkpoint to ours: python tools/convert.py SRC --arch NAME --out OUT [--licence L]"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from prunet_zoo.console import run_plain_tool
from prunet_zoo.errors import CheckpointError

EPILOG = """example:
  python tools/convert.py gpunet_p0_pyt_ckpt_21.12.0_amp.zip --arch prunet_p0 --out prunet_p0.safetensors

Every tensor is consumed and every shape checked; code in a checkpoint is never run. The result carries its spec and
is taken wherever weights are: create_model("prunet_p0.safetensors"), arch=..., --weights ...

The published zip and the .pth.tar in it, under their published names, pass their licence and origin on, and so does a
safetensors file of ours. Any other file is taken for weights of your own: give their --licence and --origin, else the
result has no licence and says which file it was converted from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, convert, print what was written."""
    parser = argparse.ArgumentParser(
        description="Convert a published checkpoint to prunet_zoo's weights (safetensors with their spec inside).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = "the published zip, the .pth.tar in it, a state dict or training checkpoint (torch.save), or safetensors"
    parser.add_argument("source", metavar="SRC", help=kinds)
    parser.add_argument("--arch", required=True, metavar="NAME", help="the network, such as prunet_p0 or gpunet_d1")
    parser.add_argument("--out", required=True, metavar="OUT", help="the file to write, ending in .safetensors")
    parser.add_argument("--licence", help="licence of weights that are not the published ones, such as Apache-2.0")
    parser.add_argument("--origin", help="where such weights are from, in words")
    parser.add_argument("--force", action="store_true", help="overwrite OUT if it exists")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists() and not args.force:
        raise CheckpointError(f"{out} exists already; give another --out, or --force to overwrite it")

    from prunet_zoo.files import sha256_of
    from prunet_zoo.models import load_state
    from prunet_zoo.zoo.convert import convert_checkpoint

    convert_checkpoint(args.source, args.arch, out, licence=args.licence, origin=args.origin)
    state = load_state(out)
    parameters = sum(v.numel() for k, v in state.items() if not k.endswith(("mean", "var", "num_batches_tracked")))
    print(
        f"{out}: {args.arch}, {len(state)} tensors, {parameters:,} parameters, {out.stat().st_size:,} bytes, "
        f"sha256 {sha256_of(out)}"
    )
    return 0


if __name__ == "__main__":
    run_plain_tool(main, stopped="stopped; OUT was not written and nothing else was left behind")
