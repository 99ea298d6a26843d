"""Sample images to try a network on, made from the built-in data, none of which was trained on.

    $ python -m prunet_zoo.data.samples --out data/samples

writes ``digits/<class>/<scan>.png`` (scans of the test split, 32 px) and ``scenes/<number>.png`` (digit scenes of the
validation part, 128 px).
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

from prunet_zoo.data.digits import DigitsData
from prunet_zoo.data.scenes import SceneParams, make_scene
from prunet_zoo.errors import DataError, PrunetError
from prunet_zoo.files import write_atomic

DEFAULT_ROOT = "data/samples"  # below the current directory


def write_samples(root: str | Path = DEFAULT_ROOT, digits: int = 12, scenes: int = 6) -> list[Path]:
    """Write the first ``digits`` test scans and the first ``scenes`` validation scenes; same files are replaced.

    Args:
        root: the folder to write to.
        digits: number of scans, at most 359.
        scenes: number of scenes.

    Returns:
        Paths of the images.

    Raises:
        DataError: a number below 0, or more scans than there are. WriteError: the disk is full or not writable.
    """
    data = DigitsData("test")
    if not 0 <= digits <= len(data) or scenes < 0:
        raise DataError(f"there are 0 to {len(data)} digits, and scenes from 0 on; got {digits} and {scenes}")
    paths = []
    for index in range(digits):
        image, label = data[index]
        paths.append(Path(root) / "digits" / str(label) / f"{data.scans[index]:04d}.png")
        _write(paths[-1], image)
    for number in range(scenes):
        paths.append(Path(root) / "scenes" / f"{number:05d}.png")
        _write(paths[-1], Image.fromarray(make_scene("val", number, SceneParams()).image))
    return paths


def _write(path: Path, image: Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())


def main(argv: list[str] | None = None) -> int:
    """Command line: write the samples; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m prunet_zoo.data.samples", description="Make sample images.")
    parser.add_argument("--out", default=DEFAULT_ROOT, help="folder to write to (default: %(default)s)")
    parser.add_argument("--digits", type=int, default=12, help="number of digit scans, up to 359 (%(default)s)")
    parser.add_argument("--scenes", type=int, default=6, help="number of digit scenes (%(default)s)")
    args = parser.parse_args(argv)
    try:
        paths = write_samples(args.out, args.digits, args.scenes)
    except PrunetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(paths)} images are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
