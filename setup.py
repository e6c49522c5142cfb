"""Package metadata. `requirements.txt` pins the versions that are tested together."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="glm_jax",
    version="0.1.0",
    description="GLM-130B, the open bilingual model, in JAX on an SPMD mesh",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["glm_jax*", "convert*", "launch*", "configs*"]),
    package_data={"glm_jax.data.tables": ["*.tsv"]},
    install_requires=[
        "absl-py>=2.1",
        "flax>=0.12",
        "grain>=0.2.16",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "beartype",
            "hypothesis",
            "mypy",
            "pytest",
            "ruff",
            "torch==2.13.0",
            "types-tqdm",
        ],
        # The converters read PyTorch's files by themselves; nothing more is needed for
        # paths on a local disk.
        "convert": [],
        "cuda12": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
    },
)
