# Linux with an NVIDIA GPU (and its container toolkit), or without a GPU:
#
#   docker build -t lora-training .
#   docker build -t lora-training --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --rm --gpus all --shm-size 2g -v "$PWD/models:/models" -v "$PWD/output:/app/output" lora-training \
#     python sdxl_train_network.py --recipe sdxl_character --pretrained_model_name_or_path /models/sdxl.safetensors ...
FROM python:3.12-slim

# Triton, which --compile uses, builds with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /app
ARG TORCH_INDEX
COPY requirements.txt ./
# Before all else: builds after a change of the sources reuse these layers.
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url $TORCH_INDEX} "$(grep ^torch requirements.txt)"
RUN pip install --no-cache-dir -r requirements.txt
COPY . .

CMD ["python", "tools/start.py", "doctor"]
