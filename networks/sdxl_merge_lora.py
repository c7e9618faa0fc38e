"""The path under which other programs merge LoRAs for SDXL, which is not supported yet."""

import sys

if __name__ == "__main__":
    print(
        "error: merging into SDXL checkpoints is not supported yet; several LoRA files of any base model are merged "
        "into one by tools/merge_lora.py without --sd_model",
        file=sys.stderr,
    )
    sys.exit(1)
