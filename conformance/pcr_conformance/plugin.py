"""pytest plugin: `pytest --pyargs pcr_conformance --pcr-adapter module:factory`.

It is loaded in every pytest run of an environment that has the library, so it imports nothing until it is asked to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pcr_conformance.levels import LEVELS

_NEEDS = ("objective", "grad", "compile", "sharded", "in_place", "float64", "bfloat16")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pcr", "conformance with Probabilistic Conflict Resolution")
    group.addoption("--pcr-adapter", action="append", default=[], metavar="MODULE:FACTORY", help="repeatable")
    group.addoption("--pcr-device", default=None, metavar="DEVICE", help="where arrays lie, such as cpu or cuda:0")
    group.addoption("--pcr-examples", type=int, default=10, help="random cases of each law (default 10)")
    group.addoption("--pcr-seed", type=int, default=0, help="of the random cases (default 0)")
    group.addoption("--pcr-xfails", default=None, metavar="FILE", help="TOML with [[xfail]] adapter, law, reason")


def pytest_configure(config: pytest.Config) -> None:
    for name, what in LEVELS.items():
        config.addinivalue_line("markers", f"pcr_{name}: {what}")
    for name in _NEEDS:
        config.addinivalue_line("markers", f"pcr_needs_{name}: a law for adapters that declare {name!r}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pcr_pair" not in metafunc.fixturenames:
        return
    from pcr_conformance.libraries import NAMES, load, missing
    from pcr_conformance.registry import LAWS
    from pcr_conformance.verdict import check_matched, read_xfails

    config = metafunc.config
    asked = config.getoption("--pcr-adapter")
    file = config.getoption("--pcr-xfails")
    try:
        specs = asked or [name for name in NAMES if missing(name) is None]
        adapters = [load(spec, config.getoption("--pcr-device")) for spec in specs]
        xfails = read_xfails(Path(file)) if file else []
        check_matched(xfails, adapters)
    except (OSError, TypeError, ValueError) as error:
        raise pytest.UsageError(str(error)) from error
    params = []
    for adapter in adapters:
        for law in LAWS:
            marks: list[Any] = [getattr(pytest.mark, f"pcr_{law.level}")]
            marks += [getattr(pytest.mark, f"pcr_needs_{need}") for need in sorted(law.needs)]
            reason = law.applies(adapter)
            if reason is not None:
                marks.append(pytest.mark.skip(reason=reason))
            marks += [
                pytest.mark.xfail(reason=x.reason, strict=True) for x in xfails if x.matches(adapter.name, law.name)
            ]
            params.append(pytest.param((law, adapter), marks=marks, id=f"{law.name}-{adapter.name}"))
    if not asked:
        for name in NAMES:
            reason = missing(name)
            if reason is not None:
                params.append(pytest.param(None, marks=pytest.mark.skip(reason=f"{name}: {reason}"), id=name))
    metafunc.parametrize("pcr_pair", params)
