"""Every law on every adapter of ours, collected here through the plugin that others use."""

from pcr_conformance.test_laws import test_law

__all__ = ["test_law"]
