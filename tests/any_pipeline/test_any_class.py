"""Classes of diffusers that no table of tests lists, built by one rule, are measured and pass the check."""

import pytest

from library.architectures.any_pipeline.check import check, require_exact
from library.architectures.any_pipeline.measuring import measure
from tests.any_pipeline.any_class import build_parts
from tests.any_pipeline.test_refusals import list_pipelines
from tests.tiny.pipeline_parts import replace_ftfy
from tests.tiny.pipelines import build_tiny_pipeline, watch_pipeline

SIZE = (64, 64)
BUILT = (
    "BriaPipeline", "CogVideoXPipeline", "CogView3PlusPipeline", "CogView4Pipeline", "HunyuanVideoPipeline",
    "LTXPipeline", "QwenImagePipeline", "SanaPAGPipeline", "SanaPipeline", "SkyReelsV2Pipeline", "WanPipeline",
)  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("name", BUILT)
def test_a_class_that_the_rule_builds_is_measured(name: str) -> None:
    """Those of videos draw one frame."""
    kind = list_pipelines()[name]
    module = kind.__module__.removeprefix("diffusers.pipelines.")
    replace_ftfy(module)
    watched = watch_pipeline(build_tiny_pipeline(name, builder=lambda: build_parts(kind)))
    require_exact(check(watched, *measure(watched, SIZE)))
