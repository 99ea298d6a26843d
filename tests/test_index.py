"""The zoo's records agree: index, specs, results.csv, README's table, metafiles in OpenMMLab's schema."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from prunet_zoo import list_models, load_spec
from prunet_zoo.errors import DataError, SpecError, UnknownNameError
from prunet_zoo.zoo import find_model, index, load_index
from prunet_zoo.zoo.predict import read_meta

ROOT = Path(__file__).parents[1]
PUBLISHED = json.loads((ROOT / "tests/zoo/published.json").read_text(encoding="utf-8"))["networks"]
NAMES = {
    "prunet_p0": "GPUNet-P0", "prunet_p1": "GPUNet-P1", "gpunet_0": "GPUNet-0", "gpunet_1": "GPUNet-1",
    "gpunet_2": "GPUNet-2", "gpunet_d1": "GPUNet-D1", "gpunet_d2": "GPUNet-D2",
}  # fmt: skip
COMPUTED = {"parameters": lambda spec: spec.params(), "macs": lambda spec: spec.macs()}


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("make_index")


def test_everything_made_agrees_with_its_records(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--check"]) == 0, f"{capsys.readouterr().out}run python tools/make_index.py"


def test_a_changed_figure_or_table_is_noticed(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    metafiles = [f"configs/{folder}/metafile.yml" for folder in ("classification", "detection")]
    for name in ("README.md", "model-index.yml", "checkpoints/results.csv", *tool.DEMO_PAGES, *metafiles):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    monkeypatch.setattr(tool, "ROOT", tree)
    assert tool.main(["--check"]) == 0
    for name, old in (("README.md", "| 80.3 %"), *((page, "99.72 %") for page in tool.DEMO_PAGES)):
        page = tree / name
        assert page.read_text().count(old) == 1
        page.write_text(page.read_text().replace(old, old.replace("3 %", "4 %").replace("2 %", "1 %")))
        assert tool.main(["--check"]) == 1
        assert tool.main([]) == 0
        assert page.read_text() == (ROOT / name).read_text()
    page.write_text(page.read_text().replace(tool.DEMO_END, ""))
    with pytest.raises(DataError, match=f"{tool.DEMO_PAGES[-1]} lacks the lines"):
        tool.main(["--check"])


@pytest.mark.parametrize("name", ["digits_classifier", "digits_detector"])
def test_the_figures_of_the_committed_files_are_those_in_the_files(name: str, tool: ModuleType) -> None:
    meta = read_meta(ROOT / f"checkpoints/{name}.safetensors")
    own = [row for row in tool.read_results() if row["model"] == name]
    counted = {row["metric"]: int(row["value"]) for row in own if row["source"] == "computed"}
    keys = {"parameters": "params", "macs": "macs"}
    assert counted == {metric: meta[key] for metric, key in keys.items() if key in meta} and "parameters" in counted
    metrics = {key.removeprefix("coco/"): value for key, value in meta["metrics"].items()}
    measured = [row for row in own if row["source"] == "measured"]
    assert measured
    for row in measured:
        value = metrics[row["metric"]] * (100 if row["metric"].startswith("bbox") else 1)
        assert float(row["value"]) == pytest.approx(value, abs=0.005), row["metric"]
        assert (row["device"], row["date"]) == (meta["device"], meta["date"][:10])
        assert row["command"] == " && ".join(meta["command"])
        assert row["reference"].startswith(f"{meta['images']} ")


@pytest.mark.parametrize("name", ["digits_classifier", "digits_detector"])
def test_the_commands_of_computed_figures_print_them(name: str, tool: ModuleType) -> None:
    own = [row for row in tool.read_results() if row["model"] == name and row["source"] == "computed"]
    for command in {row["command"] for row in own}:
        python, option, source = shlex.split(command)
        assert (python, option) == ("python", "-c")
        done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [row["value"] for row in own if row["command"] == command]


@pytest.mark.parametrize("name", NAMES)
def test_published_facts_are_those_of_the_release(name: str, tool: ModuleType) -> None:
    entry, facts = find_model(name), PUBLISHED[NAMES[name]]
    spec = load_spec(name)
    assert (spec.params(), spec.macs(), spec.input_size) == (facts["params"], facts["macs"], facts["image_size"])
    assert entry.preprocess is not None
    shown = entry.preprocess.model_dump()
    expected = {key: facts[key] for key in ("crop_pct", "interpolation")} | {"input_size": facts["image_size"]}
    expected["crop_mode"] = "center"
    assert shown == expected | {"mean": tuple(facts["mean"]), "std": tuple(facts["std"])}
    assert entry.weights.url == facts["weights"]["url"]
    assert entry.weights.member == facts["weights"]["archive_member"]
    assert entry.weights.sha256 == facts["weights"]["sha256"]
    rows = tool.read_results()
    assert tool.value(rows, name, "top1") == facts["imagenet_top1"]
    for key, latency in facts["published_latency"].items():
        device, backend, dtype, *_ = key.split("_")
        assert tool.value(rows, name, f"latency {device} {backend} {dtype}") == latency
    for metric, compute in COMPUTED.items():
        assert tool.value(rows, name, metric) == compute(spec)


def test_the_index_lists_every_arch_and_the_demo_networks() -> None:
    assert [e.arch for e in load_index().values() if e.arch] == list(NAMES)
    assert sorted(NAMES) == list_models()
    assert [e.name for e in load_index().values() if e.bundled] == ["digits_classifier", "digits_detector"]
    files = [e.weights.file for e in load_index().values()]
    assert len(set(files)) == len(files)
    assert all((ROOT / "configs" / e.config).is_file() for e in load_index().values())


def test_every_figure_says_where_it_is_from(tool: ModuleType) -> None:
    rows = tool.read_results()  # checks every row
    assert {row["source"] for row in rows} == {"published", "computed", "measured"}
    measured = {row["model"] for row in rows if row["source"] == "measured"}
    assert measured == set(load_index())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "heard"}, "source 'heard' must be one of published, computed, measured"),
        ({"source": "measured", "device": "CPU"}, "a measured figure needs 'command'"),
        ({"reference": ""}, "a published figure needs 'reference'"),
        ({"value": "fast"}, "value 'fast' is not a number"),
        ({"model": "prunet_p9"}, "'prunet_p9' is not in the zoo's index"),
    ],
)
def test_a_figure_without_its_origin_is_refused(tool: ModuleType, change: dict[str, str], message: str) -> None:
    row = tool.read_results()[0]
    assert row["source"] == "published"
    with pytest.raises(DataError, match=re.escape(message)):
        tool.check_row({**row, **change}, "results.csv, line 2")


def test_unknown_models_and_schemes() -> None:
    assert find_model("prunet://gpunet_d1") is find_model("gpunet_d1")
    with pytest.raises(UnknownNameError, match="unknown zoo model 'prunet_p2'; did you mean 'prunet_p"):
        find_model("prunet_p2")


def test_a_broken_index_names_the_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    entry = {"name": "x", "config": "c.py", "classes": ["a"], "weights": {"file": "f", "licence": "l", "origin": "o"}}
    (tmp_path / "zoo/index.json").write_text(json.dumps([entry]))
    monkeypatch.setattr(index.resources, "files", lambda _: tmp_path)
    load_index.cache_clear()
    try:
        with pytest.raises(SpecError, match="a classifier needs 'preprocess'"):
            load_index()
    finally:
        monkeypatch.undo()
        load_index.cache_clear()


def models() -> list[dict[str, Any]]:
    imports = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
    return [model for path in imports for model in yaml.safe_load((ROOT / path).read_text())["Models"]]


def test_metafiles_follow_openmmlabs_schema() -> None:
    """What mim and MMEngine's inferencers read: Name, In Collection, Config, Metadata, Results, Weights."""
    for path in yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]:
        data = yaml.safe_load((ROOT / path).read_text())
        collections = {c["Name"]: c for c in data["Collections"]}
        for collection in collections.values():
            assert collection["Paper"]["URL"].startswith("https://arxiv.org/abs/")
            assert (ROOT / collection["README"]).is_file()
            assert (ROOT / collection["Code"]["URL"]).is_file()
        for model in data["Models"]:
            assert model["In Collection"] in collections
            assert (ROOT / model["Config"]).is_file()
            assert model["Weights"] == f"prunet://{model['Name']}"
            assert model["Results"], f"{model['Name']} has no result"
            for result in model["Results"]:
                assert result["Task"] in ("Image Classification", "Object Detection")
                assert result["Metrics"]
    assert [m["Name"] for m in models()] == list(load_index())
    assert {m["Name"]: m["Metadata"].get("Parameters") for m in models() if m["Name"] in NAMES} == {
        name: load_spec(name).params() for name in NAMES
    }
