# Exports SAM 3's image encoder and builds its TensorRT plan in the NVIDIA container of one month, so that the Triton
# container of the same month can load the plan. compose.yaml uses this image. Never built or run yet: this project has
# had no machine with docker and a GPU.
ARG MONTH=25.09
FROM nvcr.io/nvidia/tensorrt:${MONTH}-py3

# TensorRT of that month, as export/contract/triton_containers.py lists it
ARG TENSORRT=10.13.3

# versions of Ubuntu's packages come with the base image
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/neck-export

WORKDIR /src
COPY pyproject.toml README.md LICENSE neck_export.py ./
COPY neck neck
COPY export export
COPY engines engines
COPY benchmarks benchmarks
RUN /opt/neck-export/bin/pip install --no-cache-dir '.[gpu,triton]' "tensorrt==${TENSORRT}.*"

ENV PATH=/opt/neck-export/bin:$PATH
WORKDIR /work
USER 1000:1000
ENTRYPOINT ["neck-export"]
CMD ["doctor"]
