"""T-LoRA as a separate kind: LoRA with the network argument `tlora` (networks/core/changes/tlora.py)."""

from dataclasses import replace

from networks.core.kinds import lora

KIND = replace(lora.KIND, network_module="networks.tlora", presets={"tlora": "True"})
