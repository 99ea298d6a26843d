"""Digit scenes: a small, real detection task in COCO format that any machine can make for itself.

One to five of scikit-learn's digits (real scans) stand at random places, sizes and colours on crops of scikit-learn's
two photographs. Train and val use different scans (`split_indices`) and different regions of the photographs. Digits to
train on are turned by up to 12°: an augmentation that keeps boxes tight, which turning finished images would not.

    $ python -m prunet_zoo.data.scenes --out data/digit_scenes

makes ``images/{train,val}/*.jpg`` and ``annotations/instances_{train,val}.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prunet_zoo.data.digits_split import load_scans, split_indices
from prunet_zoo.errors import DataError, PrunetError
from prunet_zoo.files import WriteError, write_json

DEFAULT_ROOT = "data/digit_scenes"  # below the current directory, as the configs have it
CLASSES = tuple(str(digit) for digit in range(10))
MARKER = "scenes.json"
_EDGE = 0.45  # grey (of 1) where an enlarged stroke ends
_VERSION = 1  # part of the parameters: grows when the same seed draws other scenes


@dataclass(frozen=True)
class SceneParams:
    """What the scenes are made of; its hash says whether a folder holds these scenes.

    ``size``: side of a scene in px. ``min_side`` to ``max_side``: the longer side of a digit's ink in px.
    """

    train: int = 3000
    val: int = 400
    seed: int = 0
    size: int = 128
    min_side: int = 20
    max_side: int = 50
    max_digits: int = 5
    version: int = _VERSION

    def __post_init__(self) -> None:
        if self.train < 1 or self.val < 1:
            raise DataError(f"train and val must be at least 1 scene each, got {self.train} and {self.val}")

    @property
    def hash(self) -> str:
        """12 hex digits of all parameters."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Scene:
    """``image`` (size, size, 3) uint8 RGB; ``boxes`` (N, 4) as x, y, width, height in px; labels and scans (N,);
    ``masks`` (N, size, size): where a digit's ink is seen, tight in its box."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.int64]
    labels: NDArray[np.int64]
    scans: NDArray[np.int64]
    masks: NDArray[np.bool_]


def write_scenes(root: str | Path, train: int = 3000, val: int = 400, seed: int = 0) -> Path:
    """Write the scenes below ``root``, whole or not at all; if they are there already nothing is done.

    Args:
        root: the folder to make.
        train, val: number of scenes of each part.
        seed: another seed gives other scenes (of the same scans and photographs).

    Returns:
        ``root``.

    Raises:
        DataError: ``root`` holds something else: other parameters, or files that are no scenes.
        WriteError: the disk is full or not writable; nothing is left behind.
    """
    return _ensure(Path(root), SceneParams(train=train, val=val, seed=seed))


def ensure_scenes(root: str | Path = DEFAULT_ROOT) -> Path:
    """Return ``root``, made with the default parameters when missing; complete scenes of any parameters will do.

    Raises:
        DataError, WriteError: as `write_scenes`.
    """
    root = Path(root)
    return root if _read_marker(root) is not None else _ensure(root, SceneParams())


def _read_marker(root: Path) -> dict[str, Any] | None:
    """What a complete folder of scenes says of itself; None when there is no such folder."""
    try:
        return dict(json.loads((root / MARKER).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{root / MARKER} cannot be read ({error}); remove {root} and run again") from None


def _ensure(root: Path, params: SceneParams) -> Path:
    marker = _read_marker(root)
    if marker is not None:
        if marker.get("hash") != params.hash:
            raise DataError(
                f"{root} holds other scenes: made with {marker.get('params')}, asked for {asdict(params)}; "
                "remove it or choose another folder"
            )
        return root
    if root.exists() and any(root.iterdir()):
        raise DataError(f"{root} is not empty and holds no {MARKER}: not scenes; remove it or choose another folder")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    except OSError as error:
        raise WriteError(f"cannot write below {root.parent}: {error.strerror or error}") from error
    try:
        for part, count in (("train", params.train), ("val", params.val)):
            _write_part(building, part, count, params)
        write_json(building / MARKER, {"hash": params.hash, "params": asdict(params)})
        building.chmod(0o755)  # mkdtemp makes it private
        if root.exists():
            root.rmdir()  # empty, as seen above: a rename onto a folder is not everywhere allowed
        building.replace(root)
    except OSError as error:
        if _read_marker(root) is not None:  # another process was faster and has written the same
            return _ensure(root, params)
        raise WriteError(
            f"cannot write the scenes to {root}: {error.strerror or error}. Nothing was left behind; "
            "free some space (about 20 MB) or choose another folder"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return root


def _write_part(root: Path, part: str, count: int, params: SceneParams) -> None:
    """Write images and annotations of ``part``."""
    (root / "images" / part).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        scene = make_scene(part, number, params)
        name = f"{number:05d}.jpg"
        buffer = io.BytesIO()
        Image.fromarray(scene.image).save(buffer, "JPEG", quality=92)
        (root / "images" / part / name).write_bytes(buffer.getvalue())
        images.append({"id": number, "file_name": name, "width": params.size, "height": params.size})
        found = (scene.boxes.tolist(), scene.labels.tolist(), scene.scans.tolist(), scene.masks)
        for box, label, scan, mask in zip(*found, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools takes an id of 0 for "no match"
                    "image_id": number,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "segmentation": {"size": list(mask.shape), "counts": _run_lengths(mask)},
                    "iscrowd": 0,
                    "scan": scan,
                }
            )
    write_json(
        root / "annotations" / f"instances_{part}.json",
        {
            "info": {"description": f"digit scenes, {part}", **asdict(params)},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name, "supercategory": "digit"} for i, name in enumerate(CLASSES)],
        },
    )


def make_scene(part: str, number: int, params: SceneParams) -> Scene:
    """Draw scene ``number`` of ``part`` ('train' or 'val'); it depends on nothing but these and ``params``."""
    # RandomState, not Generator: its stream does not change with numpy's releases
    rng = np.random.RandomState([params.seed, {"train": 0, "val": 1}[part], number])
    scans, labels = load_scans()
    pool = split_indices()[0 if part == "train" else 1]
    canvas = _background(part, params.size, rng)
    owner = np.full((params.size, params.size), -1)  # which digit's ink is visible at each pixel
    taken: list[tuple[int, int, int, int]] = []
    chosen: list[int] = []
    for _ in range(rng.randint(1, params.max_digits + 1)):
        scan = int(pool[rng.randint(len(pool))])
        side, tilt = rng.randint(params.min_side, params.max_side + 1), rng.uniform(-12, 12)
        alpha = _enlarge(scans[scan], side, tilt if part == "train" else 0.0)
        place = _find_place(alpha.shape, taken, params.size, rng)
        if place is None:  # no room left
            continue
        x, y = place
        h, w = alpha.shape
        region = (slice(y, y + h), slice(x, x + w))
        canvas[region] = _ink(canvas[region], alpha, rng)
        owner[region][alpha > 0.5] = len(chosen)
        taken.append((x, y, w, h))
        chosen.append(scan)
    kept = [(k, _tight_box(owner == k)) for k in range(len(chosen)) if (owner == k).any()]
    ids = np.array([chosen[k] for k, _ in kept], dtype=np.int64)
    boxes = np.array([box for _, box in kept], dtype=np.int64)
    masks = np.stack([owner == k for k, _ in kept])
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), boxes, labels[ids], ids, masks)


@cache
def _photographs() -> tuple[NDArray[np.uint8], ...]:
    """Scikit-learn's sample images, (427, 640, 3) RGB each."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise DataError("digit scenes need scikit-learn: pip install scikit-learn") from error
    return tuple(np.asarray(image, dtype=np.uint8) for image in load_sample_images().images)


