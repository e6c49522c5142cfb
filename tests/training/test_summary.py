"""What a run says of itself at its start."""

from configs import finetune_lora, train_tiny
from glm_jax.config import glm_config
from glm_jax.model.params import parameter_count
from glm_jax.sharding import make_mesh
from glm_jax.training.config import model_config
from glm_jax.training.summary import run_summary


def test_a_run_says_its_fields_size_and_devices():
    config = train_tiny.get_config()
    model = model_config(config)
    text = run_summary(config, model, make_mesh((2, 1, 4)))
    words = text.split()
    for name in (
        "steps=300",
        "data.batch_size=8",
        "data.objective.mask_sequences=0.3",
        "mesh=1,1,1",
    ):
        assert name in words
    assert f"model: {parameter_count(model):,} parameters, 2 layers, hidden 128, 4 heads" in text
    assert text.endswith("devices: 8 x cpu of 1 process; mesh: data 2, fsdp 1, tensor 4")


def test_a_fine_tuning_run_has_its_adapters_too():
    text = run_summary(finetune_lora.get_config(), glm_config("tiny"), make_mesh((1, 1, 1)))
    assert "adapter.rank=16" in text.split()
