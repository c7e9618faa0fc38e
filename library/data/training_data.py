"""The data of a run: described images, a user's own class, or prompts alone."""

from library.data.batches.own_dataset import OwnDataset
from library.data.batches.planned import PlannedBatches
from library.data.caching.stores import NO_LATENTS, NO_TEXTS, LatentStore, TextStore
from library.data.concepts.prompt_pairs import PromptPairs
from library.data.plan.data_plan import DataPlan

TrainingData = DataPlan | OwnDataset | PromptPairs
"""The facts of the data before any of it is drawn."""

TrainingBatches = PlannedBatches | OwnDataset | PromptPairs
"""The batches drawn from the data."""


def open_batches(data: TrainingData, latents: LatentStore = NO_LATENTS, texts: TextStore = NO_TEXTS) -> TrainingBatches:
    """Build the batches of the data with its caches; data without described images draws its own."""
    return PlannedBatches(data, latents, texts) if isinstance(data, DataPlan) else data
