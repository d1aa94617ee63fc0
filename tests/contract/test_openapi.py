"""The API against its own OpenAPI page: whatever a client sends, the answer is one the page describes, never a 500."""

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cloud.api import create_app
from cloud.api.settings import Settings
from edge_agent.contract.signals import default_catalogue
from tests.bundles import build_bundle

CHECKS: list[CheckFunction] = [
    schemathesis.checks.not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


OPERATIONS = [
    (method.upper(), path)
    for path, operations in create_app(Settings()).openapi()["paths"].items()  # nothing is opened before the start
    for method in operations
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.BaseSchema:
    folder: Path = tmp_path_factory.mktemp("api")
    bundle = build_bundle(folder / "bundle", default_catalogue())
    app = create_app(Settings(database_url=f"sqlite:///{folder}/v.db", bundle=bundle, lake=f"{folder}/lake"))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_makes_a_500_and_every_answer_is_as_described(
    page: schemathesis.BaseSchema, method: str, path: str
) -> None:
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=page[path][method].as_strategy())
    def campaign(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    campaign()


def test_every_body_that_the_page_describes_has_an_example_and_every_error_is_a_problem(
    page: schemathesis.BaseSchema,
) -> None:
    described = page.raw_schema
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                assert media["examples"], (method, path)
            for status, answer in operation["responses"].items():
                if status.startswith(("4", "5")) and path != "/health":  # its 503 is the page itself
                    assert list(answer["content"]) == ["application/problem+json"], (method, path, status)
