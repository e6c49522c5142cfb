"""A batch job of one process: its share of a file's requests, answered into a folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from glm_jax import processes
from glm_jax.config import GLMConfig
from glm_jax.engine.draft_model import SmallModel
from glm_jax.engine.engine import Engine, EngineSettings
from glm_jax.engine.speculation import DraftCounts
from glm_jax.generation.blank_filling import TextCodec
from glm_jax.generation.text_request import TextRequest
from glm_jax.jobs import record_store
from glm_jax.jobs.record_store import AnswerWriter, JobError
from glm_jax.jobs.request_files import read_by_priority
from glm_jax.jobs.request_runner import RequestRunner, share
from glm_jax.model.params import GLMParams
from glm_jax.progress import progress_bar
from glm_jax.sharding import make_mesh, parse_mesh, parse_replica_mesh


@dataclasses.dataclass(frozen=True)
class Share:
    """The share of a process in a job.

    Attributes:
      process, count: it answers every count-th request, from number `process` on.
      mesh: of its model; None for one device.
      writes: whether it writes answers; of processes that run one model together, one does.
    """

    process: int
    count: int
    mesh: Mesh | None
    writes: bool = True

    @classmethod
    def of_process(cls, mesh: str | None, process: int, count: int) -> "Share":
        """Return the share of a process of `count`, given the mesh of all of them.

        Raises:
          MeshError: the mesh does not fit the devices.
          JobError: processes that would run one model together cannot find each other.
        """
        if mesh is None:
            alone = make_mesh((1, 1, 1), jax.local_devices()) if count > 1 else None
            return cls(process, count, alone)
        if count == 1:
            return cls(0, 1, parse_mesh(mesh))
        replica = parse_replica_mesh(mesh, count)
        if replica is not None:
            return cls(process, count, replica)
        if jax.process_count() != count:
            raise JobError(
                f"--mesh={mesh}: its data axis does not divide by {count} processes, so that they "
                "run one model together: give host:port of process 0 by --coordinator"
            )
        return cls(0, 1, parse_mesh(mesh), processes.is_first())


@dataclasses.dataclass(frozen=True)
class BatchJob:
    """A job.

    Attributes:
      source: the file of requests.
      folder: of the answers.
      defaults: settings that requests do not have themselves.
      seed, truncates, adapters: see `RequestRunner`.
    """

    source: Path
    folder: Path
    defaults: TextRequest
    seed: int
    truncates: bool
    settings: EngineSettings
    adapters: tuple[str, ...] = ()

    def claim(self, model: dict[str, Any]) -> None:
        """Write the job's description into its folder, or check that it is this job's.

        Args:
          model: what must be the same when the job goes on, beside the requests.

        Raises:
          JobError: the input cannot be read, or the folder is another job's.
        """
        job = model | _settings(self.defaults)
        job |= {"input": record_store.describe_input(self.source)}
        job |= {"seed": self.seed, "truncates": self.truncates}
        job |= {"max_length": self.settings.max_length}
        record_store.claim(self.folder, job, defaults=_settings(TextRequest()))


def _settings(request: TextRequest) -> dict[str, Any]:
    """Return a request's settings as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(request)))


class Counts(NamedTuple):
    """Numbers of answered and of failed requests, and drafts of speculative decoding."""

    answered: int
    failed: int
    drafts: DraftCounts = DraftCounts(0, 0)


def run_batch(
    job: BatchJob,
    part: Share,
    config: GLMConfig,
    params: GLMParams,
    tokenizer: TextCodec,
    small_model: SmallModel | None = None,
) -> Counts:
    """Answer the remaining requests of a process's share, with a progress bar.

    Args:
      small_model: see `Engine`.

    Returns:
      Numbers of requests answered now and of those whose answer is an error, and the drafts of the
      process.

    Raises:
      JobError: answers cannot be written.
      PromptError: engine settings that the model does not allow.
    """
    requests = record_store.requests_of(job.folder)
    done = record_store.answered(job.folder, requests)
    processes.wait("answers that are there are known")
    own = range(part.process, requests, part.count)
    engine = Engine(params, config, job.settings, tokenizer.special_tokens, small_model)
    runner = RequestRunner(
        engine,
        params,
        config,
        tokenizer,
        seed=job.seed,
        truncates=job.truncates,
        adapters=job.adapters,
    )
    writer = AnswerWriter(job.folder, part.process) if part.writes else None
    source = read_by_priority(job.source, job.defaults)
    lines = share(source, done, part.process, part.count)
    counts = Counts(0, 0)
    bar = progress_bar(
        desc="answers",
        unit="prompt",
        total=len(own),
        initial=int(done[own.start :: part.count].sum()),
        disable=writer is None,
    )
    with bar:
        for record in runner.answer(lines):
            if writer is not None:
                writer.write(record)
            has_failed = "error" in record
            counts = Counts(counts.answered + (not has_failed), counts.failed + has_failed)
            bar.update()
            seconds = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{runner.generated / max(seconds, 1e-9):.0f} tokens/s", False)
    if writer is not None:
        writer.close()
    return counts._replace(drafts=engine.drafts)
