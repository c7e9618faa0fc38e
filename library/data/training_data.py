"""What a run trains on: pictures that are described, a class of the user's own, or prompts alone."""

from library.data.batches.own_dataset import OwnDataset
from library.data.batches.planned import PlannedBatches
from library.data.caching.stores import NO_LATENTS, NO_TEXTS, LatentStore, TextStore
from library.data.concepts.prompt_pairs import PromptPairs
from library.data.plan.data_plan import DataPlan

TrainingData = DataPlan | OwnDataset | PromptPairs
"""What is known and said of the data before any of it is drawn."""

TrainingBatches = PlannedBatches | OwnDataset | PromptPairs
"""What draws them."""


def open_batches(data: TrainingData, latents: LatentStore = NO_LATENTS, texts: TextStore = NO_TEXTS) -> TrainingBatches:
    """The batches of the data with what is cached of them; data without described pictures draws its own."""
    return PlannedBatches(data, latents, texts) if isinstance(data, DataPlan) else data
