"""Classes of diffusers that no table of tests lists, built by one rule, are trained and draw."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from library.architectures.any_pipeline.folder import list_arguments
from library.architectures.any_pipeline.refusals import find_cause
from tests.any_pipeline.published import build_published, find_model
from tests.any_pipeline.test_refusals import list_pipelines
from tests.any_pipeline.test_training import SCRIPT, arguments, weights
from tests.running import Finished
from tests.tiny.more_pipelines import MORE
from tests.tiny.pipelines import PIPELINES

TRAINED = (
    "AnimateDiffPAGPipeline", "AnimateDiffPipeline", "AnimateDiffSDXLPipeline", "CogVideoXPipeline",
    "EasyAnimatePipeline", "HunyuanVideo15Pipeline", "HunyuanVideoPipeline", "Kandinsky5T2VPipeline", "LTXPipeline",
    "LattePipeline", "MochiPipeline", "SemanticStableDiffusionPipeline", "SkyReelsV2DiffusionForcingPipeline",
    "SkyReelsV2Pipeline", "StableDiffusionModelEditingPipeline", "StableDiffusionPanoramaPipeline",
    "StableDiffusionPipelineSafe", "TextToVideoSDPipeline",
)  # fmt: skip
NOT_TRAINED = {
    "AltDiffusionPipeline": "its text encoder is a class of its own module",
    "Cosmos2TextToImagePipeline": "needs torchvision and cosmos_guardrail, which the tests do without",
    "Cosmos2_5_PredictBasePipeline": "needs torchvision and cosmos_guardrail, which the tests do without",
    "CosmosTextToWorldPipeline": "draws with EDMEulerScheduler, whose scaling by the noise level is not trained",
    "IFPipeline": "draws without a VAE",
    "LDMTextToImagePipeline": "its text encoder is a class of its own module",
    "MotifVideoPipeline": "its text encoder, T5Gemma 2, is not built by the tests",
    "PRXPixelPipeline": "draws without a VAE",
    "StableDiffusionSAGPipeline": "is measured and trained; its preview reads attention that guidance alone computes",
    "VersatileDiffusionTextToImagePipeline": "its denoiser is a class of its own module",
}
"""Classes that are made to draw from a text and that this test does not train, and why."""
SHOWN = (
    "AllegroPipeline", "AmusedPipeline", "AnyFlowFARPipeline", "AnyFlowPipeline", "Cosmos3OmniPipeline",
    "DreamLiteMobilePipeline", "GlmImagePipeline", "HeliosPipeline", "HeliosPyramidPipeline",
    "LTXI2VLongMultiPromptPipeline", "LatentConsistencyModelPipeline", "OmniGenPipeline", "SanaSprintPipeline",
    "StableCascadePriorPipeline", "StableDiffusionGLIGENPipeline", "StableDiffusionGLIGENTextImagePipeline",
    "StableDiffusionLDM3DPipeline", "StableDiffusionParadigmsPipeline", "StableDiffusionPix2PixZeroPipeline",
    "TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline", "UniDiffuserPipeline", "WanVACEPipeline",
    "WuerstchenPriorPipeline", "ZImageOmniPipeline",
)  # fmt: skip
"""Others, which their class refuses."""
SOME = random.Random(7).sample(TRAINED, 10)  # in the slow tier


def test_every_class_that_draws_from_text_is_trained_or_has_a_reason() -> None:
    """A new version of diffusers brings classes: they are added to one of the two lists."""
    kinds = list_pipelines()
    open_ = {name for name, kind in kinds.items() if find_cause(kind, tuple(list_arguments(kind)), "", {}) is None}
    assert open_ - set(PIPELINES) - set(MORE) - set(TRAINED) == set(NOT_TRAINED)
    assert not set(TRAINED) & set(NOT_TRAINED) and not set(SHOWN) & open_ and set(SHOWN) <= kinds.keys()
    assert len(open_ & (set(PIPELINES) | set(MORE) | set(TRAINED))) >= 60


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SOME else pytest.mark.nightly) for n in TRAINED]
)
def test_a_class_that_the_rule_builds_is_trained_and_draws(
    name: str, tmp_path: Path, train: Callable[..., Finished]
) -> None:
    """The scheduler is the published one. Those of videos draw one frame."""
    build_published(find_model(name), name).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red bird --w 64 --h 64 --s 3 --l 2.5 --n blurred\n")
    words = ("--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2")
    done = train(arguments(tmp_path / "model", tmp_path, *words), script=SCRIPT)
    assert done.status == 0, done.stderr
    assert "failed, training continues" not in done.stderr, done.stderr
    trained = weights(tmp_path / "out" / "mine.safetensors")
    assert trained and all(tensor.isfinite().all() for tensor in trained.values())
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 1
