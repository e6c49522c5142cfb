"""The demo's model taught a new relation by adapters beside its INT4 weights."""

import json
import random
import time
from pathlib import Path
from typing import Any

from configs import finetune_demo as finetune_config
from glm_jax.checkpoints.model_folder import restore
from glm_jax.data import facts
from glm_jax.data.facts import Corpus
from glm_jax.evaluation.fact_tasks import write_fact_tasks
from glm_jax.evaluation.run import evaluate
from glm_jax.evaluation.tasks import Model
from glm_jax.jobs.batch_job import Share
from glm_jax.model.device_layout import prepare
from glm_jax.tokenizer import Tokenizer
from glm_jax.training.finetuning import ADAPTER_FOLDER, finetune


def teach(checkpoint: Path, corpus: Corpus, output: Path) -> None:
    """Fine-tune, and print how many blanks are filled before and after.

    Args:
      checkpoint: the demo's model folder.
      corpus: that it was trained on.
      output: folder of the pairs, the run and the evaluations.
    """
    instructions, questions = facts.build_instructions()
    rng = random.Random(0)
    # As many blanks of the old relations, against forgetting.
    replayed = rng.sample(corpus.blanks, len(instructions))
    pairs = output / "pairs.jsonl"
    pairs.parent.mkdir(parents=True)
    lines = [
        json.dumps({"prompt": i.prompt, "target": i.target}, ensure_ascii=False)
        for i in (*instructions, *replayed)
    ]
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    experiment = finetune_config.get_config()
    experiment.data.files = str(pairs)
    began = time.perf_counter()
    finetune(experiment, checkpoint, output / "run")
    seconds = time.perf_counter() - began
    print(
        f"\nfine-tuned by adapters beside INT4 weights, in {seconds:.0f} s: on which continent "
        f"capitals lie,\n{len(instructions)} instructions, and {len(replayed)} blanks of the old "
        "relations; percent filled in right, in forms that were held out"
    )
    print(f"{'':<8}" + "".join(f"{c:>23}" for c in ("new en", "new zh", "old en", "old zh")))
    asked = {"new": Corpus((), questions), "old": corpus}
    for name, adapter in (("before", None), ("after", output / "run" / ADAPTER_FOLDER)):
        config, params = restore(checkpoint, dtype="float32", quantization="int4", adapter=adapter)
        model = Model(prepare(params), config, Tokenizer(checkpoint))
        cells = [
            cell
            for kind, of_kind in asked.items()
            for cell in _filled(of_kind, model, output / "tasks" / kind, output / name / kind)
        ]
        print(f"{name:<8}" + "".join(f"{cell:>23}" for cell in cells), flush=True)
    baseline = facts.majority_accuracy(questions)
    print(f"filling in the commonest continent: {baseline:.1%}")


def _filled(corpus: Corpus, model: Model, data: Path, output: Path) -> list[str]:
    """Return the percentage of a corpus's questions that are filled in right, by language."""
    tasks = [t for t in write_fact_tasks(corpus, model.tokenizer, data) if t.name == "fill"]
    found = evaluate(tasks, data, output, model, Share(0, 1, None), {})
    assert found is not None
    cells = []
    for language in facts.LANGUAGES:
        [result] = found["tasks"]["fill"]["groups"][language]["files"].values()
        cells.append(interval(result["metrics"]["EM"], 1))
    return cells


def interval(number: dict[str, Any], digits: int) -> str:
    """Return a metric's value, with its 95% interval."""
    value, low, high = (f"{number[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
