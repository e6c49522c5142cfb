"""Two local processes, started as the batch script for Slurm starts them."""

from running import assert_trains_as_one_process, in_slurm


def test_two_tasks_train_as_one_process_does(tmp_path, corpus, tokenizer):
    (tmp_path / "text.txt").write_text("\n".join(corpus.sentences[:300]), encoding="utf-8")
    assert_trains_as_one_process(in_slurm, tmp_path, tokenizer)
