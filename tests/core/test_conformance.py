"""The suite as a product: adapters are loaded or refused with a reason, failures are kept, wrong ones are noticed."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pcr_conformance import report
from pcr_conformance.adapter import CAPABILITIES, Defaults
from pcr_conformance.dense import DenseAdapter
from pcr_conformance.libraries import load, missing
from pcr_conformance.registry import LAWS
from pcr_conformance.verdict import Xfail, check_matched, judge, judge_all, read_xfails

DOC = Path(__file__).parents[2] / "docs" / "conformance.md"


class Half(Defaults):
    name = "half"

    def from_numpy(self, x: Any, dtype: str) -> Any: ...


class Crashing(DenseAdapter):
    name = "crashing"

    def resolve(self, *_: Any) -> Any:
        raise RuntimeError("kernel launch failed")


def test_what_is_missing_is_named_with_its_signature() -> None:
    with pytest.raises(TypeError, match=r"method resolve\(self, case: Case, rule: Rule, dtype: str\) -> Resolved"):
        load(f"{__name__}:Half")


class Undeclared(DenseAdapter):
    name = "undeclared"
    summation = "pairwise"  # type: ignore[assignment]
    capabilities = frozenset({"in_place", "no such"})


def test_declarations_that_mean_nothing_are_named() -> None:
    with pytest.raises(TypeError) as caught:
        load(f"{__name__}:Undeclared")
    for words in ("['no such'] are not among", "summation: expected a pcr_conformance.rounding.Summation", "plain: an"):
        assert words in str(caught.value)


def broken() -> Any:
    raise RuntimeError("no such device")


def test_a_factory_that_raises_is_named() -> None:
    with pytest.raises(ValueError, match="its factory raised RuntimeError: no such device"):
        load(f"{__name__}:broken")


def test_every_capability_selects_a_law() -> None:
    assert frozenset().union(*(law.needs for law in LAWS)) == CAPABILITIES


@pytest.mark.parametrize("spec", ["nothing", "no_such_module:make", "pcr_core:no_such_name"])
def test_an_adapter_that_is_not_there(spec: str) -> None:
    with pytest.raises(ValueError, match=spec):
        load(spec)


def test_a_crash_is_a_failed_law_and_the_run_goes_on() -> None:
    verdicts = {v.law: v for v in judge_all([Crashing()], 3, 0)}
    assert len(verdicts) == len(LAWS)
    crashed = verdicts["update_is_the_combination"]
    assert crashed.outcome == "failed"
    assert "kernel launch failed" in crashed.message
    assert "Case(plasticity=" in crashed.message, "the input that reproduces it"
    assert 'in resolve: raise RuntimeError("kernel launch failed")' in crashed.message, "where it happened"
    assert verdicts["statistics_are_exact"].outcome == "passed"


def test_xfails(tmp_path: Path) -> None:
    law = next(law for law in LAWS if law.name == "update_is_the_combination")
    known = [Xfail("crash*", "update_is_the_combination", "no kernel")]
    assert judge(law, Crashing(), 2, 0, known).outcome == "xfailed"
    assert judge(law, load("numpy"), 2, 0, [Xfail("*", "*", "why")]).bad, "a law that passes unexpectedly"
    with pytest.raises(ValueError, match="matches nothing"):
        check_matched([Xfail("numpy", "no_such_law", "why")], [load("numpy")])
    file = tmp_path / "xfails.toml"
    file.write_text('[[xfail]]\nadapter = "numpy"\nlaw = "x"\n')
    with pytest.raises(ValueError, match="needs a reason"):
        read_xfails(file)


def test_worst_error_is_kept_by_dtype_and_only_while_asked() -> None:
    law = next(law for law in LAWS if law.name == "statistics_are_exact")
    worst = judge(law, load("numpy"), 30, 0).worst
    assert set(worst) == {"float64", "float32", "float16"}
    assert all(0 < ratio <= 1 for ratio in worst.values())


def test_the_nearest_bound_is_named() -> None:
    names = ("rotation_goes_through", "strata_add_up")
    verdicts = [judge(law, load("numpy"), 10, 0) for law in LAWS if law.name in names]
    (wide,) = (line for line in report.nearest(verdicts) if "float64" in line)
    assert wide.startswith("nearest bound, float64: 0.")
    assert "update in rotation_goes_through on numpy" in wide


def test_the_example_of_the_documentation_passes() -> None:
    pytest.importorskip("array_api_strict")
    scope: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)[0], scope)
    verdicts = list(judge_all([scope["MyLibrary"]()], 3, 0))
    assert not [v for v in verdicts if v.bad]


def test_the_command_writes_reports_and_fails_with_a_law(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from pcr_conformance.command import app

    paths = {name: tmp_path / f"report.{name}" for name in ("json", "junit", "html")}
    options = [x for name, path in paths.items() for x in (f"--{name}", str(path))]
    ran = testing.CliRunner().invoke(app, ["run", "--adapter", "numpy", "--examples", "2", *options])
    assert ran.exit_code == 0, ran.output
    assert "pcr conformance: core+numerics+objective+sharded" in ran.output
    assert json.loads(paths["json"].read_text())["levels"] == ["core", "numerics", "objective", "sharded"]
    assert 'failures="0"' in paths["junit"].read_text()
    assert "http" not in paths["html"].read_text(), "the page is self-contained"
    failing = testing.CliRunner().invoke(app, ["run", "--adapter", f"{__name__}:Crashing", "--examples", "2"])
    assert failing.exit_code == 1
    assert failing.output.count("RuntimeError: kernel launch failed") == 1, "the same crash in many laws is told once"
    assert re.search(r"update_is_the_combination +numerics .*failed", failing.output), "a row of a table of 80 columns"
    assert testing.CliRunner().invoke(app, ["run", "--adapter", "nothing"]).exit_code == 2


@pytest.mark.parametrize("name", ["numpy", "torch", "torch-in-place", "torch-compile", "jax", "jax-resolve"])
def test_a_device_is_where_the_arrays_lie(name: str) -> None:
    if missing(name):
        pytest.skip(str(missing(name)))
    adapter = load(name, "cpu")
    law = next(law for law in LAWS if law.name == "update_is_the_combination")
    verdict = judge(law, adapter, 2, 0)
    assert not verdict.bad, verdict.message
    assert "cpu" in verdict.device.lower()
    where = f"{name.split('-')[0]} {version(name.split('-')[0])}"
    assert verdict.software == where
    assert f"{where} on {verdict.device} ({verdict.mode})" in report.badge([verdict], datetime.date(2026, 1, 1))


@pytest.mark.parametrize(
    ("spec", "device", "reason"),
    [
        ("numpy", "cuda:0", "numpy has arrays on the CPU only"),
        ("torch", "cuda:99", "torch (finds|.* is built without CUDA)"),
        ("torch", "mps", "64-bit floats"),
        ("torch", "gpu0", "gpu0"),
        ("torch", "cuda:x", "a kind and a number"),
        ("jax", "tpu:0", "no platform 'tpu'"),
        ("jax", "cpu:99", r"device\(s\) of 'cpu', counted from 0"),
        ("jax-sharded", "cuda:0", "four devices of the host|XLA_FLAGS"),
        (f"{__name__}:Crashing", "cuda:0", "its factory takes no device"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_the_reason(spec: str, device: str, reason: str) -> None:
    if ":" not in spec and find_spec(spec.split("-")[0]) is None:
        pytest.skip(f"{spec} is not installed")
    with pytest.raises(ValueError, match=reason):
        load(spec, device)


class OnDevice(Crashing):
    def __init__(self, device: str = "cpu") -> None:
        self.device = device


def test_a_factory_that_takes_a_device_is_given_it() -> None:
    assert load(f"{__name__}:OnDevice", "cuda:7").device == "cuda:7"
    assert load(f"{__name__}:OnDevice").device == "cpu"


def test_the_command_takes_a_device(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("torch")
    from pcr_conformance.command import app

    paths = {name: tmp_path / f"report.{name}" for name in ("json", "junit", "html")}
    options = [x for name, path in paths.items() for x in (f"--{name}", str(path))]
    ran = testing.CliRunner().invoke(app, ["run", "--adapter", "torch", "--device", "cpu", "--examples", "1", *options])
    assert ran.exit_code == 0, ran.output
    where = f"torch {version('torch')}"
    assert f"{where} on cpu (eager)" in ran.output
    (seen,) = {(v["software"], v["device"], v["mode"]) for v in json.loads(paths["json"].read_text())["verdicts"]}
    assert seen == (where, "cpu", "eager")
    for name in ("junit", "html"):
        assert where in paths[name].read_text()
    refused = testing.CliRunner().invoke(app, ["run", "--adapter", "torch", "--device", "cuda:99"])
    assert refused.exit_code == 2
    assert "adapter 'torch' on device 'cuda:99'" in refused.output


def test_the_plugin_costs_others_no_framework() -> None:
    code = """
import sys, pcr_conformance.plugin
heavy = {"torch", "jax", "numpy", "hypothesis", "mpmath", "typer", "rich", "pcr_core"} & set(sys.modules)
sys.exit(f"imports {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sharded_jax_on_four_devices() -> None:
    pytest.importorskip("jax")
    code = """
from pcr_conformance.libraries import load, missing
from pcr_conformance.verdict import judge_all
bad = [v for v in judge_all([load("jax-sharded")], 2, 0) if v.bad]
raise SystemExit("\\n".join(f"{v.law}: {v.message}" for v in bad) or 0)
"""
    import os

    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
