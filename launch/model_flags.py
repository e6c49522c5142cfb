"""Flags of the launchers that give a model texts to fill."""

import functools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from jax.sharding import Mesh

from glm_jax.checkpoints.model_folder import load_config, restore
from glm_jax.checkpoints.random_weights import is_random, random_config, random_model
from glm_jax.config import CACHE_DTYPES, COMPUTE_DTYPES, GLMConfig
from glm_jax.engine.draft_model import SmallModel
from glm_jax.engine.engine import EngineSettings
from glm_jax.engine.generation_settings import SETTINGS, SamplingError, Setting
from glm_jax.errors import UserError
from glm_jax.generation.text_request import TextRequest
from glm_jax.model.device_layout import prepare
from glm_jax.model.params import GLMParams
from glm_jax.quantization import QuantizationError, Scheme
from glm_jax.tokenizer import MODEL_FILE, Tokenizer, byte_tokenizer, check_fits

FLAGS = flags.FLAGS
# Flags that decide what a model answers; another mesh or more slots do not.
_MODEL_IDENTITY = (
    "checkpoint",
    "tokenizer",
    "dtype",
    "quantization",
    "activation_bits",
    "embedding_bits",
    "cache_dtype",
)
_NAMED_FOLDER = re.compile(r"(\w[\w.:-]{0,255})=(.+)")
# Settings that have no flag of their name; --ban gives banned_texts.
_WITHOUT_FLAG = (
    "banned_tokens",
    "banned_texts",
    "log_probabilities",
    "logit_bias",
    "priority",  # which a command has no other request to compare with
    "guided_choice",
)
_DEFINE: dict[type, Any] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    str: flags.DEFINE_string,
    dict: flags.DEFINE_string,
}


def define_model_flags(names_adapters: bool = False) -> None:
    """Define which model, in which precision, and where.

    Args:
      names_adapters: whether requests choose among several adapters by name.
    """
    flags.DEFINE_string(
        "checkpoint",
        None,
        "a model folder; or random:SIZE, such as random:130b, for random weights",
    )
    flags.DEFINE_string(
        "tokenizer", None, "tokenizer's folder or .model file; the checkpoint's by default"
    )
    flags.DEFINE_string(
        "mesh",
        None,
        "mesh of devices, sizes of data,fsdp,tensor such as 1,1,8; one device by default",
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        COMPUTE_DTYPES,
        "dtype of weights and computation; as stored by default; tensorfloat32 is float32 whose "
        "matrix products accelerators may round",
    )
    flags.DEFINE_string(
        "quantization",
        None,
        "quantises a float checkpoint: int8, int4, or such as int4,group=128,zero_point",
    )
    _define_adapter_flag(names_adapters)
    flags.DEFINE_integer(
        "activation_bits",
        None,
        "8 quantises activations, so that INT8 and INT4 products are of integers; on one CPU",
    )
    flags.register_validator("activation_bits", lambda bits: bits in (None, 8), "expected 8")
    flags.DEFINE_integer(
        "embedding_bits", None, "8 or 4 quantises embedding and output projection; on one CPU"
    )
    flags.register_validator("embedding_bits", lambda bits: bits in (None, 8, 4), "expected 8 or 4")
    define_memory_flags()
    flags.DEFINE_integer(
        "max_length",
        None,
        "maximum tokens of text and answer together; the model's positions by default",
        lower_bound=4,
    )
    flags.register_validator("quantization", is_scheme)


def _define_adapter_flag(is_named: bool) -> None:
    about = "folder of adapters that were trained on the checkpoint"
    if is_named:
        about += "; or NAME=FOLDER, repeated for several, of which each request names its own"
    flags.DEFINE_multi_string("adapter", [], about)
    flags.register_validator("adapter", functools.partial(_are_adapters, is_named))


