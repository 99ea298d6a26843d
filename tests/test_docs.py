"""What the documents name exists, and the code in them runs or at least compiles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from prunet_zoo import NetSpec
from prunet_zoo.data.samples import write_samples
from prunet_zoo.models import PruNetClassifier
from prunet_zoo.zoo.predict import ScoredClass

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("checkpoints/*.md")])
IDS = [str(p.relative_to(ROOT)) for p in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http://", "https://")) and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_named_tools_and_configs_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"\b((?:tools|configs|benchmarks)/[\w./-]+\.(?:py|sh|json))\b", text)
    assert not [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_no_line_waits_for_a_result(page: Path) -> None:
    assert not re.findall(r"^(?:[A-Z]{4,}|TODO.*|TBD.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_and_json_are_valid(page: Path) -> None:
    for source in blocks(page, "python"):
        compile(source, str(page), "exec")
    for source in blocks(page, "json"):
        json.loads(source)


def test_the_readmes_library_example_runs() -> None:
    (source,) = [b for b in blocks(ROOT / "README.md", "python") if "spec.params()" in b]
    namespace: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), namespace)
    assert tuple(namespace["logits"].shape) == (1, 10)  # type: ignore[attr-defined]
    printed = re.search(r"# (\d+) (\d+)$", source, re.MULTILINE)
    assert printed is not None
    spec = namespace["spec"]
    assert isinstance(spec, NetSpec)
    assert (int(printed[1]), int(printed[2])) == (spec.params(), spec.macs(224))


def test_the_zoos_example_of_prediction_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = [b for b in blocks(ROOT / "docs" / "zoo.md", "python") if "load_classifier" in b]
    monkeypatch.chdir(tmp_path)
    write_samples()  # as `python -m prunet_zoo.data.samples` does, the page's command for them
    imports, call = source.strip().rsplit("\n", 1)
    namespace: dict[str, object] = {}
    exec(compile(imports, "docs/zoo.md", "exec"), namespace)
    (found,) = eval(call, namespace)
    assert len(found) == 3 and all(isinstance(scored, ScoredClass) for scored in found)
    image = re.search(r"data/samples/digits/(\d)/\d+\.png", call)
    assert image is not None and found[0].name == image[1]


def test_the_example_of_the_checkpoints_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = blocks(ROOT / "checkpoints" / "README.md", "python")
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {}
    exec(compile(source, "checkpoints/README.md", "exec"), namespace)
    model = namespace["model"]
    assert isinstance(model, PruNetClassifier) and model.num_classes == 10


def test_the_documented_spec_is_one() -> None:
    (source,) = blocks(ROOT / "docs" / "README.md", "json")
    spec = NetSpec.from_dict(json.loads(source))
    assert {b.type for stage in spec.stages for b in stage.blocks} == {"conv", "irb", "fused_irb"}
