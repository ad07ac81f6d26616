"""The stand-in for `tensorrt`, shared with the tests of the builder."""

from __future__ import annotations

from ...build.conftest import bindings, float32_engine_bundle  # noqa: F401
from ...build.engines import exported, linear, paged, spec, tensorrt  # noqa: F401
