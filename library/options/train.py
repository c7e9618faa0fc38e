"""The options that all training scripts share, in groups."""

from dataclasses import dataclass

from library.options.base import Options, group
from library.options.caching import CachingOptions
from library.options.config_file import ConfigFileOptions
from library.options.dataset import DatasetOptions
from library.options.machine.compiling import CompileOptions
from library.options.machine.distributed import DistributedOptions
from library.options.machine.fit import FitOptions
from library.options.machine.kernels import KernelOptions
from library.options.machine.memory import MemoryOptions, PrecisionOptions
from library.options.model import ModelOptions
from library.options.output.console import ConsoleOptions
from library.options.output.preview import PreviewOptions
from library.options.output.reports import ReportOptions
from library.options.output.saving import HubOptions, MetadataOptions, SavingOptions, StateOptions
from library.options.output.trackers import TrackerOptions
from library.options.training.averaging import AveragingOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.guidance import GuidanceOptions
from library.options.training.loss import LossOptions
from library.options.training.network import NetworkOptions
from library.options.training.noise import NoiseOptions
from library.options.training.optimizer import OptimizerOptions, ScheduleOptions
from library.options.training.pairs import PairOptions
from library.options.training.run import DiagnosticOptions, RunOptions
from library.options.training.sweep import SweepOptions
from library.options.training.validation import ValidationOptions


@dataclass(frozen=True)
class TrainOptions(Options):
    """The options of a run. Each field is a group of flags: --resolution is `options.dataset.resolution`."""

    console: ConsoleOptions = group(ConsoleOptions)
    config_file: ConfigFileOptions = group(ConfigFileOptions)
    model: ModelOptions = group(ModelOptions)
    dataset: DatasetOptions = group(DatasetOptions)
    caching: CachingOptions = group(CachingOptions)
    network: NetworkOptions = group(NetworkOptions)
    optimizer: OptimizerOptions = group(OptimizerOptions)
    schedule: ScheduleOptions = group(ScheduleOptions)
    averaging: AveragingOptions = group(AveragingOptions)
    sweep: SweepOptions = group(SweepOptions)
    run: RunOptions = group(RunOptions)
    precision: PrecisionOptions = group(PrecisionOptions)
    kernels: KernelOptions = group(KernelOptions)
    memory: MemoryOptions = group(MemoryOptions)
    compiling: CompileOptions = group(CompileOptions)
    fit: FitOptions = group(FitOptions)
    noise: NoiseOptions = group(NoiseOptions)
    loss: LossOptions = group(LossOptions)
    guidance: GuidanceOptions = group(GuidanceOptions)
    pairs: PairOptions = group(PairOptions)
    saving: SavingOptions = group(SavingOptions)
    state: StateOptions = group(StateOptions)
    metadata: MetadataOptions = group(MetadataOptions)
    hub: HubOptions = group(HubOptions)
    trackers: TrackerOptions = group(TrackerOptions)
    reports: ReportOptions = group(ReportOptions)
    preview: PreviewOptions = group(PreviewOptions)
    validation: ValidationOptions = group(ValidationOptions)
    distributed: DistributedOptions = group(DistributedOptions)
    diagnostics: DiagnosticOptions = group(DiagnosticOptions)

    @property
    def trains_text_encoders(self) -> bool:
        """Return True if the text encoders get adapters and their learning rate is not 0."""
        rates = self.network.text_encoder_lr or [self.optimizer.learning_rate]
        return not self.network.network_train_unet_only and any(rates)

    @property
    def concepts(self) -> ConceptOptions | None:
        """The options of prompt training (LECO); None if the run trains on images."""
        return None
