# The GPU stack: PyTorch and Transformer Engine as NVIDIA builds them, and this project on top.
#
# This file is written but has not been built here: the project is developed on machines without
# Docker. The tag of the base image is a default to be replaced by the release that your driver
# supports; its Transformer Engine should be 2.20, the version that the project is tested with
# (pyproject.toml, extra `te`).
#
#   docker build -t proma_megatron .
#   docker run --gpus all --ipc host --rm proma_megatron proma doctor
ARG BASE=nvcr.io/nvidia/pytorch:26.11-py3
FROM ${BASE}

WORKDIR /opt/proma_megatron
COPY . .

# The image's own torch and Transformer Engine are kept, at the versions that are installed: pip
# would otherwise replace torch by one that Transformer Engine was not compiled against.
RUN python -m pip list --format=freeze | grep -iE '^(torch|transformer[_-]engine)==' > kept.txt \
    && python -m pip install --no-cache-dir --constraint kept.txt '.[launch]' \
    && rm kept.txt

WORKDIR /workspace
CMD ["proma", "--help"]
