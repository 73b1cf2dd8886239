"""What is wrong with the way a call is made rather than with its body: path and method."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Server, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


WRONG_METHODS = [("GET", "/v1/score", "POST"), ("DELETE", "/v1/score/stream", "POST"), ("POST", "/v1/info", "GET")]


@pytest.mark.parametrize(("method", "path", "allowed"), WRONG_METHODS)
def test_a_wrong_method_is_405_in_the_status_line_and_in_the_document(
    server: Server, method: str, path: str, allowed: str
):
    answer = server.http.request(method, server.http_url + path, headers={"x-request-id": "mine-7"})
    document = answer.json()
    assert answer.status_code == 405
    assert document["status"] == 405  # RFC 9457, 3.1.2: the same number
    assert answer.headers["allow"] == allowed  # RFC 9110, 15.5.6: a 405 names the methods
    assert answer.headers["content-type"] == "application/problem+json"
    assert (document["kind"], document["retryable"]) == ("invalid_request", False)
    assert document["request_id"] == answer.headers["x-request-id"] == "mine-7"
    assert (method in document["detail"], allowed in document["detail"]) == (True, True)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_404_in_the_status_line_and_in_the_document(server: Server, method: str):
    answer = server.http.request(method, f"{server.http_url}/v1/nothing")
    assert (answer.status_code, answer.json()["status"], answer.json()["kind"]) == (404, 404, "not_found")
    assert answer.headers["content-type"] == "application/problem+json"
