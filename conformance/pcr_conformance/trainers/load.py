"""Our training stacks by name, and `load_trainer` for those of others."""

from __future__ import annotations

import inspect
import os
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from pcr_conformance.factory import make
from pcr_conformance.trainers.adapter import TrainerAdapter, missing_trainer_members

#: name: the library it needs, the class in `stacks`, and its arguments; another stack is a file there and a line here
_MAKERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "numpy": ("numpy", "numpy:LoopTrainer", {}),
    "torch": ("torch", "torch:TorchTrainer", {}),
    "torch-loop": ("torch", "torch:TorchTrainer", {"norms": "loop"}),
    "trl": ("trl", "trl:TrlTrainer", {}),
    "jax": ("jax", "jax:JaxTrainer", {}),
    "jax-loop": ("jax", "jax:JaxTrainer", {"norms": "loop"}),
}

TRAINER_NAMES = tuple(_MAKERS)


def missing_trainer(name: str) -> str | None:
    """Why the stack of this name cannot be tried here, or None."""
    library = _MAKERS[name][0]
    return None if find_spec(library) is not None else f"{library} is not installed"


def load_trainer(spec: str) -> TrainerAdapter:
    """A stack of ours by name, "module:factory", or "file.py" or "file.py:factory".

    A factory is called without arguments where it can be called. A file without one has to define a single class with
    a method `train`.

    Raises:
        ValueError: no such name, module, file or attribute, or the stack's library is missing.
        TypeError: the object lacks something of the protocol; says what, with the signature to write.
    """
    if spec in _MAKERS:
        reason = missing_trainer(spec)
        if reason:
            raise ValueError(f"trainer {spec!r}: {reason}")
        library, place, options = _MAKERS[spec]
        if library == "jax" and "jax" not in sys.modules and "XLA_FLAGS" not in os.environ:
            os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # for the laws of several processes
        module, attribute = place.split(":")
        ours: TrainerAdapter = getattr(import_module(f"pcr_conformance.trainers.stacks.{module}"), attribute)(**options)
        return ours
    place, _, attribute = spec.rpartition(":") if not spec.endswith(".py") else (spec, "", "")
    if not place:
        raise ValueError(f"trainer {spec!r}: expected module:factory, a file, or one of {', '.join(TRAINER_NAMES)}")
    try:
        module_found = _from_file(Path(place)) if place.endswith(".py") else import_module(place)
        factory = getattr(module_found, attribute) if attribute else _only_class(module_found)
    except (ImportError, AttributeError, OSError) as error:
        raise ValueError(f"trainer {spec!r}: {error}") from error
    found: TrainerAdapter = make(f"trainer {spec!r}", factory, {}, missing_trainer_members)
    return found


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise OSError(f"there is no file {path}")
    spec = spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[path.stem] = module  # processes that are started, and pickle, look it up by name
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _only_class(module: ModuleType) -> Any:
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    able = [c for c in own if callable(getattr(c, "train", None))]
    if len(able) != 1:
        raise AttributeError(
            f"found {len(able)} classes with a method train in {module.__name__}; name one: FILE:CLASS"
        )
    return able[0]
