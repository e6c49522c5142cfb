"""Compiles for devices that are not here, and keeps what the compilers write."""

import os
import shutil
import tempfile
from pathlib import Path

DUMP = Path(tempfile.mkdtemp(prefix="glm_jax_aot_"))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # by the workers of one run
# PTX, too; the scheduler is the one that launchers ask for.
_FLAGS = (
    f"--xla_dump_to={DUMP} --xla_dump_emitter_re=ptx --xla_gpu_enable_latency_hiding_scheduler=true"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"


def pytest_unconfigure() -> None:
    shutil.rmtree(DUMP, ignore_errors=True)
