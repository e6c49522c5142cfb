"""What the fields of an experiment mean, in a line each: what `--help` shows beside them.

Fields that are attributes of a dataclass are described where that is; the others here.
"""

import inspect
import re

from glm_jax.config import GLMConfig
from glm_jax.data.objective import ObjectiveConfig
from glm_jax.model.adapters import AdapterConfig
from glm_jax.training.recipe import Recipe

_CLASSES = {
    "model": GLMConfig,
    "optimizer": Recipe,
    "stability": Recipe,
    "adapter": AdapterConfig,
    "data.objective": ObjectiveConfig,
}
_FIELDS = {
    "seed": "of initial values, dropout and the order of the data",
    "steps": "of the run; times data.batch_size are its rows",
    "mesh": "devices along data, fsdp and tensor; -1 for all that remain",
    "quantization": "of a frozen float model: int8, int4, or such as int4,group=128; empty: none",
    "data.files": "text to tokenise in memory: comma-separated paths and patterns",
    "data.kind": "of these files: text, or instructions: JSON lines with prompt and target",
    "data.mixture": "instead of files: prepared folders and their shares, data/en:0.6,data/zh:0.4",
    "data.tokenizer": "folder of a tokenizer; in fine-tuning the checkpoint's by default",
    "data.sequence_length": "tokens of a row",
    "data.batch_size": "rows of a step",
    "data.micro_batch_size": "rows that are computed at once, at most; 0 for the whole batch",
    "data.initial_batch_size": "rows from which the batch grows; 0 for no growth",
    "data.ramp_fraction": "share of the run's rows over which the batch grows",
    "data.ramp_increment": "rows by which the batch grows at a time; 0 for the initial size",
    "data.streams": "streams that samples are dealt to; 0 for one a row",
    "stability.restore_after": "skipped steps in a row after which a checkpoint is restored; 0 for "
    "never",
    "stability.most_restores": "restores without a checkpoint in between, after which the run ends",
    "evaluation.files": "held-out text, as data.files",
    "evaluation.kind": "of these files, as data.kind",
    "evaluation.mixture": "instead of files: prepared folders, as data.mixture",
    "evaluation.every": "steps between evaluations; 0 for none",
    "evaluation.batches": "micro-batches of an evaluation",
    "log_every": "steps between logged lines",
    "checkpoint_every": "steps between checkpoints",
    "checkpoint_minutes": "minutes after which there is a checkpoint, too; 0 for steps alone",
    "checkpoints_kept": "newest checkpoints that stay",
    "checkpoints_kept_every": "steps between checkpoints that stay for good; 0 for none",
    "checkpoints_strict": "a damaged checkpoint ends the run; else it goes on from an earlier one",
    "peak_flops": "operations a second of one device, for MFU; 0 to measure it",
}
_ENTRY = re.compile(
    r"^(?P<indent> *)(?P<names>\w+(?:,\s+\w+)*):(?P<text>.*(?:\n(?P=indent) +.*)*)", re.M
)


def field_help(name: str) -> str:
    """Return what a field means.

    Args:
      name: dotted, such as "data.batch_size".

    Raises:
      KeyError: it is no field of an experiment.
    """
    if name in _FIELDS:
        return _FIELDS[name]
    group, _, attribute = name.rpartition(".")
    return _attributes(_CLASSES[group])[attribute]


def _attributes(described: type) -> dict[str, str]:
    """{name: text} of the section "Attributes" of a class's docstring."""
    section = inspect.cleandoc(described.__doc__ or "").partition("Attributes:\n")[2]
    texts = {}
    for match in _ENTRY.finditer(section):
        for name in re.split(r",\s+", match["names"]):
            texts[name] = " ".join(match["text"].split())
    return texts
