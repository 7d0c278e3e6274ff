"""Package layout; metadata and tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["sentencekv", "sentencekv.*", "triton_ops", "triton_ops.*"]),
    package_data={
        "sentencekv": ["py.typed"],
        "sentencekv.pocket": ["*.json", "*.jinja", "*.safetensors", "*.md"],
        "sentencekv.punkt": ["*.json", "*.txt"],
    },
)
