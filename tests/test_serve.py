"""`relora serve`: what it refuses. That it serves is shown with a real server in test_deployments.py."""

from __future__ import annotations

import pytest

from relora_train.cli.app import main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    captured = capsys.readouterr()
    assert captured.out == "" and isinstance(ended.value.code, int)
    return ended.value.code, captured.err


def test_without_a_server_to_serve_it_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    code, message = refusal(capsys)
    assert code == 2 and "PREFECT_API_URL names no Prefect server" in message and "prefect server start" in message


def test_a_server_that_does_not_answer_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, message = refusal(capsys)
    assert code == 2 and "No Prefect server answers at http://127.0.0.1:9/api" in message


def test_an_unknown_deployment_is_answered_with_the_known_ones(capsys: pytest.CaptureFixture[str]):
    code, message = refusal(capsys, "pretrain/huge")
    assert code == 2 and "no deployment 'pretrain/huge'" in message and "pretrain/llama-60m" in message


@pytest.mark.parametrize("arguments", [["--limit", "0"], ["--poll", "0"]])
def test_limits_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str]):
    assert refusal(capsys, *arguments)[0] == 2
