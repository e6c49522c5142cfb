"""A path that is no model folder: the error says what it is instead, and what to give."""

import shutil

import pytest

from convert.model_readers import SAFETENSORS_INDEX
from glm_jax.checkpoints import adapter_folder, folder_kinds
from glm_jax.checkpoints.adapter_folder import load_adapter
from glm_jax.checkpoints.model_folder import describe_model, load_config
from glm_jax.checkpoints.parameter_files import PARAMS_FOLDER, CheckpointError
from glm_jax.config import glm_config
from glm_jax.data.records import DATASET_FILE
from glm_jax.jobs import record_store
from glm_jax.quantization import WeightFormat
from glm_jax.tokenizer import MODEL_FILE, Tokenizer
from glm_jax.training.finetuning import ADAPTER_FOLDER
from glm_jax.training.metrics import METRICS_FILE
from glm_jax.training.results import MODEL_FOLDER

CONFIG = glm_config("tiny").to_json()
A_MODEL = {folder_kinds.CONFIG_FILE: CONFIG, f"{PARAMS_FOLDER}/embedding/": ""}
A_RUN = {METRICS_FILE: "", "checkpoints/100/": "", "tensorboard/": ""}
ADAPTERS = {adapter_folder.ADAPTER_FILE: "{}", "adapter/": ""}


def _below(folder, files):
    return {f"{folder}/{name}": text for name, text in files.items()}


# What a folder called x holds, the path that is given, and what the error says.
KINDS = {
    "nothing": ({}, "x/y", "there is no such folder"),
    "a name misspelt": (_below("glm-130b", A_MODEL), "x/glm_130b", "did you mean x/glm-130b?"),
    "empty": ({}, "x", "it is empty"),
    "a run": (A_RUN | _below(MODEL_FOLDER, A_MODEL), "x", "training run: give x/model"),
    "a run that goes on": (A_RUN, "x", "it has not ended: give its command again"),
    "a run's checkpoints": (
        A_RUN | _below(MODEL_FOLDER, A_MODEL), "x/checkpoints", "part of a training run: give x/mo",
    ),
    "a run's checkpoint": (
        A_RUN | _below(MODEL_FOLDER, A_MODEL), "x/checkpoints/100", "a training run: give x/model",
    ),
    "a fine-tuning run": (
        A_RUN | _below(ADAPTER_FOLDER, ADAPTERS), "x", "give --adapter=x/adapter, and by --check",
    ),
    "adapters": (ADAPTERS, "x", "it is a folder of adapters: give it by --adapter=x"),
    "shards": (
        {"latest": "1", "1/mp_rank_00_model_states.pt": ""}, "x",
        "PyTorch shards: convert them, python -m convert.sat_to_orbax --input=x --output=DIR",
    ),
    "an iteration": ({"mp_rank_00_model_states.pt": ""}, "x", "convert them, python -m"),
    "an iteration in it": ({"49300/mp_rank_00_model_states.pt": ""}, "x", "--input=x --output"),
    "downloads": ({"glm-130b-sat.tar.part_00": ""}, "x", "--input=x --output=DIR"),
    "a download": ({"glm.tar.part_00": ""}, "x/glm.tar.part_00", "--input=x/glm.tar.part_00 --out"),
    "their `latest`": (
        {"latest": "1", "1/mp_rank_00_model_states.pt": ""}, "x/latest", "--input=x --output=DIR",
    ),
    "a shard": ({"mp_rank_00_model_states.pt": ""}, "x/mp_rank_00_model_states.pt", "--input=x "),
    "another's weights": ({"pytorch_model.bin": "", "config.json": "{}"}, "x", "PyTorch weights"),
    "safetensors": (
        {SAFETENSORS_INDEX: "{}", folder_kinds.CONFIG_FILE: CONFIG}, "x",
        "folder of safetensors: write shards of it, python -m convert.orbax_to_sat --input=x",
    ),
    "another's safetensors": ({"model.safetensors": ""}, "x", "of another program"),
    "and its config": (
        {"model.safetensors": "", "config.json": '{"model_type": 1}'}, "x", "of another program",
    ),
    "one file of safetensors": ({"a.safetensors": ""}, "x/a.safetensors", "one file of"),
    "a tokenizer": ({MODEL_FILE: ""}, "x", "it is a tokenizer: give it by --tokenizer=x"),
    "a tokenizer's file": ({"ice.model": ""}, "x/ice.model", "it is a tokenizer's file"),
    "prepared data": ({DATASET_FILE: "{}"}, "x", "give it by --config.data.mixture=x:1"),
    "texts": ({"a.jsonl": "", "b.txt.gz": ""}, "x", "it is a folder of data (a.jsonl)"),
    "answers": ({record_store._JOB_FILE: "{}"}, "x", "the output of launch.decode"),
    "results": ({"results.json": "{}", "records/": ""}, "x", "the output of launch.evaluate"),
    "a part of a model": (A_MODEL, f"x/{PARAMS_FOLDER}", "a part of a model folder: give x"),
    "a model's config": (A_MODEL, f"x/{folder_kinds.CONFIG_FILE}", "a model folder: give x"),
    "a folder of models": (_below("a", A_MODEL) | _below("b", A_MODEL), "x", "give x/a or x/b"),
    "a file": ({"notes": ""}, "x/notes", "it is a file"),
    "a conversion that goes on": ({}, "y", "y.partial is unfinished"),
    "it by its name": ({}, "y.partial", "it is unfinished"),
    "whatever else": ({"a": "", "b": "", "c": "", "d": ""}, "x", "it holds a, b, c, ..: give"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_what_a_folder_is_and_what_to_give(kind, tmp_path, monkeypatch):
    holds, given, words = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "y.partial" / "params").mkdir(parents=True)
    for name, text in holds.items():
        path = tmp_path / "x" / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(text)
    with pytest.raises(CheckpointError) as raised:
        load_config(given)
    message = str(raised.value)
    assert words in message
    assert str(tmp_path) not in message
    assert "\n" not in message


def test_what_holds_no_adapters_is_called_what_it_is(tmp_path):
    config = glm_config("tiny")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / adapter_folder.ADAPTER_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=f"give {tmp_path}/adapter, of this fine-tuning run"):
        load_adapter(tmp_path, config, {}, None)
    (tmp_path / folder_kinds.CONFIG_FILE).write_text(CONFIG)
    (tmp_path / PARAMS_FOLDER).mkdir()
    with pytest.raises(CheckpointError, match="it is a model folder"):
        load_adapter(tmp_path, config, {}, None)


def test_a_tokenizer_of_another_name_is_found_in_its_model_folder(tmp_path, tokenizer):
    """As the released one, `ice_text.model`."""
    source, folder = tmp_path / "source", tmp_path / "model"
    source.mkdir()
    folder.mkdir()
    model, config = tokenizer.files
    shutil.copy(model, source / "ice_text.model")
    shutil.copy(config, source)
    named = Tokenizer(source / "ice_text.model")
    describe_model(folder, glm_config("tiny"), WeightFormat("float32"), named.files)
    found = Tokenizer(folder)
    assert found.encode("Paris is in [MASK].") == tokenizer.encode("Paris is in [MASK].")
    assert found.special_tokens == tokenizer.special_tokens
