"""Measures speed as ratios within one run: `make bench`.

    python -m launch.benchmark --suite=kernels --output=bench_output
    python -m launch.benchmark --suite=gpu [--skip=torch --checkpoint=random:13b]

The suite `gpu` is for one GPU: what the card reaches, products, the 130B's decode steps and a
train step, in at most nine minutes, with a table for docs/performance.md.

Every round runs each case, so that a machine whose speed drifts drifts for all. A pause
before each lets the threads of the case before it go to sleep: PyTorch's spin for some
milliseconds after their work, on the cores that the next case needs. Each case's own threads
are then woken by a run that does not count.
"""

import contextlib
import importlib
import statistics
import time
from pathlib import Path

import jax
from absl import flags

from glm_jax import cli
from glm_jax.checkpoints.random_weights import is_random
from glm_jax.errors import UserError
from glm_jax.files import explained, replacing, write_text
from glm_jax.text_files import to_json
from launch.suites import gpu, gpu_report
from launch.suites.case import Case
from launch.suites.gpu_parts import SHAPES

FLAGS = flags.FLAGS
# Where each suite is: one is imported alone, for others may need packages that are not there.
_SUITES = {
    "convert": "convert",
    "decode": "decode",
    "evaluate": "evaluate",
    "decode_step": "products",
    "kernels": "products",
    "restore": "restore",
    "serve": "serve",
    "train": "train",
}
_PAUSE = 0.02  # seconds
flags.DEFINE_enum("suite", "decode_step", [*_SUITES, "gpu"], "what to measure")
flags.DEFINE_integer("rounds", 15, "timed runs of each case", lower_bound=3)
flags.DEFINE_string("output", "bench_output", "folder for SUITE.json and SUITE.png")
flags.DEFINE_multi_enum(
    "skip", [], list(gpu.PARTS), "a part of --suite=gpu to leave out; may be repeated"
)
flags.DEFINE_string(
    "checkpoint", "random:130b", "model of --suite=gpu: a model folder, or random:SIZE"
)
flags.DEFINE_string(
    "quantization", None, "quantization of --suite=gpu's model; int4 for random weights by default"
)
flags.DEFINE_enum("shapes", "full", list(SHAPES), "shapes of --suite=gpu; tiny to try it on a CPU")


def interleaved(cases: dict[str, Case], rounds: int) -> dict[str, list[float]]:
    """Return seconds of each run of each case; a first round, which compiles, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        counted = number > 0
        for name, case in cases.items():
            if (case.is_long and not counted) or number > case.max_rounds:
                continue
            time.sleep(_PAUSE)
            if not case.is_long:
                jax.block_until_ready(case.run())
            case.prepare()
            began = time.perf_counter()
            jax.block_until_ready(case.run())
            if counted:
                seconds[name].append((time.perf_counter() - began) / case.count)
    return seconds


def report(title: str, seconds: dict[str, list[float]]) -> None:
    """Print medians, spread, and how many times as fast as the first case each is."""
    first = next(iter(seconds))
    base = statistics.median(seconds[first])
    print(f"\n{title}\n{'case':<24}{'median ms':>10}{'min':>9}{'max':>9}{first + ' / case':>16}")
    for name, times in seconds.items():
        low, median, high = (1e3 * f(times) for f in (min, statistics.median, max))
        print(f"{name:<24}{median:>10.2f}{low:>9.2f}{high:>9.2f}{1e3 * base / median:>16.2f}")


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the medians of each title's cases as bars, spread as lines, into a PNG."""
    from matplotlib import pyplot  # which measuring on a GPU does without

    figure, all_axes = pyplot.subplots(
        len(results), figsize=(10, 3.2 * len(results)), squeeze=False, layout="constrained"
    )
    for axes, (title, seconds) in zip(all_axes[:, 0], results.items(), strict=True):
        middle = [1e3 * statistics.median(times) for times in seconds.values()]
        low = [m - 1e3 * min(t) for m, t in zip(middle, seconds.values(), strict=True)]
        high = [1e3 * max(t) - m for m, t in zip(middle, seconds.values(), strict=True)]
        axes.barh(list(seconds), middle, xerr=[low, high])
        axes.invert_yaxis()
        axes.set(title=title, xlabel="milliseconds")
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    pyplot.close(figure)


def main() -> None:
    output = Path(FLAGS.output)
    with explained(output):  # before minutes of measuring
        output.mkdir(parents=True, exist_ok=True)
    if FLAGS.suite == "gpu":
        measure_gpu(output)
        return
    suite = importlib.import_module(f"launch.suites.{_SUITES[FLAGS.suite]}")
    results = {}
    for title, cases in getattr(suite, f"{FLAGS.suite}_suite")():
        results[title] = interleaved(cases, FLAGS.rounds)
        report(title, results[title])
    write_text(output / f"{FLAGS.suite}.json", to_json(results, indent=2))
    plot(results, output / f"{FLAGS.suite}.png")


def measure_gpu(output: Path) -> None:
    """gpu.json, gpu.md and gpu.png; the tables are printed too.

    Raises:
      UserError: nothing could be measured.
    """
    checkpoint, quantization = FLAGS.checkpoint, FLAGS.quantization
    if quantization is None and is_random(checkpoint):
        quantization = "int4"

    def save(results: gpu.Results) -> None:
        write_text(output / "gpu.json", to_json(results, indent=1) + "\n")
        write_text(output / "gpu.md", gpu_report.markdown(results))

    results = gpu.measure(FLAGS.skip, FLAGS.shapes, checkpoint, quantization, save)
    save(results)
    print(f"\n{gpu_report.markdown(results)}\nwritten to {output / 'gpu.json'} and gpu.md")
    with contextlib.suppress(ModuleNotFoundError):  # matplotlib
        gpu_report.draw(results, output / "gpu.png")
    if "device" not in results and set(FLAGS.skip) != set(gpu.PARTS):
        raise UserError(f"nothing was measured: {results['left_out']}")


if __name__ == "__main__":
    cli.run(main)
