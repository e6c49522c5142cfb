"""Two processes go on from the newest whole checkpoint, whichever of them finds damage."""

import shutil

from running import arguments, losses, start_joined

from glm_jax.checkpoints.checksums import CHECKSUMS_FILE


def _train(text, tokenizer, workdir):
    more = ("--config.steps=6", "--config.checkpoint_every=2", "--config.checkpoints_kept=3")
    command = ["launch.train", *arguments(text.parent, tokenizer, workdir, "1,4,2", *more)]
    return [process.finish() for process in start_joined(command, 2)]


def test_damage_that_one_of_two_processes_finds(corpus, tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(corpus.sentences[:200]), encoding="utf-8")
    _train(text, tokenizer, tmp_path / "run")
    expected = losses(tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    [*_, newest] = sorted((checkpoints / "6" / "state").rglob("*/d/*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    # Of a file that is not listed, a changed chunk is found by the process alone that reads it.
    (checkpoints / "4" / CHECKSUMS_FILE).write_text('{"files": {}, "chunks": {}}')
    of_one = (checkpoints / "4" / "state" / "ocdbt.process_1" / "d").iterdir()
    file = max(of_one, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shutil.rmtree(tmp_path / "run" / "model")
    first, second = _train(text, tokenizer, tmp_path / "run")
    assert "6/" in first
    assert "resuming from step 4\n" in first
    assert "resuming from step 2\n" in first
    assert "Traceback" not in first + second
    assert "damaged" not in second
    moved = (tmp_path / "run" / "damaged_checkpoints").iterdir()
    assert sorted(path.name for path in moved) == ["4", "6"]
    assert losses(tmp_path / "run") == expected
    assert (tmp_path / "run" / "model").is_dir()