def region_of(part: str, width: int) -> tuple[int, int]:
    """First and last column (excluded) of a photograph that is ``width`` px wide, for 'train' (left 70%) or 'val'."""
    border = width * 7 // 10
    return (0, border) if part == "train" else (border, width)


def _background(part: str, size: int, rng: np.random.RandomState) -> NDArray[np.float64]:
    """A crop of 80 to 180 px out of the part's region, scaled to ``size``, perhaps mirrored, in changed brightness."""
    photographs = _photographs()
    photo = photographs[rng.randint(len(photographs))]
    low, high = region_of(part, photo.shape[1])
    side = rng.randint(80, min(181, high - low + 1))
    x, y = rng.randint(low, high - side + 1), rng.randint(photo.shape[0] - side + 1)
    crop = Image.fromarray(photo[y : y + side, x : x + side]).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop, dtype=np.float64)
    if rng.rand() < 0.5:
        pixels = pixels[:, ::-1]
    return np.array((pixels - 128) * rng.uniform(0.6, 1.0) + 128 + rng.uniform(-30, 30))


def _enlarge(scan: NDArray[np.uint8], side: int, tilt: float) -> NDArray[np.float64]:
    """Scan (8, 8) from 0 to 16, turned by ``tilt`` degrees → coverage (H, W) from 0 to 1, longer side ``side`` px."""
    # enlarged to 64 px first, so that turning loses nothing; 16 px of margin, so that no corner is cut off
    grey = Image.fromarray(scan.astype(np.float32) / 16).resize((64, 64), Image.Resampling.BICUBIC)
    padded = Image.new("F", (96, 96))
    padded.paste(grey, (16, 16))
    turned = padded.rotate(tilt, Image.Resampling.BILINEAR) if tilt else padded
    x, y, w, h = _tight_box(np.asarray(turned) > _EDGE)
    scale = side / max(w, h)
    size = max(2, round(w * scale)), max(2, round(h * scale))
    small = turned.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    # steeper than the scan's own blur, so that the enlarged stroke has an edge; coverage is one half at _EDGE
    coverage = np.clip((np.asarray(small, dtype=np.float64) - _EDGE) / 0.4 + 0.5, 0.0, 1.0)
    x, y, w, h = _tight_box(coverage > 0.5)
    return coverage[y : y + h, x : x + w]


