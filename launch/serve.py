"""Serves a model: OpenAI's completions, blanks of a text, and a page to try both.

    python -m launch.serve --checkpoint=DIR --mesh=1,1,8 --port=8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "glm", "prompt": "The capital of France is [MASK].", "temperature": 0}'
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from glm_jax import cli, processes
from glm_jax.cli.packaged import packaged
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.errors import UserError
from glm_jax.generation import grammars
from glm_jax.sharding import MeshError, parse_mesh
from glm_jax.tokenizer import Tokenizer
from launch.model_flags import (
    adapter_names,
    define_engine_flags,
    define_model_flags,
    engine_settings,
    load_model,
    load_small_model,
    load_tokenizer,
)

try:
    from glm_jax.serving import events
    from glm_jax.serving.chat_template import ChatTemplate
    from glm_jax.serving.connections import DEFAULT_CONNECTIONS
    from glm_jax.serving.follower import Follower
    from glm_jax.serving.keys import Keys
    from glm_jax.serving.links import Followers, Leader, connect
    from glm_jax.serving.server import serve
    from glm_jax.serving.service import Limits, Serving
    from glm_jax.serving.worker import ServedModel

    _missing = None
except ModuleNotFoundError as error:  # --help does without the extra
    _missing = error.name

FLAGS = flags.FLAGS
define_model_flags(names_adapters=True)
define_engine_flags()
cli.define_process_flags()
flags.mark_flag_as_required("checkpoint")
flags.DEFINE_string("name", None, "name of the model that clients ask for; its folder's by default")
flags.DEFINE_string("host", "127.0.0.1", "address to listen on; 0.0.0.0 for all of the machine's")
flags.DEFINE_integer(
    "port", 8000, "port to listen on; 0 for any free one", lower_bound=0, upper_bound=65535
)
flags.DEFINE_string(
    "api_keys", None, "file of API keys, one a line; without it no request needs a key"
)
flags.DEFINE_string(
    "chat_template",
    None,
    "file of a Jinja template that makes a prompt of a chat's messages, such as "
    "configs/chat/dialogue.jinja; without it there is no chat",
)
flags.DEFINE_multi_string(
    "cors_origin", [], "origin of pages whose scripts may send requests; may be repeated"
)
flags.DEFINE_multi_string(
    "allowed_host",
    [],
    "a host name, without port, that requests may be sent to, beside that of --host; "
    "*.example.org for all below example.org, * for any; may be repeated",
)
flags.DEFINE_multi_string(
    "trusted_proxy",
    [],
    "IP address or network of a proxy, whose X-Forwarded-For says which client asks; "
    "may be repeated",
)
flags.DEFINE_integer(
    "max_connections", None, "maximum open connections; 1000 by default", lower_bound=1
)
flags.DEFINE_integer(
    "prefill_budget",
    512,
    "prompt tokens prefilled between two decode steps of the running requests",
    lower_bound=1,
)
flags.DEFINE_integer("max_waiting", 256, "maximum answers that wait for a slot", lower_bound=0)
flags.DEFINE_integer(
    "max_waiting_tokens",
    None,
    "maximum tokens, prompt and max_tokens together, of answers that wait; any number by default",
    lower_bound=1,
)
flags.DEFINE_integer(
    "max_beams", 4, "maximum beams of a search; 1 for no beam search", lower_bound=1
)
flags.DEFINE_integer(
    "max_body_bytes", 1 << 20, "maximum size of a request's body", lower_bound=1024
)
flags.DEFINE_float(
    "request_seconds", 600, "maximum time of a request, until its answer is whole", lower_bound=1
)
flags.DEFINE_float(
    "drain_seconds", 600, "time that running requests have to end after SIGTERM", lower_bound=1
)
flags.DEFINE_bool(
    "log_requests", False, "write a line for each request: client, path, status, time"
)


def load(tokenizer: Tokenizer) -> "ServedModel":
    """Return the model of the flags, behind an engine."""
    mesh = _mesh()
    config, params = load_model(mesh)
    small = load_small_model(mesh, tokenizer)
    engine = Engine(params, config, _engine_settings(), tokenizer.special_tokens, small)
    return ServedModel(engine, params, config, tokenizer)


def _engine_settings() -> EngineSettings:
    settings = engine_settings(FLAGS.prefill_budget)
    return dataclasses.replace(settings, compiles_guided=grammars.is_installed())


def _mesh() -> Mesh | None:
    """Return the mesh of the flags, of devices of all processes.

    Raises:
      MeshError: there is no such mesh, or a process has no device in it.
    """
    if FLAGS.mesh is not None:
        mesh = parse_mesh(FLAGS.mesh)
        lost = set(range(jax.process_count())) - {d.process_index for d in mesh.devices.flat}
        if not lost:
            return mesh
    elif jax.process_count() == 1:
        return None
    raise MeshError(
        f"--mesh={FLAGS.mesh}: {jax.process_count()} processes serve one model on devices of all "
        f"of them, of which there are {jax.device_count()}: such as --mesh=1,1,{jax.device_count()}"
    )


def main() -> None:
    if _missing is not None:
        raise UserError(f"{_missing} is missing: pip install 'glm_jax[serve]'")
    index, count = cli.join_processes(saves_at_sigterm=False)
    events.show()
    if count == 1:
        _serve()
        return
    coordinator, *_ = processes.resolve(FLAGS.coordinator, count, index)
    assert coordinator is not None
    link = connect(coordinator, index, count, _shared_settings())
    if isinstance(link, Leader):
        Follower(lambda: load(load_tokenizer()), link).run()
        return
    try:
        _serve(link)
    except BaseException as error:
        link.end(error)
        raise


def _shared_settings() -> dict[str, Any]:
    """Return flags that are the same in all processes of a model."""
    names = [flag.name for flag in FLAGS.flags_by_module_dict()["launch.model_flags"]]
    values = {name: FLAGS[name].value for name in names}
    return values | dataclasses.asdict(_engine_settings())


def _serve(followers: "Followers | None" = None) -> None:
    count = FLAGS.max_connections or DEFAULT_CONNECTIONS.count
    tokenizer = load_tokenizer()  # before anyone is answered
    template = FLAGS.chat_template
    serve(
        lambda: load(tokenizer),
        Serving(
            name=FLAGS.name or Path(FLAGS.checkpoint).resolve().name,
            adapters=adapter_names(),
            host=FLAGS.host,
            port=FLAGS.port,
            max_waiting=FLAGS.max_waiting,
            max_waiting_tokens=FLAGS.max_waiting_tokens,
            limits=Limits(FLAGS.request_seconds, FLAGS.max_body_bytes, FLAGS.max_beams),
            keys=None if FLAGS.api_keys is None else Keys.read(FLAGS.api_keys),
            cors_origins=FLAGS.cors_origin,
            allowed_hosts=FLAGS.allowed_host,
            trusted_proxies=FLAGS.trusted_proxy,
            connections=dataclasses.replace(DEFAULT_CONNECTIONS, count=count),
            drain_seconds=FLAGS.drain_seconds,
            logs_requests=FLAGS.log_requests,
            chat_template=None if template is None else ChatTemplate.read(packaged(template)),
        ),
        followers,
    )


if __name__ == "__main__":
    cli.run(main)