def _are_adapters(is_named: bool, values: Sequence[str]) -> bool:
    names = [name for name, _ in map(_named_folder, values)]
    if None in names and len(names) > 1:
        raise flags.ValidationError("several adapters need a name each, as in NAME=FOLDER")
    if any(names) and not is_named:
        raise flags.ValidationError(
            f"only serve and decode choose adapters by name: give {names[0]}'s folder alone"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise flags.ValidationError(f"the name {twice[0]} twice: give each its own")
    return True


def _named_folder(value: str) -> tuple[str | None, str]:
    """Return the name and the folder of NAME=FOLDER; a folder alone, even with "=", has no name."""
    named = _NAMED_FOLDER.fullmatch(value)
    return (None, value) if named is None or os.path.exists(value) else (named[1], named[2])


def adapter() -> str | dict[str, str] | None:
    """Return the flag --adapter as `restore` takes it: one folder, or several by name."""
    named = dict(map(_named_folder, FLAGS.adapter))
    return named.get(None, {name: folder for name, folder in named.items() if name} or None)


def adapter_names() -> tuple[str, ...]:
    """Return the names of adapters that requests choose from, in the order of their ids."""
    given = adapter()
    return tuple(given) if isinstance(given, dict) else ()


def model_identity() -> dict[str, Any]:
    """Return what decides the model's answers."""
    return {name: getattr(FLAGS, name) for name in _MODEL_IDENTITY} | {"adapter": adapter()}


def define_memory_flags() -> None:
    """Define the cache's dtype and how much of the weights each device holds."""
    flags.DEFINE_enum(
        "cache_dtype",
        None,
        CACHE_DTYPES,
        "dtype of cached keys and values; that of the computation by default",
    )
    flags.DEFINE_float(
        "weight_memory_limit",
        None,
        "GiB of weights on each device; layers beyond it are streamed from the host's memory",
        lower_bound=0,
    )


def is_scheme(text: str | None) -> bool:
    """Return whether a flag says how to quantise; raise ValidationError if not."""
    try:
        return text is None or bool(Scheme.parse(text))
    except QuantizationError as error:
        raise flags.ValidationError(str(error)) from error


def define_engine_flags() -> None:
    """Define how much an engine computes at once."""
    flags.DEFINE_integer("slots", 16, "maximum requests in the running batch", lower_bound=1)
    flags.DEFINE_integer(
        "cache_tokens",
        None,
        "tokens in the cache of all running requests; 512 a slot by default",
        lower_bound=1,
    )
    flags.DEFINE_integer("prefill_width", 512, "maximum tokens of a prefill batch", lower_bound=32)
    define_speculation_flags()


def define_speculation_flags() -> None:
    """Define how far a step guesses ahead, and what a smaller model guesses."""
    flags.DEFINE_integer(
        "speculate",
        0,
        "maximum draft tokens of each request, guessed from its own text, that a step checks "
        "beside its next token; the answers stay the same",
        lower_bound=0,
    )
    flags.DEFINE_string(
        "draft_checkpoint",
        None,
        "folder of a smaller model with the same tokenizer, which guesses for --speculate where a "
        "request's own text suggests nothing",
    )


def engine_settings(prefill_budget: int | None = None) -> EngineSettings:
    """Return an engine's settings from the flags.

    Args:
      prefill_budget: see `EngineSettings`.
    """
    return EngineSettings(
        slots=FLAGS.slots,
        max_length=FLAGS.max_length,
        cache_tokens=FLAGS.cache_tokens,
        prefill_width=FLAGS.prefill_width,
        prefill_budget=prefill_budget,
        speculate=FLAGS.speculate,
    )


def define_strategy_flags() -> None:
    """Define how tokens are chosen: the table of `GenerationSettings` as flags."""
    for name, setting in SETTINGS.items():
        if name not in (*_WITHOUT_FLAG, "seed"):
            _DEFINE[setting.kind](name, setting.default, _help(setting))
            flags.register_validator(name, functools.partial(_is_setting, name))
    # A request's own seed may be missing, not a command's.
    flags.DEFINE_integer("seed", 0, f"seed of sampling; {SETTINGS['seed'].range}")
    flags.register_validator("seed", functools.partial(_is_setting, "seed"))
    choice = f"{SETTINGS['guided_choice'].help}; may be repeated"
    flags.DEFINE_multi_string("guided_choice", None, choice)
    flags.register_validator("guided_choice", functools.partial(_is_setting, "guided_choice"))
    flags.DEFINE_multi_string("ban", [], "a text that no answer contains; may be repeated")
    flags.register_validator("ban", functools.partial(_is_setting, "banned_texts"))


def _help(setting: Setting) -> str:
    return f"{setting.help}; {setting.range}" if setting.range else setting.help


def _is_setting(name: str, value: Any) -> bool:
    try:
        return value is None or SETTINGS[name].checked(name, value) is not None
    except SamplingError as error:
        # absl names the flag and its value.
        raise flags.ValidationError(re.sub(rf"^{name}=.*?: ", "", str(error))) from error


def strategy() -> TextRequest:
    """Return a request with the flags' settings and no text.

    Raises:
      UserError: settings contradict each other.
    """
    named = [name for name in SETTINGS if name not in (*_WITHOUT_FLAG, "seed")]
    settings = {name: getattr(FLAGS, name) for name in named}
    request = TextRequest(
        **settings, banned_texts=tuple(FLAGS.ban), guided_choice=tuple(FLAGS.guided_choice or ())
    )
    request.choice(lambda text: [0])  # before a model is read
    return request


def model_config() -> GLMConfig:
    """Return the config of the flags' model, without its weights.

    Raises:
      UserError: there is no such model.
    """
    return (random_config if is_random(FLAGS.checkpoint) else load_config)(FLAGS.checkpoint)


def load_tokenizer() -> Tokenizer:
    """Return the flags' tokenizer; by default, for random weights, one whose tokens are bytes.

    Raises:
      UserError: there is no tokenizer, it is another model's, or there is no such model.
    """
    config = model_config()
    if is_random(FLAGS.checkpoint):
        if FLAGS.tokenizer is None:
            assert config.special_tokens is not None
            print("no --tokenizer: each byte of a text is a token", file=sys.stderr)
            return byte_tokenizer(config.special_tokens, config.vocab_size)
        config = config.replace(special_tokens=None)  # random weights know none
    tokenizer = Tokenizer(FLAGS.tokenizer or FLAGS.checkpoint)
    check_fits(tokenizer, config)
    return tokenizer


def load_model(mesh: Mesh | None) -> tuple[GLMConfig, GLMParams]:
    """Return the flags' model, prepared for decoding.

    Raises:
      UserError: there is no such model, or it does not fit the flags.
    """
    form = mesh, FLAGS.dtype, FLAGS.quantization, FLAGS.weight_memory_limit
    if not is_random(FLAGS.checkpoint):
        config, params = restore(FLAGS.checkpoint, *form, adapter())
    elif FLAGS.adapter:
        given = FLAGS.adapter[0]
        raise UserError(f"--adapter={given}: random weights take no adapter: leave it out")
    else:
        print(f"{FLAGS.checkpoint}: random weights: the answers mean nothing", file=sys.stderr)
        config, params = random_model(FLAGS.checkpoint, *form)
    config = config.replace(cache_dtype=FLAGS.cache_dtype)
    return config, prepare(params, FLAGS.activation_bits, FLAGS.embedding_bits, donate=True)


def load_small_model(mesh: Mesh | None, tokenizer: Tokenizer) -> SmallModel | None:
    """Return the model that writes drafts, if the flags name one.

    Args:
      tokenizer: the flags' model's.

    Raises:
      UserError: there is no such model, or it has another tokenizer.
    """
    folder = FLAGS.draft_checkpoint
    if folder is None:
        return None
    if not FLAGS.speculate:
        raise UserError(
            f"--draft_checkpoint={folder}: give --speculate, the tokens that it guesses at most"
        )
    config = load_config(folder)
    check_fits(tokenizer, config)
    own = Path(folder) / MODEL_FILE
    if own.exists() and own.read_bytes() != tokenizer.files[0].read_bytes():
        raise UserError(
            f"--draft_checkpoint={folder}: another tokenizer than {tokenizer.files[0]}: a model "
            "that guesses tokens needs the same"
        )
    config, params = restore(folder, mesh, FLAGS.dtype)
    return SmallModel(params, config)
