"""Fills blanks in texts that are typed in, or in each line of a file.

python -m launch.generate --checkpoint=DIR [--quantization=int4] [--input=FILE]
"""

from absl import flags

from glm_jax import cli
from glm_jax.decoding.beams import BeamSearch
from glm_jax.decoding.generate import PromptError, prepare
from glm_jax.decoding.interactive import fill_all, prompts
from glm_jax.decoding.sampling import Sampling, SamplingError
from glm_jax.model.checkpoint import restore
from glm_jax.quantization import QuantizationError, Scheme
from glm_jax.sharding import parse_mesh
from glm_jax.tokenizer import Tokenizer

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "a model folder", required=True)
flags.DEFINE_string("tokenizer", None, "folder or .model file; the checkpoint's by default")
flags.DEFINE_string("input", None, "a text a line; asked for in the terminal by default")
flags.DEFINE_string("mesh", None, "sizes of data,fsdp,tensor, such as 1,1,8; one device by default")
flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "as stored by default")
flags.DEFINE_string(
    "quantization", None, "quantises a float checkpoint: int8, int4, or int4,group=128,zero_point"
)
flags.DEFINE_integer(
    "activation_bits", None, "8: integer products of INT8 and INT4, on one CPU", 8, 8
)
flags.DEFINE_integer(
    "embedding_bits", None, "8 or 4: embedding and output projection too, on one CPU"
)
flags.register_validator("embedding_bits", lambda bits: bits in (None, 8, 4), "8 or 4")
flags.DEFINE_enum(
    "cache_dtype", None, ["float32", "bfloat16", "float16", "int8"], "of keys and values"
)
flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token")
flags.DEFINE_integer("top_k", 0, "keep only the k likeliest tokens; 0 keeps all")
flags.DEFINE_float("top_p", 0.0, "keep the likeliest tokens up to this probability; 0 keeps all")
flags.DEFINE_integer("num_beams", 1, "above 1: beam search, which takes no sampling", lower_bound=1)
flags.DEFINE_float("length_penalty", 1.0, "of beam search; higher favours longer answers")
flags.DEFINE_integer("no_repeat_ngram", 0, "of beam search: n tokens never twice", lower_bound=0)
flags.DEFINE_integer("min_tokens", 0, "of beam search: before an answer may end", lower_bound=0)
flags.DEFINE_integer("max_length", None, "tokens of text and answer together")
flags.DEFINE_integer("seed", 0, "of sampling")


@flags.validator("quantization")
def _is_scheme(text: str | None) -> bool:
    try:
        return text is None or bool(Scheme.parse(text))
    except QuantizationError as error:
        raise flags.ValidationError(str(error)) from error


def _strategy() -> Sampling | BeamSearch:
    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
    if FLAGS.num_beams == 1:
        return sampling
    if not sampling.is_greedy:
        raise SamplingError("--num_beams searches, it does not sample: leave out --temperature")
    return BeamSearch(
        FLAGS.num_beams, FLAGS.length_penalty, FLAGS.no_repeat_ngram, FLAGS.min_tokens
    )


def main() -> None:
    strategy = _strategy()
    texts = prompts(FLAGS.input)
    tokenizer = Tokenizer(FLAGS.tokenizer or FLAGS.checkpoint)
    mesh = None if FLAGS.mesh is None else parse_mesh(FLAGS.mesh)
    config, params = restore(FLAGS.checkpoint, mesh, FLAGS.dtype, FLAGS.quantization)
    config = config.replace(cache_dtype=FLAGS.cache_dtype)
    params = prepare(params, FLAGS.activation_bits, FLAGS.embedding_bits)
    failures = fill_all(params, config, tokenizer, texts, strategy, FLAGS.max_length, FLAGS.seed)
    if failures:
        raise PromptError(f"{failures} of the texts could not be filled")


if __name__ == "__main__":
    cli.run(main)
