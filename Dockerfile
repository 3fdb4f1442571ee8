# syntax=docker/dockerfile:1
# One image per kind of chip, all of the same wheel:
#
#   docker build -t mxn .
#   docker run -p 127.0.0.1:8000:8000 -v mxn:/var/lib/mxn -e MXN_API_KEY=choose-one mxn
#
#   docker build -t mxn:cuda --build-arg CHIP=cuda .        docker run --gpus all ...
#   docker build -t mxn:rocm --build-arg CHIP=rocm .        docker run --device /dev/kfd --device /dev/dri --group-add video ...
#
# Inside the container the server has to listen on all addresses, so it does not start without MXN_API_KEY.
# PyTorch's wheels bring their own CUDA and ROCm libraries: the host needs the driver only.

ARG CHIP=cpu
ARG PYTHON=python:3.12-slim-bookworm

FROM ${PYTHON} AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    PIP_CONSTRAINT=/constraints.txt PIP_BUILD_CONSTRAINT=/constraints.txt PYTHONDONTWRITEBYTECODE=1
COPY constraints.txt /constraints.txt

# ---------------------------------------------------------------- the wheel, the same for every chip
FROM base AS wheel
RUN pip install hatchling
WORKDIR /source
COPY . .
RUN hatchling build -t wheel -d /wheel

# ---------------------------------------------------------------- torch for a chip; it changes less often than mxn does
FROM base AS torch-cpu
RUN pip install --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
ENV MXN_EXTRA=cpu

FROM base AS torch-cuda
RUN pip install --extra-index-url https://download.pytorch.org/whl/cu130 torch==2.13.0+cu130
ENV MXN_EXTRA=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base AS torch-rocm
RUN pip install --extra-index-url https://download.pytorch.org/whl/rocm7.2 torch==2.13.0+rocm7.2
ENV MXN_EXTRA=rocm

# ---------------------------------------------------------------- the image
FROM torch-${CHIP} AS image
# Kernels are built for the CPU or GPU they run on, the first time a model is loaded.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN --mount=from=wheel,source=/wheel,target=/wheel pip install "$(ls /wheel/*.whl)[${MXN_EXTRA}]"

RUN useradd --system --uid 10001 --user-group --create-home mxn && install -d -o mxn -g mxn /var/lib/mxn
USER mxn
ENV MXN_CACHE_DIR=/var/lib/mxn/cache MXN_DATA_DIR=/var/lib/mxn/data PYTHONDONTWRITEBYTECODE=
VOLUME /var/lib/mxn
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["mxn"]
CMD ["serve", "--host", "0.0.0.0"]
