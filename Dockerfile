# The image, by Docker, Podman or Buildah: `make image`. Singularity.def is the other door to the same
# recipe, setup/install_image.sh. The defaults of all build arguments stand here and nowhere else.

# Small, with CUDA's compatibility libraries, Python 3.12 on Ubuntu 24.04; torch brings the rest of CUDA 12
# in its packages. In public use with this digest: openwall/john-packages, deploy/readme.md.
ARG BASE_IMAGE=docker.io/nvidia/cuda:12.6.3-base-ubuntu24.04@sha256:c87e78933f4c16e3272123bf2f75537306596d0fbaa395a29696a22786e5ee0e
FROM ${BASE_IMAGE}

# kernels for sm_80 (A100) and sm_90 (H100, H200) are in this build; it runs with drivers from 525 on
ARG TORCH_VERSION=2.13.0
ARG TORCH_CUDA=cu126
ARG TORCH_INDEX=https://download.pytorch.org/whl

WORKDIR /opt/lora/src
# what changes seldom first: the layer is kept while only the project changes
COPY requirements.lock ./
COPY setup/install.sh setup/install_image.sh setup/
RUN setup/install_image.sh packages

ARG BASE_IMAGE
ARG COMMIT=unknown
ARG VERSION=unknown
COPY . .
RUN setup/install_image.sh project

LABEL org.opencontainers.image.title="lora-train" \
      org.opencontainers.image.description="LoRA fine-tuning of language models on Slurm clusters" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.version="${VERSION}"

# What must hold without the entrypoint too (apptainer exec, pyxis); %environment in Singularity.def is the same.
# lora-train in bin/ is the entrypoint. The driver is judged by preflight, which says what to do.
ENV PATH=/opt/lora/bin:/opt/lora/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    LC_ALL=C.UTF-8 \
    PYTHONNOUSERSITE=1 \
    PYTHONSAFEPATH=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_DISABLE_REQUIRE=1

WORKDIR /workspace
ENTRYPOINT ["/opt/lora/entrypoint/entrypoint.sh"]
