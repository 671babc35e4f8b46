"""The plan's estimate of what tokenizing takes."""

import pytest

from relora_train.cli.plan import plan_view
from relora_train.runs.plan import plan
from relora_train.settings.load import load_profile


def test_the_time_and_disk_of_tokenizing_are_estimated_by_workers_where_the_size_is_known(tmp_path):
    c4 = load_profile("llama_60m", {"data": {"max_documents": None}})
    estimate = plan(c4).tokenization
    size = 364_868_892 * 2_270  # documents of 305 GB of compressed files
    assert estimate is not None and estimate.text_bytes == size
    read, encode = size / 65e6 / 3600, size / 11.6e6 / 3600  # one process reads, and any number encodes
    for workers in (1, 8, 64):
        assert estimate.hours_by_workers[workers] == pytest.approx(read + encode / workers)
    assert estimate.disk_bytes == pytest.approx(1.56 * size)
    assert "828 GB of text; 23 h 22 min by 1, 6 h 01 min by 8, 3 h 50 min by 64" in plan_view(plan(c4))[0].plain
    assert plan(load_profile("llama_60m")).tokenization.text_bytes == 3_100_000 * 2_270
    (tmp_path / "a.txt").write_text("x" * 1000)
    here = {"source": "text", "paths": [str(tmp_path / "a.txt")], "max_documents": None}
    assert plan(load_profile("smoke", {"data": {**here, "engine": "tokenizers"}})).tokenization.text_bytes == 1000
    assert plan(load_profile("smoke", {"data": {**here, "paths": [str(tmp_path / "none.txt")]}})).tokenization is None
    two = [{"name": name, **here} for name in "ab"]
    assert (
        plan(load_profile("smoke", {"data": {"max_documents": None, "sources": two}})).tokenization.text_bytes == 2000
    )
