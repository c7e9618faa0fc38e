"""Every option that the training scripts share, in groups."""

from dataclasses import dataclass

from library.options.averaging import AveragingOptions
from library.options.base import Options, group
from library.options.caching import CachingOptions
from library.options.compiling import CompileOptions
from library.options.config_file import ConfigFileOptions
from library.options.console import ConsoleOptions
from library.options.dataset import DatasetOptions
from library.options.distributed import DistributedOptions
from library.options.fit import FitOptions
from library.options.graphs import GraphOptions
from library.options.kernels import KernelOptions
from library.options.loss import LossOptions
from library.options.memory import MemoryOptions, PrecisionOptions
from library.options.model import ModelOptions
from library.options.network import NetworkOptions
from library.options.noise import NoiseOptions
from library.options.optimizer import OptimizerOptions, ScheduleOptions
from library.options.preview import PreviewOptions
from library.options.reports import ReportOptions
from library.options.run import FaultOptions, RunOptions
from library.options.saving import HubOptions, MetadataOptions, SavingOptions, StateOptions
from library.options.sweep import SweepOptions
from library.options.trackers import TrackerOptions
from library.options.validation import ValidationOptions


@dataclass(frozen=True)
class TrainOptions(Options):
    """What the user asked for: one field per group of flags, `options.dataset.resolution` is --resolution."""

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
    graphs: GraphOptions = group(GraphOptions)
    memory: MemoryOptions = group(MemoryOptions)
    compiling: CompileOptions = group(CompileOptions)
    fit: FitOptions = group(FitOptions)
    noise: NoiseOptions = group(NoiseOptions)
    loss: LossOptions = group(LossOptions)
    saving: SavingOptions = group(SavingOptions)
    state: StateOptions = group(StateOptions)
    metadata: MetadataOptions = group(MetadataOptions)
    hub: HubOptions = group(HubOptions)
    trackers: TrackerOptions = group(TrackerOptions)
    reports: ReportOptions = group(ReportOptions)
    preview: PreviewOptions = group(PreviewOptions)
    validation: ValidationOptions = group(ValidationOptions)
    distributed: DistributedOptions = group(DistributedOptions)
    faults: FaultOptions = group(FaultOptions)
