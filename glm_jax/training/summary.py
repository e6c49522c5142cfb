"""What a run says of itself at its start: experiment, model and devices."""

import textwrap

from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from glm_jax.config import GLMConfig
from glm_jax.model.params import parameter_count

_WIDTH = 100


def run_summary(config: ConfigDict, model: GLMConfig, mesh: Mesh) -> str:
    """Lines with all fields of an experiment, the model's size and the devices.

    Args:
      model: that is trained, or frozen beside adapters.
    """
    fields = traverse_util.flatten_dict(config.to_dict(), sep=".")
    values = " ".join(f"{name}={value}" for name, value in fields.items())
    devices = mesh.devices.ravel()
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    hosts = len({device.process_index for device in devices})
    experiment = textwrap.wrap(
        f"experiment: {values}",
        _WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(
        [
            *experiment,
            f"model: {parameter_count(model):,} parameters, {model.num_layers} layers, hidden "
            f"{model.hidden_size}, {model.num_heads} heads, vocabulary {model.vocab_size}, "
            f"computing in {model.compute_dtype}",
            f"devices: {len(devices)} x {devices[0].device_kind} of {hosts} "
            f"process{'es' if hosts > 1 else ''}; mesh: {sizes}",
        ]
    )
