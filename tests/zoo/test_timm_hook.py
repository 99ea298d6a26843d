"""Registration with timm at import, in every order; mostly with a small package that plays timm, so in milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NETWORKS = ["gpunet_0", "gpunet_1", "gpunet_2", "gpunet_d1", "gpunet_d2", "prunet_p0", "prunet_p1"]
NO_MMENGINE = "import sys; sys.modules['mmengine'] = None\n"
REGISTRY = """
registered = []
def generate_default_cfgs(cfgs): return dict(cfgs)
def register_model(fn):
    registered.append(fn.__name__)
    return fn
"""
SHOW = """
from timm.models._registry import registered
print(sorted(registered))
print([type(f).__name__ for f in sys.meta_path if type(f).__module__ == 'prunet_zoo.timm_hook'])
"""
WELL = [str(NETWORKS), "[]"]  # each once, and nothing left in sys.meta_path


def play_timm(folder: Path, init: str = "from . import models\n", models: str = "done = True\n") -> Path:
    """A package that registers as timm does."""
    (folder / "timm" / "models").mkdir(parents=True)
    (folder / "timm" / "__init__.py").write_text(init)
    (folder / "timm" / "models" / "__init__.py").write_text("from . import _registry\n" + models)
    (folder / "timm" / "models" / "_registry.py").write_text(REGISTRY)
    return folder


def run(code: str, folder: Path | None = None, timeout: float = 60) -> list[str]:
    """Lines printed by a fresh interpreter that finds the packages in ``folder`` first."""
    path = os.pathsep.join(str(p) for p in (folder, ROOT) if p is not None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


REAL = "print(timm.list_models('prunet*'), [m for m in timm.list_models('gpunet*')])"


@pytest.mark.parametrize("order", ["import timm, prunet_zoo", "import prunet_zoo, timm"])
def test_timm_itself_in_both_orders(order: str) -> None:
    shown = run(f"{NO_MMENGINE}{order}\n{REAL}\nprint('torch' in sys.modules)")
    assert shown == [f"{NETWORKS[5:]} {NETWORKS[:5]}", "True"]


def test_timm_itself_where_mmengine_is() -> None:
    pytest.importorskip("mmengine")
    assert run(f"import prunet_zoo, timm\n{REAL}") == [f"{NETWORKS[5:]} {NETWORKS[:5]}"]


def test_import_of_this_package_alone_loads_no_timm(tmp_path: Path) -> None:
    code = NO_MMENGINE + "import prunet_zoo\nprint([m for m in ('timm', 'torch') if m in sys.modules])"
    assert run(code, play_timm(tmp_path)) == ["[]"]


@pytest.mark.parametrize(
    "order",
    [
        "import prunet_zoo, timm",
        "import timm, prunet_zoo",
        "import prunet_zoo; from timm.models import _registry",
        "import prunet_zoo.spec, timm",
        "import prunet_zoo, importlib; importlib.import_module('timm.models')",
    ],
)
def test_every_order_registers_each_network_once(tmp_path: Path, order: str) -> None:
    assert run(NO_MMENGINE + order + SHOW, play_timm(tmp_path)) == WELL


@pytest.mark.parametrize(
    ("init", "models"),
    [
        ("import prunet_zoo\nfrom . import models\n", "done = True\n"),
        ("from . import models\nimport prunet_zoo\n", "done = True\n"),
        ("from . import models\n", "import prunet_zoo\ndone = True\n"),
    ],
    ids=["before timm.models", "after timm.models", "within timm.models"],
)
def test_imported_in_the_middle_of_timms_import(tmp_path: Path, init: str, models: str) -> None:
    code = NO_MMENGINE + "import timm; print(timm.models.done)" + SHOW
    assert run(code, play_timm(tmp_path, init, models)) == ["True", *WELL]


def test_imported_in_the_middle_of_the_real_timms_import() -> None:
    code = f"""
    {NO_MMENGINE}
    class Midway:  # the import of one family of timm's models brings this package
        def find_spec(self, name, path=None, target=None):
            if name == 'timm.models.starnet':
                sys.meta_path.remove(self)
                import prunet_zoo
    sys.meta_path.insert(0, Midway())
    import timm
    print(timm.list_models('prunet*'), timm.is_model('starnet_s1'))
    """
    assert run(code) == ["['prunet_p0', 'prunet_p1'] True"]


def test_reloads_register_nothing_twice(tmp_path: Path) -> None:
    code = NO_MMENGINE + "import importlib, prunet_zoo; importlib.reload(prunet_zoo)\nimport timm\n"
    code += "importlib.reload(prunet_zoo); importlib.reload(timm.models); importlib.reload(timm); import prunet_zoo"
    assert run(code + SHOW, play_timm(tmp_path)) == WELL


def test_timm_that_fails_at_first(tmp_path: Path) -> None:
    folder = play_timm(tmp_path, models="import os\nif 'BROKEN' in os.environ: raise ImportError('no torch')\n")
    code = """
    import os
    os.environ['BROKEN'] = '1'
    import prunet_zoo
    for _ in range(2):
        try:
            import timm
        except ImportError as error:
            print(error, 'timm.models' in sys.modules)
    del os.environ['BROKEN']
    import timm
    """
    assert run(NO_MMENGINE + textwrap.dedent(code) + SHOW, folder) == ["no torch False"] * 2 + WELL


def test_a_fault_of_the_registration_is_not_hidden(tmp_path: Path) -> None:
    folder = play_timm(tmp_path)
    registry = folder / "timm" / "models" / "_registry.py"
    registry.write_text("registered = []\n")  # a timm too old
    for order in ("import prunet_zoo\nimport timm", "import timm\nimport prunet_zoo"):
        code = f"try:\n{textwrap.indent(order, '    ')}\nexcept ImportError as error:\n    print(error.name)"
        assert run(NO_MMENGINE + code, folder) == ["timm.models._registry"]


def test_without_timm(tmp_path: Path) -> None:
    code = """
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name == 'timm':
                raise ModuleNotFoundError("No module named 'timm'", name='timm')
    sys.meta_path.insert(0, Hide())
    import prunet_zoo
    print(prunet_zoo.load_spec('prunet_p0').name)
    try:
        import timm
    except ModuleNotFoundError as error:
        print(error)
    """
    assert run(NO_MMENGINE + textwrap.dedent(code)) == ["prunet_p0", "No module named 'timm'"]


def test_the_module_keeps_its_own_loader_and_resources(tmp_path: Path) -> None:
    code = """
    import importlib.resources, importlib.util, inspect, pkgutil
    import prunet_zoo
    import timm
    loader = timm.models.__loader__
    print(type(loader).__name__, loader is timm.models.__spec__.loader, 'done' in inspect.getsource(timm.models))
    print(importlib.util.find_spec('timm.models') is timm.models.__spec__)
    print((importlib.resources.files('timm.models') / '_registry.py').is_file())
    print([m.name for m in pkgutil.walk_packages(timm.__path__, 'timm.')])
    """
    shown = ["SourceFileLoader True True", "True", "True", "['timm.models', 'timm.models._registry']"]
    assert run(NO_MMENGINE + textwrap.dedent(code), play_timm(tmp_path)) == shown


def test_looking_without_importing(tmp_path: Path) -> None:
    code = """
    import importlib.util
    import prunet_zoo
    spec = importlib.util.find_spec('timm.models')
    print('timm.models' in sys.modules, spec.origin.endswith('__init__.py'), spec.loader.is_package('timm.models'))
    print('done' in spec.loader.get_source('timm.models'), importlib.util.find_spec('timm.nothing'))
    import timm.models
    """
    shown = ["False True True", "True None", *WELL]
    assert run(NO_MMENGINE + textwrap.dedent(code) + SHOW, play_timm(tmp_path, init="")) == shown


def test_in_a_zip_archive(tmp_path: Path) -> None:
    import shutil

    archive = shutil.make_archive(str(tmp_path / "site"), "zip", play_timm(tmp_path / "site"))
    assert run(NO_MMENGINE + "import prunet_zoo, timm" + SHOW, Path(archive)) == WELL


@pytest.mark.parametrize("first", ["timm", "prunet_zoo"])
def test_two_threads_that_import_both_at_once(tmp_path: Path, first: str) -> None:
    folder = play_timm(tmp_path, models="import time\ntime.sleep(0.1)\n")
    code = f"""
    import importlib, threading, time
    errors = []
    def bring(name, delay):
        time.sleep(delay)
        try:
            importlib.import_module(name)
        except BaseException as error:
            errors.append(error)
    # not a package and its submodule: Python itself may find a deadlock between two threads that import these
    names = ['timm', 'prunet_zoo', 'timm', 'prunet_zoo']
    threads = [threading.Thread(target=bring, args=(n, 0 if n.startswith({first!r}) else 0.03)) for n in names]
    [t.start() for t in threads]
    [t.join(30) for t in threads]
    print(errors, [t.is_alive() for t in threads])
    """
    shown = run(NO_MMENGINE + textwrap.dedent(code) + SHOW, folder, timeout=90)
    assert shown == ["[] [False, False, False, False]", *WELL]


def test_other_import_hooks_stay_in_place(tmp_path: Path) -> None:
    code = """
    import prunet_zoo
    class Watcher:
        seen = []
        def find_spec(self, name, path=None, target=None):
            self.seen.append(name)
    sys.meta_path.insert(0, Watcher())
    sys.meta_path.append(object())  # an old finder without find_spec
    import timm
    print('timm.models' in Watcher.seen, type(sys.meta_path[0]).__name__)
    """
    assert run(NO_MMENGINE + textwrap.dedent(code) + SHOW, play_timm(tmp_path)) == ["True Watcher", *WELL]
