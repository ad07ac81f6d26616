"""Requests made up from our own OpenAPI description: never a 5xx, nor an answer that it does not promise."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
FEW = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_that_the_description_allows_or_forbids_breaks_the_server(server, until, mode):
    schema = schemathesis.openapi.from_dict(server.get("/openapi.json").json())
    operations = {f"{o.method} {o.path}": o for o in (found.ok() for found in schema.get_all_operations())}
    assert {"post /", "post /v1/chat/completions", "post /tokenize", "get /metrics"} <= set(operations)
    for operation in operations.values():
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing to send

        @FEW
        @given(case=operation.as_strategy(mode))
        def sent(case):
            if isinstance(case.body, dict) and case.path in ("/", "/v1/chat/completions"):
                case.body["timeout_ms"] = 50  # an untrained prompt runs to the token limit
            case.call_and_validate(base_url=server.url, checks=CHECKS)

        sent()
    until(server.idle)
