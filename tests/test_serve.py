"""`relora serve`: what it refuses. That it serves is shown with a real server in test_deployments.py."""

import pytest


def test_without_a_server_to_serve_it_says_how_to_start_one(relora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code, out, message = relora("serve")
    assert (
        (code, out) == (2, "")
        and "PREFECT_API_URL names no Prefect server" in message
        and "prefect server start" in message
    )


def test_a_server_that_does_not_answer_is_named(relora, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, out, message = relora("serve")
    assert (code, out) == (2, "") and "No Prefect server answers at http://127.0.0.1:9/api" in message


def test_an_unknown_deployment_is_answered_with_the_known_ones(relora):
    code, out, message = relora("serve", "pretrain/huge")
    assert (code, out) == (2, "") and "no deployment 'pretrain/huge'" in message and "pretrain/llama-60m" in message


@pytest.mark.parametrize("arguments", [["--limit", "0"], ["--poll", "0"]])
def test_limits_that_make_no_sense_are_refused(relora, arguments: list[str]):
    assert relora("serve", *arguments).code == 2
