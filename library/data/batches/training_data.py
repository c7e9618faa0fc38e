"""What a run trains on: pictures that are described, or a class of the user's own."""

from library.data.batches.own_dataset import OwnDataset
from library.data.batches.planned import PlannedBatches
from library.data.caching.stores import NO_LATENTS, NO_TEXTS, LatentStore, TextStore
from library.data.description.plan import DataPlan

TrainingData = DataPlan | OwnDataset
"""What is known and said of the data before any of it is drawn."""

TrainingBatches = PlannedBatches | OwnDataset
"""What draws them."""


def open_batches(data: TrainingData, latents: LatentStore = NO_LATENTS, texts: TextStore = NO_TEXTS) -> TrainingBatches:
    """The batches of the data with what is cached of them; a class of the user's own draws its own."""
    return data if isinstance(data, OwnDataset) else PlannedBatches(data, latents, texts)
