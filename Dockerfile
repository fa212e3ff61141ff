# ncalign with what its demo needs. `docker build -t ncalign .`, then `docker run --rm -v "$PWD:/work" ncalign --help`.
# With GPUs: `docker run --gpus all ...`; torch's wheel brings its CUDA libraries.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /ncalign
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN python -m pip install --no-cache-dir -c constraints.txt '.[demo]'

RUN useradd --create-home user && install -d -o user /work /home/user/.cache /home/user/.cache/ncalign
USER user
# Models and log-probs are kept here: mount a volume to keep them from run to run.
ENV NCALIGN_CACHE=/home/user/.cache/ncalign
WORKDIR /work
ENTRYPOINT ["ncalign"]
