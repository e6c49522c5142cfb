"""Package metadata. `requirements.txt` pins the versions that are tested together."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

_KERNELS = "glm_jax/kernels"
_CALLED_BY_XLA = (
    "libglm_jax_cpu",
    "libglm_jax_attention",
    "libglm_jax_paged_attention",
    "libglm_jax_layer_norm",
    "libglm_jax_geglu",
)
_GUIDED = ["llguidance>=1.9"]
_SERVE = [
    *_GUIDED,
    "fastapi>=0.115",
    "h11>=0.16",  # before, bodies in chunks could hide requests
    "jinja2>=3.1.6",  # before, templates could leave its sandbox
    "prometheus_client>=0.20",
    "uvicorn>=0.30",
    "uvloop>=0.19",
]


def kernel(name: str, library: str, *sources: str) -> Extension:
    """Return sources in a kernel's folder as a shared library."""
    folder = f"{_KERNELS}/{name}"
    return Extension(
        f"glm_jax.kernels.{name}.{library}",
        sources=[f"{folder}/{source}" for source in sources],
        depends=[f"{_KERNELS}/threads.h", *map(str, Path(_KERNELS).glob("**/*.inc"))],
        language="c++",
        extra_compile_args=["-O3", "-std=c++17", "-Wno-psabi"],
        optional=True,
    )


def plain_library(folder: str, library: str, source: str) -> Extension:
    """Return a source that Python calls by ctypes."""
    return Extension(
        f"{folder.replace('/', '.')}.{library}",
        sources=[f"{folder}/{source}"],
        language="c++",
        extra_compile_args=["-O3", "-std=c++17"],
        optional=True,
    )


class BuildKernel(build_ext):
    """Builds the CPU kernels as plain shared libraries; without a compiler, goes without."""

    def get_ext_filename(self, fullname: str) -> str:
        name = Path(*fullname.split("."))
        version = f"_ffi{ffi_version()}" if name.name in _CALLED_BY_XLA else ""
        return f"{name}{version}.so"

    def build_extension(self, extension: Extension) -> None:
        extension.include_dirs.append(str(jaxlib_include()))
        super().build_extension(extension)


def jaxlib_include() -> Path:
    import jaxlib

    return Path(jaxlib.__file__).parent / "include"


def ffi_version() -> str:
    """Return the version of XLA's foreign function interface that the kernels are built for.

    jaxlibs with an earlier one refuse them, so that it is part of a library's name.
    """
    header = (jaxlib_include() / "xla/ffi/api/c_api.h").read_text(encoding="utf-8")
    return "_".join(re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header))


setup(
    name="glm_jax",
    version="0.1.0",
    description="GLM-130B, the open bilingual model, in JAX on an SPMD mesh",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["glm_jax*", "convert*", "launch*", "configs*"]),
    package_data={
        "configs": ["*.yaml", "chat/*.jinja", "prompts/*.yaml", "tasks/**/*.yaml"],
        "glm_jax.data.tables": ["*.tsv"],
        "glm_jax.kernels.quantized_matmul": ["tables/*.json"],
        "glm_jax.serving": ["page/*"],
        "launch": ["kubernetes/*.yaml", "slurm/*.sh"],
    },
    entry_points={"console_scripts": ["glm-jax = launch.__main__:main"]},
    cmdclass={"build_ext": BuildKernel},
    ext_modules=[
        kernel("quantized_matmul", _CALLED_BY_XLA[0], "cpu.cc"),
        kernel("attention", _CALLED_BY_XLA[1], "cpu.cc"),
        kernel("paged_attention", _CALLED_BY_XLA[2], "cpu.cc"),
        kernel("layer_norm", _CALLED_BY_XLA[3], "cpu.cc"),
        kernel("geglu", _CALLED_BY_XLA[4], "cpu.cc"),
        plain_library("glm_jax/checkpoints", "libglm_jax_summed_read", "summed_read.cc"),
        plain_library("convert", "libglm_jax_transpose", "transpose.cc"),
    ],
    install_requires=[
        "absl-py>=2.1",
        "flax>=0.12",
        "array_record>=0.8",
        "etils>=1.9",
        "grain>=0.2.16",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "PyYAML>=6.0",
        "orbax-checkpoint>=0.12",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
        "zstandard>=0.23",
    ],
    extras_require={
        # For answers by a choice, a regular expression or a JSON schema.
        "guided": _GUIDED,
        # For `glm-jax serve`.
        "serve": _SERVE,
        "test": [
            *_SERVE,
            "beartype",
            "hypothesis",
            "kubernetes-validate",
            "mypy",
            "openai",
            "pytest",
            "pytest-xdist",
            "pyarrow",
            "ruff",
            "schemathesis",
            "selenium",
            # Its build for CPUs alone is for Python 3.11.
            "torch==2.13.0; python_version < '3.12'",
            "types-PyYAML",
            "types-tqdm",
        ],
        # To look at a run's `tensorboard` folder, which is written without it.
        "tensorboard": ["tensorboard>=2.17"],
        # Peers of `make bench`, where they build.
        "bench": ["gguf", "llama-cpp-python"],
        # lm-evaluation-harness with our model in it: `glm-jax harness`.
        "harness": ["lm_eval>=0.4.11"],
        # For shards behind gs:// and s3:// addresses; local disks need nothing more.
        "convert": ["fsspec", "gcsfs", "s3fs"],
        # What `make test-aot` compiles with.
        "aot": [
            "jax[cuda12]",
            "jax[tpu]",
            "nvidia-cuda-nvdisasm",
            "pytest",
            "pytest-xdist",
            "tokamax",
        ],
        "cuda12": ["jax[cuda12]", "tokamax"],
        "tpu": ["jax[tpu]"],
    },
)
