"""Two local processes, started as the templates for Slurm and Kubernetes start them."""

import pytest
from running import assert_trains_as_one_process, in_kubernetes, in_slurm


@pytest.mark.parametrize("start", [in_slurm, in_kubernetes])
def test_two_processes_train_as_one_does(tmp_path, corpus, tokenizer, start):
    (tmp_path / "text.txt").write_text("\n".join(corpus.sentences[:300]), encoding="utf-8")
    assert_trains_as_one_process(start, tmp_path, tokenizer)