def _find_place(
    shape: tuple[int, ...], taken: list[tuple[int, int, int, int]], size: int, rng: np.random.RandomState
) -> tuple[int, int] | None:
    """A corner (x, y) where a digit of ``shape`` (H, W) covers at most 5% of another, or None after 40 draws."""
    h, w = shape
    if h > size or w > size:
        return None
    for _ in range(40):
        x, y = rng.randint(size - w + 1), rng.randint(size - h + 1)
        if all(_overlap((x, y, w, h), other) <= 0.05 for other in taken):
            return x, y
    return None


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection of two boxes (x, y, w, h) as a share of the smaller one."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height) / min(a[2] * a[3], b[2] * b[3])


def _ink(region: NDArray[np.float64], alpha: NDArray[np.float64], rng: np.random.RandomState) -> NDArray[np.float64]:
    """Blend a random colour, at least 70 grey levels from the region's mean, over ``region`` (H, W, 3)."""
    mean = region.mean((0, 1))
    while True:
        colour = rng.uniform(0, 255, 3)
        if abs((colour - mean) @ (0.299, 0.587, 0.114)) >= 70:
            break
    opacity = rng.uniform(0.75, 1.0) * alpha[..., None]
    return region * (1 - opacity) + colour * opacity


def _tight_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Smallest box (x, y, w, h) in px around the true pixels of ``mask`` (H, W)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's run-length encoding of ``mask`` (H, W): lengths of runs down the columns, the first of false pixels."""
    flat = mask.flatten(order="F")
    ends = [*(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), len(flat)]
    return [0] * bool(flat[0]) + np.diff([0, *ends]).tolist()


def main(argv: list[str] | None = None) -> int:
    """Command line: make the scenes; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m prunet_zoo.data.scenes", description="Make the digit scenes.")
    parser.add_argument("--out", default=DEFAULT_ROOT, help="folder to make (default: %(default)s)")
    parser.add_argument("--train", type=int, default=SceneParams.train, help="scenes to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=SceneParams.val, help="scenes to validate on (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        root = write_scenes(args.out, args.train, args.val, args.seed)
    except PrunetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.train} train and {args.val} val scenes are in {root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
