"""A small model, data in two languages and their task files, for command lines."""

import jax

from glm_jax.checkpoints.model_folder import save_model
from glm_jax.config import glm_config
from glm_jax.evaluation.fact_tasks import write_fact_tasks
from glm_jax.model import params as glm_params


def write_evaluation(folder, tokenizer, corpus, examples):
    """FOLDER/model, FOLDER/data with so many examples a file, FOLDER/tasks."""
    vocab = -(-tokenizer.vocab_size // 64) * 64
    config = glm_config("tiny", num_heads=8, vocab_size=vocab, max_sequence_length=64)
    model = glm_params.init(config, jax.random.key(0))
    save_model(folder / "model", config, model, tokenizer.files)
    write_fact_tasks(corpus, tokenizer, folder / "data")
    for path in (folder / "data").glob("*/*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:examples]))
    (folder / "tasks").mkdir()
    for name, kind, more in (
        ("choose", "mul", ""),
        ("fill", "gen", "max-gen-length: 4\nmetrics: [EM, F1_zh]\n"),
        ("predict", "lm", "metrics: [BPB]\nuse_task_mask: true\n"),
    ):
        text = f"name: {name}\ntype: {kind}\npath: {name}\n{more}"
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder
