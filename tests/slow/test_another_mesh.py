"""A run that was broken off goes on on other meshes with the same losses."""

import numpy as np
import pytest
from running import StopError, broken_at

from glm_jax.training.loop import train


def test_a_run_goes_on_on_another_mesh(experiment, tmp_path, monkeypatch):
    experiment.optimizer.dropout = experiment.optimizer.attention_dropout = 0.0
    expected = train(experiment, tmp_path / "one")
    first = experiment.copy_and_resolve_references()
    first.mesh = "2,2,2"
    with monkeypatch.context() as patched:
        broken_at(12, patched)
        with pytest.raises(StopError):
            train(first, tmp_path / "many")
    experiment.mesh = "1,1,4"
    rest = train(experiment, tmp_path / "many")
    assert rest[0]["step"] == 12
    losses = {h["step"]: h["loss"] for h in expected}
    np.testing.assert_allclose(
        [h["loss"] for h in rest], [losses[h["step"]] for h in rest], rtol=1e-3
    )
