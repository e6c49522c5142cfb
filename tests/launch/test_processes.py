"""How processes find each other."""

import pytest

from glm_jax import processes
from glm_jax.processes import ProcessesError


def test_processes_that_cannot_find_each_other_are_told_what_is_missing(monkeypatch):
    for name in ("GLM_JAX_COORDINATOR", "GLM_JAX_NUM_PROCESSES", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert processes.resolve() == (None, 0, 1)  # alone
    with pytest.raises(ProcessesError, match="2 processes and no coordinator"):
        processes.resolve(count=2)
    with pytest.raises(ProcessesError, match="GLM_JAX_PROCESS_ID"):
        processes.resolve("127.0.0.1:1", count=2)
    monkeypatch.setenv("GLM_JAX_NUM_PROCESSES", "two")
    with pytest.raises(ProcessesError, match="'two' in the environment is not an integer"):
        processes.resolve("127.0.0.1:1")
