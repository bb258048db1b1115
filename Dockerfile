# docker build --tag qmoe . && docker run --rm --volume "$PWD:/models" qmoe quantize SRC DST
# With a GPU: docker run --gpus all. No test of this repository builds it (docs/install.md says what was tried).
FROM python:3.11-slim

# Builds the CPU kernels; Triton needs it at run time on a GPU.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
# First what changes rarely. Another build of torch: --build-arg TORCH_INDEX=URL
COPY constraints.txt .
ARG TORCH_INDEX
RUN pip install --no-cache-dir --constraint constraints.txt \
    ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[report]"

WORKDIR /models
ENTRYPOINT ["qmoe"]
CMD ["--help"]
