"""What the OpenAPI document says holds for requests that are made of it, right and wrong."""

import subprocess
import sys
from pathlib import Path

from served import running, tiny_served

from glm_jax.engine.engine import EngineSettings
from glm_jax.serving.chat_template import ChatTemplate
from glm_jax.serving.keys import Keys
from glm_jax.serving.service import Limits

_TEMPLATE = "configs/chat/dialogue.jinja"


def test_every_operation(tokenizer, tmp_path):
    short = EngineSettings(8, 32, page_size=16, prefill_width=32, compiles_guided=True)
    model = tiny_served(tokenizer, short)
    limits = Limits(seconds=60.0, beams=2)
    more = {"keys": Keys(["the-key"]), "chat_template": ChatTemplate.read(_TEMPLATE)}
    with running(lambda: model, limits=limits, **more) as served:
        ran = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")),
                "run",
                served.url + "/openapi.json",
                "--header=Authorization: Bearer the-key",
                "--checks=all",
                # How many tokens a text has, and what goes with what, is in no schema.
                "--exclude-checks=positive_data_acceptance",
                "--phases=coverage,fuzzing",
                "--max-examples=10",
                "--workers=2",
                "--generation-deterministic",
                "--suppress-health-check=all",
                "--no-color",
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    print(ran.stdout[-400:])
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert served.error is None
