"""Plans a job: whether it fits, and how fast it can be; compiles its programs without a device.

    python -m launch.plan --config=configs/glm_130b.py --job=decode --hardware=a100_40gb \\
        --devices=8 --precision=float16 --batch=2 --length=2048 [--sweep]

Takes the compilers that `make test-aot` installs (in .venv-aot).
"""

import importlib
import os
from pathlib import Path

# Before jax is used: no device is, and no TPU is looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from absl import flags
from ml_collections import ConfigDict

from glm_jax import cli
from glm_jax.config import GLMConfig, glm_130b
from glm_jax.files import write_text
from glm_jax.planning import evaluation_table, finetuning_table, hardware_table
from glm_jax.planning.plan import JOBS, PRECISIONS, PlanError, PlanRequest, check_hardware
from glm_jax.planning.reports import draw, line, record, table
from glm_jax.planning.sweep import PlanResult, attempt, smallest, sweep
from glm_jax.sharding import MeshError
from glm_jax.text_files import to_json
from glm_jax.training import config as train_config
from launch.model_flags import define_memory_flags, is_scheme, model_config

FLAGS = flags.FLAGS
_TABLES = {
    "hardware": hardware_table.TABLE,
    "finetuning": finetuning_table.TABLE,
    "evaluation": evaluation_table.TABLE,
}
cli.define_experiment_flag("configs/glm_130b.py", is_default=True)
flags.DEFINE_string(
    "checkpoint", None, "a model folder, or random:SIZE: its model instead of the config's"
)
flags.DEFINE_enum("job", "decode", JOBS, "program to compile")
flags.DEFINE_string("hardware", None, "a file of configs/hardware, such as a100_40gb")
flags.DEFINE_integer("devices", 1, "number of devices", lower_bound=1)
flags.DEFINE_string(
    "mesh", None, "mesh, sizes of data,fsdp,tensor; all devices along tensor by default"
)
flags.DEFINE_enum("precision", "float16", PRECISIONS, "number format of the weights")
flags.DEFINE_string(
    "quantization",
    None,
    "quantization instead of --precision: int8, int4, or such as int4,group=128",
)
flags.register_validator("quantization", is_scheme)
flags.DEFINE_integer(
    "batch", 1, "requests that decode together, or rows of a training step", lower_bound=1
)
flags.DEFINE_integer(
    "length", None, "tokens of each request or row; the model's positions by default", lower_bound=1
)
define_memory_flags()
flags.DEFINE_bool("sweep", False, "try every mesh, with batches as large as fit")
flags.DEFINE_enum(
    "table",
    None,
    list(_TABLES),
    "print a table of docs/hardware.md, finetuning.md or evaluating.md",
)
flags.DEFINE_string("output", None, "folder for plan.json and plan.png")
cli.require(("hardware",), instead=("table",))


def hardware(name: str) -> ConfigDict:
    """Return the one file of configs/hardware whose name begins with `name`.

    Args:
      name: hyphens count as underscores.

    Raises:
      PlanError: there is no such file, or a number in it is not above 0.
    """
    folder = Path(__file__).parent.parent / "configs" / "hardware"
    known = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    matching = [file for file in known if file.startswith(name.replace("-", "_"))]
    if len(matching) != 1:
        raise PlanError(f"--hardware={name}: one of {', '.join(known)}")
    module = importlib.import_module(f"configs.hardware.{matching[0]}")
    config: ConfigDict = module.get_config()
    check_hardware(matching[0], config)
    return config


def plan_request() -> PlanRequest:
    """Return the request of the flags."""
    model = _model()
    sizes = FLAGS.mesh or f"1,1,{FLAGS.devices}"
    try:
        data, fsdp, tensor = (int(size) for size in sizes.split(","))
    except ValueError as error:
        raise MeshError(f"--mesh={sizes}: sizes of data,fsdp,tensor") from error
    if min(data, fsdp, tensor) < 1:
        raise MeshError(f"--mesh={sizes}: each at least 1")
    is_training = FLAGS.job == "train"
    return PlanRequest(
        model=model,
        job=FLAGS.job,
        precision=FLAGS.quantization or FLAGS.precision,
        mesh=(data, fsdp, tensor),
        batch=FLAGS.batch,
        length=FLAGS.length or model.max_sequence_length,
        cache=FLAGS.cache_dtype,
        recipe=train_config.recipe(FLAGS.config) if is_training else None,
        weight_memory_limit=FLAGS.weight_memory_limit,
    )


def _model() -> GLMConfig:
    if FLAGS.checkpoint is not None:
        return model_config()
    fields = FLAGS.config.model.to_dict()
    if "num_layers" in fields:
        return train_config.model_config(FLAGS.config)
    return glm_130b(**fields)  # a fine-tuning config's model is its checkpoint's


def main() -> None:
    if FLAGS.table:
        for text in _TABLES[FLAGS.table].lines(glm_130b(), hardware):
            print(text, flush=True)
        return
    described = hardware(FLAGS.hardware)
    request = plan_request()
    if FLAGS.sweep:
        errors = set()

        def show(tried: PlanResult) -> None:
            errors.add(tried.error)
            print(line(tried), flush=True)

        results = sweep(request, described, show)
        if not results and "" in errors:
            raise PlanError("nothing that was tried fits: more devices, or fewer bits")
        if not results:
            raise PlanError(f"nothing could be planned: {'; '.join(sorted(errors)[:3])}")
        print(f"\nfastest: {line(results[0])}")
        write(results, described)
        return
    tried = attempt(request, described)
    if tried.plan is None:
        raise PlanError(tried.error)
    print(table(tried, described))
    if not tried.plan.fits:
        least = smallest(request, described)
        count = "no number up to 1024" if least is None else str(least.request.devices)
        print(f"smallest that does: {count} x {described.device_kind}")
    write([tried], described)


def write(results: list[PlanResult], described: ConfigDict) -> None:
    """Write plan.json and plan.png if there is --output."""
    if FLAGS.output is None:
        return
    folder = Path(FLAGS.output)
    records = [record(tried) for tried in results]
    content = {"hardware": described.device_kind, "plans": records}
    text = to_json(content, indent=1)
    write_text(folder / "plan.json", text + "\n")
    draw([tried for tried in results if tried.plan is not None][:20], folder / "plan.png")


if __name__ == "__main__":
    cli.run(main)
