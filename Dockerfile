# Linux with an NVIDIA GPU (and its container toolkit), or without a GPU:
#
#   docker build -t lora-training .
#   docker build -t lora-training --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --rm --gpus all --shm-size 2g --user "$(id -u):$(id -g)" \
#     -v "$PWD/pictures:/pictures:ro" -v "$PWD/models:/models:ro" -v "$PWD/output:/output" -v lora-hub:/hub \
#     lora-training python train.py /pictures --base /models/sdxl.safetensors --trigger "mycat, a cat" --output_dir /output
FROM python:3.12-slim

# Triton, which --compile uses, builds with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /app
ARG TORCH_INDEX
COPY requirements.txt requirements.lock ./
COPY library/environment/lock_file.py library/
# Before all else: builds after a change of the sources reuse these layers.
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} "$(grep ^torch requirements.txt)"
# The other packages as tested, checked by their hashes.
RUN python -c "from library.environment.lock_file import *; print(format_entries(open('requirements.lock').read(), False, True))" > /tmp/beside-torch.lock && pip install --no-cache-dir --require-hashes --no-deps -r /tmp/beside-torch.lock
# Any user may write there, so that --user gives the files to whoever starts the container.
RUN install -d -m 1777 /output /hub
ENV HF_HOME=/hub HOME=/tmp
VOLUME /pictures /models /output /hub
USER 1000
COPY . .

CMD ["python", "tools/start.py", "doctor"]
